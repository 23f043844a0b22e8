"""Two and four processes over loopback end as one process does; what they decide together."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tiny_costs import write_costs
from xla_flags import QUICK

from experiments import tiny_parent
from puzzle_jax import distributed
from puzzle_jax.errors import PuzzleError
from puzzle_jax.library import Library
from puzzle_jax.store import StageStore, Workdir

STAGES = ("data", "costs", "activations", "library", "scores", "search", "coupled", "child", "gkd")


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def together(count: int, command: list[str]) -> list[subprocess.CompletedProcess[str]]:
  """Ends of a command that is started in so many processes; of a single one, without the flags."""
  address, processes = f"--coordinator=127.0.0.1:{free_port()}", []
  env = os.environ | {"XLA_FLAGS": QUICK, "JAX_PLATFORMS": "cpu"}
  for i in range(count):
    flags = [address, f"--processes={count}", f"--process={i}", "--heartbeat_s=20"] if count > 1 else []
    processes.append(
      subprocess.Popen(
        [sys.executable, *command, *flags],
        env=env,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  ends = []
  try:
    for process in processes:
      out, err = process.communicate(timeout=300)
      err = "".join(line for line in err.splitlines(keepends=True) if "[Gloo]" not in line)
      ends.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
  finally:
    for process in processes:
      process.kill()
      process.communicate()
  return ends


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("processes")
  tiny_parent.write(folder / "parent")
  write_costs(folder / "costs.json", str(folder / "parent"))
  return folder


def command(
  folder: Path, name: str, count: int, stages: tuple[str, ...], *, axis: str, more: Sequence[str]
) -> list[str]:
  """Of a run in so many processes, whose devices lie along an axis of the mesh."""
  return [
    "-m",
    "experiments.run",
    "--config=configs/tiny.py",
    f"--config.parent={folder / 'parent'}",
    f"--config.costs.table={folder / 'costs.json'}",
    f"--config.mesh.{axis}={count}",
    "--config.activations.dtype=float32",
    "--config.activations.tier=disk",
    "--config.space.attention=('gqa','linear')",
    "--config.space.ffn=(0.5,'none')",
    "--config.bld.steps=3",
    "--config.gkd.steps=3",
    f"--workdir={folder / name}",
    f"--stages={','.join(stages)}",
    *more,
  ]


def run(
  folder: Path, name: str, count: int, stages: tuple[str, ...], *, axis: str = "data", more: Sequence[str] = ()
) -> Path:
  """The work directory of a run that ends well."""
  ends = together(count, command(folder, name, count, stages, axis=axis, more=more))
  for end in ends:
    assert end.returncode == 0, end.stderr[-3000:]
  assert all(end.stderr.strip() == "" for end in ends[1:])  # process 0 alone says how it goes
  return folder / name


@pytest.fixture(scope="module")
def alone(folder):
  """The work directory of a run in one process."""
  return Workdir(run(folder, "1", 1, STAGES))


@pytest.fixture(scope="module", params=[2, 4])
def ended(folder, alone, request):
  """The work directories of a run in one process and in several."""
  return alone, Workdir(run(folder, str(request.param), request.param, STAGES))


def test_the_library_is_that_of_one_process(ended):
  one, several = (Library(workdir.stage("library")) for workdir in ended)
  for layer in range(4):
    for name, losses in one.losses(layer).items():
      assert several.losses(layer)[name] == pytest.approx(losses, rel=1e-5, abs=1e-7), f"{layer} {name}"


def compare_scores(one: StageStore, several: StageStore, folder: str = "") -> None:
  for layer in range(4):
    expected, found = (store.get_json(f"{folder}layer_{layer:02d}.json")["blocks"] for store in (one, several))
    assert found.keys() == expected.keys()
    for block, scores in expected.items():
      for name, value in scores.items():
        whole = 5.0 if name == "lm_loss" else value  # a difference of two losses near 5 nats
        assert abs(found[block][name] - value) <= 1e-5 * abs(whole) + 1e-7, f"{layer} {block} {name}"


def test_the_scores_are_those_of_one_process(ended):
  compare_scores(*(workdir.stage("scores") for workdir in ended))


def test_blocks_scored_in_the_child_and_pairs_are_those_of_one_process(folder, alone):
  more, found = ["--config.search.refine_rounds=1", "--config.coupled.blocks=('linear/w32',)"], []
  for count in (1, 2):
    shutil.copytree(alone.root, folder / f"refined_{count}")
    found.append(Workdir(run(folder, f"refined_{count}", count, ("search", "coupled"), more=more)))
  one, several = (workdir.stage("search").get_json("solution_0.json")["rounds"] for workdir in found)
  for expected, other in zip(one, several, strict=True):
    assert other == {**expected, "kl": pytest.approx(expected["kl"]), "stderr": pytest.approx(expected["stderr"])}
  stores = [workdir.stage("coupled") for workdir in found]
  for layer in range(4):
    expected, other = (Library(store).losses(layer)["linear/w32"] for store in stores)
    assert other == pytest.approx(expected, rel=1e-5, abs=1e-7)
  compare_scores(*stores, "scores/")
  assert len({tuple(store.get_json("solution_0.json")["blocks"]) for store in stores}) == 1


def test_the_child_is_that_of_one_process(ended):
  one, several = ended
  solutions = [workdir.stage("search").get_json("solution_0.json")["blocks"] for workdir in ended]
  assert solutions[0] == solutions[1]
  histories = [workdir.stage("gkd").get_json("history.json")["steps"] for workdir in ended]
  for step, expected in enumerate(histories[0]):
    assert histories[1][step] == pytest.approx(expected, rel=1e-5, abs=1e-7), step
  for path in sorted((one.root / "gkd" / "model").glob("*.safetensors")):
    found = safetensors.numpy.load_file(several.root / "gkd" / "model" / path.name)
    for name, expected in safetensors.numpy.load_file(path).items():
      np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-6, err_msg=name)


def test_the_evaluation_is_that_of_one_process(folder, alone):
  """Of models whose weights are cut over the devices of both."""
  shutil.copytree(alone.root, folder / "cut")
  found = []
  for name, count in (("1", 1), ("cut", 2)):
    workdir = Workdir(run(folder, name, count, ("evaluation",), axis="model"))
    found.append(workdir.stage("evaluation").get_json("evaluation.json"))
  for quality in ("before_gkd", "after_gkd"):
    assert found[1][quality] == pytest.approx(found[0][quality], rel=1e-5, abs=1e-7)
  assert found[1]["samples"] == found[0]["samples"]


def test_one_process_writes_what_is_single(ended):
  _, several = ended
  assert len((several.root / "launches.jsonl").read_text().splitlines()) == 1
  assert all(several.stage(name).done for name in STAGES)


DECISIONS = """
import json, sys
from absl import app, flags
from experiments import launch
from puzzle_jax import distributed
from puzzle_jax.store import CorruptFileError

def main(argv):
  me, found = int(flags.FLAGS.process), []
  found.append(distributed.anyone(me == 1))
  found.append(distributed.anyone(False))
  found.append(distributed.everyone(me == 1))
  found.append(distributed.everyone(True))
  found.append(distributed.by_first(lambda: [me, distributed.count(), distributed.anyone(False)]))
  def fail():
    raise CorruptFileError("x is corrupt")
  try:
    distributed.by_first(fail)
  except CorruptFileError as e:
    found.append(str(e))
  print(json.dumps([distributed.is_first(), found]))

launch.run(main)
"""


def test_what_processes_decide_together():
  ends = together(2, ["-c", DECISIONS])
  for i, end in enumerate(ends):
    assert end.returncode == 0, end.stderr[-3000:]
    assert json.loads(end.stdout) == [i == 0, [True, False, False, True, [0, 1, False], "x is corrupt"]]


def test_a_single_process_decides_alone():
  assert distributed.by_first(lambda: 3) == 3
  assert (distributed.count(), distributed.is_first(), distributed.anyone(True), distributed.everyone(False)) == (
    1,
    True,
    True,
    False,
  )


@pytest.mark.parametrize(
  "env, several",
  [
    ({}, False),
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # in a batch script, outside of srun
    ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"}, False),
    ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"}, True),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
  ],
)
def test_schedulers_are_seen(env, several, monkeypatch):
  for name in ("SLURM_STEP_NUM_TASKS", "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"):
    monkeypatch.delenv(name, raising=False)
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  assert distributed.scheduled() is several


def test_refuses_half_of_the_flags():
  with pytest.raises(PuzzleError, match="--coordinator, --processes and --process belong together"):
    distributed.start(processes=2)
  with pytest.raises(PuzzleError, match="--process=2 must be from 0 to 1, of --processes=2"):
    distributed.start(coordinator="localhost:1", processes=2, process=2)
