"""Runs the pipeline: python -m experiments.run --config=configs/smollm2_135m.py:quickstart --workdir=runs/quickstart.

Started again on the same work directory it does what is missing. Any field can be overridden, for example
--config.search.limits.min_speedup=1.5; --stages=costs,search runs a part; --dry_run says what would be done.
"""

from absl import flags

import puzzle_jax
from puzzle_jax import plan
from puzzle_jax.report import closing_table

from . import launch  # relative: in the wheel, `experiments` lies in `puzzle_jax` (setup.py)

_CONFIG = launch.define_config()
flags.adopt_module_key_flags(launch)  # --help shows --config, too
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory; made if it is not there.", required=True)
_STAGES = flags.DEFINE_list("stages", [], "Stages to run, separated by commas; all when empty.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print what would be done and what it would take; start nothing.")
_REUSE = flags.DEFINE_string("reuse", None, "Another run's directory: take its stages where this run's are the same.")
_WANDB = flags.DEFINE_string("wandb", "", "Send metrics to this project at Weights & Biases, too.")


def main(argv: list[str]) -> None:
  del argv
  config = launch.run_config(_CONFIG)
  if _DRY_RUN.value and _REUSE.value:
    raise puzzle_jax.PuzzleError("--dry_run does not see what --reuse would bring; leave one of them out")
  if _DRY_RUN.value:
    print(plan.make(config, _WORKDIR.value, stages=_STAGES.value))
    return
  run = puzzle_jax.run(config, _WORKDIR.value, stages=_STAGES.value, reuse=_REUSE.value, wandb=_WANDB.value)
  if not _STAGES.value or "report" in _STAGES.value:
    print(closing_table(run.summary, workdir=_WORKDIR.value))


if __name__ == "__main__":
  launch.run(main)
