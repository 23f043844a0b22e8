"""The search: the best child under limits, as a mixed-integer program (paper section 5). Imports no JAX.

Minimise Σ score[l, j]·x[l, j] over binary x with Σ_j x[l, j] = 1 in every layer l. Every limit bounds a sum over the
blocks from above: a throughput of at least T is a run time of at most batch·tokens / T. The batch is no variable: the
program is solved at each measured batch and the best child kept.

HiGHS computes in floating point, so each answer is checked in exact arithmetic; one that breaks a limit is cut off and
the program solved again.

Ties: of two batches with equal scores the one with the higher throughput wins, then the smaller. At one batch HiGHS is
deterministic; after it each layer, first to last, takes the first of its variants that has exactly the same score and
leaves all limits met.
"""

import copy
import dataclasses
import decimal
import functools
import math
import operator
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import cvxpy as cp
import numpy as np
import scipy.sparse

from puzzle_jax.errors import PuzzleError
from puzzle_jax.table import Figures, Scenario, Table, exact

GIB = 2**30
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What a child must meet in each scenario; None: no such limit. Speedups and ratios compare with the parent."""

  max_memory_bytes: float | None = None  # weights, and KV cache of the whole batch at full length
  max_runtime_s: float | None = None  # prefill and decode of the whole batch
  min_throughput: float | None = None  # input + output tokens/s
  max_first_token_s: float | None = None  # prefill of the whole batch
  max_token_s: float | None = None  # decode of the whole batch, per output token
  max_params: float | None = None
  max_kv_bytes_per_token: float | None = None  # of all layers
  min_speedup: float | None = None  # throughput over the parent's at the same batch and scenario
  min_decode_speedup: float | None = None  # the parent's decode time over the child's
  max_memory_ratio: float | None = None
  max_params_ratio: float | None = None

  def __post_init__(self) -> None:
    for name, value in self.items():
      number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
      if not number or value < 0 or (value == 0 and name.startswith("min")):
        least = "at least 0" if name.startswith("max") else "above 0"
        raise PuzzleError(f"limit {name}={value!r} must be a finite number {least}; leave it out for no limit")

  def items(self) -> Iterator[tuple[str, float]]:
    """The limits that are set, by name."""
    return ((f.name, v) for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Performance:
  """A child in one scenario. Figures are rounded so that each, given back as a limit, is met."""

  memory_bytes: float
  runtime_s: float
  throughput: float  # input + output tokens/s
  output_throughput: float  # output tokens/s
  first_token_s: float
  token_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Solution(Performance):
  """A child that meets all limits. The inherited figures are those of `scenario`."""

  choice: tuple[int, ...]  # the index of each layer's variant
  blocks: tuple[str, ...]  # their names, attention/ffn
  weights: tuple[str | None, ...]  # which training of each block, where the table tells several apart
  batch: int  # requests at once
  score: float  # Σ of the blocks' scores
  params: float
  kv_bytes_per_token: float
  mip_gap: float | None  # no child is better by more than this share of the score; None: not proven
  solve_s: float  # wall time
  scenario: str  # whose figures stand in front
  scenarios: Mapping[str, Performance]  # the figures in each

  def to_json(self) -> dict[str, Any]:
    """The content of `solution_K.json`; wall times are under `timing`."""
    data = dataclasses.asdict(self)
    data["timing"] = {"solve_s": data.pop("solve_s")}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}


# Of each limit: the quantity of `Figures` that it bounds, and the unit of which a max_ limit is quantity / unit and a
# min_ limit unit / quantity. The unit depends on the scenario, the batch and the parent's figures.
_LIMITS: dict[str, tuple[str, Callable[[Scenario, int, Figures], Fraction | int]]] = {
  "max_memory_bytes": ("memory_bytes", lambda s, b, p: 1),
  "max_runtime_s": ("runtime_s", lambda s, b, p: 1),
  "min_throughput": ("runtime_s", lambda s, b, p: b * s.tokens),
  "max_first_token_s": ("prefill_s", lambda s, b, p: 1),
  "max_token_s": ("decode_s", lambda s, b, p: s.output_tokens),
  "max_params": ("params", lambda s, b, p: 1),
  "max_kv_bytes_per_token": ("kv_bytes_per_token", lambda s, b, p: 1),
  "min_speedup": ("runtime_s", lambda s, b, p: p.runtime_s),
  "min_decode_speedup": ("decode_s", lambda s, b, p: p.decode_s),
  "max_memory_ratio": ("memory_bytes", lambda s, b, p: p.memory_bytes),
  "max_params_ratio": ("params", lambda s, b, p: p.params),
}
_SAME_EVERYWHERE = ("params", "kv_bytes_per_token")  # quantities that do not depend on the scenario

_TOLERANCE = 1e-9  # of HiGHS, absolute,
_SCALE = 1e3  # for rows and objectives of this size
_MAX_CUTS = 100


def _rounded(value: Fraction, *, up: bool, digits: int = 15) -> float:
  """The nearest number of `digits` decimal digits that is not below (`up`) or not above `value`."""
  rounding = decimal.ROUND_CEILING if up else decimal.ROUND_FLOOR
  context = decimal.Context(prec=digits, rounding=rounding)
  number = float(context.divide(decimal.Decimal(value.numerator), decimal.Decimal(value.denominator)))
  return int(number) if number.is_integer() else number


@dataclasses.dataclass(frozen=True)
class Bound:
  """One limit in one scenario at one batch: a child's `quantity` may be at most `most`."""

  limit: str
  scenario: str
  quantity: str
  unit: Fraction
  most: Fraction

  @property
  def is_max(self) -> bool:
    return self.limit.startswith("max")

  @property
  def rounding(self) -> float:
    """Relative error of `Table.weights`, which adds two numbers for some quantities."""
    return 2.0**-51 if self.quantity in ("runtime_s", "memory_bytes") else 0.0

  def value(self, amount: Fraction) -> Fraction:
    """An amount of the quantity in the limit's own unit."""
    top, bottom = (amount, self.unit) if self.is_max else (self.unit, amount)
    return top / bottom if bottom else Fraction(0)

  def say(self, amount: Fraction) -> str:
    """The limit as if it were set to `amount`, rounded to the side that `amount` meets."""
    value = _rounded(self.value(amount), up=self.is_max, digits=9)
    if self.limit == "max_memory_bytes":
      value = math.ceil(self.value(amount))
      return f"{self.limit}={value} ({_rounded(Fraction(value, GIB), up=True, digits=6)} GiB)"
    return f"{self.limit}={value}"


class Optimum(NamedTuple):
  """A choice, and what no possible choice's Σ objective is below."""

  choice: tuple[int, ...]
  proven: float


class _Row(NamedTuple):
  """A linear constraint: Σ coefficients·x ≤ most."""

  coefficients: np.ndarray  # [L, J]
  most: float


class Program:
  """What is possible at one batch, and the best of it by any objective.

  Args:
    table: what may be chosen.
    limits: what must be met,
    scenarios: in each of these,
    batch: with so many requests at once.
  """

  def __init__(self, table: Table, limits: Limits, *, scenarios: Sequence[str], batch: int):
    self.table, self.scenarios, self.batch = table, tuple(scenarios), batch
    self.bounds: tuple[Bound, ...] = ()
    self.apart: tuple[tuple[int, ...], ...] = ()  # choices to differ from,
    self.min_different = 1  # in at least so many layers
    for scenario in scenarios:
      parent = table.figures(table.parent, scenario, batch)
      for limit, value in limits.items():
        quantity, unit_of = _LIMITS[limit]
        if quantity in _SAME_EVERYWHERE and scenario != scenarios[0]:
          continue
        unit = Fraction(unit_of(table.scenarios[scenario], batch, parent))
        most = exact(value) * unit if limit.startswith("max") else unit / exact(value)
        self.bounds += (Bound(limit, scenario, quantity, unit, most),)

  def under(self, bounds: Iterable[Bound]) -> "Program":
    """The program with other bounds."""
    other = copy.copy(self)
    other.bounds = tuple(bounds)
    return other

  def differing(self, apart: Iterable[tuple[int, ...]], layers: int) -> "Program":
    """The program for choices that differ from each of `apart` in at least `layers` layers."""
    other = copy.copy(self)
    other.apart, other.min_different = tuple(apart), layers
    return other

  def weights(self, bound: Bound) -> np.ndarray:
    """What each variant adds to the bounded quantity, [L, J]."""
    return self.table.weights(bound.quantity, bound.scenario, self.batch)

  def amount(self, bound: Bound, choice: Sequence[int]) -> Fraction:
    """The bounded quantity of a child, exactly."""
    return getattr(self.table.figures(choice, bound.scenario, self.batch), bound.quantity)

  def fixed(self, bound: Bound) -> Fraction:
    """The part of the bounded quantity that no block owns."""
    return getattr(self.table.fixed_figures(bound.scenario, self.batch), bound.quantity)

  def least(self, bound: Bound) -> Fraction:
    """The smallest amount of the bounded quantity if nothing else were asked."""
    return self.amount(bound, self._argmin(self.weights(bound)))

  def broken(self, choice: Sequence[int]) -> list[Bound]:
    """The bounds that a child exceeds, exactly."""
    at = (np.arange(len(choice)), np.asarray(choice))

    def exceeds(bound: Bound) -> bool:
      about, most = float(self.fixed(bound)) + float(self.weights(bound)[at].sum()), float(bound.most)
      clear = abs(about - most) > 1e-9 * most  # far more than rounding can do
      return about > most if clear else self.amount(bound, choice) > bound.most

    return [b for b in self.bounds if exceeds(b)]

  def possible(self, choice: Sequence[int]) -> bool:
    """Whether a child meets all bounds and differs enough."""
    apart = (sum(map(operator.ne, choice, other)) >= self.min_different for other in self.apart)
    return all(apart) and not self.broken(choice)

  def minimise(self, objective: np.ndarray, *, gap: float = 0.0) -> Optimum | None:
    """The possible choice of least Σ objective ([L, J]), to a relative gap; None if nothing is possible."""
    first = self._argmin(objective)
    if self.possible(first):
      return Optimum(first, float(objective[np.arange(len(first)), first].sum()))
    if any(self.least(b) > b.most for b in self.bounds):
      return None
    candidates = self._undominated(objective)
    rows = []
    for bound in self.bounds:
      # Counted from each layer's least, so that a row is scaled to what the limit really leaves to decide.
      extra, room = self._extra(bound), float(bound.most - self.least(bound))
      rounding = 1e-12 * extra[candidates].max()
      candidates &= extra <= room * (1 + 1e-9) + rounding
      if not candidates.any(1).all():
        return None
      if scale := max(room, rounding):
        rows.append(_Row(extra / scale, room / scale))
    rows += [self._same_as(other) for other in self.apart]
    for _ in range(_MAX_CUTS):
      optimum = _solve(objective, candidates, rows, gap)
      if optimum is None:
        return None
      broken = self.broken(optimum.choice)
      if not broken:
        return optimum
      rows += [self._cut(bound, optimum.choice, candidates) for bound in broken]
    names = ", ".join(b.limit for b in broken)
    raise PuzzleError(f"{names}: too many children lie within rounding of the limit; change it by a billionth")

  def _argmin(self, values: np.ndarray) -> tuple[int, ...]:
    return tuple(np.where(self.table.allowed, values, np.inf).argmin(1).tolist())

  def _extra(self, bound: Bound) -> np.ndarray:
    """What each variant adds to the quantity beyond the least of its layer."""
    weights = np.where(self.table.allowed, self.weights(bound), np.inf)
    return weights - weights.min(1, keepdims=True)

  def _same_as(self, other: Sequence[int]) -> _Row:
    chosen = np.arange(self.table.score.shape[1]) == np.array(other)[:, None]
    return _Row(chosen.astype(float), len(other) - self.min_different)

  def _undominated(self, objective: np.ndarray) -> np.ndarray:
    """The variants [L, J] that no other of their layer can replace without loss, in objective and in every bound.

    The variants of a choice to differ from are no replacement: taking them may make the two equal.
    """
    replacement = self.table.allowed.copy()
    for other in self.apart:
      replacement[np.arange(len(other)), other] = False
    as_good = np.repeat(replacement[:, :, None], replacement.shape[1], axis=2)  # [L, k, j]: k can replace j
    equal = as_good.copy()
    for values, rounding in ((objective, 0.0), *((self.weights(b), b.rounding) for b in self.bounds)):
      as_good &= values[:, :, None] * (1 + rounding) <= values[:, None, :]
      equal &= values[:, :, None] == values[:, None, :]
    index = np.arange(replacement.shape[1])
    as_good &= ~equal | (index[:, None] < index)
    return self.table.allowed & ~as_good.any(1)

  def _cut(self, bound: Bound, choice: Sequence[int], candidates: np.ndarray) -> _Row:
    """A row that every possible choice meets, and `choice`, which exceeds the bound by a rounding error, does not."""
    cells = [(int(i), int(j)) for i, j in np.argwhere(candidates)]
    figures = {(i, j): self.table.block_figures(i, j, bound.scenario, self.batch) for i, j in cells}
    amounts = {cell: getattr(f, bound.quantity) for cell, f in figures.items()}
    least = [min(amounts[cell] for cell in cells if cell[0] == i) for i in range(len(choice))]
    extra = {(i, j): amount - least[i] for (i, j), amount in amounts.items()}
    taken = sorted(((extra[cell], cell) for cell in enumerate(choice)), reverse=True)
    room = bound.most - self.amount(bound, choice) + sum(e for e, _ in taken)
    # All amounts may be multiples of one step: then a bound half-way between two multiples means the same.
    step = functools.reduce(_gcd, extra.values())
    row = np.zeros(candidates.shape)
    if step > room * Fraction(1, 10**6):
      for cell, e in extra.items():
        row[cell] = e / step
      return _Row(row, room // step + 0.5)
    # A cover: these layers alone, with as much or more each, are too much.
    cover: list[tuple[Fraction, tuple[int, int]]] = []
    while sum(e for e, _ in cover) <= room:
      cover.append(taken[len(cover)])
    for needed, (i, _) in cover:
      for j in np.flatnonzero(candidates[i]):
        row[i, j] = extra[i, int(j)] >= needed
    return _Row(row, len(cover) - 1)


def _gcd(a: Fraction, b: Fraction) -> Fraction:
  return Fraction(math.gcd(a.numerator * b.denominator, b.numerator * a.denominator), a.denominator * b.denominator)


def _solve(objective: np.ndarray, candidates: np.ndarray, rows: Sequence[_Row], gap: float) -> Optimum | None:
  """One run of HiGHS over the candidate variants; None if it finds the rows infeasible."""
  layer = np.nonzero(candidates)[0]
  num_layers, n = len(candidates), len(layer)
  x = cp.Variable(n, boolean=True)
  one_each = scipy.sparse.csr_array((np.ones(n), (layer, np.arange(n))), shape=(num_layers, n))
  constraints = [one_each @ x == 1]
  if rows:
    matrix = np.stack([row.coefficients[candidates] for row in rows])
    constraints.append(_SCALE * matrix @ x <= _SCALE * np.array([row.most for row in rows]))
  costs = objective[candidates]
  scale = _SCALE / (np.abs(costs).max() or 1.0)
  problem = cp.Problem(cp.Minimize((scale * costs) @ x), constraints)
  problem.solve(
    solver=cp.HIGHS,
    mip_rel_gap=gap,
    mip_abs_gap=0.0,
    mip_feasibility_tolerance=_TOLERANCE,
    primal_feasibility_tolerance=_TOLERANCE,
    dual_feasibility_tolerance=_TOLERANCE,
    small_matrix_value=1e-12,  # below it coefficients are dropped
  )
  if problem.status in (cp.INFEASIBLE, cp.settings.INFEASIBLE_OR_UNBOUNDED):
    return None
  if problem.status != cp.OPTIMAL:
    raise PuzzleError(f"HiGHS ended with {problem.status!r}; try a gap above {gap}")
  info: Any = problem.solver_stats.extra_stats
  chosen = np.full(candidates.shape, -1.0)
  chosen[candidates] = x.value
  return Optimum(tuple(chosen.argmax(1).tolist()), info.mip_dual_bound / scale)


def programs(
  table: Table,
  limits: Limits,
  *,
  scenario: str | None = None,
  batch: int | None = None,
  freeze: Mapping[int, str] | None = None,
) -> list[Program]:
  """The program at each batch to try; the arguments are those of `solve`.

  Raises:
    PuzzleError: the table does not have the scenario, the batch or the frozen blocks.
  """
  table = table.freeze(freeze or {})
  if scenario is not None and scenario not in table.scenarios:
    raise PuzzleError(f"scenario {scenario!r} is not in the table; it has {', '.join(table.scenarios)}")
  scenarios = [scenario] if scenario is not None else list(table.scenarios)
  if batch is not None:
    missing = [m for s in scenarios if (m := table.missing_cost(s, batch))]
    if missing:
      raise PuzzleError(f"batch {batch}: {missing[0]}; choose a batch that was measured for all")
  batches = [batch] if batch is not None else table.batches(scenarios)
  return [Program(table, limits, scenarios=scenarios, batch=b) for b in batches]


def solution(program: Program, choice: Sequence[int], *, seconds: float = 0.0) -> Solution:
  """The child that a choice stands for, with its figures and no claim to be the best.

  Raises:
    PuzzleError: it breaks a limit.
  """
  table, batch = program.table, program.batch
  if broken := program.broken(choice):
    raise PuzzleError(f"the child breaks {', '.join(b.limit for b in broken)}")
  performance = {}
  for name in program.scenarios:
    scenario, figures = table.scenarios[name], table.figures(choice, name, batch)
    out = Fraction(scenario.output_tokens)
    rate = batch / figures.runtime_s if figures.runtime_s else Fraction(0)
    performance[name] = Performance(
      memory_bytes=_rounded(figures.memory_bytes, up=True),
      runtime_s=_rounded(figures.runtime_s, up=True),
      throughput=_rounded(rate * scenario.tokens, up=False),
      output_throughput=_rounded(rate * out, up=False),
      first_token_s=_rounded(figures.prefill_s, up=True),
      token_s=_rounded(figures.decode_s / out if out else Fraction(0), up=True),
    )
  variants = [layer[j] for layer, j in zip(table.layers, choice, strict=True)]
  return Solution(
    choice=tuple(int(j) for j in choice),
    blocks=tuple(v.block for v in variants),
    weights=tuple(v.weights for v in variants),
    batch=batch,
    score=float(table.total_score(choice)),
    params=_rounded(figures.params, up=True),
    kv_bytes_per_token=_rounded(figures.kv_bytes_per_token, up=True),
    mip_gap=None,
    solve_s=seconds,
    scenario=program.scenarios[0],
    scenarios=performance,
    **dataclasses.asdict(performance[program.scenarios[0]]),
  )


def solve(
  table: Table,
  limits: Limits | None = None,
  *,
  scenario: str | None = None,
  batch: int | None = None,
  solutions: int = 1,
  min_different_layers: int = 1,
  freeze: Mapping[int, str] | None = None,
  gap: float = 0.0,
  diverse_gap: float = 1e-3,
) -> list[Solution]:
  """The children of lowest score that meet all limits, best first.

  Args:
    table: scores and costs.
    limits: what to meet; none by default.
    scenario: the one in which to meet them; None: in each of the table's.
    batch: requests at once; None: every batch that all variants have a cost for, and the best child of all.
    solutions: how many children; fewer come back when no more exist.
    min_different_layers: in how many layers each must differ from every earlier one. (The paper's alpha is the largest
      share of equal layers: L - alpha·L.)
    freeze: blocks (attention/ffn) that layers are held to.
    gap: relative optimality gap of the first child; 0: proven best.
    diverse_gap: the same of the later ones, whose proof takes far longer.

  Raises:
    PuzzleError: nothing meets the limits (says which and what can be reached), or the arguments do not fit the table.
  """
  if solutions < 1:
    raise PuzzleError(f"solutions={solutions} must be at least 1")
  if not 1 <= min_different_layers <= table.num_layers:
    raise PuzzleError(f"min_different_layers={min_different_layers} must be 1 to {table.num_layers}, the layers")
  tried = programs(table, limits or Limits(), scenario=scenario, batch=batch, freeze=freeze)
  found: list[Solution] = []
  while len(found) < solutions:
    apart = tuple(s.choice for s in found)
    child = _best([p.differing(apart, min_different_layers) for p in tried], diverse_gap if found else gap)
    if child is None:
      break
    found.append(child)
  if not found:
    raise infeasible(tried)
  return found


def _best(tried: Sequence[Program], gap: float) -> Solution | None:
  """The best child over all batches."""
  start, score = time.perf_counter(), tried[0].table.score
  optima = [(p, o) for p, o in zip(tried, _parallel(lambda p: p.minimise(score, gap=gap), tried), strict=True) if o]
  if not optima:
    return None
  children = [solution(program, _first_of_ties(program, optimum.choice)) for program, optimum in optima]
  best = min(children, key=lambda s: (s.score, -s.throughput, s.batch))
  missed = best.score - min(optimum.proven for _, optimum in optima)
  precision = _TOLERANCE * max(abs(best.score), float(np.nanmax(np.abs(score))))
  achieved = missed / max(abs(best.score), precision) if missed > precision else 0.0
  return dataclasses.replace(best, mip_gap=achieved, solve_s=time.perf_counter() - start)


def _parallel(function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
  """Maps over threads: HiGHS runs outside Python's lock, and a run of it keeps about one core busy."""
  with ThreadPoolExecutor(os.cpu_count()) as pool:
    return list(pool.map(function, items))


def _first_of_ties(program: Program, choice: tuple[int, ...]) -> tuple[int, ...]:
  """See "Ties" above."""
  table, best = program.table, list(choice)
  for i, j in enumerate(choice):
    for other in np.flatnonzero(table.allowed[i, :j] & (table.score[i, :j] == table.score[i, j])):
      if program.possible([*best[:i], int(other), *best[i + 1 :]]):
        best[i] = int(other)
        break
  return tuple(best)


def infeasible(tried: Sequence[Program]) -> PuzzleError:
  """The error for limits that nothing meets: each that fails alone, or else a smallest set of them that conflicts."""
  every = range(len(tried[0].bounds))
  nothing = np.zeros(tried[0].table.score.shape)

  def fail(chosen: Iterable[int]) -> bool:
    return not any(p.under(p.bounds[k] for k in chosen).minimise(nothing) for p in tried)

  def name(k: int) -> str:
    bound = tried[0].bounds[k]
    return bound.say(bound.most) + (f" in scenario {bound.scenario}" if len(tried[0].scenarios) > 1 else "")

  def nearest(k: int, others: Iterable[int]) -> str:
    """Bound k as near to its limit as the others allow, over all batches."""
    reached = []
    for p in tried:
      bound = p.bounds[k]
      if best := p.under(p.bounds[o] for o in others).minimise(p.weights(bound)):
        amount = p.amount(bound, best.choice)
        value = bound.value(amount)
        reached.append((value if bound.is_max else -value, f"{bound.say(amount)} (batch {p.batch})"))
    return min(reached)[1]

  if alone := [k for k in every if all(p.least(p.bounds[k]) > p.bounds[k].most for p in tried)]:
    text = "; ".join(f"{name(k)}: the nearest reachable is {nearest(k, [])}" for k in alone)
  else:
    core = list(every)
    for k in every:
      if fail(rest := [o for o in core if o != k]):
        core = rest
    values = " or ".join(nearest(k, [o for o in core if o != k]) for k in core)
    text = f"{' and '.join(map(name, core))} together: the nearest reachable with the others met is {values}"
  table = tried[0].table
  narrowed = table.allowed.sum() < sum(map(len, table.layers))
  return PuzzleError(f"no child meets {text}; relax {'a limit, a freeze or a restriction' if narrowed else 'a limit'}")


@dataclasses.dataclass(frozen=True)
class FrontierPoint:
  """The best child at one value of the swept limit; None: nothing meets it."""

  value: float
  solution: Solution | None


def frontier(
  table: Table,
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
    scenario: this and the rest as in `solve`.
    batch: requests at once.
    freeze: blocks that layers are held to.
    gap: relative optimality gap.
  """
  if limit not in _LIMITS:
    raise PuzzleError(f"limit {limit!r} is unknown; known: {', '.join(_LIMITS)}")

  def point(value: float) -> FrontierPoint:
    asked = dataclasses.replace(limits or Limits(), **{limit: value})
    tried = programs(table, asked, scenario=scenario, batch=batch, freeze=freeze)
    return FrontierPoint(value, _best(tried, gap))

  return _parallel(point, values)


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


def sensitivity(
  table: Table,
  limits: Limits,
  *,
  scenario: str | None = None,
  batch: int | None = None,
  freeze: Mapping[int, str] | None = None,
) -> list[Sensitivity]:
  """Which limits bind and what relaxing each by a step would buy; arguments as in `solve`."""
  here = solve(table, limits, scenario=scenario, batch=batch, freeze=freeze)[0].score

  def best(limit: str, value: float | None) -> float:
    asked = dataclasses.replace(limits, **{limit: value})
    return solve(table, asked, scenario=scenario, batch=batch, freeze=freeze)[0].score

  def one(limit: str, value: float) -> Sensitivity:
    step = GIB if limit == "max_memory_bytes" else 0.01 * value
    relaxed = value + step if limit.startswith("max") else value - step
    without = best(limit, None)
    score = best(limit, relaxed) if without < here else here
    return Sensitivity(limit, value, without < here, without, relaxed, score, here - score)

  return _parallel(lambda item: one(*item), limits.items())
