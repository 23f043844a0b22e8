"""A job that is planned on chips that are not here (`schedule`): what it is, and what a stage of it takes."""

import dataclasses
import functools
from pathlib import Path

from puzzle_jax import bld, flops, memory, rates
from puzzle_jax.arch import Architecture
from puzzle_jax.chips import Chip
from puzzle_jax.config import RunConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.mesh import MeshConfig
from puzzle_jax.needs import Need, needs
from puzzle_jax.rates import Rate
from puzzle_jax.space import LayerSpace, Space

SHARE = 0.9  # of a device's memory, as `memory` has it


def divisors(n: int) -> list[int]:
  """Of a number, itself included."""
  return [i for i in range(1, n + 1) if n % i == 0]


@dataclasses.dataclass(frozen=True)
class Groups:
  """Groups in which a layer's variants are trained: their number, the largest, its bytes, and whether they fit."""

  count: int
  jobs: tuple[bld.Job, ...]
  memory_bytes: int
  fits: bool


@dataclasses.dataclass(frozen=True)
class Job:
  """What is planned.

  Attributes:
    config: of the run; its mesh is not read.
    parent: the architecture.
    space: of the search.
    chip: of each device.
    devices: that there are.
    host_bytes: memory of one host, half of which may hold activations.
    storage_bytes_per_s: of the work directory, for all hosts together.
    disk_bytes: that the library may take at once.
    records: folder of measurements (`rates`).
  """

  config: RunConfig
  parent: Architecture
  space: Space
  chip: Chip
  devices: int
  host_bytes: float
  storage_bytes_per_s: float
  disk_bytes: float
  records: Path

  def __post_init__(self) -> None:
    for name in ("devices", "storage_bytes_per_s", "disk_bytes"):
      if getattr(self, name) <= 0:
        raise PuzzleError(f"plan: {name}={getattr(self, name)} must be above 0")

  @functools.cached_property
  def needs(self) -> dict[str, Need]:
    """Of each stage on one device."""
    return dict(needs(dataclasses.replace(self.config, mesh=MeshConfig()), self.parent, self.space))

  @functools.cached_property
  def layer(self) -> LayerSpace:
    """The layer whose variants are the largest."""
    return max(set(self.space.layers), key=lambda x: sum(s.num_params(self.parent.config) for s in x.variants))

  @property
  def step_flops_per_token(self) -> int:
    """Of a step of blockwise distillation, a layer."""
    target, context = self.config.bld.attention_target, self.config.data.seq_len // 2
    return flops.decoupled_step(self.layer, self.parent.config, context=context, attention_target=target)

  @functools.cached_property
  def measured(self) -> rates.Measured | None:
    """The step on this chip that is nearest to this job's."""
    target = self.config.bld.attention_target
    return rates.measured(self.records, self.chip, attention_target=target, flops_per_token=self.step_flops_per_token)

  @functools.cached_property
  def groups(self) -> dict[int, "Groups"]:
    """How a layer's variants are trained, by devices along `data`."""
    settings = dataclasses.replace(self.config.bld, layers=1, memory_gib=self.limit / 2**30)
    config, jobs, found = self.parent.config, bld.decoupled(self.layer), {}
    for data in divisors(settings.batch_rows):
      rows, tokens = settings.batch_rows // data, self.config.data.seq_len
      try:
        plan = memory.Plan.of(self.layer.parent, jobs, config, settings, rows=rows, tokens=tokens)
      except PuzzleError:  # one variant alone is too large
        largest = max(jobs, key=lambda job: job.num_params(config))
        need = memory.need(self.layer.parent, (largest,), config, settings, rows=rows, tokens=tokens)
        found[data] = Groups(len(jobs), (largest,), need.total, False)
        continue
      need, group = max(zip(plan.needs, plan.groups, strict=True), key=lambda pair: pair[0].total)
      found[data] = Groups(len(plan.groups), group, need.total, True)
    return found

  @property
  def limit(self) -> float:
    """Bytes that a step may take on a device."""
    return SHARE * self.chip.memory_bytes


@dataclasses.dataclass(frozen=True)
class Stage:
  """A stage on a split of the devices.

  Attributes:
    name: of the stage.
    mesh: the split.
    flops: of matrix products, on all devices.
    seconds: expected; None where nothing is known.
    rate: what they are reckoned with.
    memory_bytes: on each device, by arithmetic.
    disk_bytes: in its folder at once.
    fits: whether a device has that memory.
    note: for people.
    windows: of the library.
    groups: of variants that the library trains one after the other.
    tier: where its activations lie.
  """

  name: str
  mesh: MeshConfig
  flops: float
  seconds: float | None
  rate: Rate | None
  memory_bytes: float
  disk_bytes: float
  fits: bool
  note: str = ""
  windows: int = 1
  groups: int = 1
  tier: str = ""

  @property
  def device_hours(self) -> float | None:
    """Of all devices of the split; None where the time is not known."""
    return None if self.seconds is None else self.seconds * self.mesh.devices / 3600
