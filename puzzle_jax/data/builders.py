"""tensorflow-datasets builders of text: what they read is written once as array_record and then read at random.

tensorflow-datasets does all that is used here without TensorFlow. It prepares a dataset in a folder beside and renames
it at the end, so a killed run leaves nothing that could be taken for whole. Shards are written as they come: the
builders that sort examples by a key need TensorFlow for more than 1 GB.
"""

import abc
import contextlib
import functools
import gzip
import io
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from puzzle_jax.data import stdlib
from puzzle_jax.errors import PuzzleError
from puzzle_jax.json_input import parse

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
_SHARD_BYTES = 256 * 2**20  # of files on disk; tensorflow-datasets holds one shard's text in memory
_SPLIT = "train"


class _TextBuilder(tfds.core.ShardBasedBuilder):
  """A dataset of one split and one feature, `text`."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

  @abc.abstractmethod
  def _shards(self) -> Sequence[Callable[[], Iterable[str]]]:
    """What yields the documents of each shard."""

  def _shard_iterators_per_split(self, dl_manager: Any) -> Any:
    del dl_manager

    def examples(documents: Callable[[], Iterable[str]]) -> Iterator[tuple[int, dict[str, str]]]:
      return ((i, {"text": text}) for i, text in enumerate(documents()))

    return {_SPLIT: [functools.partial(examples, documents) for documents in self._shards()]}


class StandardLibraryText(_TextBuilder):
  """The embedded text (`puzzle_jax.data.stdlib`)."""

  def _shards(self) -> Sequence[Callable[[], Iterable[str]]]:
    return [stdlib.documents]


class TextFiles(_TextBuilder):
  """Local files: .txt holds one document, .jsonl one a line; both may be gzipped."""

  def __init__(self, *, data_dir: Path, paths: Sequence[Path], text_field: str):
    self._paths, self._text_field = paths, text_field
    super().__init__(data_dir=data_dir)

  def _shards(self) -> Sequence[Callable[[], Iterable[str]]]:
    shards: list[list[Path]] = []
    room = 0
    for path in self._paths:
      size = path.stat().st_size
      if size > room:
        shards.append([])
        room = _SHARD_BYTES
      shards[-1].append(path)
      room -= size
    return [functools.partial(_read_files, shard, self._text_field) for shard in shards]


def _read_files(paths: Sequence[Path], text_field: str) -> Iterator[str]:
  for path in paths:
    yield from read_file(path, text_field)


def read_file(path: Path, text_field: str) -> Iterator[str]:
  """Yields the documents of a file, but for empty ones.

  Raises:
    PuzzleError: not UTF-8, not gzip, not JSON, or no such field; with file and line.
  """
  try:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
      if path.name.endswith((".txt", ".txt.gz")):
        texts = iter([file.read()])
      else:
        texts = (_field(line, text_field, f"{path}:{i}") for i, line in enumerate(file, 1) if line.strip())
      for text in texts:
        if text.strip():
          yield text.encode("utf-8", "replace").decode()  # JSON can spell out halves of surrogate pairs
  except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as e:
    raise PuzzleError(f"{path} cannot be read as UTF-8 text ({e}); convert it, or leave it out") from e


def _field(line: str, name: str, where: str) -> str:
  row = parse(line, where, ".jsonl holds one object a line")
  if not isinstance(row, dict) or not isinstance(row.get(name), str):
    columns = [k for k, v in row.items() if isinstance(v, str)] if isinstance(row, dict) else []
    raise PuzzleError(f"{where} has no text in {name!r}; its text fields are {columns}: set data.text_field to one")
  return row[name]


def read_prepared(builder: tfds.core.DatasetBuilder, *, quiet: bool) -> Sequence[dict[str, Any]]:
  """The examples of a builder's training split, prepared if they are not yet.

  Args:
    builder: any builder; its `data_dir` belongs to this run alone.
    quiet: show neither progress nor messages.
  """
  folder = Path(builder.data_dir)
  for left_by_killed in folder.parent.glob(f"incomplete.*_{folder.name}"):
    shutil.rmtree(left_by_killed, ignore_errors=True)
  with contextlib.ExitStack() as stack:
    if quiet:
      nowhere = io.StringIO()
      stack.enter_context(contextlib.redirect_stdout(nowhere))
      stack.enter_context(contextlib.redirect_stderr(nowhere))
    config = tfds.download.DownloadConfig(try_download_gcs=False)
    builder.download_and_prepare(file_format="array_record", download_config=config)
  splits = builder.info.splits
  split = splits[_SPLIT] if _SPLIT in splits else next(iter(splits.values()))
  return builder.as_data_source(split.name) if split.num_examples else []
