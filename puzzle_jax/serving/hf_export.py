"""Exports a child as a Hugging Face directory in the nemotron-nas dialect, which inference engines read.

The directory loads with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`; the modelling files
travel with it. Needs neither JAX nor, unless activations are calibrated, PyTorch.
"""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from puzzle_jax import checkpoint, store, weights
from puzzle_jax.arch import GQA, Architecture, BlockSpec, LinearAttention, LinearFFN, NoAttention, NoFFN, SwiGLU
from puzzle_jax.checkpoint import Checkpoint
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import open_model
from puzzle_jax.parents.families import FFN_MULTIPLE
from puzzle_jax.serving import engines, fp8
from puzzle_jax.serving.model_card import model_card
from puzzle_jax.serving.padding import padded_architecture, padded_tensors
from puzzle_jax.tokenizer import Tokenizer

_MODELLING_FILES = Path(__file__).parent / "hf"
_AUTO_MAP = {
  "AutoConfig": "configuration_puzzle.PuzzleConfig",
  "AutoModelForCausalLM": "modeling_puzzle.DeciLMForCausalLM",
}
_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
DTYPES = (*_DTYPES, *fp8.ALGORITHMS)


def export_hf(
  child: Path,
  out: Path,
  *,
  dtype: str = "bfloat16",
  engine: str = "",
  workdir: Path | None = None,
  figures: str = "",
) -> None:
  """Writes the child of a directory that `parents.open_model` takes.

  FFNs are padded with zeros to a width that the engine reads; the outputs stay equal.

  Args:
    child: the child's directory.
    out: a new or empty directory; it is there when it is whole.
    dtype: of the exported weights, one of `DTYPES`; the 8-bit ones are described in `fp8`.
    engine: of `engines.ENGINES`, which shall run it. Empty: the modelling files that travel with it, and widths that
      every reader of the dialect understands, multiples of 256.
    workdir: of the run that the child is of, whose stored activations `float8_tensor` needs.
    figures: what was measured of the child, Markdown, for the model card.

  Raises:
    PuzzleError: another dtype; a child that is not whole, holds NaNs or has a shape that no reader takes; blocks that
      the engine does not run; an `out` that is not empty.
  """
  if dtype not in DTYPES:
    raise PuzzleError(f"export dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
  if out.is_file() or (out.is_dir() and any(out.iterdir())):
    raise PuzzleError(f"{out} is not empty; name a new directory for the export")
  model = open_model(child)
  architecture = model.architecture
  c = architecture.config
  if c.hidden_size % c.num_heads:
    raise PuzzleError(
      f"{child}: Transformers' LlamaConfig, which readers build on, refuses {c.num_heads} heads with hidden_size="
      f"{c.hidden_size}, which they do not divide; this child cannot be exported"
    )
  exported = exported_architecture(architecture, dtype=dtype, engine=engine)
  engines.check_export(engine or "transformers", exported, format="hf", dtype=dtype)
  model.validate()
  tokenizer = Tokenizer.from_folder(child)
  config = hf_config(exported, tokenizer=tokenizer, dtype=dtype)
  if dtype in fp8.ALGORITHMS:
    fp8.check_shapes(exported)
    scales = _input_scales(model, exported, config, workdir) if dtype == "float8_tensor" else None
    tensors = fp8.quantised(padded_tensors(model, exported, dtype=np.float32), input_scales=scales)
    config["quantization_config"] = fp8.quantization_config(dtype)
  else:
    tensors = padded_tensors(model, exported, dtype=_DTYPES[dtype])
  card = model_card(architecture, model.metadata, exported=exported, dtype=dtype, figures=figures)
  with store.replacing(out) as aside:
    aside.mkdir()
    weights.write_tensors(aside, tensors)
    weights.write_json(aside / "config.json", config)
    if dtype in fp8.ALGORITHMS:
      weights.write_json(aside / "hf_quant_config.json", fp8.legacy_config(dtype))
    checkpoint.write_tokenizer(aside, child)
    weights.write_json(aside / "generation_config.json", _generation_config(child, tokenizer))
    write_modelling_files(aside)
    (aside / "README.md").write_text(card, encoding="utf-8")


def write_modelling_files(folder: Path) -> None:
  """What `auto_map` of config.json names."""
  for file in _MODELLING_FILES.glob("*.py"):
    shutil.copyfile(file, folder / file.name)


def exported_architecture(architecture: Architecture, *, dtype: str, engine: str) -> Architecture:
  """The architecture as `export_hf` writes it."""
  reader = engines.by_name(engine) if engine else engines.Engine(title="any reader")
  multiple = math.lcm(reader.ffn_multiple, fp8.MULTIPLE) if dtype in fp8.ALGORITHMS else reader.ffn_multiple
  return padded_architecture(architecture, ffn_multiple=multiple, untie=not reader.tied_embeddings)


def _input_scales(
  model: Checkpoint, exported: Architecture, config: dict[str, Any], workdir: Path | None
) -> dict[str, float]:
  if workdir is None:
    raise PuzzleError(
      "float8_tensor takes the scales of activations from those that a run has stored: give the run's work directory "
      "as the child, or export as float8_channel, whose scales are taken as tokens come"
    )
  try:
    from puzzle_jax.serving import calibration  # PyTorch: an extra
  except ImportError as e:
    raise PuzzleError(f"float8_tensor needs {e.name}: run `pip install puzzle_jax[export]`") from e
  return calibration.input_scales(model, exported, config, workdir=workdir)


def hf_config(architecture: Architecture, *, tokenizer: Tokenizer | None, dtype: str) -> dict[str, Any]:
  """config.json of an architecture; without a tokenizer, no token begins or ends a text.

  The rotary keys are the older ones, which old and new readers know.
  """
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
    "bos_token_id": tokenizer.bos_id if tokenizer else None,
    "eos_token_id": tokenizer.eos_id if tokenizer else None,
    "torch_dtype": "bfloat16" if dtype in fp8.ALGORITHMS else dtype,
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
