"""Training activations that roll through the layers (paper section 3): a window of tokens, one layer's input at a time.

A window holds what the layers being distilled read and what the next one reads: the parent's forward pass makes the
latter from the former, layer by layer, so the parent never has to be on the device whole. Tiers, by where that fits:

  device  the accelerator's memory; a batch is a slice
  host    the machine's memory
  disk    tensorstore arrays under a path or a bucket's URL, a SHA-256 a shard; a killed run goes on from them

The first two are made again from the embeddings when a run goes on. Budgets of tokens that no tier holds are cut into
windows that follow one another.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from puzzle_jax import distributed
from puzzle_jax.activations import Batch, Where, forward, where_of
from puzzle_jax.arch import BlockSpec, ModelConfig
from puzzle_jax.data import PackedText
from puzzle_jax.errors import PuzzleError
from puzzle_jax.mesh import fetch, from_local_rows, local_rows, place, rows_of_layers
from puzzle_jax.store import CorruptFileError

TIERS = ("auto", "device", "host", "disk")
DTYPES = ("float32", "bfloat16", "float8")
ATTENTION = ("exact", "fast")

_FP8 = jnp.float8_e4m3fn
_FP8_MAX = float(jnp.finfo(_FP8).max)
_T = TypeVar("_T")
Stored = dict[str, Any]  # `x` and, for float8, `scale`


def encode(x_BTD: jax.Array, dtype: str) -> Stored:
  """What is stored of a layer's input; float8 has a scale a token, for massive activations pass 20,000."""
  if dtype != "float8":
    return {"x": x_BTD.astype(dtype)}
  scale = jnp.maximum(jnp.max(jnp.abs(x_BTD), axis=-1, keepdims=True), 1e-30) / _FP8_MAX
  return {"x": (x_BTD / scale).astype(_FP8), "scale": scale.astype(jnp.float32)}


def decode(stored: Stored) -> jax.Array:
  """The layer's input in fp32."""
  x = stored["x"].astype(jnp.float32)
  return x * stored["scale"] if "scale" in stored else x


class Tier(Protocol):
  """Where layers' inputs lie, in shards of rows that are written and read whole."""

  def read(self, layer: int, shard: int) -> Stored: ...

  def write(self, layer: int, shard: int, stored: Stored) -> None: ...

  def has(self, layer: int) -> bool:
    """Whether all shards of a layer were written."""
    ...

  def drop(self, layer: int) -> None: ...

  def clear(self) -> None:
    """Forgets all layers."""
    ...


@dataclasses.dataclass(frozen=True)
class Shape:
  """Of one layer's input: shards, rows a shard (those of a training batch), tokens a row, width, how it is stored."""

  shards: int
  rows: int
  tokens: int
  width: int
  dtype: str

  @property
  def size(self) -> int:
    """Bytes."""
    return self.shards * sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.arrays.values())

  @property
  def arrays(self) -> dict[str, tuple[tuple[int, int, int], Any]]:
    """Shape and dtype of each array of a shard."""
    stored: Any = {"float8": _FP8}.get(self.dtype, self.dtype)
    arrays: dict[str, tuple[tuple[int, int, int], Any]] = {
      "x": ((self.rows, self.tokens, self.width), jnp.dtype(stored))
    }
    if self.dtype == "float8":
      arrays["scale"] = ((self.rows, self.tokens, 1), jnp.dtype(jnp.float32))
    return arrays


class DeviceTier:
  """In the accelerators' memory."""

  def __init__(self, shape: Shape):
    self._shape = shape
    self._layers: dict[int, dict[int, Stored]] = collections.defaultdict(dict)

  def read(self, layer: int, shard: int) -> Stored:
    return self._layers[layer][shard]

  def write(self, layer: int, shard: int, stored: Stored) -> None:
    self._layers[layer][shard] = stored

  def has(self, layer: int) -> bool:
    return len(self._layers[layer]) == self._shape.shards

  def drop(self, layer: int) -> None:
    self._layers.pop(layer, None)

  def clear(self) -> None:
    self._layers.clear()


class HostTier(DeviceTier):
  """In the machine's memory: of each process, the rows of its devices."""

  def __init__(self, shape: Shape, mesh: Mesh):
    super().__init__(shape)
    self._mesh = mesh

  def read(self, layer: int, shard: int) -> Stored:
    local = super().read(layer, shard)
    return {k: from_local_rows(self._mesh, a, self._shape.rows) for k, a in local.items()}

  def write(self, layer: int, shard: int, stored: Stored) -> None:
    super().write(layer, shard, {k: local_rows(a) for k, a in stored.items()})


class DiskTier:
  """Tensorstore arrays under a local path (`file://…`) or a bucket (`gs://…`, `s3://…`), one chunk a shard.

  `index.json` names the shards that are whole with their SHA-256: what is not in it does not exist.

  Args:
    url: of the folder of this process.
    shape: of a layer's input.
    mesh: whose rows of this process are stored.
    key: what the window was made of; an index of another key is forgotten.
  """

  def __init__(self, url: str, shape: Shape, mesh: Mesh, key: str):
    self._url, self._shape, self._mesh, self._key = url.rstrip("/") + "/", shape, mesh, key
    self._context = tensorstore.Context()
    try:
      self._kv = tensorstore.KvStore.open(self._url, context=self._context).result()
      found = self._kv.read("index.json").result()
    except (ValueError, NotImplementedError) as e:
      raise PuzzleError(f"activations.location={url!r} cannot be opened ({e}); give a path, gs://… or s3://…") from e
    index = json.loads(found.value) if found.state == "value" else {}
    self._index: dict[str, dict[str, str]] = index["layers"] if index.get("key") == key else {}
    if index.get("key") != key:
      self.clear()

  def _save(self) -> None:
    self._kv.write("index.json", json.dumps({"key": self._key, "layers": self._index})).result()

  def _array(self, layer: int, shard: int, name: str, local: np.ndarray | None = None) -> Any:
    """A shard's array; with `local` one to write that to."""
    spec: dict[str, Any] = {
      "driver": "zarr3",
      "kvstore": f"{self._url}layer_{layer:02d}/{shard}/{name}/",
      "store_data_equal_to_fill_value": True,
      "fill_missing_data_reads": False,
    }
    if local is None:
      return tensorstore.open(spec, open=True, context=self._context).result()
    spec["metadata"] = {"shape": list(local.shape), "data_type": local.dtype.name}
    return tensorstore.open(spec, create=True, delete_existing=True, context=self._context).result()

  def read(self, layer: int, shard: int) -> Stored:
    """Raises CorruptFileError for a shard that is not what was written."""
    try:
      found = {k: self._array(layer, shard, k).read().result() for k in self._shape.arrays}
      broken = "" if _digest(found) == self._index[str(layer)][str(shard)] else "checksum"
    except ValueError as e:
      broken = str(e)
    if broken:
      self._index.pop(str(layer), None)
      self._save()
      kind = CorruptFileError if distributed.count() == 1 else PuzzleError  # others know nothing of it: all end
      raise kind(
        f"{self._url}layer_{layer:02d}: shard {shard} is missing or corrupt ({broken}); start again: it will be made "
        "anew"
      )
    return {k: from_local_rows(self._mesh, a, self._shape.rows) for k, a in found.items()}

  def write(self, layer: int, shard: int, stored: Stored) -> None:
    """Raises PuzzleError where there is no space left."""
    arrays = {k: local_rows(v) for k, v in stored.items()}
    try:
      for k, array in arrays.items():
        self._array(layer, shard, k, array).write(array).result()
      self._index.setdefault(str(layer), {})[str(shard)] = _digest(arrays)
      self._save()
    except ValueError as e:
      if "No space left" not in str(e) and "quota" not in str(e):
        raise
      raise PuzzleError(
        f"no space left while writing {self._url}; make room or lower activations.window_tokens, and start again: "
        "what is finished is kept"
      ) from e

  def has(self, layer: int) -> bool:
    return len(self._index.get(str(layer), ())) == self._shape.shards

  def drop(self, layer: int) -> None:
    if self._index.pop(str(layer), None) is not None:
      self._save()
    prefix = f"layer_{layer:02d}/"
    self._kv.delete_range(tensorstore.KvStore.KeyRange(prefix, prefix[:-1] + "0")).result()

  def clear(self) -> None:
    self._index = {}
    self._kv.delete_range(tensorstore.KvStore.KeyRange()).result()


def open_tier(tier: str, shape: Shape, mesh: Mesh, *, folder: str, key: str) -> Tier:
  """One of `TIERS`; folder and key are those of the disk's."""
  if tier == "disk":
    url = folder if "://" in folder else f"file://{os.path.abspath(folder)}"
    return DiskTier(f"{url.rstrip('/')}/window/process_{jax.process_index()}", shape, mesh, key)
  return DeviceTier(shape) if tier == "device" else HostTier(shape, mesh)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
  digest = hashlib.sha256()
  for name in sorted(arrays):
    digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
  return digest.hexdigest()


def ahead(load: Callable[[Any], _T], items: Sequence[Any], *, depth: int = 2) -> Iterator[_T]:
  """What `load` gives for each item, up to `depth` items ahead of the one that is used, in a thread."""
  with ThreadPoolExecutor(1) as pool:
    waiting: collections.deque[Future[_T]] = collections.deque()
    for item in items:
      waiting.append(pool.submit(load, item))
      if len(waiting) > depth:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


@functools.partial(jax.jit, static_argnames=("dtype", "sharding"))
def _encode(x_BTD: jax.Array, dtype: str, sharding: NamedSharding) -> Stored:
  return jax.lax.with_sharding_constraint(encode(x_BTD, dtype), sharding)


@functools.partial(jax.jit, static_argnames="sharding")
def _decode_group(stored: list[Stored], sharding: NamedSharding) -> jax.Array:
  return jax.lax.with_sharding_constraint(jnp.stack([decode(s) for s in stored]), sharding)


@functools.partial(jax.jit, static_argnames=("spec", "config", "dtype", "sharding"))
def _advance(
  spec: BlockSpec, config: ModelConfig, params: Any, stored: Stored, where: Where, dtype: str, sharding: NamedSharding
) -> tuple[Stored, dict[str, jax.Array]]:
  x, sums = forward(spec, config, params, Batch(decode(stored), *where))
  return jax.lax.with_sharding_constraint(encode(x, dtype), sharding), sums


class Window:
  """One window of training tokens.

  Args:
    config: of the model.
    packed: the rows of the window; those that fill no shard are left out.
    mesh: the devices.
    tier: where they lie.
    shape: of a layer's input there.
    attention: "exact" keeps documents of a row apart by a mask; "fast" lets a row be one document.
    dtype: of the matrix products of the parent's forward pass.
  """

  def __init__(
    self, config: ModelConfig, packed: PackedText, mesh: Mesh, *, tier: Tier, shape: Shape, attention: str, dtype: str
  ):
    self.shape, self._packed, self._mesh, self._config, self._tier = shape, packed, mesh, config, tier
    self._fast, self._dtype = attention == "fast", dtype

  def _rows(self, shard: int) -> slice:
    return slice(shard * self.shape.rows, (shard + 1) * self.shape.rows)

  def _where(self, shard: int) -> Where:
    return where_of(self._config, self._packed.rows(self._rows(shard)), self._mesh, one_document=self._fast)

  def start(self, embed_VD: np.ndarray) -> None:
    """Makes the input of layer 0."""
    rows = NamedSharding(self._mesh, P("data"))
    for i in range(self.shape.shards):
      x = place(self._mesh, np.asarray(embed_VD[self._packed.tokens[self._rows(i)]], np.float32), P("data"))
      self._tier.write(0, i, _encode(x, self.shape.dtype, rows))

  def latest(self, layer: int) -> int | None:
    """The last layer up to `layer` whose input is there."""
    return next((i for i in range(layer, -1, -1) if distributed.everyone(self._tier.has(i))), None)

  def advance(self, layer: int, spec: BlockSpec, params: Any) -> dict[str, np.ndarray]:
    """Makes the input of the next layer.

    Args:
      layer: whose input is there.
      spec: the parent's block.
      params: its weights by slot.

    Returns:
      By slot, [E]: the mean magnitude of what the subblock's last matrix multiplies (for channel contribution).
    """
    sums: Any = None
    shards, sharding = range(self.shape.shards), NamedSharding(self._mesh, P("data"))
    for i, stored in enumerate(ahead(lambda shard: self._tier.read(layer, shard), shards)):
      context, real_BT = self._where(i)
      context = dataclasses.replace(context, dtype=jnp.dtype(self._dtype))
      out, added = _advance(spec, self._config, params, stored, (context, real_BT), self.shape.dtype, sharding)
      self._tier.write(layer + 1, i, out)
      sums = added if sums is None else jax.tree.map(jnp.add, sums, added)
    used = self._packed.segment_ids[: self.shape.shards * self.shape.rows]
    return {slot: s / float(np.sum(used > 0)) for slot, s in fetch(sums).items()}

  def batches(self, layers: Sequence[int], shards: Sequence[int]) -> Iterator[Batch]:
    """Shards of the inputs of some layers, x [G, B, T, D], read ahead of the one in use."""
    sharding = NamedSharding(self._mesh, rows_of_layers(self._mesh, len(layers), self.shape.rows))

    def load(shard: int) -> Batch:
      x_GBTD = _decode_group([self._tier.read(layer, shard) for layer in layers], sharding)
      return Batch(x_GBTD, *self._where(shard))

    return ahead(load, shards)

  def drop(self, layer: int) -> None:
    """Forgets the input of a layer that is distilled."""
    self._tier.drop(layer)

  def clear(self) -> None:
    """Forgets everything: the window is over."""
    self._tier.clear()
