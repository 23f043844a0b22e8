"""The search: the best children under limits, as a mixed-integer program (paper section 5). Imports no JAX.

Minimise Σ score[l, j]·x[l, j] over binary x with Σ_j x[l, j] = 1 in every layer l, under `limits`. The batch is no
variable: the program is solved at each measured batch and the best child kept. How: `mip` (HiGHS), `program` (exact
checks), `solution` (figures, ties), `infeasible` (why nothing is found), `tradeoffs` (frontier, sensitivity). All that
is for others to use can be imported from here.
"""

from collections.abc import Mapping

from puzzle_jax.errors import PuzzleError
from puzzle_jax.search.infeasible import infeasible
from puzzle_jax.search.limits import GIB, Limits
from puzzle_jax.search.program import Program, Tables, programs
from puzzle_jax.search.solution import Performance, Solution, best_child, solution
from puzzle_jax.search.tradeoffs import (
  FrontierPoint,
  LayerStability,
  Sensitivity,
  frontier,
  frontier_json,
  sensitivity,
  stable_layers,
)

__all__ = [
  "GIB",
  "FrontierPoint",
  "LayerStability",
  "Limits",
  "Performance",
  "Program",
  "Sensitivity",
  "Solution",
  "Tables",
  "best_child",
  "frontier",
  "frontier_json",
  "infeasible",
  "programs",
  "sensitivity",
  "solution",
  "solve",
  "stable_layers",
]


def solve(
  table: Tables,
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
    table: scores and costs; several restrictions of one table: the child may come from any (`serving.engines`).
    limits: what to meet; none by default.
    scenario: the one in which to meet them; None: in each of the table's.
    batch: requests at once; None: every batch that all variants have a cost for, and the best child of all.
    solutions: how many children; fewer come back when no more exist.
    min_different_layers: in how many layers each must differ from every earlier one. (The paper's alpha is the largest
      share of equal layers: L - alpha·L.)
    freeze: blocks (attention/ffn) that layers are held to.
    gap: relative optimality gap of the first child; 0: proven best.
    diverse_gap: the same of the later ones, whose proof can take far longer: each is the best, to this gap, of those
      that differ enough from the ones found before it.

  Raises:
    PuzzleError: nothing meets the limits (says which and what can be reached), or the arguments do not fit the table.
  """
  if solutions < 1:
    raise PuzzleError(f"solutions={solutions} must be at least 1")
  tried = programs(table, limits or Limits(), scenario=scenario, batch=batch, freeze=freeze)
  num_layers = tried[0].table.num_layers
  if not 1 <= min_different_layers <= num_layers:
    raise PuzzleError(f"min_different_layers={min_different_layers} must be 1 to {num_layers}, the layers")
  found: list[Solution] = []
  while len(found) < solutions:
    apart = tuple(s.choice for s in found)
    child = best_child([p.differing(apart, min_different_layers) for p in tried], diverse_gap if found else gap)
    if child is None:
      break
    found.append(child)
  if not found:
    raise infeasible(tried)
  return sorted(found, key=lambda child: child.score)  # later ones can be better than earlier ones by their gap
