"""A bar for each stage in a terminal, plain lines in a log file."""

import io
import re

import pytest

from puzzle_jax import progress
from puzzle_jax.progress import Progress


class Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


def test_a_terminal_gets_a_bar_with_rate_and_time_left() -> None:
  screen = Terminal()
  shown = Progress(stream=screen)
  with shown.bar("gkd", total=8, unit="step", done=2) as bar:
    for _ in range(3):
      bar.set_postfix_str("loss 0.5", refresh=False)
      bar.update()
    bar.refresh()  # type: ignore[attr-defined]
    shown.say("a word")
  # A line that follows a longer one, as when the rate falls below 10,000, ends in spaces.
  last = [line for line in re.split(r"[\r\n]", screen.getvalue()) if "gkd" in line][-1].rstrip()
  assert re.fullmatch(r"gkd +62% \|[█#]+.* *\| 5/8 steps, +[\d.]+ step/s, 00:00 < 00:00, loss 0.5", last)
  assert re.search(r"\[\d\d:\d\d:\d\d\] a word\n", screen.getvalue())


def test_a_log_file_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
  now = [100.0]
  monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
  log = io.StringIO()
  shown = Progress(stream=log)
  with shown.bar("library", total=30, unit="layer", done=10) as bar:
    for _ in range(20):
      now[0] += 4
      bar.set_postfix_str("loss 0.5")
      bar.update()
  shown.say("a word")
  lines = [re.sub(r"^\[\d\d:\d\d:\d\d\] ", "", line) for line in log.getvalue().splitlines()]
  assert lines == [
    "library: 15 of 30 layers in 00:20, 4 s/layer, 01:00 left, loss 0.5",
    "library: 20 of 30 layers in 00:40, 4 s/layer, 00:40 left, loss 0.5",
    "library: 25 of 30 layers in 01:00, 4 s/layer, 00:20 left, loss 0.5",
    "library: 30 of 30 layers in 01:20, 4 s/layer, loss 0.5",
    "a word",
  ]
  assert "\r" not in log.getvalue()


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
  shown = Progress(quiet=True)
  with shown.bar("data", total=1, unit="split") as bar:
    bar.update()
  shown.say("a word")
  assert capsys.readouterr() == ("", "")
