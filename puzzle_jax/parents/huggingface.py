"""Parents in Hugging Face's format: a directory with config.json and safetensors, or a repository of the hub."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from puzzle_jax.arch import Architecture
from puzzle_jax.checkpoint import TOKENIZER_FILES
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import families
from puzzle_jax.weights import INDEX, SafetensorsFolder, read_json

# Weights as safetensors, what describes them, and the tokenizer; never code or pickles.
_FILES = ("config.json", "README.md", "model*.safetensors", INDEX, *TOKENIZER_FILES)
_BUFFER = "rotary_emb.inv_freq"  # derived from the configuration; older releases of Transformers stored it


def is_hub_id(source: str) -> bool:
  """Whether `source` looks like `owner/name`."""
  return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None


def download(repository: str) -> Path:
  """The local snapshot of a hub repository, fetched where it is not yet there.

  Raises:
    PuzzleError: no network, no such repository, or one whose terms have to be accepted first.
  """
  try:
    return Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(_FILES)))
  except GatedRepoError as e:
    raise PuzzleError(
      f"{repository} is gated: accept its terms on its page, then log in with `hf auth login` or set HF_TOKEN"
    ) from e
  except RepositoryNotFoundError as e:
    raise PuzzleError(f"{repository} is neither a directory here nor a hub repository that you can read") from e
  except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as e:
    reason = " ".join(str(e).split())[:120]
    raise PuzzleError(
      f"{repository} is no directory here and could not be fetched from the hub ({reason}); check the network and the "
      "path, or copy the model's directory here"
    ) from e


def read_license(folder: Path) -> str | None:
  """The licence that a model card's front matter names."""
  try:
    return huggingface_hub.ModelCard.load(folder / "README.md").data.get("license")
  except (OSError, ValueError):  # no card, or none that can be read: nothing is known
    return None


def open_folder(folder: Path) -> tuple[Architecture, SafetensorsFolder]:
  """Architecture and weights of a directory.

  Raises:
    PuzzleError: not a whole model of a supported family.
  """
  config: Mapping[str, Any] = read_json(folder / "config.json")
  architecture, weights = families.read_config(config), SafetensorsFolder(folder)
  for name in [n for n in weights.shapes if n.endswith(_BUFFER)]:
    weights.discard(name)
  head, embed = "lm_head.weight", "model.embed_tokens.weight"
  if architecture.config.tie_embeddings and {head, embed} <= weights.shapes.keys():
    if not np.array_equal(weights.read(head), weights.read(embed)):
      raise PuzzleError(
        f"{folder}: {head} differs from {embed}, though config.json says tie_word_embeddings=true; "
        "set it to false if the two are meant to differ"
      )
    weights.discard(head)
  return architecture, weights
