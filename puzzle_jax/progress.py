"""Progress bars with time left in a terminal, plain lines in a log file."""

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

_FORMAT = "{desc:<12} {percentage:3.0f}% |{bar:24}| {n_fmt}/{total_fmt} {unit}s  {elapsed} < {remaining}  {postfix}"


class Progress:
  """Makes the bars of a run; `quiet` makes none."""

  def __init__(self, *, quiet: bool = False, stream: TextIO | None = None):
    self._quiet, self._stream = quiet, stream or sys.stderr

  def bar(self, name: str, *, total: int, unit: str) -> Any:
    """A tqdm bar. In a log file it prints a line at most every 20 s."""
    terminal = self._stream.isatty()
    return tqdm(
      total=total,
      desc=name,
      unit=unit,
      bar_format=_FORMAT if terminal else _FORMAT + "\n",
      mininterval=0.2 if terminal else 20,
      miniters=None if terminal else 1,
      disable=self._quiet,
      file=self._stream,
    )

  def say(self, line: str) -> None:
    """A line for the user, above any bar."""
    if not self._quiet:
      tqdm.write(f"[{time.strftime('%H:%M:%S')}] {line}", file=self._stream)
