"""What the limits cost: the frontier, each limit's price, the layers that never change (paper section 5). No JAX."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from puzzle_jax.errors import PuzzleError
from puzzle_jax.search.infeasible import infeasible
from puzzle_jax.search.limits import GIB, Limits
from puzzle_jax.search.program import Program, Tables, programs
from puzzle_jax.search.solution import Solution, best_child, in_parallel


@dataclasses.dataclass(frozen=True)
class FrontierPoint:
  """The best child at one value of the swept limit; None: nothing meets it."""

  value: float
  solution: Solution | None


def frontier(
  table: Tables,
  limit: str,
  values: Sequence[float],
  *,
  limits: Limits | None = None,
  scenario: str | None = None,
  batch: int | None = None,
  freeze: Mapping[int, str] | None = None,
  gap: float = 0.0,
) -> list[FrontierPoint]:
  """The best child at each value of one limit, in the order of `values`; solved in parallel.

  (Starting each solve from its neighbour's child saved 8 % where it was measured, less than a second thread.)

  Args:
    table: scores and costs.
    limit: a field of `Limits`.
    values: what to set it to.
    limits: the other limits.
    scenario: this and the rest as in `search.solve`.
    batch: requests at once.
    freeze: blocks that layers are held to.
    gap: relative optimality gap.

  Raises:
    PuzzleError: no such limit.
  """
  known = [f.name for f in dataclasses.fields(Limits)]
  if limit not in known:
    raise PuzzleError(f"limit {limit!r} is unknown; known: {', '.join(known)}")

  def at(value: float) -> list[Program]:
    asked = dataclasses.replace(limits or Limits(), **{limit: value})
    return programs(table, asked, scenario=scenario, batch=batch, freeze=freeze)

  return in_parallel(lambda value: FrontierPoint(value, best_child(at(value), gap)), values)


@dataclasses.dataclass(frozen=True)
class LayerStability:
  """The block that a layer has most often along a frontier."""

  layer: int
  block: str
  share: float  # of the children, 0 to 1


def stable_layers(solutions: Iterable[Solution]) -> list[LayerStability]:
  """How steady each layer's block is over several children, such as those of a frontier."""
  layers = []
  for i, blocks in enumerate(zip(*(s.blocks for s in solutions), strict=True)):
    block, count = Counter(blocks).most_common(1)[0]
    layers.append(LayerStability(i, block, count / len(blocks)))
  return layers


def frontier_json(limit: str, points: Sequence[FrontierPoint]) -> dict[str, Any]:
  """The content of `frontier.json`: the points, and how stable each layer is along them."""
  stable = stable_layers(p.solution for p in points if p.solution)
  return {
    "limit": limit,
    "points": [{"value": p.value, "solution": p.solution and p.solution.to_json()} for p in points],
    "stable_layers": [dataclasses.asdict(layer) for layer in stable],
  }


@dataclasses.dataclass(frozen=True)
class Sensitivity:
  """What one limit costs, from neighbouring solves."""

  limit: str
  value: float
  binding: bool  # the best child without it has a lower score,
  score_without: float  # this one
  relaxed: float  # the limit a step looser: 1 GiB more memory, 1 % of anything else
  score_relaxed: float  # the best score then
  gain: float  # how much lower that is than now: what the step buys

  def __str__(self) -> str:
    memory = self.limit == "max_memory_bytes"
    limit = f"{self.limit}={f'{self.value / GIB:.6g} GiB' if memory else f'{self.value:.9g}'}"
    if not self.binding:
      return f"{limit} does not bind"
    step = "1 GiB more" if memory else "1 % looser"
    return (
      f"{limit} binds: {step} would lower the score by {self.gain:.4g} to {self.score_relaxed:.6g}, "
      f"no such limit to {self.score_without:.6g}"
    )


def sensitivity(
  table: Tables,
  limits: Limits,
  *,
  scenario: str | None = None,
  batch: int | None = None,
  freeze: Mapping[int, str] | None = None,
) -> list[Sensitivity]:
  """Which limits bind and what relaxing each by a step would buy; arguments as in `solve`."""

  def best(asked: Limits) -> float:
    tried = programs(table, asked, scenario=scenario, batch=batch, freeze=freeze)
    if (child := best_child(tried, 0.0)) is None:
      raise infeasible(tried)
    return child.score

  here = best(limits)

  def one(limit: str, value: float) -> Sensitivity:
    step = GIB if limit == "max_memory_bytes" else 0.01 * value
    relaxed = value + step if limit.startswith("max") else value - step
    without = best(dataclasses.replace(limits, **{limit: None}))
    score = best(dataclasses.replace(limits, **{limit: relaxed})) if without < here else here
    return Sensitivity(limit, value, without < here, without, relaxed, score, here - score)

  return in_parallel(lambda item: one(*item), limits.items())
