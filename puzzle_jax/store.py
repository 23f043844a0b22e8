"""The only module that writes to a work directory: whole files or none, checksums, locks (docs/architecture.md).

A work directory holds one folder a stage. A folder's `manifest.json` names the key it was made for (the part of the
config and the content of the inputs that it depends on) and the digest of every file that is finished. A file that is
not in the manifest does not exist, whatever lies on the disk: it is what a killed run left behind.

Two digests a file: `sha256` of its bytes finds corruption; `content` leaves out JSON's `timing` key, so that two runs
that differ in nothing but measured wall times count as the same.
"""

import contextlib
import copy
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from puzzle_jax import distributed
from puzzle_jax.errors import PuzzleError

MANIFEST = "manifest.json"
_UMASK = os.umask(0o022)
os.umask(_UMASK)  # reading it means setting it


class CorruptFileError(PuzzleError):
  """A file of a work directory does not have the checksum that was recorded when it was written."""


class CleanedFileError(PuzzleError):
  """A file is needed that `StageStore.clean` removed; `folder` is its stage's."""

  def __init__(self, message: str, folder: Path):
    super().__init__(message)
    self.folder = folder

  def __reduce__(self) -> tuple[Any, ...]:
    return type(self), (str(self), self.folder)


def _canonical(data: Any) -> bytes:
  return json.dumps(data, sort_keys=True, allow_nan=False).encode()


def digest(data: Any) -> str:
  """Hex SHA-256 of a JSON value, without any `timing` key of its top level."""
  if isinstance(data, Mapping):
    data = {k: v for k, v in data.items() if k != "timing"}
  return hashlib.sha256(_canonical(data)).hexdigest()


def file_digest(path: Path) -> str:
  """Hex SHA-256 of a file's bytes."""
  with path.open("rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def file_digests(folder: Path) -> dict[str, str]:
  """`file_digest` of every file below a folder, by relative path."""
  files = sorted(path for path in folder.rglob("*") if path.is_file())
  return {path.relative_to(folder).as_posix(): file_digest(path) for path in files}


def _sync(path: Path) -> None:
  fd = os.open(path, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)


def _disk_full(error: Exception) -> bool:
  """Whether a write failed for want of space; safetensors tells the error's number in its message only."""
  numbers = (errno.ENOSPC, errno.EDQUOT)
  if isinstance(error, OSError):
    return error.errno in numbers
  return any(f"(os error {number})" in str(error) for number in numbers)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
  """Yields a path beside `path` to write (a file, or a folder that the body makes); renames it over at the end.

  Raises:
    PuzzleError: no space left, with the free bytes.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  aside = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    yield aside
    for file in [aside, *aside.rglob("*")] if aside.is_dir() else [aside]:
      if file.is_file():
        file.chmod(0o666 & ~_UMASK)  # some writers make files that others cannot read
      _sync(file)
    if aside.is_dir() and path.exists():
      shutil.rmtree(path)
    aside.replace(path)
    _sync(path.parent)
  except (OSError, safetensors.SafetensorError) as e:
    if not _disk_full(e):
      raise
    free = shutil.disk_usage(path.parent).free
    raise PuzzleError(
      f"no space left while writing {path} ({free / 2**20:.0f} MiB free); make room and start again: "
      "what is finished is kept"
    ) from e
  finally:
    if aside.is_dir():
      shutil.rmtree(aside, ignore_errors=True)
    else:
      aside.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
  """Writes a JSON file, whole or not at all."""
  with replacing(path) as aside:
    aside.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
  try:
    return json.loads(path.read_text())
  except (ValueError, RecursionError) as e:
    raise CorruptFileError(f"{path} is not JSON ({e}); delete it and start again") from e


class StageStore:
  """The folder of one stage. Files are named by relative paths such as `layer_07.safetensors`.

  Where several processes hold one, what changes it is called by all of them and done by process 0.
  """

  def __init__(self, root: Path):
    self.root = root
    self._manifest: dict[str, Any]
    self.reload()

  def reload(self) -> None:
    """Takes up what the folder holds now."""
    path = self.root / MANIFEST
    self._manifest = read_json(path) if path.exists() else {"key": None, "files": {}, "done": False}

  @property
  def key(self) -> Any:
    """What the folder was made for, or None."""
    return self._manifest["key"]

  @property
  def done(self) -> bool:
    return self._manifest["done"]

  @property
  def record(self) -> dict[str, Any]:
    """What `finish` recorded (versions, timing)."""
    return self._manifest.get("record", {})

  @property
  def _there(self) -> dict[str, Any]:
    return {name: info for name, info in self._manifest["files"].items() if not info.get("cleaned")}

  @property
  def names(self) -> list[str]:
    """The finished files."""
    return sorted(self._there)

  @property
  def size(self) -> int:
    """Bytes of the finished files."""
    return sum(f["bytes"] for f in self._there.values())

  @property
  def cleaned(self) -> bool:
    """Whether `clean` removed files of it."""
    return len(self._there) < len(self._manifest["files"])

  def _save(self) -> None:
    if distributed.is_first():
      write_json(self.root / MANIFEST, self._manifest)

  @distributed.written_by_first
  def begin(self, key: Any) -> None:
    """Makes the folder one for `key`: what was made for another key, or left half-written, goes."""
    key = json.loads(_canonical(key))
    if self.key != key:
      if self.root.exists():
        shutil.rmtree(self.root)
      self._manifest = {"key": key, "files": {}, "done": False}
    for pattern in (".*.part", ".tmp*") if self.root.exists() else ():  # ours, and what safetensors writes to first
      for part in self.root.rglob(pattern):
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    self._manifest["done"] = False
    self._save()

  @distributed.written_by_first
  def finish(self, record: Mapping[str, Any]) -> None:
    """Marks the stage as done, with versions and timing."""
    self._manifest |= {"done": True, "record": dict(record)}
    self._save()

  @distributed.written_by_first
  def adopt(self, other: "StageStore") -> None:
    """Makes the folder hold what another run's finished stage does; files are shared (hard links) where they can be."""
    self.begin(other.key)
    for name in other.names:
      path = self.root / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.unlink(missing_ok=True)
      try:
        os.link(other.root / name, path)
      except OSError:  # another disk
        with replacing(path) as aside:
          shutil.copyfile(other.root / name, aside)
    self._manifest["files"] = copy.deepcopy(other._manifest["files"])
    self.finish(other.record)

  @distributed.written_by_first
  def clean(self, names: Sequence[str]) -> None:
    """Removes finished files that nothing reads soon; the stage stays done, and what depends on it stays valid."""
    finished = (self.root / MANIFEST).stat()
    for name in names:
      self._manifest["files"][name]["cleaned"] = True
    self._save()
    os.utime(self.root / MANIFEST, ns=(finished.st_atime_ns, finished.st_mtime_ns))  # see `Workdir.finished`
    for name in names:
      (self.root / name).unlink(missing_ok=True)

  @distributed.written_by_first
  def forget_cleaned(self) -> None:
    """Makes the stage one that has to make again what `clean` removed."""
    self._manifest |= {"files": self._there, "done": False}
    self._save()

  def missing(self) -> list[str]:
    """Recorded files that are gone or of another size (checksums are verified when a file is read)."""

    def broken(name: str, info: Mapping[str, Any]) -> bool:
      path = self.root / name
      return not path.is_file() or path.stat().st_size != info["bytes"]

    return [name for name, info in self._there.items() if broken(name, info)]

  def content(self, *, times_too: bool = False) -> str:
    """Digest of everything that the stage made, without what lies under `timing`: the key of stages that read it."""
    kind = "sha256" if times_too else "content"
    return digest({name: info[kind] for name, info in self._manifest["files"].items()})

  def __contains__(self, name: str) -> bool:
    return name in self._manifest["files"] and (self.root / name).is_file()

  def _forget(self, name: str) -> None:
    if self._manifest["files"].pop(name, None) is not None:
      self._save()

  @distributed.written_by_first
  def remove(self, name: str) -> None:
    """Deletes a file, if it is there."""
    self._forget(name)
    (self.root / name).unlink(missing_ok=True)

  def _record(self, *names: str) -> None:
    for name in names:
      path = self.root / name
      sha = file_digest(path)
      content = digest(read_json(path)) if path.suffix == ".json" else sha
      self._manifest["files"][name] = {"sha256": sha, "content": content, "bytes": path.stat().st_size}
    self._save()

  @distributed.written_by_first
  def put_json(self, name: str, data: Any) -> None:
    """Writes a JSON file; its top-level key `timing` does not count as content."""
    self._forget(name)
    write_json(self.root / name, data)
    self._record(name)

  @distributed.written_by_first
  def put_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes named arrays as a safetensors file."""
    self._forget(name)
    contiguous = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
    with replacing(self.root / name) as aside:
      safetensors.numpy.save_file(contiguous, aside)
    self._record(name)

  @distributed.written_by_first
  def put_text(self, name: str, text: str) -> None:
    self._forget(name)
    with replacing(self.root / name) as aside:
      aside.write_text(text, encoding="utf-8")
    self._record(name)

  @contextlib.contextmanager
  def put_folder(self, name: str) -> Iterator[Path]:
    """Yields an empty folder to fill; it becomes `name` when the body ends well."""
    for old in [n for n in self.names if n.startswith(f"{name}/")]:
      self._forget(old)
    with replacing(self.root / name) as aside:
      aside.mkdir()
      yield aside
    files = sorted(p.relative_to(self.root).as_posix() for p in (self.root / name).rglob("*") if p.is_file())
    self._record(*files)

  def path(self, name: str) -> Path:
    """The path of a finished file, its checksum verified.

    Raises:
      CorruptFileError: the file is not what was written, or not there.
      CleanedFileError: it was removed by `clean`.
    """
    path = self.root / name
    info = self._manifest["files"].get(name)
    if info and info.get("cleaned"):
      raise CleanedFileError(
        f"{path} was removed by experiments.clean; delete {self.root} and start the run again to have it made anew",
        self.root,
      )
    if info is None or not path.is_file() or file_digest(path) != info["sha256"]:
      self._forget(name)
      self._manifest["done"] = False
      if self.root.exists():
        self._save()
      raise CorruptFileError(f"{path} is missing or corrupt (checksum); start again: it will be made anew")
    return path

  def folder(self, name: str) -> Path:
    """The path of a folder of `put_folder`, the checksum of each of its files verified; raises what `path` does."""
    for file in [n for n in self._manifest["files"] if n.startswith(f"{name}/")] or [f"{name}/"]:
      self.path(file)
    return self.root / name

  def get_json(self, name: str) -> Any:
    return read_json(self.path(name))

  def get_arrays(self, name: str) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(self.path(name))


class Workdir:
  """A run's directory."""

  def __init__(self, root: str | os.PathLike[str]):
    self.root = Path(root)

  def stage(self, name: str) -> StageStore:
    return StageStore(self.root / name)

  def finished(self) -> list[StageStore]:
    """The stages that are done, in the order in which they were finished."""
    manifests = sorted(self.root.glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime_ns)
    return [store for path in manifests if (store := self.stage(path.parent.name)).done]

  def scratch(self, name: str) -> Path:
    """A folder for what a library manages itself (checkpoints); no checksums of ours."""
    path = self.root / name
    path.mkdir(parents=True, exist_ok=True)
    return path

  def append(self, name: str, record: Mapping[str, Any]) -> None:
    """Adds a line to a JSON-lines file of the directory itself."""
    with (self.root / name).open("a") as f:
      print(json.dumps(record, allow_nan=False), file=f)

  @contextlib.contextmanager
  def lock(self) -> Iterator[None]:
    """Holds the directory for this process; the kernel frees it when the process ends, however it ends.

    Raises:
      PuzzleError: another process holds it (says which), or the directory cannot be written.
    """
    try:
      self.root.mkdir(parents=True, exist_ok=True)
      handle = (self.root / "lock").open("a+")
    except OSError as e:
      raise PuzzleError(f"work directory {self.root} cannot be written ({e.strerror}); choose another --workdir") from e
    with handle:
      try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        handle.seek(0)
        holder = handle.read().strip() or "another process"
        raise PuzzleError(f"work directory {self.root} is in use by {holder}; wait for it or use another") from None
      handle.truncate(0)
      handle.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}")
      handle.flush()
      yield

  def require_space(self, needed: int) -> None:
    """Raises PuzzleError when fewer than `needed` bytes are free."""
    probe = self.root
    while not probe.exists():
      probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < needed:
      raise PuzzleError(
        f"work directory {self.root} needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; "
        "make room or choose another --workdir"
      )


def temporary_folder() -> tempfile.TemporaryDirectory[str]:
  """A folder for intermediate files that nothing reads again."""
  return tempfile.TemporaryDirectory(prefix="puzzle_jax-")
