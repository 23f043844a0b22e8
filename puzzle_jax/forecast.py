"""What a job of the full size needs, as text or JSON (`experiments.plan`): of `schedule` and `abstract`."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from puzzle_jax import abstract, schedule, units
from puzzle_jax.abstract import Compiled
from puzzle_jax.mesh import MeshConfig
from puzzle_jax.needs import scores_bytes
from puzzle_jax.planned import Job, Stage
from puzzle_jax.schedule import Window

COMPILED = ("library", "gkd")  # the stages whose steps are programs of the largest size
_LABELS = {
  "measured": "measured: this step on this chip",
  "scaled": "scaled: the stage was never measured on this chip; the library's measured share of the peak",
  "roofline": "roofline: the chip was never measured; its peak, so a lower bound",
}


@dataclasses.dataclass(frozen=True)
class Forecast:
  """The plan of a job.

  Attributes:
    job: what is planned.
    stages: on the splits that end them first.
    windows: what windows save and cost.
    compiled: of `COMPILED`, as far as they were compiled.
    dollars_per_hour: of a device.
  """

  job: Job
  stages: list[Stage]
  windows: list[Window]
  compiled: dict[str, Compiled]
  dollars_per_hour: float

  def to_json(self) -> dict[str, Any]:
    """Plain values: bytes, seconds, dollars."""
    stages = []
    for stage in self.stages:
      compiled = self.compiled.get(stage.name)
      hours = stage.device_hours
      stages.append(
        dataclasses.asdict(stage)
        | {"devices": stage.mesh.devices, "device_hours": hours}
        | {"dollars": None if hours is None else hours * self.dollars_per_hour}
        | {"compiled": compiled and dataclasses.asdict(compiled)}
      )
    return {
      "config": self.job.config.name,
      "parent": {"source": self.job.config.parent, "params": self.job.parent.num_params()},
      "chip": self.job.chip.name,
      "devices": self.job.devices,
      "dollars_per_hour": self.dollars_per_hour,
      "stages": stages,
      "windows": [dataclasses.asdict(window) for window in self.windows],
    }

  def __str__(self) -> str:
    return "\n".join(self._lines())

  def _lines(self) -> Iterator[str]:
    job = self.job
    params = job.parent.num_params() / 1e9
    yield f"{job.config.name} on {job.devices} x {job.chip.name}: {job.config.parent}, {params:,.1f} B parameters"
    yield f"space: {job.space}; nothing is started, no weights are read"
    yield ""
    yield (
      f"{'stage':<12} {'data x model x layer':<21} {'FLOPs':>8} {'time':>12} {'device h':>9} {'cost':>9} "
      f"{'memory each':>11} {'disk':>9}  rate"
    )
    for s in self.stages:
      mesh = f"{s.mesh.data} x {s.mesh.model} x {s.mesh.layer}"
      hours = s.device_hours
      cost = "-" if hours is None else f"${hours * self.dollars_per_hour:,.0f}"
      yield (
        f"{s.name:<12} {mesh:<21} {f'{s.flops:.1e}' if s.flops else '-':>8} {units.duration(s.seconds):>12} "
        f"{'-' if hours is None else f'{hours:,.1f}':>9} {cost:>9} {units.size(s.memory_bytes):>11}"
        f"{' ' if s.fits else '!'}{units.size(s.disk_bytes):>9}  {s.rate.basis if s.rate else '-'}"
      )
    known = [s for s in self.stages if s.seconds is not None]
    hours = sum(s.device_hours or 0.0 for s in known)
    yield (
      f"{'in all':<12} {'':<21} {sum(s.flops for s in known):>8.1e} "
      f"{units.duration(sum(s.seconds or 0.0 for s in known)):>12} {hours:>9,.1f} "
      f"{f'${hours * self.dollars_per_hour:,.0f}':>9}"
    )
    for s in self.stages:
      if not s.fits:
        yield (
          f"! {s.name} does not fit: of the {units.size(job.chip.memory_bytes)} of a device, {units.size(job.limit)} "
          "may be taken"
        )
    for basis in dict.fromkeys(s.rate.basis for s in self.stages if s.rate):
      sources = dict.fromkeys(s.rate.source for s in self.stages if s.rate and s.rate.basis == basis)
      yield f"{_LABELS[basis]} ({'; '.join(sources)})"
    yield f"cost: ${self.dollars_per_hour:g} a device and hour, assumed (--price); of the devices that a stage uses"
    yield ""
    yield from self._schedule()
    yield ""
    yield from self._windows()
    yield ""
    yield from self._memory()

  def _schedule(self) -> Iterator[str]:
    library = next(s for s in self.stages if s.name == "library")
    tokens = schedule.window_of(self.job, library.windows)
    yield "the schedule that ends first; every command of experiments.run gets"
    yield (
      f"  --config.bld.layers={library.mesh.layer} --config.activations.window_tokens={tokens} "
      f"--config.activations.tier={library.tier}"
    )
    for s in self.stages:
      mesh = [f"--config.mesh.{axis}={n}" for axis, n in dataclasses.asdict(s.mesh).items() if n > 1]
      if mesh or s.note:
        yield "  ".join(filter(None, (f"  --stages={s.name}", " ".join(mesh), s.note and f"# {s.note}")))

  def _windows(self) -> Iterator[str]:
    library = next(s for s in self.stages if s.name == "library")
    yield f"training activations on disk, {library.mesh.layer} layers side by side (states wait there between windows):"
    yield f"  {'tokens a window':>16} {'windows':>8} {'activations':>12} {'states':>10} {'library':>14}"
    for w in self.windows:
      yield (
        f"  {w.tokens:>16,} {w.windows:>8} {units.size(w.activation_bytes):>12} {units.size(w.state_bytes):>10} "
        f"{units.duration(w.seconds):>14}"
      )

  def _memory(self) -> Iterator[str]:
    yield "memory of a device, by arithmetic and as compiled on shapes alone (there attention keeps its scores,"
    yield "and for a CPU what is stored in bf16 has a copy in fp32):"
    for s in self.stages:
      if s.name not in COMPILED:
        continue
      kept = self._scores(s)
      arithmetic = s.memory_bytes + kept
      own = f" ({units.size(s.memory_bytes)} with flash attention)" if kept else ""
      line = f"  {s.name}: {units.size(arithmetic)} by arithmetic{own}"
      if (c := self.compiled.get(s.name)) is None:
        yield f"{line}; not compiled"
      elif c.refused:
        yield f"{line}; refused by the compiler for {c.backend}: {c.refused}"
      else:
        yield (
          f"{line}, {units.size(c.total)} compiled for {c.backend} ({units.size(c.arguments)} arguments), "
          f"{c.total / arithmetic:.2f} times"
        )
    if (m := self.job.measured) and m.compiled_ratio:
      yield f"  a step of the library on the chip itself: {m.compiled_ratio:.2f} times the arithmetic ({m.name})"

  def _scores(self, stage: Stage) -> float:
    """What attention adds that keeps its scores: where the compiler is no GPU's."""
    config, layer, mesh = self.job.config, self.job.layer, stage.mesh
    if not self.job.chip.tpu and stage.name not in self.compiled:
      return 0
    if stage.name == "library":
      rows = config.bld.batch_rows // mesh.data
      arrays: float = abstract.kept_scores(layer, self.job.groups[mesh.data].jobs, self.job.parent.config)
    else:  # "exact" attention keeps them anywhere, and the arithmetic has them
      rows = config.gkd.batch_rows // mesh.data
      arrays = (config.gkd.attention == "fast") / mesh.model
    return arrays * scores_bytes(layer.parent, self.job.parent, rows, config.data.seq_len)


def make(job: Job, *, dollars_per_hour: float, compiled: bool) -> Forecast:
  """Plans a job.

  Args:
    job: what.
    dollars_per_hour: of a device; 0: the chip's assumed price.
    compiled: whether the largest steps are compiled too, which takes a minute or some.
  """
  stages = schedule.stages(job)
  library = next(s for s in stages if s.name == "library")
  found = {s.name: _compiled(job, s) for s in stages if compiled and s.name in COMPILED}
  stages = [dataclasses.replace(s, fits=s.fits and _fits(job, found.get(s.name))) for s in stages]
  price = dollars_per_hour or job.chip.dollars_per_hour
  return Forecast(job, stages, schedule.windows_table(job, library.mesh), found, price)


def _fits(job: Job, compiled: Compiled | None) -> bool:
  """Whether a program fits, as far as the chip's own compiler knows."""
  if compiled is None or compiled.backend != job.chip.name:
    return True
  return not compiled.refused and compiled.total <= job.chip.memory_bytes


def _compiled(job: Job, stage: Stage) -> Compiled:
  config = job.config
  if stage.name == "gkd":
    mesh = MeshConfig(data=stage.mesh.data, model=stage.mesh.model)
    devices = abstract.devices_of(job.chip, mesh.devices)
    return abstract.gkd_step(job.parent, config.gkd, mesh, tokens=config.data.seq_len, devices=devices)
  return abstract.bld_step(
    job.layer,
    job.groups[stage.mesh.data].jobs,
    job.parent.config,
    dataclasses.replace(config.bld, layers=1),
    rows=config.bld.batch_rows // stage.mesh.data,
    tokens=config.data.seq_len,
    one_document=config.activations.attention == "fast",
    devices=abstract.devices_of(job.chip, 1),
  )
