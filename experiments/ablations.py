"""Runs the arms of configs/ablations.py and holds their children against each other.

    python -m experiments.ablations --workdir=runs/ablations --change.data.source=TEXT.jsonl.gz \
      --change.evaluation.texts='("OTHER.txt.gz",)'

Each child is measured on the base's held-out rows and on the other texts, whatever it was made from. The record,
experiments/results/ablations.json, is written after each child and has its losses by blocks of rows; started again, the
study goes on with those that it lacks, on a bare machine too: what all arms share is then made again. An arm takes from
the base what it does not change; its own files are deleted once it is in the record.
"""

import hashlib
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

import puzzle_jax
from configs import ablations
from experiments import RESULTS, arms
from puzzle_jax import data, search
from puzzle_jax.config import RunConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluation import quality, suite
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.runs import Run
from puzzle_jax.search import Limits
from puzzle_jax.search import baselines as search_rules
from puzzle_jax.store import write_json

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the arms' runs.", required=True)
_ARMS = flags.DEFINE_list("arms", list(ablations.ARMS), "Which of them, separated by commas.")
_SEEDS = flags.DEFINE_integer("seeds", 0, "At most so many of each arm; 0: as the config says.")
_MINUTES = flags.DEFINE_float("minutes", 0, "Begin no further child after so many; 0: no end.")
_RECORD = flags.DEFINE_string("record", str(RESULTS / "ablations.json"), "Where to write it; goes on with what it has.")
_CHANGES = config_flags.DEFINE_config_dict(
  "change", ablations.get_config(), "Fields that all arms share, as in --change.data.source=TEXT.jsonl.gz."
)

SHARED = ["data", "costs", "activations", "library", "scores", "search"]  # of the base, made in any case
STAGES = [*SHARED, "coupled", "child", "gkd"]
BLOCK = 4  # rows whose losses the record adds up


def config_of(arm: str, seed: int, changed: Any) -> RunConfig:
  """An arm's config for one of its seeds, with the fields that were given for all."""
  values = ablations.get_config(arm)
  values.gkd.seed = seed
  if values.search.rule == search_rules.random_feasible.__name__:
    values.search.seed = seed
  values.data.source = values.data.source.replace(ablations.TEXT, changed.data.source)
  return arms.with_changes(values, ablations.get_config(), changed)


def by_block(
  child: LanguageModel, parent: LanguageModel, packed: data.PackedText, *, batch_rows: int
) -> dict[str, list[float]]:
  """`quality.by_row`, some neighbouring rows together: they can be of one document."""
  ours, theirs = ((m.architecture, m.params) for m in (child, parent))
  sums = quality.by_row(ours, theirs, packed, batch_rows=batch_rows)
  starts = np.arange(0, packed.num_rows, BLOCK)
  return {k: [float(f"{x:.7g}") for x in np.add.reduceat(values, starts)] for k, values in sums.items()}


def child_of(run: Run, texts: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
  """What the record keeps of one child, measured by `by_block`."""
  parent = search.solution(search.programs(run.table, Limits())[0], run.table.parent)
  history = run.store("gkd").get_json("history.json")["steps"]
  return {
    "blocks": list(run.solution["blocks"]),
    "speedup": run.solution["throughput"] / parent.throughput,
    "params": run.child.architecture.num_params(),
    "last_step": history[-1] if history else {},
    "texts": {text: {"kl": sums["kl"], "nll": sums["child"]} for text, sums in texts.items()},
    "seconds": {name: round(run.store(name).record["timing"]["seconds"], 1) for name in STAGES},
  }


class Study:
  """The children to make, and the record."""

  def __init__(self, root: Path, record: Path, changed: Any):
    self._root, self._path, self._changed = root, record, changed
    base = config_of(ablations.BASE, 0, changed)
    self._record = arms.opened(record, arms.header("ablations", root, base) | {"texts": {}, "arms": {}})
    self._base = puzzle_jax.run(base, self._folder(ablations.BASE, 0), stages=SHARED)
    rows_of = dict(suite.texts(self._base))
    self._texts = {name: rows(base.data.seq_len) for name, rows in rows_of.items()}
    digests = {name: hashlib.sha256(packed.tokens.tobytes()).hexdigest() for name, packed in self._texts.items()}
    for name, found in digests.items():
      if self._record.setdefault("digests", digests).get(name) != found:
        raise PuzzleError(f"{name} is not the text that {record} was measured on: name another --record")

  def _folder(self, arm: str, seed: int) -> Path:
    """Of a child's run; what the parent writes is kept for all."""
    folder = self._root / f"{arm}_{seed}"
    if not folder.exists():
      (self._root / "datasets").mkdir(parents=True, exist_ok=True)
      folder.mkdir()
      (folder / "datasets").symlink_to((self._root / "datasets").absolute())
    return folder

  def has(self, arm: str, seed: int) -> bool:
    """Whether the record does; what failed is tried again."""
    return "error" not in self._record["arms"].get(arm, {}).get("children", {}).get(str(seed), {"error": "not made"})

  def make(self, arm: str, seed: int) -> None:
    """A child, into the record; a rule that finds none, or a training that diverges, is a result too."""
    folder, first = self._folder(arm, seed), self._root / f"{arm}_0"
    reuse = first if seed and (first / "config.json").exists() else self._base.workdir.root
    begin = time.perf_counter()
    try:
      config = config_of(arm, seed, self._changed)
      run = puzzle_jax.run(config, folder, stages=STAGES, reuse=None if reuse == folder else reuse)
      texts = {name: self._measure(run, name) for name in self._texts}
      child = child_of(run, texts)
    except PuzzleError as e:
      child = {"error": str(e)}
    found = self._record["arms"].setdefault(arm, {"changes": ablations.ARMS[arm], "children": {}})
    found["children"][str(seed)] = child | {"wall_s": round(time.perf_counter() - begin, 1)}
    write_json(self._path, self._record)
    jax.clear_caches()

  def _measure(self, run: Run, text: str) -> dict[str, list[float]]:
    sums = by_block(run.child, run.parent_model, self._texts[text], batch_rows=run.config.evaluation.batch_rows)
    parent = {"nll": sums["parent"], "tokens": sums["tokens"]}
    before = self._record["texts"].setdefault(text, parent)
    if before["tokens"] != parent["tokens"] or not np.allclose(before["nll"], parent["nll"], rtol=1e-3):
      raise PuzzleError(f"{text} is not the text that {self._path} was measured on")
    return sums

  def forget(self, arm: str) -> None:
    """Deletes the runs of an arm, but for the base's."""
    for folder in self._root.glob(f"{arm}_[0-9]"):
      if folder != self._base.workdir.root:
        shutil.rmtree(folder)


def study() -> None:
  begin = time.monotonic()
  if unknown := set(_ARMS.value) - ablations.ARMS.keys():
    raise PuzzleError(f"--arms: {', '.join(sorted(unknown))} unknown; known: {', '.join(ablations.ARMS)}")
  root = Path(_WORKDIR.value)
  if jax.default_backend() != "cpu":  # seeds of an arm are one program
    jax.config.update("jax_compilation_cache_dir", str((root / "compiled").absolute()))
  made = Study(root, Path(_RECORD.value), _CHANGES.value)
  for arm in _ARMS.value:
    for seed in range(min(ablations.SEEDS.get(arm, 1), _SEEDS.value or 9)):
      if made.has(arm, seed):
        continue
      if _MINUTES.value and time.monotonic() - begin > 60 * _MINUTES.value:
        print(f"{arm} and what follows is left; the same command goes on")
        return
      made.make(arm, seed)
    made.forget(arm)
  print("all children are made")


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)  # orbax's chatter
  try:
    study()
  except PuzzleError as e:
    sys.exit(f"error: {e}")


if __name__ == "__main__":
  app.run(main)
