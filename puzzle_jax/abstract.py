"""What the largest steps take on a device, by compiling them on shapes alone: no weights, and no such device.

The compiler is that of the host's CPU, or a TPU's where the package libtpu is installed (extra `tpu`), which needs no
TPU for it. Neither has the flash attention that a GPU's step has: attention keeps its scores (`kept_scores`); and a
CPU's compiler keeps a copy in fp32 of what is stored in bf16.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from puzzle_jax import bld, gkd
from puzzle_jax.activations import Batch
from puzzle_jax.arch import Architecture, ModelConfig
from puzzle_jax.bld import BLDConfig, Job
from puzzle_jax.chips import Chip
from puzzle_jax.data import PackedText
from puzzle_jax.gkd import GKDConfig
from puzzle_jax.mesh import MeshConfig, state_spec
from puzzle_jax.model import decoder
from puzzle_jax.space import LayerSpace


@dataclasses.dataclass(frozen=True)
class Compiled:
  """Bytes of a compiled program on each device.

  Attributes:
    backend: whose compiler.
    arguments: weights, optimiser states and inputs, which are there in any case.
    temporaries: what it keeps besides while it runs, new outputs included.
    refused: what the compiler said when the program is too large for the chip; then the bytes are 0.
  """

  backend: str
  arguments: int
  temporaries: int
  refused: str = ""

  @property
  def total(self) -> int:
    return self.arguments + self.temporaries

  @classmethod
  def of(cls, lowered: Any, backend: str) -> "Compiled":
    """Compiles."""
    try:
      found = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      return cls(backend, 0, 0, refused=next((x for x in str(e).splitlines() if "Used" in x), str(e)[:200]))
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return cls(backend, int(found.argument_size_in_bytes), int(found.temp_size_in_bytes + new))


def devices_of(chip: Chip, count: int) -> Sequence[Any]:
  """So many devices to compile for: the chip's, if its compiler is here, or the host's virtual ones."""
  if chip.tpu and importlib.util.find_spec("libtpu") is not None:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nobody to ask for the machine's own topology
    with contextlib.suppress(RuntimeError, ValueError):  # a number of chips that is no slice
      name = f"{chip.tpu}:{_slice(max(count, chip.per_host), axes=3 if chip.tpu == 'v5' else 2)}"
      return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:count]
  return jax.devices("cpu")[:count]


def _slice(count: int, *, axes: int) -> str:
  """The sides of a box of so many chips, as even as powers of two are: `2x2x1`."""
  sides = [1] * axes
  while math.prod(sides) < count:
    sides[sides.index(min(sides))] *= 2
  return "x".join(map(str, sorted(sides, reverse=axes == 3)))


def _mesh(devices: Sequence[Any], config: MeshConfig) -> Mesh:
  return Mesh(np.array(devices[: config.devices]).reshape(config.data, config.model), ("data", "model"))


def _whole(tree: Any, mesh: Mesh) -> Any:
  """The same shapes, on every device."""
  sharding = NamedSharding(mesh, P())
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _shape(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def bld_step(
  space: LayerSpace,
  jobs: tuple[Job, ...],
  config: ModelConfig,
  settings: BLDConfig,
  *,
  rows: int,
  tokens: int,
  one_document: bool,
  devices: Sequence[Any],
) -> Compiled:
  """`bld.train_step` of some jobs of one layer, on one device.

  Args:
    space: of the layer.
    jobs: trained together.
    config: of the model.
    settings: how.
    rows: of a batch on the device.
    tokens: a row.
    one_document: whether a row counts as one document (`ActivationsConfig.attention` "fast").
    devices: of which the first is compiled for.
  """
  parent = {s.slot: {k: _shape(1, *t.shape) for k, t in s.tensors(config).items()} for s in space.parent.subblocks}
  trained = bld.split(
    {
      job.name: {s.slot: {k: _shape(1, *t.shape) for k, t in s.tensors(config).items()} for s in job.subblocks}
      for job in jobs
    }
  )
  jobs = tuple(job for job in jobs if job.name in trained)
  states = jax.eval_shape(lambda weights: bld.init_states(settings, weights), trained)

  def batch(x_GBTD: jax.Array, positions_BT: jax.Array, real_BT: jax.Array) -> Batch:
    segments_BT = None if one_document else positions_BT
    return Batch(x_GBTD, decoder.context_of(config, positions_BT, segments_BT=segments_BT), real_BT)

  x_GBTD = _shape(1, rows, tokens, config.hidden_size)
  batches = jax.eval_shape(batch, x_GBTD, _shape(rows, tokens, dtype=jnp.int32), _shape(rows, tokens))
  arguments = _whole((parent, trained, states, batches, (_shape(1), _shape(1))), _mesh(devices, MeshConfig()))
  step = functools.partial(bld.train_step, space.parent, jobs, config, settings)
  return Compiled.of(jax.jit(step, donate_argnums=(1, 2)).lower(*arguments), devices[0].device_kind)


def kept_scores(space: LayerSpace, jobs: Sequence[Job], config: ModelConfig) -> int:
  """How many arrays of attention's scores a step of blockwise distillation has where attention keeps them.

  Those of the parent, and of each variant four: scores and probabilities, and the gradients of both.
  """
  attends = [s for job in jobs for s in job.subblocks if s.slot == "attention" and s.kv_bytes_per_token(config)]
  return bool(space.parent.kv_bytes_per_token(config)) + 4 * len(attends)


def gkd_step(
  architecture: Architecture, settings: GKDConfig, mesh_config: MeshConfig, *, tokens: int, devices: Sequence[Any]
) -> Compiled:
  """`gkd.train_step` of a child as large as its parent, weights and states cut over data and model, rows over data.

  Args:
    architecture: of both.
    settings: how.
    mesh_config: of which `data` must divide `settings.batch_rows`.
    tokens: a row.
    devices: to compile for.
  """
  mesh = _mesh(devices, mesh_config)
  params = jax.eval_shape(lambda key: decoder.stacked(architecture, decoder.init(architecture, key)), jax.random.key(0))
  state = jax.eval_shape(lambda params: gkd.State.first(params, settings), params)

  def cut(path: Any, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, state_spec(mesh, path, x.shape)))

  params, state = (jax.tree_util.tree_map_with_path(cut, x) for x in (params, state))
  rows = NamedSharding(mesh, P("data"))
  batch = PackedText(*[jax.ShapeDtypeStruct((settings.batch_rows, tokens), jnp.int32, sharding=rows)] * 3)  # type: ignore[arg-type]
  models = {"child": architecture, "parent": architecture}
  step = functools.partial(inspect.unwrap(gkd.train_step), **models, config=settings, mesh=mesh)
  jitted = jax.jit(step, donate_argnums=0, out_shardings=jax.tree.map(lambda x: x.sharding, state))
  return Compiled.of(jitted.lower(state, batch, params), devices[0].device_kind)
