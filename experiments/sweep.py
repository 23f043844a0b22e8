"""Runs a config's sweep: python -m experiments.sweep --config=configs/smollm2_135m.py:quickstart --workdir=runs/speeds

The config's `sweep(add)` says what each run overrides, and its directory in WORKDIR is named after that. Stages that
are the same in all of them are made once, in WORKDIR/shared. --config.section.field=value holds for every run.

Here the runs go one after the other; started again, the sweep goes on. For a cluster, print a script instead, and give
it what `sbatch` needs to know:

    python -m experiments.sweep --config=… --workdir=… --slurm > sweep.sh
    bash sweep.sh --gres=gpu:1 --time=8:00:00
"""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

import puzzle_jax
from puzzle_jax import sweep
from puzzle_jax.report import closing

from . import launch  # relative: in the wheel, `experiments` lies in `puzzle_jax` (setup.py)

_CONFIG = launch.define_config()
flags.adopt_module_key_flags(launch)  # --help shows --config, too
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs' directories are made.", required=True)
_SLURM = flags.DEFINE_bool("slurm", False, "Print a script that submits the runs as one Slurm array; start nothing.")


def _row(workdir: Path) -> str:
  summary = puzzle_jax.open_run(workdir).summary
  child, faster = summary["models"]["child"], closing.speedup(summary)
  if faster is None:  # not timed here: as the costs predict
    faster = summary["solution"]["throughput"] / (closing.predicted_throughput(summary, "parent") or math.nan)
  return f"{faster:>9.2f}× {child['params'] / 1e6:>12.1f} {child['kl']:>9.4f} ± {child['kl_stderr']:.4f}"


def main(argv: list[str]) -> int | None:
  del argv
  launch.run_config(_CONFIG)
  flag: Any = flags.FLAGS["config"]
  workdir = Path(_WORKDIR.value)
  run = [sys.executable, "-m", f"{__package__}.run"]
  planned = sweep.plan(run, flag.config_filename, flag.override_values, workdir)
  if _SLURM.value:
    print(sweep.slurm_script(planned, name=workdir.name))
    return None
  if planned.shared and subprocess.run(planned.shared).returncode:
    return 1
  failed = [name for name, command in planned.runs.items() if subprocess.run(command).returncode]
  print(f"\n{'':<32} {'speed-up':>10} {'parameters (M)':>12} {'KL (nats a token)':>18}")
  for name in planned.runs:
    print(f"{name:<32} {'failed: see above' if name in failed else _row(workdir / name)}")
  return 1 if failed else None


if __name__ == "__main__":
  launch.run(main)
