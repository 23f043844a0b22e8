"""Architectures of well-known parents, for costs: these need shapes, not weights (imports no JAX)."""

import json
from pathlib import Path
from typing import Any

from puzzle_jax.arch import Architecture
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents.families import read_config

_LLAMA_31: dict[str, Any] = {
  "model_type": "llama",
  "vocab_size": 128_256,
  "num_key_value_heads": 8,
  "max_position_embeddings": 131_072,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500_000.0,
  "rope_scaling": {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
  },
  "hidden_act": "silu",
  "tie_word_embeddings": False,
}
# The numbers of their config.json, which is all that a name stands for.
KNOWN: dict[str, dict[str, Any]] = {
  "smollm2-135m": {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
  },
  "llama-3.1-8b": _LLAMA_31
  | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32},
  "llama-3.1-70b": _LLAMA_31
  | {"hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def read_shapes(source: str) -> Architecture:
  """The architecture of a name of `KNOWN`, or of a config.json file.

  Raises:
    PuzzleError: neither, or a model of a kind that is not supported.
  """
  if source in KNOWN:
    return read_config(KNOWN[source])
  path = Path(source)
  if not path.is_file():
    raise PuzzleError(f"{source} is neither a config.json nor one of {', '.join(KNOWN)}")
  try:
    config = json.loads(path.read_text())
  except (UnicodeDecodeError, json.JSONDecodeError) as e:
    raise PuzzleError(f"{source} is not JSON ({e}); name a config.json") from e
  if not isinstance(config, dict):
    raise PuzzleError(f"{source} holds no JSON object; name a config.json")
  return read_config(config)
