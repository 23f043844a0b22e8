"""The mixed-integer program itself, through cvxpy and HiGHS (paper section 5). Imports no JAX.

Minimise Σ objective[l, j]·x[l, j] over binary x with Σ_j x[l, j] = 1 in every layer l, under linear rows.

The relaxed program (x between 0 and 1) comes first. By Lagrange, whatever prices λ ≥ 0 it gives its rows, no choice
that meets the rows has an objective below

    bound + Σ_l lift[l, choice of l],    lift[l, j] = c[l, j] − min_k c[l, k],    c = objective + Σ_r λ_r·row_r,

where bound = Σ_l min_j c[l, j] − Σ_r λ_r·most_r. So a search among the variants of little lift (the core of a knapsack
problem: Balas and Zemel 1980, doi:10.1287/opre.28.5.1130) finds the best of all, if what it finds is no worse than any
choice with one variant of more lift can be; and tells how far to look, if not.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cvxpy as cp
import numpy as np
import scipy.sparse

from puzzle_jax.errors import PuzzleError

TOLERANCE = 1e-9  # of HiGHS, absolute,
_SCALE = 1e3  # for rows and objectives of this size
_TIGHT = dict.fromkeys([f"{part}_feasibility_tolerance" for part in ("mip", "primal", "dual")], TOLERANCE)
_TIGHT["small_matrix_value"] = 1e-12  # below it coefficients are dropped
_CORE = 2  # variants a layer to search first: 80 × 54 took 1.6 times as long with 1, 1.3 times with 4


class Row(NamedTuple):
  """A linear constraint: Σ coefficients·x ≤ most."""

  coefficients: np.ndarray  # [L, J]
  most: float


class Optimum(NamedTuple):
  """A choice, and what no possible choice's Σ objective is below."""

  choice: tuple[int, ...]
  proven: float


def minimise(objective: np.ndarray, candidates: np.ndarray, rows: Sequence[Row], *, gap: float) -> Optimum | None:
  """The choice of least Σ objective under the rows, as far as HiGHS's tolerances go.

  Args:
    objective: [L, J].
    candidates: [L, J] bool, what may be chosen; something in every layer.
    rows: at least one.
    gap: relative, between what is found and what is proven.

  Returns:
    None if nothing meets the rows.
  """
  if (relaxed := _relax(objective, candidates, rows)) is None:
    return None
  bound, lift = relaxed
  largest = float(np.abs(objective[candidates]).max())
  lifts = np.sort(lift[candidates])
  size = _CORE * len(candidates)
  best = None
  while best is None:
    reach = float(lifts[min(size, len(lifts) - 1)])
    best = _search(objective, candidates & (lift <= reach), rows, gap)
    if reach == lifts[-1]:  # everything was searched
      return best
    size *= 4
  value = float(objective[np.arange(len(candidates)), best.choice].sum())
  left_out = bound + reach  # what no choice with a variant beyond the core is below
  found = Optimum(best.choice, min(best.proven, left_out))
  if value - left_out <= gap * abs(value) + 1e-12 * largest:
    return found
  # What is better has lifts up to value − bound only.
  return _search(objective, candidates & (lift <= value - bound + TOLERANCE * largest), rows, gap) or found


def _relax(objective: np.ndarray, candidates: np.ndarray, rows: Sequence[Row]) -> tuple[float, np.ndarray] | None:
  """Bound and lifts ([L, J]) as above, valid however rough the solver's prices are; None: nothing meets the rows."""
  model = _Model(objective, candidates, rows, integer=False)
  if not model.solve():  # HiGHS's own tolerances: with tighter ones it sometimes ends without a result
    return None
  cost, spent = objective.copy(), 0.0
  for row, price in zip(rows, model.prices(), strict=True):
    cost[candidates] += price * row.coefficients[candidates]
    spent += price * row.most
  least = np.where(candidates, cost, np.inf).min(1)
  return float(least.sum() - spent), cost - least[:, None]


def _search(objective: np.ndarray, candidates: np.ndarray, rows: Sequence[Row], gap: float) -> Optimum | None:
  """The best choice by branch and bound."""
  model = _Model(objective, candidates, rows, integer=True)
  # A restart presolves anew once many variants are ruled out. Here they are already: with restarts 80 × 54 took twice
  # as long.
  if not model.solve(mip_rel_gap=gap, mip_abs_gap=0.0, mip_allow_restart=False, **_TIGHT):
    return None
  chosen = np.full(candidates.shape, -1.0)
  chosen[candidates] = model.x.value
  info: Any = model.problem.solver_stats.extra_stats
  return Optimum(tuple(chosen.argmax(1).tolist()), float(info.mip_dual_bound) / model.scale)


class _Model:
  """The program in cvxpy; objective and rows scaled, for HiGHS's tolerances are absolute."""

  def __init__(self, objective: np.ndarray, candidates: np.ndarray, rows: Sequence[Row], *, integer: bool):
    layer = np.nonzero(candidates)[0]
    num_layers, n = len(candidates), len(layer)
    self.x = cp.Variable(n, boolean=True) if integer else cp.Variable(n, nonneg=True)
    one_each = scipy.sparse.csr_array((np.ones(n), (layer, np.arange(n))), shape=(num_layers, n))
    coefficients = np.stack([row.coefficients[candidates] for row in rows])
    self.limits = _SCALE * coefficients @ self.x <= _SCALE * np.array([row.most for row in rows])
    costs = objective[candidates]
    self.scale = _SCALE / (np.abs(costs).max() or 1.0)
    self.problem = cp.Problem(cp.Minimize((self.scale * costs) @ self.x), [one_each @ self.x == 1, self.limits])

  def solve(self, **options: Any) -> bool:
    """Whether there is a solution."""
    try:
      self.problem.solve(solver=cp.HIGHS, **options)
    except (cp.SolverError, ValueError) as e:  # what cvxpy raises where HiGHS has no result
      raise PuzzleError(f"HiGHS fails ({e}); change a limit a little, or allow a gap") from e
    if self.problem.status not in (cp.OPTIMAL, cp.INFEASIBLE, cp.settings.INFEASIBLE_OR_UNBOUNDED):
      raise PuzzleError(f"HiGHS ends with {self.problem.status!r}; change a limit a little, or allow a gap")
    return self.problem.status == cp.OPTIMAL

  def prices(self) -> np.ndarray:
    """By how much the objective falls per unit of each row; not negative."""
    return np.maximum(self.limits.dual_value, 0.0) * (_SCALE / self.scale)
