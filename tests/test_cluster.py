"""The scripts of docs/cluster.md: whole, valid, and what the Slurm one does when a run was preempted."""

import math
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from puzzle_jax import pipeline, preemption

PAGE = (Path(__file__).parents[1] / "docs" / "cluster.md").read_text()


def shown(name: str) -> str:
  """A file as the page shows it."""
  found = re.search(rf"<!-- {re.escape(name)} -->\n```\w+\n(.*?)```\n<!-- end -->", PAGE, re.DOTALL)
  assert found, name
  return found[1]


def slurm(folder: Path, *, code: int) -> tuple[int, list[str], list[str]]:
  """Runs the script with an srun that ends with a status: the script's own, what srun and scontrol were given."""
  for name, status in (("srun", code), ("scontrol", 0)):
    (folder / name).write_text(
      f'#!/bin/bash\nprintf "%s\\n" "$@" "$JAX_LOCAL_DEVICE_IDS" > {folder}/{name}.log\nexit {status}\n'
    )
    (folder / name).chmod(0o755)
  script = shown("puzzle.sbatch").replace("root=/shared/puzzle_jax", f"root={folder}")
  environ = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "17"}
  done = subprocess.run(["bash", "-c", script, "puzzle.sbatch", "--stages=library"], env=environ, check=False)
  logs = [folder / f"{name}.log" for name in ("srun", "scontrol")]
  given = [log.read_text().splitlines() if log.exists() else [] for log in logs]
  return done.returncode, *given


def test_the_slurm_script_is_bash() -> None:
  subprocess.run(["bash", "-n"], input=shown("puzzle.sbatch"), text=True, check=True)


@pytest.mark.parametrize("code", [0, 1, preemption.EXIT_CODE])
def test_a_preempted_run_is_requeued_and_no_other(tmp_path: Path, code: int) -> None:
  status, srun, scontrol = slurm(tmp_path, code=code)
  assert status == code
  assert "--stages=library" in srun
  assert srun[-1] == "0,1,2,3,4,5,6,7"
  assert scontrol[:2] == (["requeue", "17"] if code == preemption.EXIT_CODE else [])


def manifests() -> dict[str, dict[str, Any]]:
  return {m["kind"]: m for m in yaml.safe_load_all(shown("puzzle.yaml"))}


def test_the_jobset_starts_as_many_hosts_as_its_mesh_has() -> None:
  job = manifests()["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["completionMode"] == "Indexed"  # JAX takes a process's number from it
  assert job["parallelism"] == job["completions"]
  (container,) = job["template"]["spec"]["containers"]
  devices = job["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]
  axes = [int(a.rpartition("=")[2]) for a in container["command"] if a.startswith("--config.mesh.")]
  assert axes == [8, 8]
  assert devices == 64
  assert "--stages=library" in container["command"]


def test_the_slurm_jobs_have_as_many_hosts_as_their_meshes_and_all_stages() -> None:
  script = shown("puzzle.sbatch")
  whole, gpus = (int(re.findall(rf"--{name}=(\d+)", script)[0]) for name in ("nodes", "gpus-per-node"))
  assert "--config.mesh" not in script
  jobs, stages = re.findall(r"^submit (.*puzzle\.sbatch.*)$", PAGE, re.MULTILINE), list[str]()
  for job in jobs:
    nodes = re.search(r"--nodes=(\d+)", job)
    axes = [int(n) for n in re.findall(r"--config\.mesh\.\w+=(\d+)", job)]
    assert math.prod(axes) == gpus * (int(nodes[1]) if nodes else whole), job
    stages += re.findall(r"--stages=(\S+)", job)[0].split(",")
  assert sorted(stages) == sorted(stage.name for stage in pipeline.STAGES)
  order = {name: i for i, name in enumerate(stages)}
  assert all(order[name] < order[stage.name] for stage in pipeline.STAGES for name in stage.inputs)


def test_both_scripts_have_the_settings_that_all_stages_share() -> None:
  shared = {"bld.layers=8", "activations.window_tokens=15663104", "activations.tier=host"}
  for name in ("puzzle.sbatch", "puzzle.yaml"):
    assert shared <= set(re.findall(r"--config\.((?:bld|activations)\.[\w.]+=\w+)", shown(name)))


def test_the_jobset_starts_again_when_it_was_preempted() -> None:
  found = manifests()
  spec = found["JobSet"]["spec"]
  job = spec["replicatedJobs"][0]["template"]["spec"]
  (rule,) = spec["failurePolicy"]["rules"]
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  codes = [r["onExitCodes"] for r in job["podFailurePolicy"]["rules"] if "onExitCodes" in r]
  pod = job["template"]["spec"]
  assert codes == [{"containerName": pod["containers"][0]["name"], "operator": "In", "values": [preemption.EXIT_CODE]}]
  assert pod["restartPolicy"] == "Never"  # a podFailurePolicy needs it
  mounts = {m["name"] for m in pod["containers"][0]["volumeMounts"]}
  assert mounts == {v["name"] for v in pod["volumes"]}
  assert pod["serviceAccountName"] == found["ServiceAccount"]["metadata"]["name"]
  assert found["RoleBinding"]["roleRef"]["name"] == found["Role"]["metadata"]["name"]


def test_the_options_are_fields_of_the_config() -> None:
  from puzzle_jax.config import check_key

  text = PAGE
  keys = set(re.findall(r"--config\.([\w.]+)=", text))
  assert {"mesh.data", "bld.layers", "parent"} <= keys
  for key in keys:
    check_key(key)
