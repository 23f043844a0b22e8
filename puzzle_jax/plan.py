"""What a run would do, and what it would take, before it is started (`experiments.run --dry_run`)."""

import dataclasses
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from puzzle_jax import pipeline, preflight, units
from puzzle_jax.config import RunConfig
from puzzle_jax.costs import jax_timing
from puzzle_jax.needs import Need, needs
from puzzle_jax.runs import Run
from puzzle_jax.store import MANIFEST, StageStore

_NEAR = 10.0  # how many times another run's FLOPs may differ for its seconds to say anything
# Of the rate of matrix products, what the quickstart's stages reach: half of it, where they do not decode.
_SHARE, _SHARES = 0.5, {"costs": 0.07, "evaluation": 0.3}
_EARLIER = "from the seconds that {} took on this hardware, scaled by FLOPs where a stage has any"
_FLOPS = "from FLOPs at shares of the {:.3g} TFLOP/s that fp32 products reach here: may be off several times"


@dataclasses.dataclass(frozen=True)
class StagePlan:
  """A stage of the plan.

  Attributes:
    name: of the stage.
    todo: why it has to be made; None: it is done.
    need: of it, by arithmetic.
    seconds: expected; None where nothing is known.
    source: what the seconds are taken from.
  """

  name: str
  todo: str | None
  need: Need
  seconds: float | None
  source: str


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a run would do.

  Attributes:
    run: that would be started.
    stages: all that were asked for.
  """

  run: Run
  stages: tuple[StagePlan, ...]

  def __str__(self) -> str:
    return "\n".join(self._lines())

  def _lines(self) -> Iterator[str]:
    parent, root = self.run.parent, self.run.workdir.root
    todo = [s for s in self.stages if s.todo]
    sources = list(dict.fromkeys(s.source for s in todo if s.source))
    yield f"plan of {self.run.config.name} in {root}; nothing is started"
    yield f"parent {parent.name}, {parent.architecture.num_params() / 1e6:,.1f} M parameters; space: {self.run.space}"
    yield ""
    yield f"{'stage':<12} {'disk':>10} {'memory':>10} {'time':>10}      to do"
    for stage in self.stages:
      if not stage.todo:
        store = self.run.store(stage.name)
        done = "done; made again if a new child needs what was cleaned" if store.cleaned else "done"
        yield f"{stage.name:<12} {units.size(store.size):>10} {'':>10} {'':>10}      {done}"
        continue
      letter = f"({'abcdefgh'[sources.index(stage.source)]})" if stage.source else ""
      cells = (units.size(stage.need.disk_bytes), units.size(stage.need.memory_bytes), units.duration(stage.seconds))
      yield f"{stage.name:<12} {cells[0]:>10} {cells[1]:>10} {cells[2]:>10} {letter:<4} {stage.todo}"
    if todo:
      disk = sum(s.need.disk_bytes for s in todo)
      peak = max(s.need.memory_bytes for s in todo)
      time_ = units.duration(sum(s.seconds or 0 for s in todo))
      yield (
        f"{'at most':<12} {units.size(disk):>10} {units.size(peak):>10} {time_:>10}      "
        f"{len(todo)} of {len(self.stages)} stages"
      )
      yield f"{'there are':<12} {units.size(_free(root)):>10} {units.size(preflight.memory_bytes()):>10}"
      yield ""
      for i, source in enumerate(sources):
        yield f"({'abcdefgh'[i]}) {source}"
      yield "memory: weights, optimiser states, stored rows on the device, by arithmetic; compiled programs add to it"


def _free(root: Path) -> int:
  while not root.exists():
    root = root.parent
  return shutil.disk_usage(root).free


def _earlier(root: Path, stage: str, need: Need, hardware: str) -> tuple[float, str] | None:
  """The seconds of a stage as the latest run beside this one, on the same hardware, recorded and scaled them."""
  for path in sorted(root.absolute().parent.glob(f"*/{stage}/{MANIFEST}"), key=os.path.getmtime, reverse=True):
    record = StageStore(path.parent).record
    if record.get("hardware") != hardware or record.get("resumed", True):
      continue
    if bool(record["flops"]) != bool(need.flops):
      continue
    scale = need.flops / record["flops"] if record["flops"] else 1.0
    if not 1 / _NEAR <= scale <= _NEAR:
      continue
    return record["timing"]["seconds"] * scale, str(root.parent / path.parent.parent.name)
  return None


def _matmul_rate() -> float:
  """FLOP/s of fp32 matrix products on the device, of a second's test."""
  size = 2048
  x = jnp.ones((size, size))
  product = jax.jit(lambda x: x @ x)
  product(x).block_until_ready()
  times: list[float] = []
  end = time.perf_counter() + 0.5
  while len(times) < 3 or time.perf_counter() < end:
    begin = time.perf_counter()
    product(x).block_until_ready()
    times.append(time.perf_counter() - begin)
  return 2 * size**3 / statistics.median(times)


def make(config: RunConfig, workdir: str | os.PathLike[str], *, stages: Sequence[str] = ()) -> Plan:
  """Plans what `pipeline.run` would do; writes nothing.

  Args:
    config: of the run.
    workdir: its directory, which need not exist.
    stages: names of stages; all when empty.

  Raises:
    PuzzleError: what `pipeline.run` would refuse before it starts; also a target that no child meets, where the costs
      are there already.
  """
  run = Run(config, workdir, quiet=True)
  preflight.check(run)
  pipeline.check_identity(run)
  need = needs(config, run.parent.architecture, run.space)
  todo: dict[str, str] = {}
  for stage in pipeline.selected(stages):
    store = run.store(stage.name)
    reason = pipeline.status(stage, run, store)
    if reason is None and (again := [name for name in stage.inputs if name in todo]):
      reason = f"only if {' or '.join(again)} comes out different"
    if reason is not None:
      todo[stage.name] = reason
    elif stage.check is not None:
      stage.check(run)
  hardware, rate = jax_timing.hardware(), 0.0
  planned = []
  for stage in pipeline.selected(stages):
    own = need.get(stage.name, Need())
    seconds, source = None, ""
    if stage.name in todo:
      if earlier := _earlier(run.workdir.root, stage.name, own, hardware):
        seconds, source = earlier[0], _EARLIER.format(earlier[1])
      elif own.flops:
        rate = rate or _matmul_rate()
        seconds, source = own.flops / rate / _SHARES.get(stage.name, _SHARE), _FLOPS.format(rate / 1e12)
    planned.append(StagePlan(stage.name, todo.get(stage.name), own, seconds, source))
  return Plan(run, tuple(planned))
