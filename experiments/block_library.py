"""Runs the arms of configs/block_library.py and compares them: python -m experiments.block_library --workdir=runs/study

Each arm is a run of its own below the work directory. The record says, for each arm, kind of variant and layer, the
held-out loss before and after training and what the variant costs in the parent (KL). Started again, the study goes on
with the arms that its record lacks.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from absl import app, flags
from ml_collections import config_flags

import puzzle_jax
from configs import block_library
from experiments import RESULTS, arms
from puzzle_jax.errors import PuzzleError
from puzzle_jax.runs import Run
from puzzle_jax.store import write_json

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the arms' runs.", required=True)
_ARMS = flags.DEFINE_list("arms", list(block_library.ARMS), "Which of them, separated by commas.")
_RECORD = flags.DEFINE_string(
  "record", str(RESULTS / "block_library.json"), "Where to write it; goes on with what it has."
)
_CHANGES = config_flags.DEFINE_config_dict(
  "change", block_library.get_config(), "Fields that all arms share, as in --change.data.source=TEXT.jsonl.gz."
)


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


def study() -> None:
  root, path, base = Path(_WORKDIR.value), Path(_RECORD.value), block_library.get_config()
  header = arms.header("block_library", root, arms.with_changes(base, base, _CHANGES.value))
  record, first = arms.opened(path, header | {"arms": {}}), None
  missing = [arm for arm in _ARMS.value if arm not in record["arms"]]
  for arm in dict.fromkeys(["base", *missing] if missing else []):  # the others take from the base what they share
    folder, stages = root / arm, ["data", "costs", "activations", "library"]
    stages += ["scores"] if arm in missing else []  # else the others take from it what they share
    config = arms.with_changes(block_library.get_config(arm), base, _CHANGES.value)
    if config.coupled.wanted:
      stages += ["search", "coupled"]
    run = puzzle_jax.run(config, folder, stages=stages, reuse=first)
    first = first or folder
    if arm not in missing:
      continue
    variants = found(run)
    record["arms"][arm] = {"changes": block_library.ARMS[arm], "variants": variants, "pairs": pairs(run)}
    print(arm, {k: round(float(np.mean(v["kl"])), 4) for k, v in variants.items()}, flush=True)
    write_json(path, record)


def main(argv: list[str]) -> None:
  del argv
  try:
    study()
  except PuzzleError as e:
    sys.exit(f"error: {e}")


if __name__ == "__main__":
  app.run(main)
