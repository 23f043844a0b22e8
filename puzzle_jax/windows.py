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

from puzzle_jax.activations import Batch, forward, real, to_context
from puzzle_jax.arch import BlockSpec, ModelConfig
from puzzle_jax.data import PackedText
from puzzle_jax.errors import PuzzleError
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
  """Where layers' inputs lie, in shards of rows that are written whole."""

  def read(self, layer: int, rows: slice) -> Stored: ...

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
  """Of one layer's input: rows, tokens a row, width, rows a shard and how it is stored."""

  rows: int
  tokens: int
  width: int
  shard_rows: int
  dtype: str

  @property
  def size(self) -> int:
    """Bytes."""
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype in self.arrays.values())

  @property
  def shards(self) -> list[slice]:
    return [slice(i, min(i + self.shard_rows, self.rows)) for i in range(0, self.rows, self.shard_rows)]

  @property
  def arrays(self) -> dict[str, tuple[tuple[int, int, int], Any]]:
    """Shape and dtype of each stored array."""
    stored: Any = {"float8": _FP8}.get(self.dtype, self.dtype)
    arrays: dict[str, tuple[tuple[int, int, int], Any]] = {
      "x": ((self.rows, self.tokens, self.width), jnp.dtype(stored))
    }
    if self.dtype == "float8":
      arrays["scale"] = ((self.rows, self.tokens, 1), jnp.dtype(jnp.float32))
    return arrays


@functools.partial(jax.jit, donate_argnums=0)
def _place(whole: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)


@functools.partial(jax.jit, static_argnames="rows")
def _slice(whole: jax.Array, start: jax.Array, rows: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(whole, start, rows, axis=0)


class DeviceTier:
  """In the accelerator's memory."""

  def __init__(self, shape: Shape):
    self._shape = shape
    self._layers: dict[int, dict[str, jax.Array]] = {}
    self._written: dict[int, set[int]] = collections.defaultdict(set)

  def read(self, layer: int, rows: slice) -> Stored:
    count = len(range(*rows.indices(self._shape.rows)))
    return {k: _slice(a, rows.start, count) for k, a in self._layers[layer].items()}

  def write(self, layer: int, shard: int, stored: Stored) -> None:
    if layer not in self._layers:
      self._layers[layer] = {k: jnp.zeros(s, d) for k, (s, d) in self._shape.arrays.items()}
    whole, start = self._layers[layer], self._shape.shards[shard].start
    self._layers[layer] = {k: _place(whole[k], stored[k], start) for k in whole}
    self._written[layer].add(shard)

  def has(self, layer: int) -> bool:
    return len(self._written[layer]) == len(self._shape.shards)

  def drop(self, layer: int) -> None:
    self._layers.pop(layer, None)
    self._written.pop(layer, None)

  def clear(self) -> None:
    self._layers.clear()
    self._written.clear()


class HostTier:
  """In the machine's memory."""

  def __init__(self, shape: Shape):
    self._shape = shape
    self._layers: dict[int, dict[str, np.ndarray]] = {}
    self._written: dict[int, set[int]] = collections.defaultdict(set)

  def read(self, layer: int, rows: slice) -> Stored:
    return {k: a[rows] for k, a in self._layers[layer].items()}

  def write(self, layer: int, shard: int, stored: Stored) -> None:
    if layer not in self._layers:
      self._layers[layer] = {k: np.empty(s, d) for k, (s, d) in self._shape.arrays.items()}
    for k, array in self._layers[layer].items():
      array[self._shape.shards[shard]] = stored[k]
    self._written[layer].add(shard)

  def has(self, layer: int) -> bool:
    return len(self._written[layer]) == len(self._shape.shards)

  def drop(self, layer: int) -> None:
    self._layers.pop(layer, None)
    self._written.pop(layer, None)

  def clear(self) -> None:
    self._layers.clear()
    self._written.clear()


class DiskTier:
  """Tensorstore arrays under a local path (`file://…`) or a bucket (`gs://…`, `s3://…`), one chunk a shard.

  `index.json` names the shards that are whole with their SHA-256: what is not in it does not exist.

  Args:
    url: of the folder.
    shape: of a layer's input.
    key: what the window was made of; an index of another key is forgotten.
  """

  def __init__(self, url: str, shape: Shape, key: str):
    self._url, self._shape, self._key = url.rstrip("/") + "/", shape, key
    try:
      self._kv = tensorstore.KvStore.open(self._url).result()
      found = self._kv.read("index.json").result()
    except (ValueError, NotImplementedError) as e:
      raise PuzzleError(f"activations.location={url!r} cannot be opened ({e}); give a path, gs://… or s3://…") from e
    index = json.loads(found.value) if found.state == "value" else {}
    self._index: dict[str, dict[str, str]] = index["layers"] if index.get("key") == key else {}
    if index.get("key") != key:
      self._kv.delete_range(tensorstore.KvStore.KeyRange()).result()
    self._open: dict[tuple[int, str], Any] = {}

  def _save(self) -> None:
    self._kv.write("index.json", json.dumps({"key": self._key, "layers": self._index})).result()

  def _array(self, layer: int, name: str) -> Any:
    if (layer, name) not in self._open:
      size, dtype = self._shape.arrays[name]
      chunk = [self._shape.shard_rows, *size[1:]]
      spec = {
        "driver": "zarr3",
        "kvstore": f"{self._url}layer_{layer:02d}/{name}/",
        "metadata": {
          "shape": list(size),
          "data_type": dtype.name,
          "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        },
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
      }
      self._open[layer, name] = tensorstore.open(spec, open=True, create=True).result()
    return self._open[layer, name]

  def read(self, layer: int, rows: slice) -> Stored:
    """Whole shards are read and checked, then cut."""
    first = rows.start // self._shape.shard_rows
    last = (min(rows.stop, self._shape.rows) - 1) // self._shape.shard_rows
    parts = [self._shard(layer, shard) for shard in range(first, last + 1)]
    offset = first * self._shape.shard_rows
    return {k: np.concatenate([p[k] for p in parts])[rows.start - offset : rows.stop - offset] for k in parts[0]}

  def _shard(self, layer: int, shard: int) -> Stored:
    try:
      found = {k: self._array(layer, k)[self._shape.shards[shard]].read().result() for k in self._shape.arrays}
      broken = "" if _digest(found) == self._index[str(layer)][str(shard)] else "checksum"
    except ValueError as e:
      broken = str(e)
    if broken:
      self._index.pop(str(layer))
      self._save()
      raise CorruptFileError(
        f"{self._url}layer_{layer:02d}: shard {shard} is missing or corrupt ({broken}); start again: it will be made "
        "anew"
      )
    return found

  def write(self, layer: int, shard: int, stored: Stored) -> None:
    """Raises PuzzleError where there is no space left."""
    arrays = {k: np.asarray(v) for k, v in stored.items()}
    try:
      for k, array in arrays.items():
        self._array(layer, k)[self._shape.shards[shard]].write(array).result()
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
    return len(self._index.get(str(layer), ())) == len(self._shape.shards)

  def drop(self, layer: int) -> None:
    if self._index.pop(str(layer), None) is not None:
      self._save()
    for key in [k for k in self._open if k[0] == layer]:
      del self._open[key]
    prefix = f"layer_{layer:02d}/"
    self._kv.delete_range(tensorstore.KvStore.KeyRange(prefix, prefix[:-1] + "0")).result()

  def clear(self) -> None:
    self._index, self._open = {}, {}
    self._kv.delete_range(tensorstore.KvStore.KeyRange()).result()


def open_tier(tier: str, shape: Shape, *, folder: str, key: str) -> Tier:
  """One of `TIERS`; folder and key are those of the disk's."""
  if tier == "disk":
    url = folder if "://" in folder else f"file://{os.path.abspath(folder)}"
    return DiskTier(f"{url.rstrip('/')}/window", shape, key)
  return DeviceTier(shape) if tier == "device" else HostTier(shape)


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


@jax.jit
def _decode_group(stored: list[Stored]) -> jax.Array:
  return jnp.stack([decode(s) for s in stored])


@functools.partial(jax.jit, static_argnames=("spec", "config", "dtype"))
def _advance(
  spec: BlockSpec, config: ModelConfig, params: Any, stored: Stored, context: Any, real_BT: jax.Array, dtype: str
) -> tuple[Stored, dict[str, jax.Array]]:
  x, sums = forward(spec, config, params, Batch(decode(stored), context, real_BT))
  return encode(x, dtype), sums


class Window:
  """One window of training tokens.

  Args:
    config: of the model.
    packed: the rows of the window.
    tier: where they lie.
    shape: of a layer's input there.
    attention: "exact" keeps documents of a row apart by a mask; "fast" lets a row be one document, as flash attention
      needs it.
    dtype: of the matrix products of the parent's forward pass.
  """

  def __init__(self, config: ModelConfig, packed: PackedText, *, tier: Tier, shape: Shape, attention: str, dtype: str):
    self.shape, self.packed, self._config, self._tier = shape, packed, config, tier
    self._fast, self._dtype = attention == "fast", dtype

  def _where(self, rows: slice) -> tuple[Any, jax.Array]:
    return to_context(self._config, self.packed, rows, one_document=self._fast), real(self.packed, rows)

  def start(self, embed_VD: np.ndarray) -> None:
    """Makes the input of layer 0."""
    for i, rows in enumerate(self.shape.shards):
      x = jnp.asarray(embed_VD[self.packed.tokens[rows]], jnp.float32)
      self._tier.write(0, i, encode(x, self.shape.dtype))

  def latest(self, layer: int) -> int | None:
    """The last layer up to `layer` whose input is there."""
    return next((i for i in range(layer, -1, -1) if self._tier.has(i)), None)

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
    for i, stored in enumerate(ahead(lambda rows: self._tier.read(layer, rows), self.shape.shards)):
      context, real_BT = self._where(self.shape.shards[i])
      out, added = _advance(
        spec, self._config, params, stored, context.replace(dtype=jnp.dtype(self._dtype)), real_BT, self.shape.dtype
      )
      self._tier.write(layer + 1, i, out)
      sums = added if sums is None else jax.tree.map(jnp.add, sums, added)
    tokens = float(np.sum(self.packed.segment_ids > 0))
    return {slot: np.asarray(s) / tokens for slot, s in sums.items()}

  def batches(self, layers: Sequence[int], rows: Sequence[slice]) -> Iterator[Batch]:
    """Batches of the inputs of some layers, x [G, B, T, D], read ahead of the one in use."""

    def load(part: slice) -> Batch:
      x_GBTD = _decode_group([jax.tree.map(jnp.asarray, self._tier.read(layer, part)) for layer in layers])
      return Batch(x_GBTD, *self._where(part))

    return ahead(load, rows)

  def drop(self, layer: int) -> None:
    """Forgets the input of a layer that is distilled."""
    self._tier.drop(layer)

  def clear(self) -> None:
    """Forgets everything: the window is over."""
    self._tier.clear()
