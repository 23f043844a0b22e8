"""The built-in cost backend: subblocks timed in JAX on the machine at hand, by difference between whole models.

Timed are models of M equal layers, each with one variant beside the parent's other subblock, and models without
attention, without FFN, and of half the depth; weights stream from memory as they do in a real model. One least-squares
fit explains their seconds by a fixed part and what each subblock adds to a layer. What is timed is `decode_step`, a
program of the whole model. Its attention reads the whole allocated cache, so a decode step depends on
the cache's length alone: it is timed at the scenario's own, and for the parent's block with and without attention at
twice that, to show what context costs.

Programs are timed in turn, several rounds, and the mean of each one's faster half counts. On a shared two-core machine
whose speed drifts by 20 %, ten rounds of this and the fit predict a child's speed-up to +-0.008; the fastest round and
plain differences, to +-0.021 (one standard deviation, 30 rounds of the quickstart's programs).
"""

import collections
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from puzzle_jax import mesh as mesh_lib
from puzzle_jax.arch import Architecture, BlockSpec, NoAttention, NoFFN, Subblock
from puzzle_jax.costs import CostTable, Scenario
from puzzle_jax.costs.differences import fit, quiet_mean
from puzzle_jax.errors import PuzzleError, why_no_memory
from puzzle_jax.model.language_model import cache_length, decode_step, empty_cache, prompt_length
from puzzle_jax.progress import Progress
from puzzle_jax.space import Space


@dataclasses.dataclass(frozen=True)
class TimingConfig:
  """How costs are timed.

  Attributes:
    layers: M, of the models that subblocks are timed in.
    rounds: how often each program is timed; the mean of its faster half counts.
    decode_steps: steps in one timing.
  """

  layers: int = 12
  rounds: int = 5
  decode_steps: int = 8

  def __post_init__(self) -> None:
    if self.layers < 2 or self.rounds < 1 or self.decode_steps < 1:
      raise PuzzleError(f"costs: layers >= 2, rounds >= 1 and decode_steps >= 1 are needed; got {self}")


def hardware() -> str:
  """The device's name: the GPU's, or the processor's with the number of usable cores."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return f"{jax.device_count()} x {device.device_kind}"
  names = []
  if platform.system() == "Linux":
    with open("/proc/cpuinfo") as f:
      names = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
  return f"{len(names) or 1} cores of {names[0] if names else platform.processor() or platform.machine()}"


def versions() -> dict[str, str]:
  return {"jax": jax.__version__, "python": platform.python_version()}


class _Program:
  """Prefill or decode of one model, compiled, its state kept between timings."""

  def __init__(self, architecture: Architecture, params: Any, *, batch: int, tokens: int, start: int, slots: int):
    self._architecture, self._params, self._steps = architecture, params, 0
    self._mesh, shape = mesh_lib.mesh_of(params), (batch, tokens)
    where = (
      jnp.ones(shape, jnp.int32),
      jnp.broadcast_to(start + jnp.arange(tokens), shape),
      jnp.full(batch, tokens - 1),
    )
    self._where = where if self._mesh is None else mesh_lib.put(self._mesh, where, P())
    self._cache = empty_cache(architecture, self._mesh, batch=batch, length=slots)

  def __call__(self, steps: int) -> float:
    """Seconds of one of `steps` calls in a row."""
    begin = time.perf_counter()
    for _ in range(steps):
      logits, self._cache = decode_step(self._architecture, self._params, *self._where, self._cache, mesh=self._mesh)
    logits.block_until_ready()
    return (time.perf_counter() - begin) / steps


class Timing(NamedTuple):
  """Of a program: the mean of its faster half, the standard deviation relative to that, and the seconds by round."""

  seconds: float
  spread: float
  rounds: tuple[float, ...] = ()


def _time(programs: dict[Any, tuple[_Program, int]], rounds: int, tick: Callable[[], Any]) -> dict[Any, Timing]:
  for program, steps in programs.values():  # compiles and warms up
    program(1)
    program(steps)
    tick()
  seconds: dict[Any, list[float]] = collections.defaultdict(list)
  for _ in range(rounds):
    for key, (program, steps) in programs.items():
      seconds[key].append(program(steps))
      tick()
  quiet = {key: quiet_mean(s) for key, s in seconds.items()}
  return {key: Timing(quiet[key], statistics.pstdev(s) / quiet[key], tuple(s)) for key, s in seconds.items()}


def _programs_of(
  name: Any,
  architecture: Architecture,
  params: Any,
  *,
  scenario: Scenario,
  batch: int,
  steps: int,
  context_too: bool = False,
) -> dict[Any, tuple[_Program, int]]:
  """Prefill and decode with the scenario's cache, and decode with one twice as long where context is to be seen."""
  own, tokens = cache_length(scenario.tokens), prompt_length(scenario.input_tokens)
  prefill = _Program(architecture, params, batch=batch, tokens=tokens, start=0, slots=own)
  programs = {(name, "prefill", own): (prefill, 1)}
  for slots in (own, 2 * own) if context_too else (own,):
    decode = _Program(architecture, params, batch=batch, tokens=1, start=scenario.input_tokens, slots=slots)
    programs[name, "decode", slots] = (decode, steps)
  return programs


def measure(
  parent: Architecture,
  space: Space,
  *,
  scenarios: Sequence[Scenario],
  batches: Sequence[int],
  config: TimingConfig,
  progress: Progress,
) -> CostTable:
  """Times every subblock of a space in fp32 with random weights of the parent's shapes.

  Raises:
    PuzzleError: no scenario fits the memory at any batch; those that do not are in `details`.
  """
  base = collections.Counter(parent.blocks).most_common(1)[0][0]
  subblocks = {s for layer in space.layers for s in (*layer.attention, *layer.ffn)}
  without_attention = BlockSpec(NoAttention(), base.ffn)
  specs = {base, without_attention, BlockSpec(base.attention, NoFFN())}
  specs |= {dataclasses.replace(base, **{s.slot: s}) for s in subblocks}
  models = [(base, config.layers // 2), *((spec, config.layers) for spec in sorted(specs, key=lambda s: s.name))]
  weights = _Weights(parent, seed=0)
  costs: dict[str, dict[str, dict[str, dict[str, float]]]] = {s.id: {} for s in subblocks}
  fixed: dict[str, dict[str, dict[str, float]]] = {}
  details: dict[str, Any] = {"timing": dataclasses.asdict(config), "points": [], "unreachable": []}

  def programs(scenario: Scenario, batch: int) -> dict[Any, tuple[_Program, int]]:
    found: dict[Any, tuple[_Program, int]] = {}
    for spec, depth in models:
      found |= _programs_of(
        (spec, depth),
        dataclasses.replace(parent, blocks=(spec,) * depth),
        weights.params(spec, depth),
        scenario=scenario,
        batch=batch,
        steps=config.decode_steps,
        context_too=depth == config.layers and spec in (base, without_attention),
      )
    return found

  total = len(scenarios) * len(batches) * (2 * len(models) + 2) * (config.rounds + 1)
  with progress.bar("costs", total=total, unit="timing") as bar:
    for scenario in scenarios:
      for batch in batches:
        try:
          timed = _time(programs(scenario, batch), config.rounds, bar.update)
        except jax.errors.JaxRuntimeError as e:
          if not (why := why_no_memory(str(e))):
            raise
          details["unreachable"].append({"scenario": scenario.name, "batch": batch, "why": why})
          continue
        own, key = cache_length(scenario.tokens), str(batch)
        fits = {}
        for phase, times in (("prefill_s", 1), ("decode_s", scenario.output_tokens)):
          seconds = [timed[model, phase.removesuffix("_s"), own].seconds * times for model in models]
          fits[phase] = fit([(spec,) * depth for spec, depth in models], seconds)
        for s in subblocks:
          costs[s.id].setdefault(scenario.name, {})[key] = {phase: fit.of(s) for phase, fit in fits.items()}
        fixed.setdefault(scenario.name, {})[key] = {phase: fit.fixed for phase, fit in fits.items()}
        for ((spec, depth), phase, slots), found in timed.items():
          point = {"scenario": scenario.name, "batch": batch, "block": spec.name, "layers": depth, "phase": phase}
          point |= {"cache_slots": slots, "seconds": found.seconds, "spread": found.spread}
          if slots == own:
            point["residual"] = fits[f"{phase}_s"].residuals[models.index((spec, depth))]
          details["points"].append(point)
  if not fixed:
    raise PuzzleError(f"JAX reached none of the scenarios at any batch: {details['unreachable'][0]['why']}")
  reached = tuple(s for s in scenarios if s.name in fixed)
  return CostTable("jax", hardware(), versions(), 4, reached, costs, fixed, details)


class _Weights:
  """Random weights of the parent's shapes; layers do not share memory, models share layers."""

  def __init__(self, parent: Architecture, *, seed: int):
    self._parent, self._rng = parent, np.random.default_rng(seed)
    head = {name: self._draw(t.shape) for name, t in parent.head_tensors().items()}
    self._head, self._made = head, dict[tuple[Subblock, int], Any]()

  def _draw(self, shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(self._rng.standard_normal(shape, np.float32) * 0.02)

  def _subblock(self, spec: Subblock, layer: int) -> Any:
    if (spec, layer) not in self._made:
      shapes = {name: t.shape for name, t in spec.tensors(self._parent.config).items()}
      self._made[spec, layer] = {name: self._draw(shape) for name, shape in shapes.items()}
    return self._made[spec, layer]

  def params(self, spec: BlockSpec, depth: int) -> Any:
    return self._head | {"layers": [{s.slot: self._subblock(s, i) for s in spec.subblocks} for i in range(depth)]}


def time_models(
  models: dict[str, tuple[Architecture, Any]],
  *,
  scenario: Scenario,
  batch: int,
  config: TimingConfig,
) -> dict[str, dict[str, Any]]:
  """Seconds of whole models for a scenario, timed in turn.

  Returns:
    By model: `prefill_s`, and `decode_s` of all output tokens; and under `rounds` the same of each round, in which
    the models took turns.
  """
  own = cache_length(scenario.tokens)
  programs: dict[Any, tuple[_Program, int]] = {}
  for name, (architecture, params) in models.items():
    programs |= _programs_of(name, architecture, params, scenario=scenario, batch=batch, steps=config.decode_steps)
  timed, found = _time(programs, config.rounds, lambda: None), {}
  for name in models:
    phases = {
      "prefill_s": (timed[name, "prefill", own], 1),
      "decode_s": (timed[name, "decode", own], scenario.output_tokens),
    }
    rounds = {phase: [seconds * times for seconds in timing.rounds] for phase, (timing, times) in phases.items()}
    found[name] = {phase: timing.seconds * times for phase, (timing, times) in phases.items()} | {"rounds": rounds}
  return found
