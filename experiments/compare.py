"""Compares ways to choose a child at one target: python -m experiments.compare --workdir=runs/compare --name=compare.

On a run whose stages up to `search` are done (configs/smollm2_135m.py:compare). Each method chooses a child under the
run's limits; it is assembled, evaluated, distilled globally as the run's config says, and evaluated again on rows that
no choice has seen. What is done is kept in WORKDIR/compare and not done again; --name writes the record.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

import puzzle_jax
from experiments import RESULTS
from puzzle_jax import gkd, refine, search
from puzzle_jax.arch import Architecture, BlockSpec
from puzzle_jax.costs import jax_timing
from puzzle_jax.evaluation import quality
from puzzle_jax.progress import Progress
from puzzle_jax.refine import Children
from puzzle_jax.runs import Run, versions
from puzzle_jax.search import Limits, Solution
from puzzle_jax.search.baselines import BASELINES
from puzzle_jax.store import StageStore, read_json, temporary_folder, write_json

Method = Callable[[Children, Limits], Solution]

_WORKDIR = flags.DEFINE_string("workdir", None, "A run whose search is done.", required=True)
_METHODS = flags.DEFINE_list("methods", [], "Which to compare; all when empty.")
_NAME = flags.DEFINE_string("name", "", "Of the record, experiments/results/NAME.json; none when empty.")


ROUNDS = 3  # of `refine`


def _refined(children: Children, limits: Limits) -> Solution:
  return min(refine.refine(children, limits, rounds=ROUNDS), key=lambda m: m.score).solution


def _best_of(children: Children, limits: Limits) -> Solution:
  return refine.best_of(children, limits, solutions=10, min_different_layers=min(5, children.table.num_layers))[
    0
  ].solution


METHODS: dict[str, Method] = {
  "mip": lambda children, limits: search.solve(children.table, limits)[0],
  **{name: lambda c, limits, f=f: f(c.table, limits)[0] for name, f in BASELINES.items()},  # type: ignore[misc]
  "best_of_10": _best_of,
  "refined": _refined,
}


def evaluate(run: Run, children: Children, solution: Solution) -> dict[str, Any]:
  """The child before and after global distillation, held against the parent."""
  parent = run.parent_model
  teacher = (parent.architecture, parent.params)
  architecture = Architecture(parent.architecture.config, tuple(map(BlockSpec.parse, solution.blocks)))
  params = parent.params | {"layers": [weights for _, weights in children.blocks(solution.blocks)]}

  def measure(params: Any) -> dict[str, float]:
    child = (architecture, jax.device_put(params))
    return quality.compare(child, teacher, run.packed("eval"), batch_rows=run.config.evaluation.batch_rows)

  before = measure(params)
  config = dataclasses.replace(run.config.gkd, checkpoint_steps=max(run.config.gkd.steps, 1))
  with temporary_folder() as folder:
    trained, history = gkd.train(
      (architecture, params),
      teacher,
      run.packed("gkd"),
      config=config,
      heldout=run.packed("heldout"),
      folder=Path(folder) / "checkpoints",
      progress=run.progress,
    )
  return {"before_gkd": before, "after_gkd": measure(trained), "gkd_loss": history[-1]["loss"] if history else None}


def compare(run: Run, store: StageStore, methods: list[str]) -> dict[str, Any]:
  """By method; what `store` has is not done again."""
  children, limits = Children(run), run.config.search.searched
  parent = search.solution(search.programs(run.table, Limits())[0], run.table.parent)
  for name in methods:
    if f"{name}.json" in store:
      continue
    begin = time.perf_counter()
    try:
      solution = METHODS[name](children, limits)
    except puzzle_jax.PuzzleError as e:  # such as `uniform`, if no single block meets the limits
      store.put_json(f"{name}.json", {"error": str(e)})
      continue
    chosen_s = time.perf_counter() - begin
    heldout = children.scores(solution.blocks)
    found: dict[str, Any] = {
      "blocks": list(solution.blocks),
      "score": float(children.table.total_score(solution.choice)),
      "heldout_kl": heldout["kl"],
      "speedup": solution.throughput / parent.throughput,
      "params": solution.params,
      "kv_bytes_per_token": solution.kv_bytes_per_token,
      **evaluate(run, children, solution),
      "timing": {"choice_s": chosen_s, "all_s": time.perf_counter() - begin},
    }
    store.put_json(f"{name}.json", found)
    run.progress.say(f"{name}: KL {found['before_gkd']['kl']:.4f} -> {found['after_gkd']['kl']:.4f}")
    jax.clear_caches()
  return {name: store.get_json(f"{name}.json") for name in methods}


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)  # orbax's chatter
  try:
    run = puzzle_jax.open_run(_WORKDIR.value)
    run.progress = Progress()
    if unknown := set(_METHODS.value) - METHODS.keys():
      raise puzzle_jax.PuzzleError(f"--methods: {', '.join(unknown)} unknown; known: {', '.join(METHODS)}")
    store = StageStore(Path(_WORKDIR.value) / "compare")
    store.begin({"search": run.store("search").content(), "gkd": dataclasses.asdict(run.config.gkd)})
    found = compare(run, store, _METHODS.value or list(METHODS))
  except puzzle_jax.PuzzleError as e:
    sys.exit(f"error: {e}")
  for name, result in found.items():
    line = [f"KL {result[when]['kl']:.4f}" for when in ("before_gkd", "after_gkd")] if "blocks" in result else []
    print(f"{name:<16} {' -> '.join(line) or result['error']}")
  if _NAME.value:
    config = run.config.to_dict()
    record = {
      "command": f"python -m experiments.compare --workdir={_WORKDIR.value} --name={_NAME.value}",
      "date": time.strftime("%F"),
      "hardware": jax_timing.hardware(),
      "versions": versions(),
      "config": {key: config[key] for key in ("name", "parent", "data", "space", "bld", "scores", "search", "gkd")},
      "data": read_json(Path(_WORKDIR.value) / "data" / "data.json"),
      "methods": found,
    }
    write_json(RESULTS / f"{_NAME.value}.json", record)


if __name__ == "__main__":
  app.run(main)
