"""Beyond the sum of block scores: children measured whole, and blocks scored in the child instead of the parent.

The search adds up scores that were each measured alone in the parent (paper section 4); how blocks act on each other is
left out. Two remedies that keep the mixed-integer program as it is (docs/search.md has what they are worth):

  `best_of`   solves for several children that differ and keeps the one that measures best;
  `refine`    scores all blocks again, in place of the child's own, and searches with the mean of both scores: the
              trapezoid rule for what a block does on the way from the parent to the child.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from puzzle_jax import distributed, scoring, search
from puzzle_jax import mesh as mesh_lib
from puzzle_jax.arch import BlockSpec
from puzzle_jax.runs import Run
from puzzle_jax.scoring import Block, Scorer
from puzzle_jax.search import Limits, Solution, Tables
from puzzle_jax.search.table import Table

Names = Sequence[str]


class Children:
  """Children of a run's library, put together and measured on its held-out rows.

  Args:
    run: with a finished library and search.
  """

  def __init__(self, run: Run):
    self._run, self.table = run, run.table

  @functools.cached_property
  def _parent(self) -> Any:
    return self._run.parent_on(self._run.mesh).params

  @functools.cached_property
  def _variants(self) -> list[dict[str, Any]]:
    library, mesh = self._run.library, self._run.mesh
    return [mesh_lib.shard_weights(mesh, library.load_layer(i)) for i in library.layers]

  @functools.cached_property
  def scorer(self) -> Scorer:
    return scoring.scorer_of(self._run, self._parent)

  def block(self, layer: int, name: str) -> Block:
    """A block by name, with its weights."""
    spec, space = BlockSpec.parse(name), self._run.space.layers[layer]
    return spec, scoring.block_weights(space, spec, self._parent["layers"][layer], self._variants[layer])

  def blocks(self, names: Names) -> list[Block]:
    """Of a whole child."""
    return [self.block(layer, name) for layer, name in enumerate(names)]

  def scores(self, names: Names) -> dict[str, float]:
    """Of a whole child, by metric, with standard errors."""
    return self.scorer.whole(self.blocks(names))

  def rescored(self, names: Names) -> np.ndarray:
    """What each variant of the table changes in a child, less what the parent's own block changes there, [L, J].

    Pairs are summed from their subblocks, each put beside the child's other subblock.
    """
    child, metric = self.blocks(names), self._run.config.scores.metric
    result = np.full(self.table.score.shape, np.nan)
    for layer, (x_RTD, variants) in enumerate(zip(self.scorer.inputs(child), self.table.layers, strict=False)):
      own = BlockSpec.parse(names[layer])
      with_attention = [f"{v.attention}/{own.ffn.name}" for v in variants]
      with_ffn = [f"{own.attention.name}/{v.ffn}" for v in variants]
      blocks = dict.fromkeys([*with_attention, *with_ffn])
      found = self.scorer.score(layer, (self.block(layer, block) for block in blocks), x_RTD, model=child)
      score = {block: scores[metric] for block, scores in zip(blocks, found, strict=True)}
      values = np.array([score[a] + score[f] for a, f in zip(with_attention, with_ffn, strict=True)])
      result[layer, : len(variants)] = values - values[self.table.parent[layer]]
    return result


@dataclasses.dataclass(frozen=True)
class Measured:
  """A child of the search, and what it scores as a whole."""

  solution: Solution
  score: float
  stderr: float


def measured(children: Children, solution: Solution, *, metric: str = "kl") -> Measured:
  """Measures a solution."""
  scores = children.scores(solution.blocks)
  return Measured(solution, scores[metric], scores[f"{metric}_stderr"])


def best_of(
  children: Children, limits: Limits, *, solutions: int, min_different_layers: int, **where: Any
) -> list[Measured]:
  """Several children of low estimated score, the one that measures best first.

  Args:
    children: of the library.
    limits: what each meets.
    solutions: how many.
    min_different_layers: between any two.
    **where: scenario, batch and the like, as in `search.solve`.
  """
  found = search.solve(children.table, limits, solutions=solutions, min_different_layers=min_different_layers, **where)
  return sorted((measured(children, s) for s in found), key=lambda m: m.score)


def refine(
  children: Children,
  limits: Limits,
  *,
  rounds: int,
  metric: str = "kl",
  restrict: Callable[[Table], Tables] = lambda table: table,
  **where: Any,
) -> Iterator[Measured]:
  """The search's child, and after it that of each round; the best is the one to take.

  A round scores all blocks in the last child. The search then takes the mean of a block's score in the parent and its
  mean score in all children so far.

  Args:
    children: of the library.
    limits: what each meets.
    rounds: fewer when one finds a child that was there before.
    metric: that children are measured by.
    restrict: leaves of a table what may be chosen, such as `serving.engines.restrict`.
    **where: scenario, batch and the like, as in `search.solve`.
  """
  table, seen, in_children = children.table, list[tuple[str, ...]](), list[np.ndarray]()
  while True:
    (solution,) = distributed.by_first(functools.partial(search.solve, restrict(table), limits, **where))
    if solution.blocks in seen:
      return
    seen.append(solution.blocks)
    yield measured(children, solution, metric=metric)
    if len(seen) > rounds:
      return
    in_children.append(children.rescored(solution.blocks))
    table = dataclasses.replace(children.table, score=(children.table.score + np.mean(in_children, axis=0)) / 2)
