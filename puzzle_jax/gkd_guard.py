"""What keeps global distillation safe: the watch over its loss, and the checksums of its checkpoints.

Checkpoints are orbax's; what is here says which of them may be used.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from puzzle_jax import distributed
from puzzle_jax.progress import Progress
from puzzle_jax.store import CorruptFileError, file_digests, read_json, write_json

WINDOW = 16  # steps whose median counts: batches differ, and one of them says little
_LEAST = 0.01  # nats a token; below it, a multiple of the loss is no worry


class Watch:
  """Says whether a loss has come to diverge, and whether weights are good enough for a checkpoint.

  Held against each other are medians of `WINDOW` steps. Diverged: the last one is more than `multiple` times the least
  one so far, and the warm-up, in which a loss may rise and come back, lies a window behind. Good: neither the last
  median nor the loss of the very weights in question is more than that; so a checkpoint of the rise is never written
  over a good one.

  Args:
    multiple: of the best median; 0: only what is not finite counts.
    warmup: steps of it.
    losses: of the steps so far.
  """

  def __init__(self, multiple: float, warmup: int, losses: Sequence[float] = ()):
    self._multiple, self._warmup = multiple, warmup
    self._losses: list[float] = []
    self.best = math.inf
    for loss in losses:
      self.note(loss)

  def note(self, loss: float) -> None:
    """Takes up the loss of the next step."""
    self._losses.append(loss)
    if len(self._losses) >= WINDOW:
      self.best = min(self.best, self.median)

  @property
  def median(self) -> float:
    """Of the last steps."""
    return float(np.median(self._losses[-WINDOW:])) if self._losses else 0.0

  @property
  def _most(self) -> float:
    return self._multiple * max(self.best, _LEAST) if self._multiple else math.inf

  @property
  def diverged(self) -> bool:
    return len(self._losses) >= self._warmup + WINDOW and self.median > self._most

  def is_good(self, loss: float) -> bool:
    """Whether weights of this loss may be kept."""
    return math.isfinite(loss) and max(loss, self.median) <= self._most


def forget_checkpoints(folder: Path) -> None:
  """Deletes the checkpoints of a finished or superseded training."""

  def forget() -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _checksums(folder).unlink(missing_ok=True)

  distributed.by_first(forget)


def note_checksums(folder: Path, step: str) -> None:
  """Of the checkpoint that was written last."""
  write_json(_checksums(folder), {step: file_digests(folder / step)})


def _checksums(folder: Path) -> Path:
  """Of the last checkpoint's files, by its step."""
  return folder.with_name(f"{folder.name}.json")


def drop_damaged(folder: Path, progress: Progress) -> None:
  """Deletes checkpoints that are not as they were written: orbax itself would use a changed array.

  One that is newer than what was noted was whole, since orbax renames last, when the run was killed before the note.
  """
  try:
    known = read_json(_checksums(folder)) if _checksums(folder).exists() else {}
    newest: float = max(map(int, known), default=-1)
  except CorruptFileError:
    known, newest = {}, math.inf  # what came later cannot be told
  for checkpoint in folder.glob("[0-9]*"):
    if checkpoint.name.isdigit() and int(checkpoint.name) > newest:
      note_checksums(folder, checkpoint.name)
    elif file_digests(checkpoint) != known.get(checkpoint.name):
      progress.say(f"gkd: the checkpoint {checkpoint} is damaged or was not finished; its steps are done again")
      shutil.rmtree(checkpoint)
