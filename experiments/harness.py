"""Tasks of EleutherAI's lm-evaluation-harness on several models, side by side.

    pip install 'puzzle_jax[lm-eval]'
    python -m experiments.harness --models=smollm2-135m,runs/quickstart --tasks=arc_easy,lambada_openai

The first model is the parent: the last column is what the last one preserves of it. The harness downloads its tasks'
data; `--include_path` adds a folder of tasks of one's own.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

import puzzle_jax
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model.language_model import LanguageModel

_MODELS = flags.DEFINE_list("models", None, "Runs (their children), models' directories, GGUF files, or hub ids.")
_TASKS = flags.DEFINE_list("tasks", None, "The harness's tasks.")
_INCLUDE = flags.DEFINE_string("include_path", None, "Folder of further tasks.")
_LIMIT = flags.DEFINE_integer("limit", None, "Items of each task; all when not set.", lower_bound=1)
_SHOTS = flags.DEFINE_integer("num_fewshot", None, "Examples in the prompt; the task's own number when not set.")
_CHAT = flags.DEFINE_bool("apply_chat_template", False, "Ask through the parent's chat template.")
_TOKENS = flags.DEFINE_integer("batch_tokens", 4096, "Read at once for likelihoods.", lower_bound=1)
_ROWS = flags.DEFINE_integer("batch_rows", 16, "Answers that are written at once.", lower_bound=1)
_RESULTS = flags.DEFINE_string("results", None, "JSON file for the harness's results.")


def table(results: dict[str, dict[str, Any]]) -> list[str]:
  """Lines: a task and metric each, with the models' values and the last one's share of the first one's.

  Args:
    results: by model what `simple_evaluate` gives under `results`.
  """
  first, *_, last = [*results.values(), *results.values()]  # the same where there is one
  lines = [f"{'task':<32} {'metric':<20} " + " ".join(f"{Path(name).name[-16:]:>16}" for name in results)]
  for task, values in first.items():
    for key, value in values.items():
      metric = key.partition(",")[0]
      if isinstance(value, float) and not metric.endswith("_stderr"):
        cells = " ".join(f"{found[task][key]:>16.4f}" for found in results.values())
        share = f" {100 * last[task][key] / value:>8.1f} %" if value and len(results) > 1 else ""
        lines.append(f"{task:<32} {metric:<20} {cells}{share}")
  return lines


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  try:
    import lm_eval
    from lm_eval.tasks import TaskManager

    from puzzle_jax.evaluation.harness import HarnessModel
  except ImportError as e:
    sys.exit(f"error: {e.name} is not installed; pip install 'puzzle_jax[lm-eval]'")
  found: dict[str, dict[str, Any]] = {}
  try:
    for name in _MODELS.value or ():
      is_run = os.path.isfile(os.path.join(name, "gkd", "manifest.json"))
      model = puzzle_jax.open_run(name).child if is_run else LanguageModel.open(name)
      found[name] = lm_eval.simple_evaluate(
        model=HarnessModel(model, batch_tokens=_TOKENS.value, batch_rows=_ROWS.value),
        tasks=_TASKS.value,
        task_manager=TaskManager(include_path=_INCLUDE.value),
        limit=_LIMIT.value,
        num_fewshot=_SHOTS.value,
        apply_chat_template=_CHAT.value,
        log_samples=False,
      )["results"]
  except PuzzleError as e:
    sys.exit(f"error: {e}")
  print("\n".join(table(found)))
  if _RESULTS.value:
    Path(_RESULTS.value).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  flags.mark_flags_as_required(["models", "tasks"])
  app.run(main)
