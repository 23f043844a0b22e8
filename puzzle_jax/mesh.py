"""One mesh for all stages, on JAX's own runtime (docs/architecture.md): axes data, model and layer, each 1 by default.

  data   rows of a batch
  model  heads, the channels of FFNs, the vocabulary
  layer  neighbouring layers that are distilled side by side

Several processes see one mesh (`jax.distributed`); each holds the rows of its own devices. What a function here is not
told to shard is the same on every device.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from puzzle_jax import distributed
from puzzle_jax.errors import PuzzleError

AXES = ("data", "model", "layer")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis."""

  data: int = 1
  model: int = 1
  layer: int = 1

  def __post_init__(self) -> None:
    for name in AXES:
      if getattr(self, name) < 1:
        raise PuzzleError(f"mesh.{name}={getattr(self, name)} must be at least 1")

  @property
  def devices(self) -> int:
    return self.data * self.model * self.layer


def build(config: MeshConfig) -> Mesh:
  """The mesh of a run.

  Raises:
    PuzzleError: there are fewer devices, or, with several processes, more.
  """
  there = jax.device_count()
  if config.devices > there or (jax.process_count() > 1 and config.devices != there):
    raise PuzzleError(
      f"mesh: data={config.data} x model={config.model} x layer={config.layer} are {config.devices} devices and there "
      f"are {there} of {jax.default_backend()}; change mesh.data, mesh.model or mesh.layer"
    )
  sizes = tuple(getattr(config, name) for name in AXES)
  auto = (AxisType.Auto,) * len(AXES)  # the compiler places what is in between
  return jax.make_mesh(sizes, AXES, axis_types=auto, devices=jax.devices()[: config.devices])


def one_device() -> Mesh:
  """The mesh of this process's first device."""
  return jax.make_mesh((1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.local_devices()[:1])


def _layers(mesh: Mesh, count: int) -> str | None:
  """The axis of so many layers side by side, if it divides them."""
  return "layer" if count % mesh.shape["layer"] == 0 else None


def row_shards(mesh: Mesh, rows: int) -> int:
  """Into how many parts a batch of rows is cut: along `data` if that divides them."""
  return mesh.shape["data"] if rows % mesh.shape["data"] == 0 else 1


def rows_spec(mesh: Mesh, rows: int) -> P:
  """Of a batch of rows, [B, …]; see `row_shards`."""
  return P("data" if row_shards(mesh, rows) == mesh.shape["data"] else None)


def rows_on(mesh: Mesh | None, rows: int) -> NamedSharding | None:
  """`rows_spec` on its mesh; None without one."""
  return NamedSharding(mesh, rows_spec(mesh, rows)) if mesh else None


def rows_of_layers(mesh: Mesh, count: int, rows: int) -> P:
  """Of what layers side by side read, [G, B, …]."""
  return P(_layers(mesh, count), *rows_spec(mesh, rows))


def _spec_of(mesh: Mesh, path: Any, shape: tuple[int, ...]) -> P:
  """Of an array of weights, [G, …]: FFN channels lie along `model` if that divides them."""
  name = getattr(path[-1], "key", None) if path else None
  axes: list[str | None] = [_layers(mesh, shape[0]), *[None] * (len(shape) - 1)]
  axis = {"gate": -2, "up": -2, "down": -1}.get(str(name))
  if axis is not None and len(shape) == 3 and shape[axis] % mesh.shape["model"] == 0:
    axes[axis] = "model"
  return P(*axes)


def place_layers(mesh: Mesh, tree: Any) -> Any:
  """Weights, optimiser states and numbers of layers side by side, [G, …], on their devices."""
  return jax.tree_util.tree_map_with_path(
    lambda path, x: place(mesh, np.asarray(x), _spec_of(mesh, path, np.shape(x))), tree
  )


def shapes_of_layers(mesh: Mesh, tree: Any) -> Any:
  """Shapes and shardings of what `place_layers` makes of such arrays, to compile for."""

  def shape(path: Any, x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, _spec_of(mesh, path, x.shape)))

  return jax.tree_util.tree_map_with_path(shape, tree)


def place(mesh: Mesh, whole: np.ndarray, spec: P) -> jax.Array:
  """An array that every process has, on its devices."""
  return jax.make_array_from_callback(whole.shape, NamedSharding(mesh, spec), lambda index: whole[index])


def vocabulary_spec(mesh: Mesh, size: int) -> P:
  """Of an LM head [V, D] that each device needs for its rows: V along `model` if that divides it."""
  return P("model" if size % mesh.shape["model"] == 0 else None)


def cache_spec(mesh: Mesh, shape: tuple[int, ...]) -> P:
  """Of keys or values [B, K, S, H]: heads along `model` if that divides them."""
  return P(None, "model" if shape[1] % mesh.shape["model"] == 0 else None)


def laid(mesh: Mesh, x: jax.Array, spec: P) -> jax.Array:
  """Within a compiled program: an array as it shall lie on a mesh."""
  return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


@functools.cache
def _relaid(sharding: NamedSharding) -> Any:
  return jax.jit(lambda x: x, out_shardings=sharding)


def put(mesh: Mesh, tree: Any, spec: P) -> Any:
  """Arrays on the devices of a mesh: what every process has, on its own devices or off them, or what lies there."""
  sharding = NamedSharding(mesh, spec)
  if not mesh.is_multi_process:
    return jax.device_put(tree, sharding)

  def spread(x: Any) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return x if x.sharding == sharding else _relaid(sharding)(x)
    return place(mesh, np.asarray(x), spec)

  return jax.tree.map(spread, tree)


def mesh_of(tree: Any) -> Mesh | None:
  """The mesh that weights lie on (`shard_weights`); None: a single device."""
  sharding = getattr(jax.tree.leaves(tree)[0], "sharding", None)
  mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
  return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


_ACROSS = {"embed": -2, "head": -2, "q": -2, "k": -2, "v": -2, "o": -1, "gate": -2, "up": -2, "down": -1}


def weights_spec(mesh: Mesh, path: Any, shape: tuple[int, ...]) -> P:
  """Of an array of a model that is read only (tensor parallelism): heads, channels and the vocabulary lie along `model`
  if that divides them; the rest is on every device.
  """
  across = _ACROSS.get(str(getattr(path[-1], "key", None)) if path else "")
  if across is None or len(shape) < 2 or shape[across] % mesh.shape["model"]:
    return P()
  return P(*("model" if i == across % len(shape) else None for i in range(len(shape))))


def state_spec(mesh: Mesh, path: Any, shape: tuple[int, ...]) -> P:
  """Of an array of a model that is trained whole, or of its optimiser (FSDP and tensor parallelism).

  As `weights_spec`, and what lies along `model` lies along `data` within that; what cannot be cut there so often, and
  everything else, lies along `data` by its longest axis that can.
  """
  along = tuple(weights_spec(mesh, path, shape)) or (None,) * len(shape)
  axes: list[tuple[str, ...]] = [() if name is None else (name,) for name in along]
  order = sorted(range(len(shape)), key=lambda i: (not axes[i], -shape[i]))
  for i in order:
    if shape[i] > 1 and shape[i] % math.prod(mesh.shape[name] for name in (*axes[i], "data")) == 0:
      axes[i] += ("data",)
      break
  return P(*(names or None for names in axes))


def shard_weights(mesh: Mesh, tree: Any) -> Any:
  """Weights that every process has, or that lie on the mesh already, on its devices (`weights_spec`)."""
  return jax.tree_util.tree_map_with_path(lambda path, x: put(mesh, x, weights_spec(mesh, path, x.shape)), tree)


def shard_state(mesh: Mesh, tree: Any) -> Any:
  """A model's weights that every process has, or its optimiser's states, on their devices (`state_spec`)."""
  return jax.tree_util.tree_map_with_path(lambda path, x: put(mesh, x, state_spec(mesh, path, x.shape)), tree)


def keep_sharded(mesh: Mesh, tree: Any) -> Any:
  """Within a compiled step: its output as `shard_state` lays it."""
  return jax.tree_util.tree_map_with_path(lambda path, x: laid(mesh, x, state_spec(mesh, path, x.shape)), tree)


def local_rows(array: jax.Array) -> np.ndarray:
  """This process's rows of an array that is sharded over `data` along its first axis."""
  parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def from_local_rows(mesh: Mesh, local: np.ndarray, rows: int) -> jax.Array:
  """The inverse of `local_rows`, for an array of so many rows in all."""
  return jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), local, (rows, *local.shape[1:]))


def gathered(tree: Any) -> Any:
  """Arrays of a tree, whole and on this process's first device: what is small is done there alone."""
  own = jax.tree.map(lambda x: x if x.is_fully_addressable else fetch(x), tree)
  return jax.device_put(own, jax.local_devices()[0])


def of_first(tree: Any) -> Any:
  """Process 0's NumPy arrays, in all processes: what each computed by itself may differ in its last bits."""
  return multihost_utils.broadcast_one_to_all(tree) if distributed.count() > 1 else tree


def fetch(tree: Any) -> Any:
  """NumPy arrays of a tree of arrays, whole on every process."""

  def whole(x: Any) -> Any:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
      return multihost_utils.process_allgather(x, tiled=True)
    return jax.device_get(x)

  return jax.tree.map(whole, tree)
