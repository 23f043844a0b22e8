"""Runs the arms of configs/block_library.py and compares them: python -m experiments.block_library --workdir=runs/study

Each arm is a run of its own below the work directory; started again, it goes on. The record says, for each arm, kind of
variant and layer, the held-out loss before and after training and what the variant costs in the parent (KL).
"""

import datetime
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags
from ml_collections import config_flags

import puzzle_jax
from configs import block_library
from experiments import RESULTS
from puzzle_jax.config import RunConfig
from puzzle_jax.costs import jax_timing
from puzzle_jax.runs import Run, versions
from puzzle_jax.store import write_json

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the arms' runs.", required=True)
_ARMS = flags.DEFINE_list("arms", list(block_library.ARMS), "Which of them, separated by commas.")
_NAME = flags.DEFINE_string("name", "block_library", "Of the record: experiments/results/NAME.json.")
_CHANGES = config_flags.DEFINE_config_dict(
  "change", block_library.get_config(), "Fields that all arms share, as in --change.data.source=TEXT.jsonl.gz."
)
_SHARED = ("data", "datasets", "activations", "costs")  # what no arm changes


def config_of(arm: str, shared: dict[str, Any]) -> RunConfig:
  """An arm, with the fields that were given for all."""
  values = block_library.get_config(arm)
  base = block_library.get_config().to_dict()
  for section, fields in shared.items():
    if isinstance(fields, dict):
      values[section].update({k: v for k, v in fields.items() if v != base[section][k]})
    elif fields != base[section]:
      values[section] = fields
  return RunConfig.from_dict(values.to_dict())


def found(run: Run) -> dict[str, dict[str, list[float]]]:
  """By variant, layer after layer: losses and scores, to five digits."""
  variants: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
  for layer, space in enumerate(run.space.layers):
    losses = run.library.losses(layer)
    for block in space.single_replacements:
      (changed,) = (s for s in block.subblocks if s not in space.parent.subblocks)
      if block.name in run.scores[layer]:
        variants[changed.id]["kl"].append(_rounded(run.scores[layer][block.name]["kl"]))
        for kind in ("delta_init", "delta_trained", "paper_init", "paper_trained"):
          variants[changed.id][kind].append(_rounded(losses[changed.id][kind]))
  return variants


def _rounded(x: float) -> float:
  return float(f"{x:.5g}")


def pairs(run: Run) -> dict[str, dict[str, list[float]]]:
  """Of coupled pairs, by block, layer after layer: KL as pairs of decoupled subblocks and trained together."""
  result: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
  store = run.store("coupled")
  for layer, scores in enumerate(run.scores):
    file = f"scores/layer_{layer:02d}.json"
    for block, coupled in store.get_json(file)["blocks"].items() if file in store else ():
      result[block]["decoupled"].append(_rounded(scores[block]["kl"]))
      result[block]["coupled"].append(_rounded(coupled["kl"]))
  return result


def main(argv: list[str]) -> None:
  del argv
  root, first, arms = Path(_WORKDIR.value), None, {}
  for arm in _ARMS.value:
    folder = root / arm
    if first is not None:
      for name in _SHARED:
        if not (folder / name).exists():
          shutil.copytree(first / name, folder / name)
    stages = ["data", "costs", "activations", "library", "scores"]
    config = config_of(arm, _CHANGES.value.to_dict())
    if config.coupled.wanted:
      stages += ["search", "coupled"]
    try:
      run = puzzle_jax.run(config, folder, stages=stages)
    except puzzle_jax.PuzzleError as e:
      sys.exit(f"error: {arm}: {e}")
    first = first or folder
    seconds = {name: run.store(name).record["timing"]["seconds"] for name in ("library", "scores")}
    arms[arm] = {"changes": block_library.ARMS[arm], "variants": found(run), "pairs": pairs(run), "seconds": seconds}
    print(arm, {k: round(float(np.mean(v["kl"])), 4) for k, v in found(run).items()}, flush=True)
    write_json(
      RESULTS / f"{_NAME.value}.json",
      {
        "command": f"python -m experiments.block_library --workdir=runs/{root.name}",
        "date": datetime.date.today().isoformat(),
        "hardware": jax_timing.hardware(),
        "versions": versions(),
        "config": config_of("base", _CHANGES.value.to_dict()).to_dict(),
        "arms": arms,
      },
    )


if __name__ == "__main__":
  app.run(main)
