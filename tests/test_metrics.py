"""Metrics of a training: each step once, whatever happened, as TensorBoard's own reader and a fake wandb see them."""

import math
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from puzzle_jax import metrics
from puzzle_jax.errors import PuzzleError
from puzzle_jax.metrics import Series, WandbRun


def tensorboard(folder: Path, tag: str) -> list[tuple[int, float]]:
  events = EventAccumulator(str(folder))
  events.Reload()
  return [(e.step, e.value) for e in events.Scalars(tag)]


def write(folder: Path, first: int, last: int, scale: float, **kwargs: Any) -> None:
  with Series(folder, name="gkd", **kwargs) as log:
    for step in range(first, last + 1):
      log(step, {"loss": scale * step, "kl": math.nan if step == 2 else 0.5})


def test_a_training_that_goes_on_leaves_each_step_once(tmp_path: Path) -> None:
  folder = tmp_path / "gkd" / "metrics"
  write(folder, 1, 6, 1.0)
  with (folder / metrics.FILE).open("a") as f:
    f.write('{"step": 7, "tim')  # killed while it wrote
  assert [r["step"] for r in metrics.read(folder)] == [1, 2, 3, 4, 5, 6]
  write(folder, 4, 8, 10.0)
  expected = [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60), (7, 70), (8, 80)]
  assert tensorboard(folder, "loss") == expected
  found = metrics.read(folder)
  assert [(r["step"], r["loss"]) for r in found] == expected
  assert math.isnan(found[1]["kl"])
  assert math.isnan(tensorboard(folder, "kl")[1][1])
  assert len(list(folder.iterdir())) == 2


def test_a_training_that_starts_again_leaves_nothing_of_the_first(tmp_path: Path) -> None:
  write(tmp_path, 1, 6, 1.0)
  Series(tmp_path, name="library/layer_00").record({"ffn.w32": [3.0, 2.0], "ffn.linear": [5.0, 4.0]})
  assert tensorboard(tmp_path, "ffn.linear") == [(1, 5.0), (2, 4.0)]
  assert EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"] == ["ffn.w32", "ffn.linear"]
  assert metrics.read(tmp_path / "nowhere") == []


class FakeWandb(types.ModuleType):
  """Records what wandb would be given."""

  class Error(Exception): ...

  def __init__(self) -> None:
    super().__init__("wandb")
    self.calls: list[Any] = []

  def init(self, **kwargs: Any) -> "FakeWandb":
    self.calls.append(kwargs)
    return self

  def define_metric(self, name: str, *, step_metric: str) -> None:
    self.calls.append((name, step_metric))

  def log(self, values: dict[str, float]) -> None:
    self.calls.append(values)

  def finish(self, *, exit_code: int) -> None:
    self.calls.append(exit_code)


def test_wandb_gets_each_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  config = {"gkd": {"steps": 8}}

  def start() -> WandbRun:
    return WandbRun("puzzle", workdir=tmp_path, config=config)

  with pytest.raises(KeyboardInterrupt), start() as run:  # noqa: PT012
    write(tmp_path / "gkd", 1, 5, 1.0, wandb=run)
    raise KeyboardInterrupt
  with start() as run:
    write(tmp_path / "gkd", 4, 8, 1.0, wandb=run)
  logged = [c for c in fake.calls if isinstance(c, dict) and "gkd/loss" in c]
  assert [c["gkd/step"] for c in logged] == [1, 2, 3, 4, 5, 6, 7, 8]
  assert [c["gkd/loss"] for c in logged] == [1, 2, 3, 4, 5, 6, 7, 8]
  starts = [c for c in fake.calls if isinstance(c, dict) and "project" in c]
  assert starts[0] == starts[1]
  assert (starts[0]["resume"], starts[0]["config"], starts[0]["dir"]) == ("allow", config, tmp_path)
  WandbRun("puzzle", workdir=tmp_path, config={})
  assert fake.calls[-1]["id"] != starts[0]["id"]
  assert fake.calls.count(("gkd/*", "gkd/step")) == 2
  assert [c for c in fake.calls if isinstance(c, int)] == [1, 0]


def test_wandb_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)

  def refuse(**kwargs: Any) -> None:
    raise fake.Error("No API key configured.")

  monkeypatch.setattr(fake, "init", refuse)
  with pytest.raises(PuzzleError, match=r"No API key configured; run `wandb login`, or set WANDB_MODE=offline"):
    WandbRun("puzzle", workdir=tmp_path, config={})


def test_the_writer_imports_neither_tensorflow_nor_torch(tmp_path: Path) -> None:
  code = (
    "import sys, pathlib; from puzzle_jax.metrics import Series; "
    "Series(pathlib.Path(sys.argv[1]), name='x').record({'loss': [1.0]}); "
    "sys.exit(any(m.split('.')[0] in ('tensorflow', 'torch', 'jax') for m in sys.modules))"
  )
  assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0
