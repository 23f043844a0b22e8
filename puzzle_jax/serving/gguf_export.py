"""Exports a child as a GGUF file of llama.cpp's `deci` architecture: head counts and FFN widths by layer.

What goes where follows llama.cpp's own converter and quantiser (conversion/deci.py, src/models/deci.cpp,
src/llama-quant.cpp): norms and biases are F32, matrices of the type asked for; beside 4-bit matrices the LM head, or
the embedding that is tied to it, is Q8_0. (There llama.cpp takes Q6_K where rows are multiples of 256, which the gguf
package cannot write.) A matrix whose rows are no whole blocks of the type is F16. Rows of W_q and W_k are interleaved,
and Llama-3's rotary scaling is a tensor of divisors.

A matrix that was Q4_1 in the parent and has not been touched comes out with the same bits: the quantiser takes each
block's least and largest value, and dequantised blocks have both on the old grid.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from puzzle_jax import store
from puzzle_jax.arch import GQA, Architecture, NoAttention, SwiGLU
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import gguf_layout, open_model
from puzzle_jax.parents.gguf import GGUFFile
from puzzle_jax.parents.gguf_layout import gguf_name
from puzzle_jax.serving import engines, gguf_tokenizer
from puzzle_jax.serving.gguf_tokenizer import Entry
from puzzle_jax.serving.padding import padded_architecture, padded_tensors
from puzzle_jax.weights import StoredModel

_FILE_TYPES = {
  "F16": gguf.LlamaFileType.MOSTLY_F16,
  "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
  "Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
  "Q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
}
TYPES = tuple(_FILE_TYPES)


def export_gguf(
  child: Path, out: Path, *, dtype: str = "F16", engine: str = "", parent: GGUFFile | None = None
) -> None:
  """Writes the child of a directory that `parents.open_model` takes.

  FFNs are padded with zeros to whole blocks of the quantised types; the outputs stay equal.

  Args:
    child: the child's directory.
    out: a new file.
    dtype: of the matrices, one of `TYPES`.
    engine: which shall run it; empty: llama.cpp.
    parent: the parent, where it is a GGUF file: the metadata of its tokenizer are copied. Without one they are made
      from the child's tokenizer.json.

  Raises:
    PuzzleError: another dtype; a child that is not whole, holds NaNs, or values that the type cannot hold; a tokenizer
      that llama.cpp does not know; blocks that the engine does not run; an `out` that exists.
  """
  if dtype not in TYPES:
    raise PuzzleError(f"GGUF type {dtype!r} is not supported; choose one of {', '.join(TYPES)}")
  if out.exists():
    raise PuzzleError(f"{out} exists; name a new file for the export")
  reader, model = engines.by_name(engine or "llama_cpp"), open_model(child)
  exported = padded_architecture(model.architecture, ffn_multiple=reader.ffn_multiple, untie=not reader.tied_embeddings)
  engines.check_export(engine or "llama_cpp", exported, format="gguf", dtype=dtype)
  model.validate()
  vocab_size = exported.config.vocab_size
  tokenizer = gguf_tokenizer.copied(parent, vocab_size) if parent else gguf_tokenizer.derived(child, vocab_size)
  types = {name: _type(name, shape, exported, dtype) for name, shape in _shapes(exported)}
  with store.replacing(out) as aside:
    writer = gguf.GGUFWriter(aside, "deci")
    try:
      for entry in [*_metadata(exported, model.metadata, dtype), *tokenizer]:
        writer.add_key_value(entry.key, entry.value, entry.kind, entry.item_kind)
      for name, shape in _shapes(exported):
        block, num_bytes = gguf.GGML_QUANT_SIZES[types[name]]
        size = int(np.prod(shape)) // block * num_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, types[name])
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.write_ti_data_to_file()
      for name, array in _tensors(model, exported):
        writer.write_tensor_data(_encoded(name, array, types[name]))
    finally:
      writer.close()


def _metadata(architecture: Architecture, origin: Mapping[str, Any], dtype: str) -> Iterator[Entry]:
  """What describes the model. A linear attention has query heads but no KV heads, a missing one has neither."""
  c, blocks = architecture.config, architecture.blocks
  yield Entry.of("general.type", "model")
  yield Entry.of("general.name", f"Puzzle child of {origin['parent']}" if origin.get("parent") else "Puzzle child")
  if origin.get("license"):
    yield Entry.of("general.license", origin["license"])
  yield Entry.of("general.file_type", int(_FILE_TYPES[dtype]))
  yield Entry.of("general.quantization_version", gguf.GGML_QUANT_VERSION)
  for key, value in {
    "vocab_size": c.vocab_size,
    "context_length": c.max_context,
    "embedding_length": c.hidden_size,
    "block_count": architecture.num_layers,
    "feed_forward_length": [b.ffn.width if isinstance(b.ffn, SwiGLU) else 0 for b in blocks],
    "attention.head_count": [0 if isinstance(b.attention, NoAttention) else c.num_heads for b in blocks],
    "attention.head_count_kv": [b.attention.kv_heads if isinstance(b.attention, GQA) else 0 for b in blocks],
    "attention.key_length": c.head_dim,
    "attention.value_length": c.head_dim,
    "attention.layer_norm_rms_epsilon": c.norm_eps,
    "rope.dimension_count": c.head_dim,
    "rope.freq_base": c.rope_theta,
  }.items():
    yield Entry.of(f"deci.{key}", value)


def _shapes(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
  """Name and shape of every tensor of the file, in the order in which they are written."""
  if architecture.config.rope_scaling is not None:
    yield gguf_layout.ROPE_DIVISORS, (architecture.config.head_dim // 2,)
  for name, shape in architecture.checkpoint_shapes().items():
    yield gguf_name(name), shape


def _tensors(model: StoredModel, exported: Architecture) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors in fp32, rotary rows in llama.cpp's order."""
  c = exported.config
  if c.rope_scaling is not None:
    yield (
      gguf_layout.ROPE_DIVISORS,
      gguf_layout.rope_divisors(c.rope_scaling, c.head_dim // 2, c.rope_theta).astype(np.float32),
    )
  for name, array in padded_tensors(model, exported, dtype=np.float32):
    if gguf_layout.is_rotary(name):
      array = gguf_layout.interleave(array, c.head_dim)
    yield gguf_name(name), array


def _type(name: str, shape: tuple[int, ...], architecture: Architecture, dtype: str) -> GGMLQuantizationType:
  if len(shape) == 1:
    return GGMLQuantizationType.F32
  head = "token_embd.weight" if architecture.config.tie_embeddings else "output.weight"
  wanted = GGMLQuantizationType["Q8_0" if name == head and dtype != "F16" else dtype]
  return wanted if shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def _encoded(name: str, array: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
  """The tensor in a file's type.

  Raises:
    PuzzleError: a value is too large for it (scales are of 16 bits too).
  """
  with np.errstate(over="ignore"):
    data = gguf.quants.quantize(np.ascontiguousarray(array), kind)
    if not np.isfinite(gguf.quants.dequantize(data, kind)).all():
      raise PuzzleError(
        f"tensor {name} holds values up to {np.abs(array).max():.3g}, too large for {kind.name}; export as hf instead"
      )
  return data
