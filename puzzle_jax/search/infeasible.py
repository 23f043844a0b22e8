"""Says why no child meets the limits: which fails alone, or which conflict, and what can be reached. Imports no JAX."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from puzzle_jax.errors import PuzzleError
from puzzle_jax.search.program import Program


def infeasible(tried: Sequence[Program]) -> PuzzleError:
  """The error for limits that no program has a child for.

  It names each limit that fails alone; or else a pair that conflicts; or else a set that does, of which none can go.
  """
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
        amount = p.reached(bound, best.choice)
        value = bound.value(amount)
        reached.append((value if bound.is_max else -value, f"{bound.say(amount)} (batch {p.batch})"))
    return min(reached)[1]

  if alone := [k for k in every if all(p.least(p.bounds[k]) > p.bounds[k].most for p in tried)]:
    each = {name(k): nearest(k, []) for k in reversed(alone)}  # of a limit's bounds the first tells
    text = "; ".join(f"{k}: the nearest reachable is {value}" for k, value in reversed(each.items()))
  else:
    core = next((pair for pair in map(list, itertools.combinations(every, 2)) if fail(pair)), list(every))
    for k in core if len(core) > 2 else []:
      if fail(rest := [o for o in core if o != k]):
        core = rest
    values = " or ".join(nearest(k, [o for o in core if o != k]) for k in core)
    text = f"{' and '.join(map(name, core))} together: the nearest reachable with the others met is {values}"
  table = tried[0].table
  narrowed = table.allowed.sum() < sum(map(len, table.layers))
  return PuzzleError(f"no child meets {text}; relax {'a limit, a freeze or a restriction' if narrowed else 'a limit'}")
