"""Keeps what there is to see of a run as a small record (puzzle_jax/records.py), for the notebooks and the pictures:

python -m experiments.keep_record --workdir=runs/compare --name=full_space
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from puzzle_jax import records, search
from puzzle_jax.data import documents
from puzzle_jax.errors import PuzzleError
from puzzle_jax.pipeline import STAGES
from puzzle_jax.records import open_record
from puzzle_jax.search.table import Table
from puzzle_jax.store import replacing

_WORKDIR = flags.DEFINE_string("workdir", None, "A run with scores and a search.", required=True)
_NAME = flags.DEFINE_enum("name", None, records.NAMES, "Of the record.", required=True)
_DIGITS = flags.DEFINE_integer("digits", 5, "Significant ones of each number.")
_SPEEDS = (1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 2.0)  # of a frontier, where the run has none


def rounded(value: Any, digits: int) -> Any:
  """Fractions to so many significant digits, wherever they stand; whole numbers as they are."""
  if isinstance(value, dict):
    return {key: rounded(item, digits) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [rounded(item, digits) for item in value]
  if isinstance(value, float) and value and math.isfinite(value) and not value.is_integer():
    return float(f"{value:.{digits}g}")
  return value


def frontier(table: Table) -> list[dict[str, Any]]:
  """The best child at each of `_SPEEDS` that can be reached, as the run's own frontier has them."""
  points = search.frontier(table, "min_speedup", _SPEEDS)
  return [{"min_speedup": p.value, **p.solution.to_json()} for p in points if p.solution]


def _keep(root: Path) -> None:
  record = open_record(_WORKDIR.value)
  summary = dict(record.summary)
  config, made = summary["config"], {stage["name"] for stage in summary["stages"]}
  source, stages = config["data"]["source"], [stage.name for stage in STAGES if stage.name in made]
  summary["command"] = f"python -m experiments.run --config=configs/{config['name']} --workdir=runs/{root.name}"
  if source != documents.STDLIB:
    summary["command"] += f" --config.data.source={source}"
  if "evaluation" not in made:
    summary["command"] += f" --stages={','.join(stages)}"
  summary["frontier"] = summary["frontier"] or frontier(record.table)
  for name, data in {"report/summary.json": summary, "search/table.json": record.table.to_json()}.items():
    with replacing(root / name) as aside:
      text = json.dumps(rounded(data, _DIGITS.value), separators=(",", ":"), allow_nan=False)
      aside.write_text(text + "\n", encoding="utf-8")


def main(argv: list[str]) -> None:
  del argv
  try:
    _keep(records.FOLDER / _NAME.value)
  except PuzzleError as e:
    sys.exit(f"error: {e}")


if __name__ == "__main__":
  app.run(main)
