"""Runs the pipeline: python -m experiments.run --config=configs/smollm2_135m.py:quickstart --workdir=runs/quickstart.

Started again on the same work directory it does what is missing. Any field can be overridden, for example
--config.search.limits.min_speedup=1.5; --stages=costs,search runs a part.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

import puzzle_jax
from puzzle_jax.report import closing_table

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, such as configs/smollm2_135m.py:quickstart.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory; made if it is not there.", required=True)
_STAGES = flags.DEFINE_list("stages", [], "Stages to run, separated by commas; all when empty.")
flags.mark_flags_as_required(["config"])


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  logging.set_verbosity(logging.ERROR)  # libraries' chatter would tear the progress bars
  try:
    run = puzzle_jax.run(_CONFIG.value.to_dict(), _WORKDIR.value, stages=_STAGES.value)
    if not _STAGES.value or "report" in _STAGES.value:
      print(closing_table(run.summary, workdir=_WORKDIR.value))
  except puzzle_jax.PuzzleError as e:
    sys.exit(f"error: {e}")


if __name__ == "__main__":
  app.run(main)
