"""A child of the search: its figures in every scenario, and the best one over several batches. Imports no JAX.

Ties: of two batches with equal scores the one with the higher throughput wins, then the smaller. At one batch HiGHS is
deterministic; after it each layer, first to last, takes the first of its variants that has exactly the same score and
leaves all limits met.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np

from puzzle_jax.errors import PuzzleError
from puzzle_jax.search.decimals import rounded
from puzzle_jax.search.limits import GIB
from puzzle_jax.search.mip import TOLERANCE
from puzzle_jax.search.program import Program

_T = TypeVar("_T")
_R = TypeVar("_R")


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

  def __str__(self) -> str:
    proof = "not proven" if self.mip_gap is None else f"gap {self.mip_gap:.2g}"
    return (
      f"score {self.score:.6g} ({proof}), batch {self.batch}, {self.params / 1e9:.3f} B parameters, "
      f"{self.memory_bytes / GIB:.3f} GiB, {self.runtime_s:.6g} s, {self.throughput:.6g} tokens/s "
      f"({self.output_throughput:.6g} output tokens/s) in {self.scenario}"
    )

  def to_json(self) -> dict[str, Any]:
    """The content of `solution_K.json`; wall times are under `timing`."""
    data = dataclasses.asdict(self)
    data["timing"] = {"solve_s": data.pop("solve_s")}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}


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
      memory_bytes=rounded(figures.memory_bytes, up=True),
      runtime_s=rounded(figures.runtime_s, up=True),
      throughput=rounded(rate * scenario.tokens, up=False),
      output_throughput=rounded(rate * out, up=False),
      first_token_s=rounded(figures.prefill_s, up=True),
      token_s=rounded(figures.decode_s / out if out else Fraction(0), up=True),
    )
  variants = [layer[j] for layer, j in zip(table.layers, choice, strict=True)]
  return Solution(
    choice=tuple(int(j) for j in choice),
    blocks=tuple(v.block for v in variants),
    weights=tuple(v.weights for v in variants),
    batch=batch,
    score=float(table.total_score(choice)),
    params=rounded(figures.params, up=True),
    kv_bytes_per_token=rounded(figures.kv_bytes_per_token, up=True),
    mip_gap=None,
    solve_s=seconds,
    scenario=program.scenarios[0],
    scenarios=performance,
    **dataclasses.asdict(performance[program.scenarios[0]]),
  )


def best_child(tried: Sequence[Program], gap: float) -> Solution | None:
  """The best child over all batches."""
  start, score = time.perf_counter(), tried[0].table.score
  optima = [(p, o) for p, o in zip(tried, in_parallel(lambda p: p.minimise(score, gap=gap), tried), strict=True) if o]
  if not optima:
    return None
  children = [solution(program, _first_of_ties(program, optimum.choice)) for program, optimum in optima]
  best = min(children, key=lambda s: (s.score, -s.throughput, s.batch))
  missed = best.score - float(min(optimum.proven for _, optimum in optima))
  precision = TOLERANCE * abs(best.score) + 1e-12 * float(np.nanmax(np.abs(score)))  # HiGHS's
  achieved = missed / max(abs(best.score), precision) if missed > precision else 0.0
  return dataclasses.replace(best, mip_gap=achieved, solve_s=time.perf_counter() - start)


def in_parallel(function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
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
