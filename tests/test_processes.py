"""Two and four processes over loopback end as one process does, the two after SIGTERM; what they decide together."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tiny_costs import write_costs, write_text
from xla_flags import QUICK

from experiments import tiny_parent
from puzzle_jax import distributed, preemption
from puzzle_jax.errors import PuzzleError
from puzzle_jax.library import Library
from puzzle_jax.store import StageStore, Workdir

STAGES = ("data", "costs", "activations", "library", "scores", "search", "coupled", "child", "gkd")
LAYERS = 2


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
  tiny_parent.write(folder / "parent", layers=LAYERS)
  write_costs(folder / "costs.json", str(folder / "parent"))
  write_text(folder / "text.jsonl")
  return folder


def command(folder: Path, name: str, count: int, stages: tuple[str, ...], *, axis: str) -> list[str]:
  """Of a run in so many processes, whose devices lie along an axis of the mesh."""
  return [
    "-m",
    "experiments.run",
    "--config=configs/tiny.py",
    f"--config.parent={folder / 'parent'}",
    f"--config.costs.table={folder / 'costs.json'}",
    f"--config.data.source={folder / 'text.jsonl'}",
    f"--config.mesh.{axis}={count}",
    "--config.activations.dtype=float32",
    "--config.activations.tier=disk",
    "--config.space.attention=('linear',)",
    "--config.space.ffn=(0.5,)",
    "--config.bld.steps=3",
    "--config.search.refine_rounds=1",
    "--config.coupled.blocks=('linear/w32',)",
    "--config.coupled.bld.batch_rows=4",
    "--config.coupled.bld.steps=3",
    "--config.gkd.steps=3",
    f"--workdir={folder / name}",
    f"--stages={','.join(stages)}",
  ]


def run(folder: Path, name: str, count: int, stages: tuple[str, ...], *, axis: str = "data") -> Path:
  """The work directory of a run that ends well."""
  ends = together(count, command(folder, name, count, stages, axis=axis))
  for end in ends:
    assert end.returncode == 0, end.stderr[-3000:]
  assert all(end.stderr.strip() == "" for end in ends[1:])  # process 0 alone says how it goes
  return folder / name


@pytest.fixture(scope="module")
def alone(folder):
  """The work directory of a run in one process."""
  return Workdir(run(folder, "1", 1, (*STAGES, "evaluation")))


ASKED = """
import os, signal, sys
from absl import flags
from experiments import launch, run
from puzzle_jax import gkd, memory

asked, steps = os.environ["ASKED"], {"library": 0, "gkd": 0}

def counted(name, step):
  def work(*args, **kwargs):
    steps[name] += 1
    if asked == f"{flags.FLAGS.process} in step {steps[name]} of {name}":
      os.kill(os.getpid(), signal.SIGTERM)
    return step(*args, **kwargs)
  return work

def main(argv):
  memory.Step.__call__ = counted("library", memory.Step.__call__)
  gkd.train_step = counted("gkd", gkd.train_step)
  try:
    run.main(argv)
  finally:
    print(steps["library"], steps["gkd"])

launch.run(main)
"""


@pytest.fixture(scope="module")
def preempted(folder):
  """The work directory of a run in two processes, of which one gets SIGTERM in either training."""
  done = []
  for asked in ("1 in step 5 of library", "0 in step 2 of gkd", "none"):
    with pytest.MonkeyPatch.context() as patch:
      patch.setenv("ASKED", asked)
      ends = together(2, ["-c", ASKED, *command(folder, "2", 2, STAGES, axis="data")[2:]])
    for end in ends:
      assert end.returncode == (0 if asked == "none" else preemption.EXIT_CODE), end.stderr[-3000:]
      done.append([int(n) for n in end.stdout.split()[-2:]])
  # Of two layers' and their pairs' and of the child's, three each: nothing twice.
  assert done == [[5, 0]] * 2 + [[1 + LAYERS * 3, 2]] * 2 + [[0, 1]] * 2
  return folder / "2"


@pytest.fixture(scope="module", params=[2, 4])
def ended(folder, alone, request):
  """The work directories of a run in one process and in several."""
  several = request.getfixturevalue("preempted") if request.param == 2 else run(folder, "4", 4, STAGES)
  return alone, Workdir(several)


def test_the_library_is_that_of_one_process(ended):
  one, several = (Library(workdir.stage("library")) for workdir in ended)
  for layer in range(LAYERS):
    for name, losses in one.losses(layer).items():
      assert several.losses(layer)[name] == pytest.approx(losses, rel=1e-5, abs=1e-7), f"{layer} {name}"


def compare_scores(one: StageStore, several: StageStore, folder: str = "") -> None:
  for layer in range(LAYERS):
    expected, found = (store.get_json(f"{folder}layer_{layer:02d}.json")["blocks"] for store in (one, several))
    assert found.keys() == expected.keys()
    for block, scores in expected.items():
      for name, value in scores.items():
        whole = 5.0 if name == "lm_loss" else value  # a difference of two losses near 5 nats
        assert abs(found[block][name] - value) <= 1e-5 * abs(whole) + 1e-7, f"{layer} {block} {name}"


def test_the_scores_are_those_of_one_process(ended):
  compare_scores(*(workdir.stage("scores") for workdir in ended))


def test_blocks_scored_in_the_child_and_pairs_are_those_of_one_process(ended):
  one, several = (workdir.stage("search").get_json("solution_0.json")["rounds"] for workdir in ended)
  assert one
  for expected, other in zip(one, several, strict=True):
    assert other == {**expected, "kl": pytest.approx(expected["kl"]), "stderr": pytest.approx(expected["stderr"])}
  stores = [workdir.stage("coupled") for workdir in ended]
  for layer in range(LAYERS):
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
  shutil.rmtree(folder / "cut" / "evaluation")
  workdirs = (alone, Workdir(run(folder, "cut", 2, ("evaluation",), axis="model")))
  found = [workdir.stage("evaluation").get_json("evaluation.json") for workdir in workdirs]
  for quality in ("before_gkd", "after_gkd"):
    assert found[1][quality] == pytest.approx(found[0][quality], rel=1e-5, abs=1e-7)
  assert found[1]["samples"] == found[0]["samples"]


def test_one_process_writes_what_is_single(ended):
  _, several = ended
  starts = 3 if several.root.name == "2" else 1
  assert len((several.root / "launches.jsonl").read_text().splitlines()) == starts
  assert all(several.stage(name).done for name in STAGES)


DECISIONS = """
import json, os, signal, sys
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
  if me == 1:
    os.kill(os.getpid(), signal.SIGTERM)
  distributed.anyone(False)

launch.run(main)
"""


def test_what_processes_decide_together():
  """And that both end when one is asked to, though the other waits for it where no signal would reach Python."""
  begin = time.monotonic()
  ends = together(2, ["-c", DECISIONS])
  assert time.monotonic() - begin < 60  # for less than jax.distributed waits
  for i, end in enumerate(ends):
    assert end.returncode == preemption.EXIT_CODE, end.stderr[-3000:]
    assert end.stderr.strip() == "stopped by SIGTERM; the same command goes on from here"
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
