"""Exports a child as a Hugging Face directory in the nemotron-nas dialect, which inference engines read.

The directory loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`; the modelling files
travel with it. Needs neither JAX nor PyTorch.
"""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np

from puzzle_jax import checkpoint, weights
from puzzle_jax.arch import (
  GQA,
  Architecture,
  BlockSpec,
  LinearAttention,
  LinearFFN,
  NoAttention,
  NoFFN,
  Subblock,
  SwiGLU,
  Tensor,
)
from puzzle_jax.checkpoint import Checkpoint
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents.families import FFN_MULTIPLE
from puzzle_jax.tokenizer import Tokenizer

_MODELLING_FILES = Path(__file__).parent / "hf"
_AUTO_MAP = {
  "AutoConfig": "configuration_puzzle.PuzzleConfig",
  "AutoModelForCausalLM": "modeling_puzzle.DeciLMForCausalLM",
}
_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


def export_hf(
  child: Path,
  out: Path,
  *,
  dtype: str = "bfloat16",
  card: str | None = None,
  pad_ffn: bool = True,
) -> None:
  """Writes the child of a directory that `checkpoint.write_checkpoint` made.

  Args:
    child: the child's directory.
    out: a new or empty directory.
    dtype: of the exported weights, "bfloat16" or "float32".
    card: what the model card says beside the architecture (how it was made, how good it is), in Markdown.
    pad_ffn: zero-pad FFNs to a width that every reader understands, the next multiple of 256 (the outputs stay equal).
      False keeps exact widths, which vLLM and the travelling modelling files read, others do not.

  Raises:
    PuzzleError: another dtype; a child that is not whole, holds NaNs or has a shape that no reader takes; an `out` that
      is not empty.
  """
  if dtype not in _DTYPES:
    raise PuzzleError(f"export dtype {dtype!r} is not supported; choose one of {', '.join(_DTYPES)}")
  if out.exists() and any(out.iterdir()):
    raise PuzzleError(f"{out} is not empty; name a new directory for the export")
  model, tokenizer = checkpoint.read_checkpoint(child), Tokenizer.from_folder(child)
  c = model.architecture.config
  if c.hidden_size % c.num_heads:
    raise PuzzleError(
      f"{child}: Transformers' LlamaConfig, which readers build on, refuses {c.num_heads} heads with hidden_size="
      f"{c.hidden_size}, which they do not divide; this child cannot be exported"
    )
  exported = exported_architecture(model.architecture, pad_ffn=pad_ffn)
  out.mkdir(parents=True, exist_ok=True)
  head = model.head(_DTYPES[dtype])
  weights.write_tensors(out, weights.named_tensors(exported, head, _layers(model, exported, _DTYPES[dtype])))
  weights.write_json(out / "config.json", hf_config(exported, tokenizer=tokenizer, dtype=dtype))
  checkpoint.write_tokenizer(out, child)
  weights.write_json(out / "generation_config.json", _generation_config(child, tokenizer))
  for file in _MODELLING_FILES.glob("*.py"):
    shutil.copyfile(file, out / file.name)
  (out / "README.md").write_text(_model_card(model, card, dtype), encoding="utf-8")


def exported_architecture(architecture: Architecture, *, pad_ffn: bool) -> Architecture:
  """The architecture as the dialect can say it, with equal outputs: widths padded, biases everywhere or nowhere."""
  bias = architecture.config.qkv_bias or architecture.config.o_bias
  config = dataclasses.replace(architecture.config, qkv_bias=bias, o_bias=bias)
  if not pad_ffn:
    return dataclasses.replace(architecture, config=config)

  def padded(ffn: Subblock) -> Subblock:
    return SwiGLU(-(-ffn.width // FFN_MULTIPLE) * FFN_MULTIPLE) if isinstance(ffn, SwiGLU) else ffn

  return Architecture(config, tuple(BlockSpec(b.attention, padded(b.ffn)) for b in architecture.blocks))


def _layers(model: Checkpoint, exported: Architecture, dtype: type) -> Iterator[weights.Layer]:
  """The layers one by one, with the zeros that `exported` has beyond the child's own architecture."""

  def fitted(array: np.ndarray | None, tensor: Tensor) -> np.ndarray:
    full: np.ndarray = np.zeros(tensor.shape, dtype)
    if array is not None:
      full[tuple(slice(n) for n in array.shape)] = array
    return full

  for i, block in enumerate(exported.blocks):
    layer = model.layer(i)
    yield {
      subblock.slot: {
        name: fitted(layer[subblock.slot].get(name), tensor)
        for name, tensor in subblock.tensors(exported.config).items()
      }
      for subblock in block.subblocks
    }


def hf_config(architecture: Architecture, *, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
  """config.json of an architecture. The rotary keys are the older ones, which old and new readers know."""
  c = architecture.config
  kv_heads = [b.attention.kv_heads for b in architecture.blocks if isinstance(b.attention, GQA)]
  widths = [b.ffn.width for b in architecture.blocks if isinstance(b.ffn, SwiGLU)]
  rope: dict[str, Any] = {"rope_theta": c.rope_theta}
  if c.rope_scaling is not None:
    rope["rope_scaling"] = {
      "rope_type": "llama3",
      "factor": c.rope_scaling.factor,
      "low_freq_factor": c.rope_scaling.low_freq_factor,
      "high_freq_factor": c.rope_scaling.high_freq_factor,
      "original_max_position_embeddings": c.rope_scaling.original_max_context,
    }
  return {
    "architectures": ["DeciLMForCausalLM"],
    "model_type": "nemotron-nas",
    "auto_map": _AUTO_MAP,
    "block_configs": [block_config(block, architecture) for block in architecture.blocks],
    "vocab_size": c.vocab_size,
    "hidden_size": c.hidden_size,
    "num_hidden_layers": architecture.num_layers,
    "num_attention_heads": c.num_heads,
    "num_key_value_heads": max(kv_heads, default=c.num_heads),
    "intermediate_size": max(widths, default=FFN_MULTIPLE),
    "head_dim": c.head_dim,
    "hidden_act": "silu",
    "max_position_embeddings": c.max_context,
    "rms_norm_eps": c.norm_eps,
    **rope,
    "attention_bias": c.qkv_bias,
    "mlp_bias": False,
    "tie_word_embeddings": c.tie_embeddings,
    "bos_token_id": tokenizer.bos_id,
    "eos_token_id": tokenizer.eos_id,
    "torch_dtype": dtype,
  }


def block_config(block: BlockSpec, architecture: Architecture) -> dict[str, Any]:
  """A layer's entry of `block_configs`."""
  c = architecture.config
  attention = {
    "n_heads_in_group": c.num_heads // block.attention.kv_heads if isinstance(block.attention, GQA) else None,
    "no_op": isinstance(block.attention, NoAttention),
    "replace_with_linear": isinstance(block.attention, LinearAttention),
    "sparsify": None,
    "window_length": None,
    "num_sink_tokens": None,
    "unshifted_sink": False,
    "use_prefill_window_in_sink_attention": False,
  }
  width: dict[str, Any] = {"ffn_mult": None}
  if isinstance(block.ffn, SwiGLU):
    if block.ffn.width % FFN_MULTIPLE == 0:
      width = {"ffn_mult": 3 * block.ffn.width / (2 * c.hidden_size)}
    else:  # an exact width is taken only where the key `ffn_mult` is absent
      width = {"intermediate_size": block.ffn.width}
  ffn = {
    "no_op": isinstance(block.ffn, NoFFN),
    "replace_with_linear": isinstance(block.ffn, LinearFFN),
    "sparsify": None,
  }
  return {"attention": attention, "ffn": width | ffn}


def _generation_config(child: Path, tokenizer: Tokenizer) -> dict[str, Any]:
  """The parent's defaults of generation where it has any, and the tokens that begin, end and pad."""
  path = child / "generation_config.json"
  defaults: Mapping[str, Any] = weights.read_json(path) if path.is_file() else {}
  pad = tokenizer.special_tokens.get("pad_token")
  return dict(defaults) | {
    "bos_token_id": tokenizer.bos_id,
    "eos_token_id": sorted(tokenizer.stop_ids),
    "pad_token_id": tokenizer.eos_id if pad is None else tokenizer.backend.token_to_id(pad),
  }


def _model_card(model: Checkpoint, text: str | None, dtype: str) -> str:
  architecture, origin = model.architecture, model.metadata.get("parent")
  front = huggingface_hub.ModelCardData(
    library_name="transformers",
    pipeline_tag="text-generation",
    license=model.metadata.get("license"),
    tags=["puzzle", "nemotron-nas"],
  )
  intro = f"{text}\n\n" if text else ""
  rows = "\n".join(f"| {i} | {b.attention.name} | {b.ffn.name} |" for i, b in enumerate(architecture.blocks))
  return f"""---
{front.to_yaml()}
---

# A Puzzle child{f" of {origin}" if origin else ""}

A language model of {architecture.num_params():,} parameters whose layers differ, derived from its parent by
distillation-based architecture search (Puzzle, arXiv 2411.19146). The weights are stored in {dtype}.

{intro}```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
```

`gqaN`: attention with N key/value heads; `wN`: a SwiGLU FFN of width N; `linear`: one matrix; `none`: nothing.

| layer | attention | FFN |
|---|---|---|
{rows}
"""
