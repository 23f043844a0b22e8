"""Models on disk: tensors by Hugging Face's names in safetensors files, read and written one at a time.

Arrays are NumPy's and are read one layer at a time, so that no model has to fit in memory. Imports no JAX.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import safetensors.numpy

from puzzle_jax.arch import Architecture
from puzzle_jax.errors import PuzzleError
from puzzle_jax.json_input import read_object

SHARD_BYTES = 5_000_000_000
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_WHOLE_BYTES, _SAMPLE_EVERY, _SAMPLE_BYTES = 2 << 30, 16 << 20, 64 << 10

Layer = Mapping[str, Mapping[str, np.ndarray]]  # {"attention": {parameter name: array}, "ffn": {...}}


class Weights(Protocol):
  """The tensors of a model by full checkpoint name, read one at a time."""

  @property
  def files(self) -> Sequence[Path]: ...

  @property
  def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

  def read(self, name: str) -> np.ndarray: ...


def read_json(path: Path) -> dict[str, Any]:
  """A JSON object of someone else's making.

  Raises:
    PuzzleError: no such file, or not a JSON object.
  """
  try:
    return read_object(path, "download or write it again")
  except FileNotFoundError:
    raise PuzzleError(f"{path} does not exist; name a directory that holds a whole model") from None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n")


class SafetensorsFolder:
  """The tensors of a folder's `model.safetensors`, or of the shards that its index lists.

  Raises:
    PuzzleError: no safetensors (pickled files are never read, since that runs code), a missing or truncated file, or a
      tensor of another type than float32, float16 and bfloat16.
  """

  def __init__(self, folder: Path):
    self.files = self._find(folder)
    self._handles = {}
    self._shapes: dict[str, tuple[int, ...]] = {}
    for file in self.files:
      try:
        handle = safetensors.safe_open(file, framework="numpy")
      except FileNotFoundError:
        raise PuzzleError(f"{file} is missing, though {INDEX} lists it; download it again") from None
      except safetensors.SafetensorError as e:
        raise PuzzleError(f"{file} is truncated or no safetensors file ({e}); download it again") from e
      for name in handle.keys():  # noqa: SIM118 (not a dict)
        header = handle.get_slice(name)
        if header.get_dtype() not in _DTYPES:
          raise PuzzleError(
            f"{file}: tensor {name} is of type {header.get_dtype()}; convert the weights to one of "
            f"{', '.join(_DTYPES.values())}"
          )
        self._handles[name] = handle
        self._shapes[name] = tuple(header.get_shape())

  @staticmethod
  def _find(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
      return [folder / SINGLE]
    if (folder / INDEX).is_file():
      shards = set(read_json(folder / INDEX).get("weight_map", {}).values())
      if shards:
        return [folder / shard for shard in sorted(shards)]
      raise PuzzleError(f"{folder / INDEX} lists no shards; download it again")
    if pickled := sorted(p.name for p in folder.glob("*") if p.suffix in _PICKLED):
      raise PuzzleError(
        f"{folder} holds only pickled weights ({pickled[0]}), which are never read because that runs code; "
        "convert them to safetensors, for example with Transformers' save_pretrained"
      )
    raise PuzzleError(f"{folder} holds neither {SINGLE} nor {INDEX}; name a directory that holds a whole model")

  @property
  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    return self._shapes

  def read(self, name: str) -> np.ndarray:
    return self._handles[name].get_tensor(name)

  def discard(self, name: str) -> None:
    """Forgets a tensor that does not belong to the model."""
    del self._handles[name], self._shapes[name]


@dataclasses.dataclass(frozen=True)
class StoredModel:
  """An architecture and its weights on disk. Opening it checks names and shapes; `validate` reads every tensor.

  Raises:
    PuzzleError: tensors are missing, unexpected or of another shape than the architecture's.
  """

  architecture: Architecture
  weights: Weights
  location: str  # path or id, for messages

  def __post_init__(self) -> None:
    wanted, found = self.architecture.checkpoint_shapes(), self.weights.shapes
    if missing := [name for name in wanted if name not in found]:
      raise PuzzleError(f"{self.location}: {_some(missing)} missing; the weights do not match the configuration")
    if unexpected := [name for name in found if name not in wanted]:
      raise PuzzleError(f"{self.location}: {_some(unexpected)} unexpected; is this a variant of a supported family?")
    for name, shape in wanted.items():
      if found[name] != shape:
        raise PuzzleError(f"{self.location}: tensor {name} has shape {found[name]}, its configuration says {shape}")

  def head(self, dtype: np.typing.DTypeLike | None = None) -> dict[str, np.ndarray]:
    """The weights outside the layers, by parameter name; `dtype` None keeps the stored one."""
    return {key: self._read(t.checkpoint_name, dtype) for key, t in self.architecture.head_tensors().items()}

  def layer(self, i: int, dtype: np.typing.DTypeLike | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Layer `i`: {"attention": {...}, "ffn": {...}} by parameter name, an empty dict for a no-op."""
    config, block = self.architecture.config, self.architecture.blocks[i]
    return {
      subblock.slot: {
        key: self._read(f"model.layers.{i}.{t.checkpoint_name}", dtype) for key, t in subblock.tensors(config).items()
      }
      for subblock in block.subblocks
    }

  def validate(self) -> None:
    """Reads every tensor once.

    Raises:
      PuzzleError: values that are NaN or infinite.
    """
    for name in self.architecture.checkpoint_shapes():
      if bad := int(np.count_nonzero(~np.isfinite(self.weights.read(name)))):
        raise PuzzleError(
          f"{self.location}: tensor {name} holds {bad} values that are NaN or infinite; download it again"
        )

  def _read(self, name: str, dtype: np.typing.DTypeLike | None) -> np.ndarray:
    array = self.weights.read(name)
    return array if dtype is None else array.astype(dtype, copy=False)


def _some(names: Sequence[str]) -> str:
  shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
  return f"tensor {shown}" if len(names) == 1 else f"tensors {shown}"


def fingerprint(files: Sequence[Path]) -> str:
  """Identifies weights by content, wherever they lie.

  SHA-256 of the sizes and of all bytes up to 2 GiB; above that of 64 KiB in every 16 MiB (seconds for a 70B parent),
  which sees any training step but can miss an edit of a few values.
  """
  sizes = [file.stat().st_size for file in files]
  sha = hashlib.sha256(repr(sizes).encode())
  chunk = _SAMPLE_EVERY if sum(sizes) <= _WHOLE_BYTES else _SAMPLE_BYTES
  for file, size in zip(files, sizes, strict=True):
    with file.open("rb") as f:
      for offset in range(0, size, _SAMPLE_EVERY):
        f.seek(offset)
        sha.update(f.read(chunk))
  return sha.hexdigest()


def named_tensors(
  architecture: Architecture, head: Mapping[str, np.ndarray], layers: Iterable[Layer]
) -> Iterator[tuple[str, np.ndarray]]:
  """All tensors with their full checkpoint names, checked against the architecture as they pass.

  Raises:
    PuzzleError: a parameter is missing, unexpected or of another shape.
  """

  def named(prefix: str, tensors: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Iterator[Any]:
    if tensors.keys() != arrays.keys():
      raise PuzzleError(f"{prefix or 'head'}: parameters {sorted(arrays)} given, {sorted(tensors)} expected")
    for key, tensor in tensors.items():
      if arrays[key].shape != tensor.shape:
        name = prefix + tensor.checkpoint_name
        raise PuzzleError(f"tensor {name} has shape {arrays[key].shape}, the architecture says {tensor.shape}")
      yield prefix + tensor.checkpoint_name, arrays[key]

  yield from named("", architecture.head_tensors(), head)
  for i, (block, layer) in enumerate(zip(architecture.blocks, layers, strict=True)):
    for subblock in block.subblocks:
      yield from named(f"model.layers.{i}.", subblock.tensors(architecture.config), layer[subblock.slot])


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
  """Writes `model.safetensors`, or above SHARD_BYTES shards and their index, holding one shard in memory."""
  shards: list[list[str]] = []
  batch: dict[str, np.ndarray] = {}
  total = 0

  def flush() -> None:
    path = folder / f"shard-{len(shards)}"
    path.touch()
    mode = path.stat().st_mode  # safetensors would leave a file that its owner alone can read
    # "format" is what Transformers wants to see, whatever wrote the file.
    safetensors.numpy.save_file(batch, path, metadata={"format": "pt"})
    path.chmod(mode)
    shards.append(list(batch))
    batch.clear()

  for name, array in tensors:
    if batch and sum(a.nbytes for a in batch.values()) + array.nbytes > SHARD_BYTES:
      flush()
    batch[name] = np.asarray(array, order="C")  # ascontiguousarray would give a scalar an axis
    total += array.nbytes
  flush()
  if len(shards) == 1:
    (folder / "shard-0").rename(folder / SINGLE)
    return
  weight_map: dict[str, str] = {}
  for i, names in enumerate(shards):
    file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    (folder / f"shard-{i}").rename(folder / file)
    weight_map |= dict.fromkeys(names, file)
  write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
