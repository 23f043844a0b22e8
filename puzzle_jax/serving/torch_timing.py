"""Costs in the built-in PyTorch engine, by difference between whole models of random weights (imports no JAX).

The models are those of `by_difference`. They share layers and KV caches, so that all of them are in memory at once and
take turns, round by round: a drift of the machine meets all alike. A round of a model is the prefill of the scenario's
input and decode steps at three contexts (a row's own place in the cache decides what a step costs, so that contexts
need no prompts). A scenario's seconds are those of the prefill and of the steps behind it, interpolated between
contexts. A batch that does not fit the memory is recorded as not reachable.
"""

import dataclasses
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from puzzle_jax.arch import Architecture
from puzzle_jax.costs import CostTable, Scenario, Seconds
from puzzle_jax.costs.differences import quiet_mean
from puzzle_jax.errors import PuzzleError, why_no_memory
from puzzle_jax.progress import Progress
from puzzle_jax.serving import by_difference, torch_engine
from puzzle_jax.serving.by_difference import PHASES, Differences
from puzzle_jax.serving.torch_engine import Cache, RandomWeights, Session
from puzzle_jax.space import Space

ENGINE = "torch"  # in the table of capabilities

Times = dict[str, list[float]]  # by what was timed: `prefill`, or the context of a step


@dataclasses.dataclass(frozen=True)
class TimingConfig:
  """How costs are timed.

  Attributes:
    dtype: of weights and cache, one of `torch_engine.DTYPES`.
    layers: of the models that subblocks are timed in.
    rounds: the mean of the faster half counts.
    decode_steps: in one timing.
    ffn_widths: how many of the space's FFN widths are timed, the others being interpolated; 0: all.
  """

  dtype: str = "bfloat16"
  layers: int = 8
  rounds: int = 5
  decode_steps: int = 16
  ffn_widths: int = 0

  def __post_init__(self) -> None:
    if self.dtype not in torch_engine.DTYPES:
      raise PuzzleError(f"dtype={self.dtype} is not of the PyTorch engine; take {' or '.join(torch_engine.DTYPES)}")
    if self.layers < 6 or self.rounds < 1 or self.decode_steps < 1 or self.ffn_widths < 0:
      raise PuzzleError(f"layers >= 6, rounds and decode_steps >= 1 and ffn_widths >= 0 are needed; got {self}")


def measure(
  parent: Architecture,
  space: Space,
  *,
  scenarios: Sequence[Scenario],
  batches: Sequence[int],
  config: TimingConfig,
  hardware: str,
  progress: Progress,
  children: Mapping[str, Architecture] | None = None,
) -> CostTable:
  """Times every subblock of a space.

  Args:
    parent: its shapes; weights are random.
    space: of any kinds of subblocks.
    scenarios, batches: closed batches of equal requests.
    config: how.
    hardware: the machine's name.
    progress: shows it.
    children: whole models to time beside; predicted and measured seconds go to `details`.

  Raises:
    PuzzleError: nothing could be reached.
  """
  subblocks = by_difference.subblocks_of(space)
  timed = by_difference.spread_widths(subblocks, parent, config.ffn_widths)
  models = by_difference.timed_models(parent, timed, layers=config.layers, engine=ENGINE)
  whole, weights = models | dict(children or {}), RandomWeights(parent, dtype=config.dtype)
  parts: dict[str, dict[str, Differences]] = {}
  measured: dict[tuple[str, int], dict[str, Seconds]] = {}
  details: dict[str, Any] = {"timing": dataclasses.asdict(config), "points": [], "unreachable": [], "limits": {}}
  with progress.bar("costs", total=len(scenarios) * len(batches) * (config.rounds + 1), unit="round") as bar:
    for scenario in scenarios:
      for batch in sorted(batches):
        try:
          rounds = _rounds(whole, weights, scenario, batch, config, bar.update)
        except RuntimeError as e:
          if not (why := why_no_memory(str(e)).split(". ")[0]):
            raise
          torch.cuda.empty_cache()
          details["unreachable"].append({"scenario": scenario.name, "batch": batch, "why": why})
          continue
        totals = {name: _totals(rounds[name], scenario) for name in whole}
        measured[scenario.name, batch] = totals
        split = by_difference.differences(models, {name: totals[name] for name in models}, subblocks)
        parts.setdefault(scenario.name, {})[str(batch)] = split
        details["points"] += _points({n: rounds[n] for n in models}, scenario, batch)
        base, _, empty, *_ = models
        share = {phase: by_difference.share(totals[empty][phase], totals[base][phase]) for phase in PHASES}
        limit = {phase: "fixed" if share[phase] > by_difference.HOST_SHARE else "blocks" for phase in PHASES}
        details["limits"].setdefault(scenario.name, {})[str(batch)] = {"empty_to_base": share, "limit": limit}
  if not parts:
    raise PuzzleError(f"PyTorch reached none of the scenarios at any batch: {details['unreachable'][0]['why']}")
  costs, fixed = by_difference.cost_tables(parts)
  details["residuals"] = {s: {b: p.residuals for b, p in found.items()} for s, found in parts.items()}
  details["interpolation"] = {s: {b: p.interpolation for b, p in found.items()} for s, found in parts.items()}
  width = torch_engine.DTYPES[config.dtype].itemsize
  table = CostTable(
    backend="torch",
    hardware=hardware,
    versions={"torch": torch.__version__, "python": platform.python_version()},
    bytes_per_value=width,
    scenarios=tuple(s for s in scenarios if s.name in parts),
    subblocks=costs,
    fixed=fixed,
    details=details,
    kv_bytes_per_value=width,
  )
  details["children"] = [
    {"model": name, "scenario": scenario, "batch": batch, "blocks": [b.name for b in child.blocks]}
    | totals[name]
    | {"predicted": (predicted := table.predict(child.blocks, scenario, str(batch)))}
    | {"error": sum(totals[name].values()) / sum(predicted.values()) - 1}
    for (scenario, batch), totals in measured.items()
    for name, child in (children or {}).items()
  ]
  return table


def contexts(scenario: Scenario) -> list[int]:
  """Filled cache slots around which steps are timed: where the answer begins, in its middle and at its end."""
  last = max(scenario.input_tokens, scenario.tokens - 1)
  return sorted({scenario.input_tokens, (scenario.input_tokens + last) // 2, last})


def _rounds(
  models: Mapping[str, Architecture],
  weights: RandomWeights,
  scenario: Scenario,
  batch: int,
  config: TimingConfig,
  tick: Any,
) -> dict[str, Times]:
  """Seconds of each round by model, in turn; the first round, which warms up, is left out."""
  heads = [torch_engine.kv_heads(a) for a in models.values()]
  most = [max(h[i] if i < len(h) else 0 for h in heads) for i in range(max(map(len, heads)))]
  dtype = torch_engine.DTYPES[config.dtype]
  parent = next(iter(models.values())).config
  cache = Cache(parent, most, batch=batch, length=scenario.tokens + config.decode_steps, dtype=dtype)
  prompts = torch.randint(parent.vocab_size, (batch, scenario.input_tokens), device=torch_engine.device())
  sessions = {name: Session(weights.model(a), cache) for name, a in models.items()}
  found: dict[str, Times] = {name: {} for name in models}
  for i in range(config.rounds + 1):
    for name, session in sessions.items():
      for key, seconds in _once(session, prompts, scenario, config.decode_steps).items():
        if i:
          found[name].setdefault(key, []).append(seconds)
    tick()
  return found


def _once(session: Session, prompts: torch.Tensor, scenario: Scenario, steps: int) -> dict[str, float]:
  session.capture()
  torch_engine.wait()
  begin = time.perf_counter()
  session.prefill(prompts)
  torch_engine.wait()
  found = {"prefill": time.perf_counter() - begin}
  for context in contexts(scenario):
    session.at.fill_(max(0, context - steps // 2))
    torch_engine.wait()
    begin = time.perf_counter()
    session.decode(steps)
    torch_engine.wait()
    found[str(context)] = (time.perf_counter() - begin) / steps
  return found


def _steps(times: Times) -> dict[float, float]:
  """Seconds of a step by context."""
  return {float(key): quiet_mean(seconds) for key, seconds in times.items() if key != "prefill"}


def _totals(times: Times, scenario: Scenario) -> Seconds:
  """Of a whole scenario; the first token is the prefill's, each other one a step at its own context."""
  steps = _steps(times)
  within = np.arange(scenario.input_tokens, scenario.tokens - 1, dtype=float)
  decode = float(np.interp(within, list(steps), list(steps.values())).sum())
  return {"prefill_s": quiet_mean(times["prefill"]), "decode_s": decode}


def _points(rounds: Mapping[str, Times], scenario: Scenario, batch: int) -> list[dict[str, Any]]:
  """Each timing with its spread; of the middle context, how far a line between the others is from it."""
  points = []
  for name, times in rounds.items():
    steps = _steps(times)
    for key, seconds in times.items():
      mean = quiet_mean(seconds)
      point = {"scenario": scenario.name, "batch": batch, "model": name, "timed": key, "seconds": mean}
      point["spread"] = statistics.pstdev(seconds) / mean
      if len(steps) == 3 and key == str(int(list(steps)[1])):
        first, middle, last = steps
        point["affine_residual"] = float(np.interp(middle, [first, last], [steps[first], steps[last]])) / mean - 1
      points.append(point)
  return points
