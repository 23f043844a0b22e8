"""The configs that come along: their text is held in tests/golden/; what their sweeps start, here and on a cluster."""

import json
import subprocess
from pathlib import Path

import pytest

from configs import smollm2_135m
from experiments import golden
from puzzle_jax import sweep
from puzzle_jax.config import RunConfig, check_key
from puzzle_jax.errors import PuzzleError

COMMAND = ["python", "-m", "experiments.run"]
SMOLLM2 = "configs/smollm2_135m.py"


def test_no_value_changes_unseen() -> None:
  found = {path.name: path.read_text() for path in golden.FOLDER.glob("*.json")}
  assert golden.texts() == found, "configs changed; if that is meant, run python -m experiments.golden"
  assert all(RunConfig.from_dict(json.loads(text)["config"]) for text in found.values())


def test_each_run_of_the_sweep_is_a_valid_config() -> None:
  points = sweep.points(Path(SMOLLM2))
  assert len(points) > 1
  for overrides in points:
    config = smollm2_135m.get_config()
    for key, value in overrides.items():
      check_key(key)
      config.update_from_flattened_dict({key: value})
    assert RunConfig.from_dict(config.to_dict()).search.limits.min_speedup == overrides["search.limits.min_speedup"]


def test_what_a_sweep_shares() -> None:
  assert sweep.shared_stages([{"search.limits.min_speedup": 2}]) == [
    "data",
    "costs",
    "activations",
    "library",
    "scores",
  ]
  assert sweep.shared_stages([{"gkd.steps": 2}, {"gkd.seed": 1}])[-3:] == ["search", "coupled", "child"]
  assert sweep.shared_stages([{"gkd.steps": 2}, {"data.seed": 1}]) == ["costs"]
  assert sweep.shared_stages([{"parent": "x"}]) == []
  planned = sweep.plan(COMMAND, f"{SMOLLM2}:quickstart", {"gkd.steps": 8}, Path("runs/s"))
  assert planned.shared[3:] == [
    f"--config={SMOLLM2}:quickstart",
    "--config.gkd.steps=8",
    "--config.search.limits.min_speedup=1.1",
    "--workdir=runs/s/shared",
    "--stages=data,costs,activations,library,scores",
  ]
  assert planned.runs["min_speedup=2.0"][3:] == [
    f"--config={SMOLLM2}:quickstart",
    "--config.gkd.steps=8",
    "--config.search.limits.min_speedup=2.0",
    "--workdir=runs/s/min_speedup=2.0",
    "--reuse=runs/s/shared",
  ]


def test_sweeps_that_cannot_be() -> None:
  with pytest.raises(PuzzleError, match=r"tiny.py has no sweep\(add\)"):
    sweep.plan(COMMAND, "configs/tiny.py", {}, Path("runs/s"))


def test_two_runs_of_one_name(tmp_path: Path) -> None:
  file = tmp_path / "twice.py"
  file.write_text("def sweep(add):\n  add({'gkd.seed': 1})\n  add({'bld.seed': 1})\n")
  with pytest.raises(PuzzleError, match="two runs are called 'seed=1'"):
    sweep.plan(COMMAND, str(file), {}, tmp_path)


def test_the_script_for_slurm_submits_every_run(tmp_path: Path) -> None:
  """Against an `sbatch` and a `python` that write down what they are given; the former runs the scripts."""
  planned = sweep.plan(COMMAND, SMOLLM2, {"data.source": "a b's.txt"}, Path("runs/s"))
  (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s|" "$@" >> runs\necho >> runs\n')
  (tmp_path / "sbatch").write_text(
    '#!/bin/bash\nprintf "%s|" "$@" >> sbatch.log\necho >> sbatch.log\n'
    'for argument in "$@"; do if [ "$previous" = --wrap ]; then bash -c "$argument"; echo 17; exit; fi\n'
    "previous=$argument; done\nscript=$(cat)\n"
    'for i in 0 1 2 3; do SLURM_ARRAY_TASK_ID=$i bash -c "$script"; done\n'
  )
  for name in ("python", "sbatch"):
    (tmp_path / name).chmod(0o755)
  (tmp_path / "sweep.sh").write_text(sweep.slurm_script(planned, name="s"))
  path = f"{tmp_path}:/usr/bin:/bin"
  subprocess.run(["bash", "sweep.sh", "--gres=gpu:1"], cwd=tmp_path, env={"PATH": path}, check=True)
  submitted = (tmp_path / "sbatch.log").read_text().splitlines()
  assert [line.split("|")[:-1][:3] for line in submitted] == [
    ["--parsable", "--job-name=s-shared", "--gres=gpu:1"],
    ["--job-name=s", "--array=0-3", "--gres=gpu:1"],
  ]
  assert "--dependency=afterok:17" in submitted[1]
  started = [line.split("|")[:-1] for line in (tmp_path / "runs").read_text().splitlines()]
  assert started == [command[1:] for command in (planned.shared, *planned.runs.values())]
