"""Progress of a run: a bar for each stage with rate and time left in a terminal, plain lines in a log file."""

import sys
import time
from types import TracebackType
from typing import Protocol, Self, TextIO

from tqdm import tqdm

_FORMAT = (
  "{desc:<12} {percentage:3.0f}% |{bar:16}| {n_fmt}/{total_fmt}{unit}s, {rate_fmt}, {elapsed} < {remaining}{postfix}"
)
_LINE_EVERY_S = 20.0


class Bar(Protocol):
  """What a stage tells of its progress."""

  def update(self, n: int = 1) -> bool | None: ...
  def set_postfix_str(self, s: str = "", refresh: bool = True) -> None: ...
  def __enter__(self) -> Self: ...
  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
  ) -> None: ...


def _now() -> str:
  return time.strftime("[%H:%M:%S]")


class _Lines:
  """A bar for a log file: a line now and then, and one at the end."""

  def __init__(self, name: str, *, total: int, unit: str, done: int, stream: TextIO):
    self._name, self._total, self._unit, self._stream = name, total, unit, stream
    self._first = self._n = done
    self._begin = self._printed = time.monotonic()
    self._postfix = ""

  def update(self, n: int = 1) -> None:
    self._n += n
    if self._n < self._total and time.monotonic() - self._printed >= _LINE_EVERY_S:
      self._print()

  def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
    del refresh
    self._postfix = s

  def _print(self) -> None:
    self._printed = time.monotonic()
    seconds, made = self._printed - self._begin, self._n - self._first
    parts = [f"{self._n} of {self._total} {self._unit}s in {tqdm.format_interval(seconds)}"]
    if made and seconds:
      rate = made / seconds
      parts.append(f"{rate:.3g} {self._unit}s/s" if rate >= 1 else f"{1 / rate:.3g} s/{self._unit}")
      if left := self._total - self._n:
        parts.append(f"{tqdm.format_interval(left / rate)} left")
    print(_now(), f"{self._name}:", ", ".join([*parts, *filter(None, [self._postfix])]), file=self._stream, flush=True)

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
  ) -> None:
    if error is None:
      self._print()


class Progress:
  """Makes the bars of a run; `quiet` makes none."""

  def __init__(self, *, quiet: bool = False, stream: TextIO | None = None):
    self._quiet, self._stream = quiet, stream or sys.stderr

  def bar(self, name: str, *, total: int, unit: str, done: int = 0) -> Bar:
    """A bar that starts at `done` of `total`. In a log file it is a line at most every 20 s."""
    if not self._quiet and not self._stream.isatty():
      return _Lines(name, total=total, unit=unit, done=done, stream=self._stream)
    return tqdm(
      total=total,
      initial=done,
      desc=name,
      unit=f" {unit}",
      bar_format=_FORMAT,
      mininterval=0.2,
      dynamic_ncols=True,
      disable=self._quiet,
      file=self._stream,
    )

  def say(self, line: str) -> None:
    """A line for the user, above any bar."""
    if not self._quiet:
      tqdm.write(f"{_now()} {line}", file=self._stream)
