"""The golden run: all stages on a random four-layer parent, resumed, changed, killed and damaged."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tiny_costs import write_costs

import puzzle_jax
from configs import tiny
from experiments import tiny_parent
from puzzle_jax import bld, memory, mesh, metrics, plan, preemption, stages, surgery
from puzzle_jax.arch import BlockSpec, Subblock
from puzzle_jax.bld import CoupledConfig
from puzzle_jax.cleaning import clean
from puzzle_jax.config import RunConfig
from puzzle_jax.costs import jax_timing
from puzzle_jax.library import Library
from puzzle_jax.mesh import MeshConfig
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.needs import needs
from puzzle_jax.pipeline import STAGES
from puzzle_jax.refine import Children
from puzzle_jax.report import closing_table, render
from puzzle_jax.report.summary import summarise
from puzzle_jax.runs import Run, open_run
from puzzle_jax.scoring import Scorer
from puzzle_jax.search.table import Table
from puzzle_jax.store import MANIFEST, CleanedFileError, Workdir, file_digest

# Of the run below on a CPU. Update them (the test prints the new ones) only with a change that means to change results.
GOLDEN = {
  "blocks": ["gqa2/w64", "gqa2/w64", "linear/linear", "linear/linear"],
  "score": 0.32227,
  "kl_before": 0.29966,
  "kl_after": 0.29583,
  "perplexity": 348.86,
  "gkd_loss": 0.57171,
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
  folder = tmp_path_factory.mktemp("tiny")
  tiny_parent.write(folder / "parent")
  write_costs(folder / "costs.json", str(folder / "parent"))
  values = tiny.get_config()
  values.parent = str(folder / "parent")
  values.costs.table = str(folder / "costs.json")
  values.search.limits.min_speedup = 1.5
  return RunConfig.from_dict(values.to_dict())


@pytest.fixture(scope="module")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Run:
  return puzzle_jax.run(config, tmp_path_factory.mktemp("run"), quiet=True)


@pytest.fixture
def copy(finished: Run, tmp_path: Path) -> Path:
  """A finished work directory to spoil."""
  return Path(shutil.copytree(finished.workdir.root, tmp_path / "copy"))


def contents(root: Path) -> dict[str, str]:
  """What "ends the same" means: every stage's content, timing left out; the report holds dates and measured speeds."""
  return {s.name: Workdir(root).stage(s.name).content() for s in STAGES if s.name != "report"}


def written(root: Path) -> dict[str, int]:
  return {s.name: (root / s.name / MANIFEST).stat().st_mtime_ns for s in STAGES}


def test_golden(finished: Run) -> None:
  evaluation = finished.store("evaluation").get_json("evaluation.json")
  found = {
    "blocks": finished.solution["blocks"],
    "score": finished.solution["score"],
    "kl_before": evaluation["before_gkd"]["kl"],
    "kl_after": evaluation["after_gkd"]["kl"],
    "perplexity": evaluation["after_gkd"]["perplexity"],
    "gkd_loss": finished.summary["gkd"][-1]["loss"],
  }
  message = f"results changed; if that is meant, set GOLDEN = {found}"
  assert found.pop("blocks") == GOLDEN["blocks"], message
  for name, value in found.items():
    assert value == pytest.approx(GOLDEN[name], rel=2e-3), message


def test_the_child_is_smaller_and_speaks(finished: Run) -> None:
  assert finished.child.architecture.num_params() <= 0.75 * finished.parent.architecture.num_params()
  assert finished.child.chat("Hello", max_new_tokens=4) == finished.summary["samples"][0]["child"]
  assert finished.child.generate("a", max_new_tokens=3)
  assert "ffn.w32" in finished.library.losses(0)
  assert 0 <= finished.library.timing["waited_s"] < finished.library.timing["trained_s"]
  table = closing_table(finished.summary)
  assert f"{finished.child.architecture.num_params():,}" in table
  assert (finished.workdir.root / "report" / "report.html").stat().st_size > 1e6


def test_the_evaluation_says_how_sure_it_is(finished: Run) -> None:
  evaluation = finished.store("evaluation").get_json("evaluation.json")
  for when in ("before_gkd", "after_gkd"):
    found = evaluation[when]
    assert found["loss_change"] == pytest.approx(math.log(found["perplexity"] / found["parent_perplexity"]), rel=1e-6)
    assert 0 < found["loss_change_stderr"] < 1
  rounds = finished.summary["timing_rounds"]
  assert {model: len(phases["decode_s"]) for model, phases in rounds.items()} == {"parent": 2, "child": 2}
  assert finished.summary["models"]["child"]["loss_change_stderr"] == evaluation["after_gkd"]["loss_change_stderr"]


def test_tasks_and_contexts_redo_the_evaluation_alone(copy: Path, config: RunConfig, tmp_path: Path) -> None:
  (tmp_path / "sea.jsonl").write_text('{"context": "a", "choices": [" b", " c"], "answer": 1}\n' * 3)
  more = dataclasses.replace(config.evaluation, tasks=(str(tmp_path / "sea.jsonl"),), contexts=(32, 64), timed=False)
  before = written(copy)
  run = puzzle_jax.run(dataclasses.replace(config, evaluation=more), copy, quiet=True)
  assert {name for name, mtime in written(copy).items() if mtime != before[name]} == {"evaluation", "export", "report"}
  evaluation = run.store("evaluation").get_json("evaluation.json")
  assert [(text["context"], text["kl"] > 0) for text in evaluation["texts"]] == [(32, True), (64, True)]
  assert evaluation["texts"][0].items() >= evaluation["after_gkd"].items()
  assert run.summary["tasks"] == evaluation["tasks"]
  assert run.summary["tasks"]["tasks"]["sea"]["items"] == 3
  assert run.store("evaluation").get_arrays("answers.safetensors")["sea.child"].shape == (3,)
  assert "sea" in (copy / "report" / "report.html").read_text()
  assert "predicted_decode_s" in run.summary["models"]["child"]
  assert "throughput" not in run.summary["models"]["child"]
  assert "scenario, measured" not in closing_table(run.summary)


def report(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, "-m", "experiments.report", *map(str, arguments)]
  return subprocess.run(command, capture_output=True, text=True)


def test_a_report_is_made_again_without_weights(config: RunConfig, copy: Path, finished: Run) -> None:
  for path in copy.rglob("*.safetensors"):
    path.unlink()
  page = copy / "report" / "report.html"
  page.write_text("spoilt")
  done = report(f"--workdir={copy}")
  assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(page), "")
  run = open_run(copy)
  assert run.store("report").done
  assert run.store("report").path("report.html") == page  # its checksum is right
  found = run.summary
  assert found.pop("command") == finished.summary["command"].replace(str(finished.workdir.root), str(copy))
  assert found == {k: v for k, v in finished.summary.items() if k != "command"}
  assert page.read_text() == render(run.summary)


def test_two_runs_side_by_side(config: RunConfig, copy: Path, finished: Run, tmp_path: Path) -> None:
  settings = json.loads((copy / "config.json").read_text())
  settings["parent"], out = str(tmp_path / "gone"), tmp_path / "both.html"
  (copy / "config.json").write_text(json.dumps(settings))
  before = written(copy)
  done = report(f"--out={out}", "--compare", finished.workdir.root, copy)
  assert (done.returncode, done.stdout.strip()) == (0, str(out))
  assert f"{copy}: the figures are those that the run stored" in done.stderr
  assert "The children have the same blocks." in out.read_text()
  assert written(copy) == before


def test_report_refuses() -> None:
  done = report("--compare=a,b,c")
  assert (done.returncode, done.stderr) == (1, "error: --compare takes two runs, got a, b, c\n")


def test_the_summary_of_an_unfinished_run_leaves_out_what_is_stale(copy: Path, finished: Run) -> None:
  run = open_run(copy)
  run.store("report").begin("another key")
  run.store("gkd").begin("another key")  # as when a run with another gkd.steps was killed there
  found = summarise(run)
  assert [s["name"] for s in found["stages"]] == [
    "data",
    "costs",
    "activations",
    "library",
    "scores",
    "search",
    "coupled",
    "child",
  ]
  assert not found.keys() & {"gkd", "samples", "before_gkd", "timing_rounds"}
  assert {k: finished.summary[k] for k in ("scores", "library", "solution", "hardware")}.items() <= found.items()
  for name, model in found["models"].items():
    assert model.items() <= finished.summary["models"][name].items()
    assert "perplexity" not in model
  assert "Not timed yet" in render(found)


def test_a_finished_run_does_nothing(finished: Run, config: RunConfig) -> None:
  before = written(finished.workdir.root)
  puzzle_jax.run(config, finished.workdir.root, quiet=True)
  assert written(finished.workdir.root) == before


def test_times_alone_redo_the_report(copy: Path, config: RunConfig) -> None:
  evaluation = Workdir(copy).stage("evaluation")
  found = evaluation.get_json("evaluation.json")
  found["timing"]["seconds"]["child"]["decode_s"] *= 2
  evaluation.put_json("evaluation.json", found)
  before = written(copy)
  run = puzzle_jax.run(config, copy, quiet=True)
  after = written(copy)
  assert {name for name in before if before[name] != after[name]} == {"report"}
  assert run.summary["models"]["child"]["decode_s"] == found["timing"]["seconds"]["child"]["decode_s"]


def test_a_changed_config_redoes_what_depends_on_it(
  copy: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
  before = written(copy)
  changed = dataclasses.replace(config, gkd=dataclasses.replace(config.gkd, steps=2))
  puzzle_jax.run(changed, copy)
  redone = {name for name, mtime in written(copy).items() if mtime != before[name]}
  assert redone == {"gkd", "evaluation", "export", "report"}
  assert "gkd.steps 6 -> 2" in capsys.readouterr().err


def test_stages_need_their_inputs(config: RunConfig, tmp_path: Path) -> None:
  with pytest.raises(puzzle_jax.PuzzleError, match="stage library needs data"):
    puzzle_jax.run(config, tmp_path, stages=["library"], quiet=True)
  with pytest.raises(puzzle_jax.PuzzleError, match="unknown stage 'libary'; did you mean library"):
    puzzle_jax.run(config, tmp_path, stages=["libary"], quiet=True)


def test_damage_is_found_and_repaired(
  copy: Path, config: RunConfig, finished: Run, capsys: pytest.CaptureFixture[str]
) -> None:
  weights = copy / "library" / "layer_01.safetensors"
  data = bytearray(weights.read_bytes())
  data[-1] ^= 1
  weights.write_bytes(data)
  (copy / "activations" / "heldout" / "layer_02.safetensors").unlink()
  changed = dataclasses.replace(config, search=dataclasses.replace(config.search, frontier=(1.1,)))
  puzzle_jax.run(changed, copy)
  said = capsys.readouterr().err
  assert "layer_01.safetensors is missing or corrupt" in said
  assert "activations: files are gone: heldout/layer_02.safetensors" in said
  assert contents(copy)["gkd"] == contents(finished.workdir.root)["gkd"]


def test_killed_runs_end_the_same(config: RunConfig, finished: Run, tmp_path: Path) -> None:
  """SIGKILL in the middle of three stages, each time started again."""
  workdir = tmp_path / "killed"
  settings = tmp_path / "config.json"
  settings.write_text(json.dumps(config.to_dict()))
  code = "import json, sys, puzzle_jax; puzzle_jax.run(json.load(open(sys.argv[1])), sys.argv[2], quiet=True)"
  command = [sys.executable, "-c", code, str(settings), str(workdir)]
  for sign in ("activations/heldout/layer_02.safetensors", "library/layer_01.json", "gkd/checkpoints/4"):
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (workdir / sign).exists():
      assert process.poll() is None, f"ended before {sign}: {process.stderr.read().decode()}"  # type: ignore[union-attr]
      assert time.monotonic() < deadline
      time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not Workdir(workdir).stage("evaluation").done
  puzzle_jax.run(config, workdir, quiet=True)
  assert contents(workdir) == contents(finished.workdir.root)
  assert not Workdir(workdir).stage("data").record["resumed"]
  assert Workdir(workdir).stage("gkd").record["resumed"]
  # What was recorded twice is there once, and it is what an undisturbed run records.
  for folder, steps in [("gkd/metrics", 6), *((f"library/metrics/layer_{i:02d}", 6) for i in range(4))]:
    found, expected = (metrics.read(root / folder) for root in (workdir, finished.workdir.root))
    assert [r.pop("step") for r in found] == [r.pop("step") for r in expected] == list(range(1, steps + 1))
    times = [r.pop("time") for r in found]
    assert times == sorted(times)
    assert found == [{k: v for k, v in r.items() if k != "time"} for r in expected]
  starts = [json.loads(line) for line in (workdir / "launches.jsonl").read_text().splitlines()]
  assert len(starts) == 4
  assert all(start["versions"]["jax"] and start["stages"] == [s.name for s in STAGES] for start in starts)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, int]:
  """Calls of a stage that nothing stops, as far as they were counted."""
  return {}


@pytest.mark.parametrize(
  "stage, unit, ends_after",
  [
    ("library", (memory.Step, "__call__"), 9),
    ("library", (memory.Step, "__call__"), 18),  # the last of a layer
    ("scores", (Scorer, "_scores"), 7),
  ],
)
def test_a_preempted_stage_does_nothing_twice(
  config: RunConfig,
  finished: Run,
  copy: Path,
  monkeypatch: pytest.MonkeyPatch,
  listening: Callable[[], None],
  undisturbed: dict[str, int],
  stage: str,
  unit: tuple[type, str],
  ends_after: int,
) -> None:
  calls, work = 0, getattr(*unit)

  def counted(*args: Any) -> Any:
    nonlocal calls
    calls += 1
    if calls == ends_after:
      os.kill(os.getpid(), signal.SIGTERM)
    return work(*args)

  monkeypatch.setattr(*unit, counted)
  shutil.rmtree(copy / stage)
  with pytest.raises(preemption.PreemptedError):
    puzzle_jax.run(config, copy, stages=[stage], quiet=True)
  assert calls == ends_after
  listening()
  puzzle_jax.run(config, copy, stages=[stage], quiet=True)
  total = calls
  assert contents(copy) == contents(finished.workdir.root)
  if stage not in undisturbed:
    shutil.rmtree(copy / stage)
    puzzle_jax.run(config, copy, stages=[stage], quiet=True)
    undisturbed[stage] = calls - total
  assert total == undisturbed[stage]


def changed_target(config: RunConfig, ratio: float) -> RunConfig:
  limits = dataclasses.replace(config.search.limits, max_params_ratio=ratio)
  return dataclasses.replace(config, search=dataclasses.replace(config.search, limits=limits))


def test_a_cleaned_run_redoes_only_what_is_needed(config: RunConfig, finished: Run, copy: Path) -> None:
  run = puzzle_jax.open_run(copy)
  with run.workdir.lock(), pytest.raises(puzzle_jax.PuzzleError, match="is in use by process"):
    clean(run)
  before, order = written(copy), [store.root.name for store in run.workdir.finished()]
  weights = sum(p.stat().st_size for name in ("activations", "library") for p in (copy / name).rglob("*.safetensors"))
  assert clean(run) == weights
  assert clean(run) == 0
  assert not list(copy.glob("activations/**/*.safetensors"))
  assert [store.root.name for store in run.workdir.finished()] == order
  assert (run.summary, run.child.architecture) == (finished.summary, finished.child.architecture)
  assert run.library.losses(2) == finished.library.losses(2)
  with pytest.raises(CleanedFileError, match=r"was removed by experiments.clean; delete .*library"):
    run.library.load(2, "ffn.w32")

  puzzle_jax.run(config, copy, quiet=True)
  puzzle_jax.run(dataclasses.replace(config, name="other"), copy, quiet=True)
  assert {name for name, mtime in written(copy).items() if mtime != before[name]} == {"report"}
  puzzle_jax.run(changed_target(config, 0.6), copy, stages=["search", "activations", "library", "child"], quiet=True)
  again = {name for name, mtime in written(copy).items() if mtime != before[name]}
  assert again == {"activations", "library", "search", "child", "report"}
  assert {**contents(copy), "search": "", "child": ""} == {**contents(finished.workdir.root), "search": "", "child": ""}
  shutil.rmtree(copy / "report")
  with pytest.raises(puzzle_jax.PuzzleError, match=r"is not finished \(report to do\)"):
    clean(puzzle_jax.open_run(copy))


def test_stages_of_another_run_are_reused(config: RunConfig, finished: Run, tmp_path: Path) -> None:
  upto = [s.name for s in STAGES[:6]]
  run = puzzle_jax.run(
    changed_target(config, 0.6), tmp_path / "new", stages=upto, reuse=finished.workdir.root, quiet=True
  )
  found, expected = contents(run.workdir.root), contents(finished.workdir.root)
  assert {name for name in upto if found[name] == expected[name]} == {*upto} - {"search"}
  files = [Path(root) / "library" / "layer_00.safetensors" for root in (run.workdir.root, finished.workdir.root)]
  assert files[0].samefile(files[1])
  assert run.store("library").record == finished.store("library").record
  # What replaces a file leaves the other run's as it is.
  run.store("data").put_json("data.json", {})
  assert contents(finished.workdir.root) == expected
  with pytest.raises(puzzle_jax.PuzzleError, match="reuse='nowhere' is no run's directory"):
    puzzle_jax.run(config, tmp_path / "a", reuse="nowhere", quiet=True)


def test_the_plan_says_what_is_to_do_and_why(
  config: RunConfig, finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  root = finished.workdir.root
  before = written(root)
  assert [s.todo for s in plan.make(config, root).stages] == [None] * len(STAGES)
  longer = dataclasses.replace(config, bld=dataclasses.replace(config.bld, steps=60))
  planned = plan.make(longer, root)
  todo = {s.name: s.todo for s in planned.stages if s.todo}
  assert todo["library"] == "bld.steps 6 -> 60"
  assert todo["scores"] == "only if library comes out different"
  names = [s.name for s in STAGES]
  assert list(todo) == names[names.index("library") :]

  # Seconds: what a run beside it on the same hardware recorded, by FLOPs; else from FLOPs alone.
  library = next(s for s in planned.stages if s.name == "library")
  record = finished.store("library").record
  assert library.seconds == pytest.approx(record["timing"]["seconds"] * library.need.flops / record["flops"])
  assert 5 < library.need.flops / record["flops"] < 10
  assert f"from the seconds that {root} took" in str(planned)
  far = plan.make(dataclasses.replace(config, bld=dataclasses.replace(config.bld, steps=6000)), root)
  assert "may be off several times" in str(far)  # a thousand times the FLOPs are another matter
  monkeypatch.setattr(jax_timing, "hardware", lambda: "another machine")
  target = dataclasses.replace(longer.costs, hardware=finished.costs.hardware)  # the cost table is not of that machine
  rough = plan.make(dataclasses.replace(longer, costs=target), root.parent / "new")
  assert "may be off several times" in str(rough)
  assert next(s for s in rough.stages if s.name == "library").seconds > 0
  assert not (root.parent / "new").exists()
  assert written(root) == before

  # Bytes by arithmetic are those of the arrays that were written.
  need = needs(config, finished.parent.architecture, finished.space)
  for stage, pattern in (("library", "*"), ("activations", "[th]*/*")):
    files = (root / stage).glob(f"{pattern}.safetensors")
    arrays = [a for file in files for a in safetensors.numpy.load_file(file).values()]
    assert need[stage].disk_bytes == sum(a.nbytes for a in arrays)


def test_scores_of_a_task_go_on_within_a_layer(
  config: RunConfig, finished: Run, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  items = [{"context": f"{i} and {i} is", "choices": [f" {i + 1}", " a lot"], "answer": i % 2} for i in range(6)]
  (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, items)))
  task = dataclasses.replace(config.data, task=str(tmp_path / "task.jsonl"), task_items=5)
  asked = dataclasses.replace(config, data=task, scores=dataclasses.replace(config.scores, metric="accuracy"))
  before = ("data", "activations", "library")
  puzzle_jax.run(asked, copy, stages=before, quiet=True)
  # What text gives is what it gave without the task.
  for name in ("data/heldout.safetensors", "library/layer_03.safetensors"):
    assert file_digest(copy / name) == file_digest(finished.workdir.root / name)

  score, calls = Scorer._scores, list[Any]()

  def dies(*args: Any, **kwargs: Any) -> dict[str, float]:
    calls.append(args)
    if len(calls) == 2 * 11 + 5:  # text and task: in the second layer's third block
      raise KeyboardInterrupt
    return score(*args, **kwargs)

  monkeypatch.setattr(stages, "_SAVE_EVERY_S", 0.0)
  monkeypatch.setattr(Scorer, "_scores", dies)
  with pytest.raises(KeyboardInterrupt):
    puzzle_jax.run(asked, copy, stages=["scores"], quiet=True)
  done = len(calls[:-1]) // 2
  calls[:] = [None] * 1000  # never again
  run = puzzle_jax.run(asked, copy, stages=["scores"], quiet=True)
  assert len(calls) - 1000 == 2 * (sum(map(len, finished.scores)) - done)
  for found, text in zip(run.scores, finished.scores, strict=True):
    assert found.keys() == text.keys()
    for name, entry in found.items():
      assert entry["accuracy"] * 5 == pytest.approx(round(entry["accuracy"] * 5))
      assert {k: v for k, v in entry.items() if not k.startswith("accuracy")} == text[name]


@pytest.mark.parametrize("tier", ["device", "disk"])
def test_the_library_is_the_same_from_every_tier(config: RunConfig, finished: Run, copy: Path, tier: str) -> None:
  shutil.rmtree(copy / "library")
  moved = dataclasses.replace(config, activations=dataclasses.replace(config.activations, tier=tier))
  run = puzzle_jax.run(moved, copy, stages=["library"], quiet=True)
  assert run.store("library").content() == finished.store("library").content()
  assert not list((copy / "library").rglob("c/*"))  # what rolled through is gone


def test_layers_side_by_side_make_the_same_library(config: RunConfig, finished: Run, copy: Path) -> None:
  beside = dataclasses.replace(config, bld=dataclasses.replace(config.bld, layers=3))
  run = puzzle_jax.run(beside, copy, stages=["library"], quiet=True)
  for layer in range(4):
    expected = finished.library.losses(layer)
    for name, losses in run.library.losses(layer).items():
      assert losses == pytest.approx(expected[name], rel=1e-3, abs=1e-7), f"{layer} {name}"


def test_windows_go_on_where_they_were_killed(
  config: RunConfig, finished: Run, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Two windows of half of the tokens; the second is cut off in its second layer, and read from the disk again."""
  small = dataclasses.replace(config.activations, window_tokens=256, tier="disk")
  windowed = dataclasses.replace(config, activations=small)
  expected = puzzle_jax.run(windowed, copy, stages=["library"], quiet=True).store("library").content()
  assert expected != finished.store("library").content()
  shutil.rmtree(copy / "library")
  put, calls = Library.put, []

  def cut_off(*args: Any) -> None:
    calls.append(args[1])
    if len(calls) == 2:
      raise KeyboardInterrupt
    put(*args)

  monkeypatch.setattr(Library, "put", cut_off)
  with pytest.raises(KeyboardInterrupt):
    puzzle_jax.run(windowed, copy, stages=["library"], quiet=True)
  run = puzzle_jax.run(windowed, copy, stages=["library"], quiet=True)
  assert calls == [0, 1, 1, 2, 3]
  assert run.store("library").content() == expected


def test_pairs_trained_together_and_searched_again(config: RunConfig, finished: Run, copy: Path) -> None:
  pairs = CoupledConfig(blocks=("gqa1/w32",), solutions=1, bld=config.bld)
  run = puzzle_jax.run(dataclasses.replace(config, coupled=pairs), copy, stages=["coupled", "child"], quiet=True)
  table = Table.from_json(run.store("coupled").get_json("table.json"))
  for layer in table.layers:
    assert "gqa1/w32 (coupled)" in map(str, layer)
  solution, first = run.solution, finished.solution
  assert solution["score"] <= first["score"]
  assert "coupled" in solution["weights"]  # training helped somewhere
  library, child = Library(run.store("coupled")), LanguageModel.open(copy / "child" / "model")
  for i, (block, weights) in enumerate(zip(solution["blocks"], solution["weights"], strict=True)):
    attention, ffn = BlockSpec.parse(block).subblocks
    found = library.load_layer(i) if weights else finished.library.load_layer(i)
    for subblock in (attention, ffn):
      name = f"{subblock.id}@{block}" if weights else subblock.id
      for k, w in found.get(name, {}).items():
        np.testing.assert_array_equal(child.params["layers"][i][subblock.slot][k], w)
  from_library = [library.losses(i)["gqa1/w32"] for i in range(4)]
  fresh = dataclasses.replace(config, coupled=dataclasses.replace(pairs, from_library=False))
  run = puzzle_jax.run(fresh, copy, stages=["coupled"], quiet=True)
  for i, losses in enumerate(from_library):
    from_parent = Library(run.store("coupled")).losses(i)["gqa1/w32"]
    assert from_parent["delta_init"] > losses["delta_init"]
    assert from_parent["delta_init"] > from_parent["delta_trained"]
  assert run.solution["score"] <= first["score"]
  alone = dataclasses.replace(config, coupled=CoupledConfig(blocks=("gqa2/w32",)))
  with pytest.raises(puzzle_jax.PuzzleError, match=r"coupled.blocks=\('gqa2/w32',\) names none of the space"):
    puzzle_jax.run(alone, copy, stages=["coupled"], quiet=True)


def test_a_variant_that_is_not_finite_never_reaches_the_search(
  config: RunConfig, finished: Run, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  """One of layer 1, from its first weights to the search's table; the others are what they are without it."""
  initial, made = surgery.initial, 0

  def spoilt(spec: Subblock, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
    nonlocal made
    weights = initial(spec, *args, **kwargs)
    made += spec.id == "ffn.w32"
    return {k: np.full_like(w, np.nan) for k, w in weights.items()} if spec.id == "ffn.w32" and made == 2 else weights

  monkeypatch.setattr(surgery, "initial", spoilt)
  shutil.rmtree(copy / "library")
  run = puzzle_jax.run(config, copy, stages=["library", "scores", "search"])
  assert "library: layer 1 ffn.w32: loss not finite; it is left out of the search" in capsys.readouterr().err
  assert finished.library.usable(1) - run.library.usable(1) == {"ffn.w32"}
  blocks = {b.name for b in finished.space.layers[1].blocks if b.ffn.name == "w32"}
  assert blocks
  assert set(run.store("scores").get_json("layer_01.json")["left_out"]) == blocks
  for layer, (scores, expected) in enumerate(zip(run.scores, finished.scores, strict=True)):
    gone = blocks if layer == 1 else set()
    assert scores == {name: found for name, found in expected.items() if name not in gone}
    names, before = ({v.block for v in table.layers[layer]} for table in (run.table, finished.table))
    assert names == before - gone


def test_what_a_step_takes_is_said_before_the_first_one(
  config: RunConfig, finished: Run, copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
  """Of two groups, by arithmetic and as compiled."""
  architecture, rows = finished.parent.architecture, config.bld.batch_rows
  jobs = [j for j in bld.decoupled(finished.space.layers[0]) if j.num_params(architecture.config)]
  together = memory.need(architecture.blocks[0], jobs, architecture.config, config.bld, rows=rows, tokens=32).total
  narrow = dataclasses.replace(config.bld, memory_gib=0.99 * together / 2**30)

  def compiled(step: memory.Step, *args: Any) -> None:
    step.compiled_bytes = len(step.jobs) * 2**30

  def dies(*args: Any) -> None:
    raise KeyboardInterrupt

  monkeypatch.setattr(memory.Step, "compile", compiled)
  monkeypatch.setattr(memory.Step, "__call__", dies)
  with pytest.raises(KeyboardInterrupt):
    puzzle_jax.run(dataclasses.replace(config, bld=narrow), copy, stages=["library"])
  said = capsys.readouterr().err
  assert "library: 4 variants in 2 groups, one at a time on the device; a step takes about 0.00 of 0.00 GiB" in said
  assert "library: a step takes 2.00, 2.00 GiB as compiled" in said


def test_scores_taken_in_a_child(finished: Run) -> None:
  """Against whole children: the child's own block in layer 2, from its two subblocks."""
  children, names = Children(finished), list(finished.solution["blocks"])
  names[2] = "linear/w32"
  found = children.rescored(names)

  def whole(block: str) -> float:
    return children.scores([*names[:2], block, *names[3:]])["kl"]

  table = children.table
  assert np.array_equal(np.isnan(found), np.isnan(table.score))
  assert not found[np.arange(4), np.asarray(table.parent)].any()
  own = [v.block for v in table.layers[2]].index("linear/w32")
  parent = table.layers[2][table.parent[2]]
  expected = 2 * whole("linear/w32") - whole(f"linear/{parent.ffn}") - whole(f"{parent.attention}/w32")
  assert found[2, own] == pytest.approx(expected, abs=1e-6)


def test_refinement_takes_the_child_that_measures_best(config: RunConfig, finished: Run, copy: Path) -> None:
  asked = dataclasses.replace(config, search=dataclasses.replace(config.search, refine_rounds=3))
  run = puzzle_jax.run(asked, copy, stages=["search"], quiet=True)
  rounds, first = run.solution["rounds"], finished.solution
  assert rounds[0]["blocks"] == first["blocks"]
  assert 1 < len(rounds) <= 4
  assert len({tuple(r["blocks"]) for r in rounds}) == len(rounds)
  best = min(rounds, key=lambda r: r["kl"])
  assert run.solution["blocks"] == best["blocks"]
  assert best["kl"] == pytest.approx(Children(run).scores(best["blocks"])["kl"])
  assert run.solution["score"] >= first["score"]  # of the parent's table, of which the first child is the best
  assert run.child.architecture == finished.child.architecture  # made before


def test_a_search_for_an_engine(config: RunConfig, finished: Run, copy: Path) -> None:
  limits = dataclasses.replace(config.search.limits, max_params_ratio=0.9)
  asked = dataclasses.replace(config, search=dataclasses.replace(config.search, engine="vllm", limits=limits))
  blocks = puzzle_jax.run(asked, copy, stages=["search"], quiet=True).solution["blocks"]
  assert not any("linear" in block for block in blocks)
  assert any("linear" in block for block in finished.solution["blocks"])


def test_an_unreachable_target_is_refused_before_distillation(config: RunConfig, tmp_path: Path) -> None:
  limits = dataclasses.replace(config.search.limits, min_speedup=50.0)
  greedy = dataclasses.replace(config, search=dataclasses.replace(config.search, limits=limits))
  with pytest.raises(puzzle_jax.PuzzleError, match="min_speedup"):
    puzzle_jax.run(greedy, tmp_path, quiet=True)
  assert not (tmp_path / "activations").exists()


def test_bad_input_is_refused_before_work(
  config: RunConfig,
  copy: Path,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture[str],
) -> None:
  other = tmp_path / "other"
  tiny_parent.write(other, seed=1)
  with pytest.raises(puzzle_jax.PuzzleError, match="belongs to another parent"):
    puzzle_jax.run(dataclasses.replace(config, parent=str(other)), copy, quiet=True)
  table = dataclasses.replace(config.costs, table="nowhere.json")
  with pytest.raises(puzzle_jax.PuzzleError, match=r"costs.table='nowhere.json' is no file"):
    puzzle_jax.run(dataclasses.replace(config, costs=table), tmp_path / "a", quiet=True)
  uneven = dataclasses.replace(config, mesh=MeshConfig(data=3))
  with monkeypatch.context() as patched:
    patched.setattr(mesh, "build", lambda config: mesh.one_device())
    with pytest.raises(puzzle_jax.PuzzleError, match=r"mesh.data=3 does not divide bld.batch_rows=4.*multiple of 3"):
      puzzle_jax.run(uneven, tmp_path / "uneven", quiet=True)
    assert not (tmp_path / "uneven" / "data").exists()
    with pytest.raises(puzzle_jax.PuzzleError, match="stage gkd needs data, which is not done"):  # gkd could run on it
      puzzle_jax.run(uneven, tmp_path / "uneven", stages=["gkd"])
    assert "warning: mesh.data=3 does not divide gkd.batch_rows=2" in capsys.readouterr().err
    puzzle_jax.run(uneven, copy, quiet=True)  # was made on another mesh
  with pytest.raises(puzzle_jax.PuzzleError, match=r"mesh: data=64 x .* are 64 devices and there are"):
    puzzle_jax.run(dataclasses.replace(config, mesh=MeshConfig(data=64)), tmp_path / "many", quiet=True)
  assert not (tmp_path / "many" / "data").exists()
  with Workdir(tmp_path / "held").lock(), pytest.raises(puzzle_jax.PuzzleError, match="is in use by process"):
    puzzle_jax.run(config, tmp_path / "held", quiet=True)
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
  with pytest.raises(puzzle_jax.PuzzleError, match="needs about"):
    puzzle_jax.run(config, tmp_path / "full", quiet=True)
  assert not (tmp_path / "full" / "data").exists()
