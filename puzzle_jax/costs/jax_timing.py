"""The built-in cost backend: subblocks timed in JAX on the machine at hand, by difference between whole models.

A subblock's seconds are those of M equal layers with it less those of M equal layers without it, the other subblock
being the parent's, so that weights stream from memory as they do in a real model. What is timed is `decode_step`, the
program that `LanguageModel.generate` runs. Its attention reads the whole allocated cache, so a decode step depends on
the cache's length alone: it is timed at the scenario's own, and for the parent's block with and without attention at
twice that, to show what context costs. Programs are timed in turn, several rounds, and the fastest round counts: what
else the machine does can only add.
"""

import collections
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.arch import Architecture, BlockSpec, NoAttention, NoFFN, Subblock
from puzzle_jax.costs import CostTable, Scenario
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import decoder
from puzzle_jax.model.language_model import cache_length, decode_step, prompt_length
from puzzle_jax.progress import Progress
from puzzle_jax.space import Space


@dataclasses.dataclass(frozen=True)
class TimingConfig:
  """How costs are timed.

  Attributes:
    layers: M, of the models that subblocks are timed in.
    rounds: how often each program is timed; the fastest counts.
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
    shape = (batch, tokens)
    self._tokens = jnp.ones(shape, jnp.int32)
    self._positions = jnp.broadcast_to(start + jnp.arange(tokens), shape)
    self._last = jnp.full(batch, tokens - 1)
    self._cache = decoder.empty_cache(architecture, batch=batch, length=slots)

  def __call__(self, steps: int) -> float:
    """Seconds of one of `steps` calls in a row."""
    begin = time.perf_counter()
    for _ in range(steps):
      logits, self._cache = decode_step(
        self._architecture, self._params, self._tokens, self._positions, self._last, self._cache
      )
    logits.block_until_ready()
    return (time.perf_counter() - begin) / steps


Timed = dict[Any, tuple[float, float]]  # fastest round, and how much slower the median is, relatively


def _time(programs: dict[Any, tuple[_Program, int]], rounds: int, tick: Callable[[], Any]) -> Timed:
  for program, steps in programs.values():  # compiles and warms up
    program(1)
    program(steps)
    tick()
  seconds: dict[Any, list[float]] = collections.defaultdict(list)
  for _ in range(rounds):
    for key, (program, steps) in programs.items():
      seconds[key].append(program(steps))
      tick()
  return {key: (min(s), statistics.median(s) / min(s) - 1) for key, s in seconds.items()}


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
  """Times every subblock of a space in fp32 with random weights of the parent's shapes."""
  base = collections.Counter(parent.blocks).most_common(1)[0][0]
  subblocks = {s for layer in space.layers for s in (*layer.attention, *layer.ffn)}
  specs = {
    "base": base,
    "no attention": BlockSpec(NoAttention(), base.ffn),
    "no ffn": BlockSpec(base.attention, NoFFN()),
  }
  for s in sorted(subblocks, key=lambda s: s.id):
    specs[s.id] = dataclasses.replace(base, **{s.slot: s})
  weights = _Weights(parent, seed=0)
  costs: dict[str, dict[str, dict[str, dict[str, float]]]] = {s.id: {} for s in subblocks}
  fixed: dict[str, dict[str, dict[str, float]]] = {}
  details: dict[str, Any] = {"timing": dataclasses.asdict(config), "points": []}
  programs_each = 2 * (len(set(specs.values())) + 1) + 2
  total = len(scenarios) * len(batches) * programs_each * (config.rounds + 1)
  with progress.bar("costs", total=total, unit="timing") as bar:
    for scenario in scenarios:
      fixed[scenario.name] = {}
      for batch in batches:
        programs: dict[Any, tuple[_Program, int]] = {}
        for spec, depth in [*((s, config.layers) for s in set(specs.values())), (base, config.layers // 2)]:
          model = dataclasses.replace(parent, blocks=(spec,) * depth)
          programs |= _programs_of(
            (spec, depth),
            model,
            weights.params(spec, depth),
            scenario=scenario,
            batch=batch,
            steps=config.decode_steps,
            context_too=depth == config.layers and spec in (base, specs["no attention"]),
          )
        timed = _time(programs, config.rounds, bar.update)
        point = _Point(timed, scenario, config.layers)
        key = str(batch)
        for s in subblocks:
          without = specs["no attention" if s.slot == "attention" else "no ffn"]
          costs[s.id].setdefault(scenario.name, {})[key] = point.difference(specs[s.id], without)
        fixed[scenario.name][key] = point.fixed(base)
        details["points"] += point.records({spec: name for name, spec in reversed(specs.items())}, batch)
  return CostTable("jax", hardware(), versions(), 4, tuple(scenarios), costs, fixed, details)


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


@dataclasses.dataclass(frozen=True)
class _Point:
  """What was timed for one scenario and batch."""

  timed: Timed
  scenario: Scenario
  layers: int

  def seconds(self, spec: BlockSpec, depth: int) -> dict[str, float]:
    """Of a whole model for the scenario."""
    own = cache_length(self.scenario.tokens)
    return {
      "prefill_s": self.timed[(spec, depth), "prefill", own][0],
      "decode_s": self.timed[(spec, depth), "decode", own][0] * self.scenario.output_tokens,
    }

  def difference(self, spec: BlockSpec, without: BlockSpec) -> dict[str, float]:
    """Seconds of one subblock; a difference below zero is noise, and zero."""
    more, less = self.seconds(spec, self.layers), self.seconds(without, self.layers)
    return {phase: max(0.0, (more[phase] - less[phase]) / self.layers) for phase in more}

  def fixed(self, base: BlockSpec) -> dict[str, float]:
    """What remains of the parent's layers extrapolated to depth 0."""
    depth = self.layers // 2
    deep, shallow = self.seconds(base, self.layers), self.seconds(base, depth)
    slope = {phase: (deep[phase] - shallow[phase]) / (self.layers - depth) for phase in deep}
    return {phase: max(0.0, deep[phase] - self.layers * slope[phase]) for phase in deep}

  def records(self, names: dict[BlockSpec, str], batch: int) -> list[dict[str, Any]]:
    return [
      {
        "scenario": self.scenario.name,
        "batch": batch,
        "block": spec.name,
        "is": names[spec],
        "layers": depth,
        "phase": phase,
        "cache_slots": slots,
        "seconds": fastest,
        "spread": spread,
      }
      for ((spec, depth), phase, slots), (fastest, spread) in sorted(self.timed.items(), key=str)
    ]


def time_models(
  models: dict[str, tuple[Architecture, Any]],
  *,
  scenario: Scenario,
  batch: int,
  config: TimingConfig,
) -> dict[str, dict[str, float]]:
  """Seconds of whole models for a scenario, timed in turn: `prefill_s` and `decode_s` of all output tokens."""
  own = cache_length(scenario.tokens)
  programs: dict[Any, tuple[_Program, int]] = {}
  for name, (architecture, params) in models.items():
    programs |= _programs_of(name, architecture, params, scenario=scenario, batch=batch, steps=config.decode_steps)
  timed = _time(programs, config.rounds, lambda: None)
  return {
    name: {
      "prefill_s": timed[name, "prefill", own][0],
      "decode_s": timed[name, "decode", own][0] * scenario.output_tokens,
    }
    for name in models
  }
