"""Metrics of a run's trainings by step: JSON lines, TensorBoard's event files and, where asked, Weights & Biases.

Each training has a folder (`gkd/metrics`, `library/metrics/layer_07`): `metrics.jsonl` is the record, the event file
beside it is written from it. A training that goes on from a checkpoint does some steps again; what was recorded from
the first of them on is dropped, so that no step is there twice. A stage that is made anew starts with an empty folder.
"""

import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter  # EventFileWriter would import TensorFlow if it can

from puzzle_jax import distributed
from puzzle_jax.errors import PuzzleError
from puzzle_jax.store import digest, replacing

FILE = "metrics.jsonl"
_EVENTS = "events.out.tfevents."


def read(folder: Path) -> list[dict[str, float]]:
  """The recorded steps of a training, each with its `step` and `time` (seconds since 1970); none: not recorded yet."""
  path, records = folder / FILE, []
  for line in path.read_text().splitlines() if path.is_file() else []:
    try:
      record = json.loads(line)
    except ValueError:  # the process was killed while it wrote this line
      break
    records.append({key: math.nan if value is None else value for key, value in record.items()})
  return records


class WandbRun:
  """A work directory's run at Weights & Biases; goes on when the same config is started again.

  Raises:
    PuzzleError: the package is not there, or refuses (not logged in).
  """

  def __init__(self, project: str, *, workdir: Path, config: Mapping[str, Any]):
    try:
      import wandb
    except ImportError:
      raise PuzzleError("--wandb needs the package wandb; run `pip install 'puzzle_jax[wandb]'`") from None
    try:
      self._run = wandb.init(
        project=project,
        id=digest([str(workdir.absolute()), config])[:16],
        name=workdir.name,
        dir=workdir,
        config=dict(config),
        resume="allow",
      )
    except wandb.Error as e:
      raise PuzzleError(
        f"Weights & Biases: {str(e).rstrip(chr(46))}; run `wandb login`, or set WANDB_MODE=offline"
      ) from e
    self._series: set[str] = set()

  def log(self, series: str, step: int, values: Mapping[str, float]) -> None:
    """One step of a training, on an axis of its own."""
    if series not in self._series:
      self._series.add(series)
      self._run.define_metric(f"{series}/*", step_metric=f"{series}/step")
    self._run.log({f"{series}/{name}": value for name, value in values.items()} | {f"{series}/step": step})

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
  ) -> None:
    self._run.finish(exit_code=int(error is not None))


class Series:
  """The metrics of one training.

  Args:
    folder: of this training alone; made at the first step.
    name: of the training, for `wandb`.
    wandb: gets each step once, too.
  """

  def __init__(self, folder: Path, *, name: str, wandb: WandbRun | None = None):
    self._folder, self._name, self._wandb = folder, name, wandb
    self._lines: Any = None

  def __call__(self, step: int, values: Mapping[str, float]) -> None:
    """Records a step, counted from 1; steps from the first one given on that were recorded before are dropped."""
    if not distributed.is_first():
      return
    if self._lines is None:
      self._open(step)
    record = {"step": step, "time": time.time(), **values}
    finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
    print(json.dumps(finite), file=self._lines, flush=True)
    self._write_event(record)
    self._events.flush()
    if self._wandb and step > self._last:
      self._wandb.log(self._name, step, values)

  def record(self, curves: Mapping[str, Sequence[float]]) -> None:
    """Records a whole training that is over: by name, the values of all steps."""
    with self:
      for step, values in enumerate(zip(*curves.values(), strict=True), start=1):
        self(step, dict(zip(curves, values, strict=True)))

  def _open(self, first: int) -> None:
    records = read(self._folder)
    self._last = max((int(r["step"]) for r in records), default=0)
    kept = [r for r in records if r["step"] < first]
    with replacing(self._folder / FILE) as aside:
      lines = (json.dumps({k: v if math.isfinite(v) else None for k, v in r.items()}) + "\n" for r in kept)
      aside.write_text("".join(lines))
    for old in self._folder.glob(f"{_EVENTS}*"):
      old.unlink()
    self._lines = (self._folder / FILE).open("a")
    name = f"{_EVENTS}{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
    self._events = RecordWriter((self._folder / name).open("wb"))
    self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
    for record in kept:
      self._write_event(record)

  def _write_event(self, record: Mapping[str, float]) -> None:
    values = [Summary.Value(tag=k, simple_value=v) for k, v in record.items() if k not in ("step", "time")]
    self._write(Event(wall_time=record["time"], step=int(record["step"]), summary=Summary(value=values)))

  def _write(self, event: Event) -> None:
    self._events.write(event.SerializeToString())

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
  ) -> None:
    if self._lines is not None:
      self._lines.close()
      self._events.close()
