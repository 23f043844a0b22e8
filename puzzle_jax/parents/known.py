"""Architectures of published parents by hub id, so that a job can be planned without any of their files.

The values are those of each model's config.json and go through the same reader (`families`). No JAX.
"""

from pathlib import Path
from typing import Any

from puzzle_jax.arch import Architecture
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import families, huggingface, open_parent
from puzzle_jax.weights import read_json

_LLAMA_31 = {
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
  "tie_word_embeddings": False,
}


def _llama_31(hidden_size: int, intermediate_size: int, heads: int, layers: int) -> dict[str, Any]:
  sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
  return _LLAMA_31 | sizes | {"num_attention_heads": heads, "num_hidden_layers": layers}


_8B, _70B = _llama_31(4096, 14_336, 32, 32), _llama_31(8192, 28_672, 64, 80)
CONFIGS: dict[str, dict[str, Any]] = {
  "meta-llama/Llama-3.1-8B": _8B,
  "meta-llama/Llama-3.1-8B-Instruct": _8B,
  "meta-llama/Llama-3.1-70B": _70B,
  "meta-llama/Llama-3.1-70B-Instruct": _70B,
  "meta-llama/Llama-3.3-70B-Instruct": _70B,
}


def architecture_of(source: str) -> Architecture:
  """The architecture of a parent; nothing is downloaded and no weights need be there.

  Args:
    source: as for `parents.open_parent`; of a directory, config.json is enough.

  Raises:
    PuzzleError: a hub id that is not known here, or what `open_parent` refuses.
  """
  file = Path(source) / "config.json"
  if source in CONFIGS:
    return families.read_config(CONFIGS[source])
  if file.is_file():
    return families.read_config(read_json(file))
  if not Path(source).exists() and huggingface.is_hub_id(source):
    raise PuzzleError(
      f"parent {source!r}: its architecture is not known here; give a directory with its config.json, or one of "
      f"{', '.join(CONFIGS)}"
    )
  return open_parent(source).architecture
