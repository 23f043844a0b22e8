"""What the search must beat: simpler ways to choose a child under the same limits (paper section 5). Imports no JAX.

All take the arguments of `search.solve` and return children that meet the limits, checked exactly. Their `mip_gap` is
None: nothing is proven. Every batch is tried and the child of lowest score kept (`random_feasible` draws one).
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from puzzle_jax.errors import PuzzleError
from puzzle_jax.search import Limits, Program, Solution, Tables, infeasible, programs, solution, solve
from puzzle_jax.search.table import Table

Choice = tuple[int, ...]
Rule = Callable[[Program], Choice | None]


class Baseline(Protocol):
  """The interface of a baseline, that of `search.solve`; one child comes back."""

  def __call__(
    self,
    table: Tables,
    limits: Limits | None = None,
    *,
    scenario: str | None = None,
    batch: int | None = None,
    freeze: Mapping[int, str] | None = None,
  ) -> list[Solution]: ...


def _baseline(rule: Rule) -> Baseline:
  """Gives a rule that proposes a choice at one batch the interface of the search."""

  def run(
    table: Tables,
    limits: Limits | None = None,
    *,
    scenario: str | None = None,
    batch: int | None = None,
    freeze: Mapping[int, str] | None = None,
  ) -> list[Solution]:
    start = time.perf_counter()
    tried = programs(table, limits or Limits(), scenario=scenario, batch=batch, freeze=freeze)
    proposed = [(program, rule(program)) for program in tried]
    met = [solution(program, choice) for program, choice in proposed if choice and program.possible(choice)]
    if not met:
      _require_any(tried)
      raise PuzzleError(f"{rule.__name__} finds no child that meets the limits, although there are some; relax a limit")
    best = min(met, key=lambda s: (s.score, -s.throughput, s.batch))
    return [dataclasses.replace(best, solve_s=time.perf_counter() - start)]

  run.__name__, run.__doc__ = rule.__name__, rule.__doc__
  return run


def _require_any(tried: Sequence[Program]) -> None:
  """Raises the search's own error if no child at all meets the limits."""
  if not any(p.minimise(np.zeros(p.table.score.shape)) for p in tried):
    raise infeasible(tried)


@_baseline
def greedy(program: Program) -> Choice:
  """The paper's rule: each layer in turn takes the best variant within its even share of what the limits allow.

  Layers come in order of their mean score, least first, and each hands on what it leaves of its share, so that savings
  reach the layers that need them most. Where nothing fits, a layer takes what exceeds its share least and hands on the
  debt.
  """
  table = program.table
  score = np.where(table.allowed, table.score, np.nan)
  weights = np.array([program.weights(b) for b in program.bounds]).reshape(-1, *score.shape)  # [limits, L, J]
  share = np.array([float((b.most - program.fixed(b)) / table.num_layers) for b in program.bounds])
  scale = np.where(share > 0, share, 1.0)
  spent, choice = np.zeros_like(share), np.zeros(table.num_layers, int)
  for visited, i in enumerate(np.nanmean(score, axis=1).argsort(kind="stable"), start=1):
    budget = visited * share - spent
    over = ((weights[:, i] - budget[:, None]) / scale[:, None]).max(axis=0, initial=0.0)
    over[~table.allowed[i]] = np.inf
    fits = over <= 0
    choice[i] = np.where(fits, score[i], np.inf).argmin() if fits.any() else over.argmin()
    spent += weights[:, i, choice[i]]
  return tuple(choice.tolist())


@_baseline
def noop_only(program: Program) -> Choice:
  """Depth removal in the manner of ShortGPT: the parent's subblocks go, least score first, until the limits are met.

  A subblock's score is that of its layer without it alone. Nothing else changes.
  """
  table = program.table
  indices = [_by_block(table, i) for i in range(table.num_layers)]
  parents = [layer[j] for layer, j in zip(table.layers, table.parent, strict=True)]
  choice = [at.get(v.block, next(iter(at.values()))) for at, v in zip(indices, parents, strict=True)]
  kept = [[v.attention, v.ffn] for v in parents]
  removals = []
  for i, parent in enumerate(parents):
    for slot, block in enumerate((f"none/{parent.ffn}", f"{parent.attention}/none")):
      if block in indices[i] and block != parent.block:
        removals.append((table.score[i, indices[i][block]], i, slot))
  for _, i, slot in sorted(removals):
    if program.possible(choice):
      break
    kept[i][slot] = "none"
    choice[i] = indices[i].get("/".join(kept[i]), choice[i])
  return tuple(choice)


@_baseline
def uniform(program: Program) -> Choice | None:
  """The best single block, the same in every layer (frozen layers aside)."""
  table = program.table
  indices = [_by_block(table, i) for i in range(table.num_layers)]
  free = [at for at in indices if len(at) > 1] or indices
  choices = []
  for block in free[0]:
    if all(block in at for at in free):
      choice = tuple(at.get(block, next(iter(at.values()))) for at in indices)
      choices.append(choice)
  return min(filter(program.possible, choices), key=table.total_score, default=None)


@_baseline
def most_parameters(program: Program) -> Choice | None:
  """The child with the most parameters (to 0.01 %), whatever the scores."""
  optimum = program.minimise(-program.table.params, gap=1e-4)
  return optimum.choice if optimum else None


def random_feasible(
  table: Tables,
  limits: Limits | None = None,
  *,
  scenario: str | None = None,
  batch: int | None = None,
  freeze: Mapping[int, str] | None = None,
  seed: int = 0,
  draws: int = 1,
) -> list[Solution]:
  """Random children: uniform draws from all, each moved to a child that meets the limits by changing the fewest layers.

  Args:
    table: scores and costs; with the next four as in `search.solve`. The batch is drawn too.
    limits: what to meet.
    scenario: where.
    batch: requests at once.
    freeze: blocks that layers are held to.
    seed: equal seeds give equal children.
    draws: how many.
  """
  rng = np.random.default_rng(seed)
  tried = programs(table, limits or Limits(), scenario=scenario, batch=batch, freeze=freeze)
  tried = [p for p in tried if p.minimise(np.zeros(p.table.score.shape))] or tried
  children = []
  for _ in range(draws):
    start = time.perf_counter()
    program = tried[rng.integers(len(tried))]
    # Costs of 0 for what was drawn and about 1 for a change; what a change is to is random too.
    shape = program.table.score.shape
    drawn = np.where(program.table.allowed, rng.random(shape), -1.0).argmax(1)
    change = 1 + rng.random(shape) / shape[0]
    change[np.arange(shape[0]), drawn] = 0.0
    nearest = program.minimise(change, gap=1e-2)
    if nearest is None:
      raise infeasible(tried)
    children.append(solution(program, nearest.choice, seconds=time.perf_counter() - start))
  return children


def _by_block(table: Table, layer: int) -> dict[str, int]:
  """The allowed variants of a layer by block, best first; of several trainings of one block the best."""
  at: dict[str, int] = {}
  for j in np.argsort(table.score[layer], kind="stable"):
    if table.allowed[layer, j]:
      at.setdefault(table.layers[layer][j].block, int(j))
  return at


MIP = "mip"  # the search itself, among the rules
BASELINES: dict[str, Baseline] = {
  "greedy": greedy,
  "noop_only": noop_only,
  "uniform": uniform,
  "most_parameters": most_parameters,
  "random_feasible": random_feasible,
}


def chosen(table: Tables, limits: Limits, *, rule: str = MIP, seed: int = 0, scenario: str | None = None) -> Solution:
  """The child of a rule: the search's, or a baseline's; `seed` is that of random ones."""
  if rule == MIP:
    return solve(table, limits, scenario=scenario)[0]
  drawn: dict[str, Any] = {"seed": seed} if rule == random_feasible.__name__ else {}
  return BASELINES[rule](table, limits, scenario=scenario, **drawn)[0]


def compare(
  table: Tables, limits: Limits | None = None, *, rules: Sequence[str] = ("greedy", "uniform"), **where: Any
) -> dict[str, Solution | None]:
  """The optimal child, and under the same limits those of simpler rules; None: a rule finds none.

  Args:
    table: scores and costs.
    limits: what to meet.
    rules: of `BASELINES`.
    **where: scenario, batch and the like, as in `search.solve`.

  Raises:
    PuzzleError: nothing meets the limits (says which and what can be reached).
  """
  children: dict[str, Solution | None] = {"optimal": solve(table, limits, **where)[0]}
  for rule in rules:
    children[rule] = None
    with contextlib.suppress(PuzzleError):  # the rule's own failure: the search has found a child
      children[rule] = BASELINES[rule](table, limits, **where)[0]
  return children
