"""What is possible at one batch, exactly, and the best of it by any objective (paper section 5). Imports no JAX.

HiGHS computes in floating point, so what it finds is checked in exact arithmetic; a choice that breaks a limit is cut
off and the program solved again.
"""

import copy
import functools
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction

import numpy as np

from puzzle_jax.errors import PuzzleError
from puzzle_jax.search import mip
from puzzle_jax.search.limits import Bound, Limits, bounds
from puzzle_jax.search.mip import Optimum, Row
from puzzle_jax.search.table import Table

Tables = Table | Sequence[Table]  # several: restrictions of one table; a child may come from any of them

_MAX_CUTS = 100


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
    self.bounds = bounds(table, limits, scenarios=scenarios, batch=batch)
    self.apart: tuple[tuple[int, ...], ...] = ()  # choices to differ from,
    self.min_different = 1  # in at least so many layers

  def under(self, chosen: Iterable[Bound]) -> "Program":
    """The program with these bounds alone."""
    other = copy.copy(self)
    other.bounds = tuple(chosen)
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
    """What the blocks of a child add up to of the bounded quantity, exactly."""
    return getattr(self.table.sums(choice, bound.scenario, self.batch), bound.quantity)

  def reached(self, bound: Bound, choice: Sequence[int]) -> Fraction:
    """The bounded quantity of a child, exactly: not below the floor."""
    return getattr(self.table.figures(choice, bound.scenario, self.batch), bound.quantity)

  def fixed(self, bound: Bound) -> Fraction:
    """The part of the bounded quantity that no block owns."""
    return getattr(self.table.fixed_figures(bound.scenario, self.batch), bound.quantity)

  def least(self, bound: Bound) -> Fraction:
    """The smallest amount of the bounded quantity if nothing else were asked."""
    return max(self._lowest(bound), bound.floor)

  def _lowest(self, bound: Bound) -> Fraction:
    """`least` of what blocks add up to."""
    return self.amount(bound, self._argmin(self.weights(bound)))

  def broken(self, choice: Sequence[int]) -> list[Bound]:
    """The bounds that a child exceeds, exactly."""
    at = (np.arange(len(choice)), np.asarray(choice))

    def exceeds(bound: Bound) -> bool:
      if bound.floor > bound.most:
        return True
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
      extra, room = self._extra(bound), float(bound.most - self._lowest(bound))
      rounding = 1e-12 * extra[candidates].max()
      candidates &= extra <= room * (1 + 1e-9) + rounding
      if not candidates.any(1).all():
        return None
      scale = max(room, rounding) or 1.0
      rows.append(Row(extra / scale, room / scale))
    rows += [self._same_as(other) for other in self.apart]
    for _ in range(_MAX_CUTS):
      optimum = mip.minimise(objective, candidates, rows, gap=gap)
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

  def _same_as(self, other: Sequence[int]) -> Row:
    chosen = np.arange(self.table.score.shape[1]) == np.array(other)[:, None]
    return Row(chosen.astype(float), len(other) - self.min_different)

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

  def _cut(self, bound: Bound, choice: Sequence[int], candidates: np.ndarray) -> Row:
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
      return Row(row, room // step + 0.5)
    # A cover: these layers alone, with as much or more each, are too much.
    cover: list[tuple[Fraction, tuple[int, int]]] = []
    while sum(e for e, _ in cover) <= room:
      cover.append(taken[len(cover)])
    for needed, (i, _) in cover:
      for j in np.flatnonzero(candidates[i]):
        row[i, j] = extra[i, int(j)] >= needed
    return Row(row, len(cover) - 1)


def _gcd(a: Fraction, b: Fraction) -> Fraction:
  return Fraction(math.gcd(a.numerator * b.denominator, b.numerator * a.denominator), a.denominator * b.denominator)


def programs(
  table: Tables,
  limits: Limits,
  *,
  scenario: str | None = None,
  batch: int | None = None,
  freeze: Mapping[int, str] | None = None,
) -> list[Program]:
  """The program at each batch to try, of each table; the arguments are those of `search.solve`.

  Raises:
    PuzzleError: a table does not have the scenario, the batch or the frozen blocks.
  """
  tables = [t.freeze(freeze or {}) for t in ([table] if isinstance(table, Table) else table)]
  described = tables[0].scenarios
  if scenario is not None and scenario not in described:
    raise PuzzleError(f"scenario {scenario!r} is not in the table; it has {', '.join(described)}")
  scenarios = [scenario] if scenario is not None else list(described)
  found = []
  for each in tables:
    if batch is not None and (missing := [m for s in scenarios if (m := each.missing_cost(s, batch))]):
      raise PuzzleError(f"batch {batch}: {missing[0]}; choose a batch that was measured for all")
    batches = [batch] if batch is not None else each.batches(scenarios)
    found += [Program(each, limits, scenarios=scenarios, batch=b) for b in batches]
  return found
