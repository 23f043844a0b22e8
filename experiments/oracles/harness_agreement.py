"""Does a model judge in lm-evaluation-harness as its own export does in the harness's own backend for Transformers?

    pip install 'puzzle_jax[lm-eval]' 'puzzle_jax[export]' accelerate
    python -m experiments.oracles.harness_agreement --tasks=arc_easy.jsonl.gz,lambada.jsonl.gz

The embedded parent, or the directory that --model names, is exported in fp32; both sides get the same texts of the
first 500 items of each task. Bar: at most one item of 500 is judged differently, by likelihood or by likelihood a
character.
Writes experiments/results/harness_agreement.json.
"""

import datetime
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from experiments import RESULTS
from experiments.oracles.readers import installed
from puzzle_jax.costs import jax_timing
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluation import tasks
from puzzle_jax.evaluation.likelihood import Likelihood
from puzzle_jax.evaluation.suite import task_name
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.parents import EMBEDDED, open_parent
from puzzle_jax.runs import versions
from puzzle_jax.serving import served
from puzzle_jax.store import file_digest, temporary_folder, write_json

_TASKS = flags.DEFINE_list("tasks", None, "JSON lines, as of evaluation.tasks.", required=True)
_MODEL = flags.DEFINE_string("model", EMBEDDED, "All that --config.parent takes.")
_ITEMS = flags.DEFINE_integer("items", 500, "Of each task.", lower_bound=1)
BAR = 1 / 500  # of the items


def likelihoods(model: Any, items: list[tasks.Item]) -> list[Likelihood]:
  """Of every choice behind its context, as the harness asks for them."""
  from lm_eval.api.instance import Instance

  pairs = [(item.context, choice) for item in items for choice in item.choices]
  asked = [Instance("loglikelihood", {}, pair, i, metadata=("task", i, 1)) for i, pair in enumerate(pairs)]
  return [Likelihood(*found) for found in model.loglikelihood(asked)]


def compare(files: list[Path], source: str, number: int) -> dict[str, Any]:
  """The record; its `missed` names the tasks that miss the bar."""
  from lm_eval.models.huggingface import HFLM

  from puzzle_jax.evaluation.harness import HarnessModel

  items = {task_name(str(file)): tasks.read_items(file, limit=number, targets=True) for file in files}
  parent = open_parent(source)
  ours = HarnessModel(LanguageModel.of(parent, parent.tokenizer()))
  found: dict[str, dict[str, Any]] = {}
  with temporary_folder() as folder:
    exported = Path(folder) / "exported"
    served.export_parent(parent, exported, dtype="float32", engine="transformers")
    theirs = HFLM(str(exported), batch_size=16, device="cpu", dtype="float32", trust_remote_code=True)
    for name, questions in items.items():
      both = [likelihoods(model, questions) for model in (ours, theirs)]
      judged = [tasks.answers(questions, side) for side in both]
      kinds = ["plain"] + ["normalised"] * (judged[0].normalised is not None)
      log_p = np.array([[one.log_p for one in side] for side in both])
      found[name] = {"items": len(questions), "largest_difference": float(np.abs(log_p[0] - log_p[1]).max())} | {
        kind: {
          "accuracy": [float(np.mean(getattr(side, kind))) for side in judged],
          "different": int(np.sum(getattr(judged[0], kind) != getattr(judged[1], kind))),
        }
        for kind in kinds
      }
  command = f"python -m experiments.oracles.harness_agreement --tasks={','.join(file.name for file in files)}"
  for flag, value in ((_MODEL, Path(source).name), (_ITEMS, number)):
    if flag.value != flag.default:
      command += f" --{flag.name}={value}"
  return {
    "command": command,
    "date": datetime.date.today().isoformat(),
    "hardware": jax_timing.hardware(),
    "versions": versions() | installed(("lm_eval", "torch", "transformers")),
    "model": parent.name,
    "files": {file.name: file_digest(file) for file in files},
    "tasks": found,
    "bar": BAR,
    "missed": [
      f"{name}, {kind}"
      for name, task in found.items()
      for kind in ("plain", "normalised")
      if kind in task and task[kind]["different"] > BAR * task["items"]
    ],
  }


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  try:
    record = compare([Path(task) for task in _TASKS.value], _MODEL.value, _ITEMS.value)
  except ImportError as e:
    sys.exit(f"error: {e.name} is not installed; pip install 'puzzle_jax[lm-eval]' 'puzzle_jax[export]' accelerate")
  except PuzzleError as e:
    sys.exit(f"error: {e}")
  write_json(RESULTS / "harness_agreement.json", record)
  for name, task in record["tasks"].items():
    for kind in ("plain", "normalised"):
      if kind in task:
        print(f"{name}, {kind}: {task[kind]['different']} of {task['items']} judged differently")
  sys.exit(f"error: missed bars: {', '.join(record['missed'])}" if record["missed"] else 0)


if __name__ == "__main__":
  app.run(main)
