"""Keeps a run's figures as a small record: python -m experiments.record --workdir=runs/quickstart --name=quickstart."""

import sys

from absl import app, flags

import puzzle_jax
from experiments import RESULTS
from puzzle_jax.store import write_json

_WORKDIR = flags.DEFINE_string("workdir", None, "A finished run.", required=True)
_NAME = flags.DEFINE_string("name", None, "Of the record: experiments/results/NAME.json.", required=True)

_KEPT = ("name", "date", "command", "parent", "hardware", "versions", "target", "models", "before_gkd", "eval_tokens")


def main(argv: list[str]) -> None:
  del argv
  try:
    summary = puzzle_jax.open_run(_WORKDIR.value).summary
  except puzzle_jax.PuzzleError as e:
    sys.exit(f"error: {e}")
  record = {key: summary[key] for key in _KEPT}
  record["stages"] = {stage["name"]: round(stage["seconds"], 1) for stage in summary["stages"]}
  record["samples"] = summary["samples"]
  record["solution"] = {key: summary["solution"][key] for key in ("score", "mip_gap", "runtime_s")}
  write_json(RESULTS / f"{_NAME.value}.json", record)


if __name__ == "__main__":
  app.run(main)
