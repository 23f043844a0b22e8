"""Is the sum of block scores a good estimate? python -m experiments.interactions --workdir=runs/compare

On a run whose stages up to `search` are done (configs/smollm2_135m.py:compare). Random children over a range of speeds,
and the search's own over the same range: the sum of their blocks' scores against the KL that they have as a whole, on
the rows that the scores were taken on. Then the same for children around the target, with the scores taken in the
search's child too (`puzzle_jax.refine`).
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.stats
from absl import app, flags

import puzzle_jax
from experiments import RESULTS
from puzzle_jax import refine, search
from puzzle_jax.costs import jax_timing
from puzzle_jax.refine import Children, Measured
from puzzle_jax.runs import versions
from puzzle_jax.scoring import rank_correlation
from puzzle_jax.search import Limits, Solution
from puzzle_jax.search.baselines import BASELINES, random_feasible
from puzzle_jax.search.table import Table
from puzzle_jax.store import read_json, write_json

_WORKDIR = flags.DEFINE_string("workdir", None, "A run whose search is done.", required=True)
_CHILDREN = flags.DEFINE_integer("children", 100, "Random children.")
_FASTEST = flags.DEFINE_float("fastest", 2.0, "Speed-up of the fastest children.")
_NAME = flags.DEFINE_string("name", "interactions", "Of the record: experiments/results/NAME.json.")

_SPEEDS = 20
_ROUNDS = 4
_NEIGHBOURS = 20  # children around the target


def _estimate(table: Table, solution: Solution) -> float:
  return float(table.score[np.arange(table.num_layers), np.asarray(solution.choice)].sum())


def _points(children: Children, solutions: Sequence[Solution], **tables: Table) -> list[dict[str, float]]:
  """Of each child: what it measures as a whole, and its sum of scores in each table."""
  points = []
  for solution in solutions:
    found: Measured = refine.measured(children, solution)
    sums = {name: _estimate(table, solution) for name, table in tables.items()}
    points.append({"throughput": solution.throughput, "kl": found.score, "kl_stderr": found.stderr} | sums)
    print(points[-1], flush=True)
  return points


def correlation(points: Sequence[dict[str, float]], estimate: str) -> dict[str, float]:
  """Of an estimate with the measured KL: Spearman's rank correlation, and how many times the estimate the KL is."""
  kl, estimated = (np.array([p[key] for p in points]) for key in ("kl", estimate))
  ratio = kl / estimated
  quantiles = dict(zip(("ratio_p10", "ratio_median", "ratio_p90"), np.quantile(ratio, (0.1, 0.5, 0.9)), strict=True))
  return {"children": len(points), "spearman": float(scipy.stats.spearmanr(kl, estimated).statistic)} | {
    name: float(value) for name, value in quantiles.items()
  }


def _baseline(children: Children, limits: Limits, name: str) -> float | None:
  try:
    return refine.measured(children, BASELINES[name](children.table, limits)[0]).score
  except puzzle_jax.PuzzleError:  # such as `uniform`, where no single block meets the limits
    return None


def study(children: Children, limits: Limits, *, draws: int, fastest: float) -> dict[str, Any]:
  """Everything that is measured."""
  table = children.table
  speeds = np.linspace(1.05, fastest, _SPEEDS)
  random = [
    solution
    for i, speed in enumerate(speeds)
    for solution in random_feasible(table, Limits(min_speedup=float(speed)), seed=i, draws=draws // _SPEEDS)
  ]
  optimal = [p.solution for p in search.frontier(table, "min_speedup", speeds.tolist()) if p.solution]
  neighbours = search.solve(table, limits, solutions=_NEIGHBOURS, min_different_layers=min(3, table.num_layers))
  begin = time.perf_counter()
  in_child = dataclasses.replace(table, score=children.rescored(neighbours[0].blocks))
  rescored_s = time.perf_counter() - begin
  mean = dataclasses.replace(table, score=(table.score + in_child.score) / 2)
  points = {
    "random": _points(children, random, sum=table),
    "optimal": _points(children, optimal, sum=table),
    "neighbours": _points(children, neighbours, sum=table, in_child=in_child, mean=mean),
  }
  summary = {name: correlation(group, "sum") for name, group in points.items()}
  thirds = np.array_split(sorted(points["random"], key=lambda p: p["sum"]), 3)
  for size, third in zip(("mild", "middle", "harsh"), thirds, strict=True):
    summary[f"random_{size}"] = correlation(list(third), "sum")
  summary |= {f"neighbours_{name}": correlation(points["neighbours"], name) for name in ("in_child", "mean")}
  rounds = list(refine.refine(children, limits, rounds=_ROUNDS))
  best = refine.best_of(children, limits, solutions=10, min_different_layers=min(5, children.table.num_layers))
  chosen = {
    "refine_rounds": [{"kl": m.score, "stderr": m.stderr, "blocks": list(m.solution.blocks)} for m in rounds],
    "baselines": {name: _baseline(children, limits, name) for name in BASELINES},
    "best_of_10": [{"kl": m.score, "stderr": m.stderr, "sum": m.solution.score} for m in best],
  }
  own = [
    next(children.scorer.score(layer, [block], jnp.asarray(x)))["kl"]
    for layer, (block, x) in enumerate(
      zip(children.scorer.parent, children.scorer.inputs(children.scorer.parent), strict=False)
    )
  ]
  summary["parent_s_own_blocks"] = {"largest_kl": max(map(abs, own))}
  return {"summary": summary, "chosen": chosen, "points": points, "timing": {"rescored_s": rescored_s}}


def main(argv: list[str]) -> None:
  del argv
  try:
    run = puzzle_jax.open_run(_WORKDIR.value)
    found = study(Children(run), run.config.search.searched, draws=_CHILDREN.value, fastest=_FASTEST.value)
  except puzzle_jax.PuzzleError as e:
    sys.exit(f"error: {e}")
  for name, figures in found["summary"].items():
    print(f"{name:<22}", {key: round(value, 3) for key, value in figures.items()})
  config = run.config.to_dict()
  record = {
    "command": f"python -m experiments.interactions --workdir={_WORKDIR.value} --name={_NAME.value}",
    "date": time.strftime("%F"),
    "hardware": jax_timing.hardware(),
    "versions": versions(),
    "config": {key: config[key] for key in ("name", "parent", "data", "space", "bld", "scores", "search")},
    "data": read_json(Path(_WORKDIR.value) / "data" / "data.json"),
    "stages_s": {store.root.name: store.record["timing"]["seconds"] for store in run.workdir.finished()},
    "rank_correlation_of_subblock_sums": rank_correlation(run.space, run.scores, metric=run.config.scores.metric),
    **found,
  }
  write_json(RESULTS / f"{_NAME.value}.json", record)


if __name__ == "__main__":
  app.run(main)
