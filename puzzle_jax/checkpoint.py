"""The child's directory, between JAX and serving: `architecture.json`, safetensors and the tokenizer's files."""

import dataclasses
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from puzzle_jax.arch import Architecture
from puzzle_jax.errors import PuzzleError
from puzzle_jax.weights import (
  Layer,
  SafetensorsFolder,
  StoredModel,
  named_tensors,
  read_json,
  write_json,
  write_tensors,
)

if TYPE_CHECKING:
  from puzzle_jax.tokenizer import Tokenizer

ARCHITECTURE = "architecture.json"
TOKENIZER_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "chat_template.jinja",
  "generation_config.json",
)


def write_tokenizer(folder: Path, tokenizer: "Path | Tokenizer") -> None:
  """Copies the tokenizer's files of a folder, or saves a tokenizer with the tokens that end a generation."""
  if isinstance(tokenizer, Path):
    for name in TOKENIZER_FILES:
      if (tokenizer / name).is_file():
        shutil.copyfile(tokenizer / name, folder / name)
  else:
    tokenizer.save(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": sorted(tokenizer.stop_ids)})


def write_checkpoint(
  folder: Path,
  architecture: Architecture,
  head: Mapping[str, np.ndarray],
  layers: Iterable[Layer],
  *,
  tokenizer: "Path | Tokenizer",
  metadata: Mapping[str, Any] | None = None,
) -> None:
  """Writes a child into an existing folder; whoever calls makes that atomic.

  Args:
    folder: where to.
    architecture: of the child.
    head: arrays by the names of `Architecture.head_tensors`; dtypes are kept.
    layers: one `Layer` after the other; an iterator is read as it is written.
    tokenizer: the parent's, or a folder whose tokenizer files are copied as they are.
    metadata: JSON values to keep beside the architecture, such as the parent's name and licence.

  Raises:
    PuzzleError: arrays that do not fit the architecture.
  """
  write_tensors(folder, named_tensors(architecture, head, layers))
  write_tokenizer(folder, tokenizer)
  write_json(folder / ARCHITECTURE, architecture.to_json() | {"metadata": dict(metadata or {})})


@dataclasses.dataclass(frozen=True)
class Checkpoint(StoredModel):
  """A child read from its directory."""

  metadata: Mapping[str, Any]


def open_checkpoint(folder: Path) -> Checkpoint:
  """The child of a directory that `write_checkpoint` wrote; names and shapes are checked, values are not yet read.

  Raises:
    PuzzleError: no such child, or tensors that do not fit its architecture.
  """
  described = read_json(folder / ARCHITECTURE)
  architecture = Architecture.from_json(described)
  metadata = described.get("metadata", {})
  if not isinstance(metadata, dict):
    raise PuzzleError(f"{folder / ARCHITECTURE}: metadata is {metadata!r}, not an object; copy the directory again")
  return Checkpoint(architecture, SafetensorsFolder(folder), str(folder), metadata=metadata)


def read_checkpoint(folder: Path) -> Checkpoint:
  """`open_checkpoint`, with every tensor's values checked too."""
  checkpoint = open_checkpoint(folder)
  checkpoint.validate()
  return checkpoint
