"""Documents from the embedded text, local files or any tensorflow-datasets dataset; duplicates out; a held-out part.

Distillation trains on one part and scores, stopping decisions and evaluation use the other (paper sections 3 and 4).
The parts share no document: duplicates, white space and case aside, are dropped first. A document goes by the hash of
its text, so it stays in its part when others are added.
"""

import dataclasses
import difflib
import glob
import hashlib
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import tensorflow_datasets as tfds

from puzzle_jax import store
from puzzle_jax.data import builders, stdlib
from puzzle_jax.errors import PuzzleError

STDLIB = "stdlib"
_TFDS = "tfds:"
_READ_TOGETHER = 1024  # four times as fast as one by one


class SourceFile(NamedTuple):
  """A file's name and the SHA-256 of its bytes, in hex."""

  name: str
  sha256: str


@dataclasses.dataclass(frozen=True, eq=False)
class DocumentSource:
  """Documents, read when asked for.

  Attributes:
    name: what was asked for.
    digest: hex SHA-256 of the texts and of how they are split.
    train: documents to learn from.
    heldout: documents to measure on.
    files: what was read of the disk.
    forced: whether a part would be empty, had not one document been put there against its hash.
  """

  name: str
  digest: str
  train: Sequence[str]
  heldout: Sequence[str]
  files: tuple[SourceFile, ...] = ()
  forced: bool = False


def load_documents(
  source: str, *, data_dir: Path, text_field: str = "text", heldout_fraction: float = 0.1
) -> DocumentSource:
  """Prepares a source in `data_dir`, once, and splits it.

  Args:
    source: `stdlib`, the embedded text; a path or glob of .txt and .jsonl files, gzipped or not; or
      `tfds:NAME[:TEXT_FIELD]`, a dataset that tensorflow-datasets knows (needs a network the first time).
    data_dir: a folder of this run alone.
    text_field: where the text is in a JSON line or a dataset's example.
    heldout_fraction: expected share of the documents to hold out; at least one is.

  Raises:
    PuzzleError: nothing there, no such field, a dataset that cannot be had, or fewer than two documents.
  """
  if not 0 < heldout_fraction < 1:
    raise PuzzleError(f"heldout_fraction={heldout_fraction} must be between 0 and 1")
  files: tuple[SourceFile, ...] = ()
  if source == STDLIB:
    made_by = store.digest([platform.python_version(), store.file_digest(Path(stdlib.__file__))])
    rows = builders.read_prepared(builders.StandardLibraryText(data_dir=data_dir / made_by[:16]), quiet=True)
    text_field = "text"
  elif source.startswith(_TFDS):
    rows, text_field = _registered(source.removeprefix(_TFDS), data_dir, text_field)
  else:
    paths = find_files(source)
    files = tuple(SourceFile(path.name, store.file_digest(path)) for path in paths)
    made_from = store.digest([text_field, *files])
    builder = builders.TextFiles(data_dir=data_dir / made_from[:16], paths=paths, text_field=text_field)
    rows, text_field = builders.read_prepared(builder, quiet=True), "text"
  return split(source, rows, heldout_fraction=heldout_fraction, text_field=text_field, files=files)


def named(sources: str) -> tuple[str, ...]:
  """The sources of a list that is separated by commas."""
  return tuple(name.strip() for name in sources.split(","))


def of_files(source: str) -> bool:
  """Whether a source of `load_documents` names files."""
  return source != STDLIB and not source.startswith(_TFDS)


def find_files(pattern: str) -> list[Path]:
  """The text files that a path or glob names.

  Raises:
    PuzzleError: none, or files of another kind.
  """
  path = Path(pattern).expanduser()
  found = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
  files = [p for p in found if p.is_file()]
  if not files:
    hint = f"; {path} is a folder: say {path}/*.txt or {path}/*.jsonl" if path.is_dir() else ""
    raise PuzzleError(f"no file matches {pattern!r}{hint or '; check the path (data.source)'}")
  for file in files:
    if not file.name.endswith(builders.SUFFIXES):
      raise PuzzleError(f"{file} is none of {', '.join(builders.SUFFIXES)}; convert it, or narrow {pattern!r}")
  return files


def _registered(name: str, data_dir: Path, text_field: str) -> tuple[Sequence[dict[str, Any]], str]:
  """The examples of `NAME[:VERSION][:TEXT_FIELD]` and the text's field."""
  head, _, tail = name.rpartition(":")
  if head and not re.fullmatch(r"[\d.*]+", tail):
    name, text_field = head, tail
  try:
    builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    features = builder.info.features
    columns = [k for k, f in features.items() if isinstance(f, tfds.features.Text)]
    if text_field not in columns:
      raise PuzzleError(f"dataset {name!r} has no text in {text_field!r}; its text fields are {columns}: append one")
    return builders.read_prepared(builder, quiet=False), text_field
  except PuzzleError:
    raise
  except tfds.core.DatasetNotFoundError as e:
    near = difflib.get_close_matches(name.partition("/")[0], tfds.list_builders(with_community_datasets=False))
    raise PuzzleError(f"tensorflow-datasets has no dataset {name!r}; near: {near or 'none'}") from e
  except Exception as e:  # each dataset's code and network can raise what it likes
    raise PuzzleError(
      f"dataset {name!r} cannot be had ({type(e).__name__}: {str(e).strip()[:300]}). It needs a network the first time "
      f"and must not need TensorFlow; or prepare it elsewhere as array_record and copy it to {data_dir}"
    ) from e


class _Documents(Sequence[str]):
  """Some rows of a dataset, as text."""

  def __init__(self, rows: Sequence[dict[str, Any]], text_field: str, indices: np.ndarray):
    self._rows: Any = rows  # a data source: also has __getitems__
    self._text_field, self._indices = text_field, indices

  def __len__(self) -> int:
    return len(self._indices)

  @overload
  def __getitem__(self, index: int) -> str: ...
  @overload
  def __getitem__(self, index: slice) -> "_Documents": ...
  def __getitem__(self, index: int | slice) -> "str | _Documents":
    if isinstance(index, slice):
      return _Documents(self._rows, self._text_field, self._indices[index])
    return self._text(self._rows[int(self._indices[index])])

  def __iter__(self) -> Iterator[str]:
    for start in range(0, len(self), _READ_TOGETHER):
      yield from map(self._text, self._rows.__getitems__(self._indices[start : start + _READ_TOGETHER].tolist()))

  def _text(self, row: dict[str, Any]) -> str:
    return row[self._text_field].decode(errors="replace")


def key(text: str) -> int:
  """The hash by which documents are told apart, white space and case aside."""
  words = " ".join(text.casefold().split())
  return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=16).digest())


def is_heldout(key: int, fraction: float) -> bool:
  """Which part a document goes to, whatever other documents there are."""
  return key < fraction * 2**128


def split(
  name: str,
  rows: Sequence[dict[str, Any]],
  *,
  heldout_fraction: float,
  text_field: str = "text",
  files: tuple[SourceFile, ...] = (),
) -> DocumentSource:
  """The documents of a dataset without duplicates, in two parts."""
  every = _Documents(rows, text_field, np.arange(len(rows)))
  first: dict[int, tuple[int, bytes]] = {}  # by key: index and exact hash
  for index, text in enumerate(every):
    if text.strip():
      first.setdefault(key(text), (index, hashlib.sha256(text.encode()).digest()))
  if len(first) < 2:
    raise PuzzleError(
      f"{name!r} holds {len(first)} different documents that are not empty; one part is held out, so it takes two or "
      "more (a .txt file is one document, a line of .jsonl is one)"
    )
  keys = sorted(first)
  below = sum(is_heldout(k, heldout_fraction) for k in keys)
  num_heldout = min(max(below, 1), len(keys) - 1)
  parts = [sorted(first[k] for k in part) for part in (keys[num_heldout:], keys[:num_heldout])]
  content = hashlib.sha256(b"/".join(b"".join(sha for _, sha in part) for part in parts)).hexdigest()
  train, heldout = (_Documents(rows, text_field, np.array([i for i, _ in part])) for part in parts)
  forced = num_heldout != below
  return DocumentSource(name=name, digest=content, train=train, heldout=heldout, files=files, forced=forced)
