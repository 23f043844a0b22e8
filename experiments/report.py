"""Makes the page of a run anew, or one of two runs side by side. Needs no weights, and no stage to be finished.

python -m experiments.report --workdir=runs/quickstart
python -m experiments.report --compare=runs/quickstart,runs/mine --out=both.html

The page of a run goes to its own report/report.html; --out names another file, and leaves the run as it is.
"""

import sys
from pathlib import Path
from typing import Any

from absl import app, flags

import puzzle_jax
from puzzle_jax.errors import PuzzleError
from puzzle_jax.report import render, render_comparison
from puzzle_jax.report.summary import summarise
from puzzle_jax.store import replacing

_WORKDIR = flags.DEFINE_string("workdir", None, "A run's directory.")
_COMPARE = flags.DEFINE_list("compare", [], "Two runs' directories, separated by a comma or a space.")
_OUT = flags.DEFINE_string("out", "", "The file to write; with --compare, compare.html when empty.")


def summary_of(workdir: str) -> dict[str, Any]:
  """The figures of a run; those that it stored where its parent is not at hand.

  Raises:
    PuzzleError: it is no run's directory, or a file of it is corrupt.
  """
  run = puzzle_jax.open_run(workdir)
  try:
    return summarise(run)
  except PuzzleError as e:
    if "summary.json" not in run.store("report"):
      raise
    print(f"{e}\n{workdir}: the figures are those that the run stored", file=sys.stderr)
    return run.summary


def redo(workdir: str) -> Path:
  """Makes a run's summary and page anew, in its directory."""
  summary, store = summary_of(workdir), puzzle_jax.open_run(workdir).store("report")
  store.put_json("summary.json", summary)
  store.put_text("report.html", render(summary))
  return store.root / "report.html"


def main(argv: list[str]) -> None:
  workdir, compared = _WORKDIR.value, [*_COMPARE.value, *argv[1:]]
  try:
    if bool(workdir) == bool(_COMPARE.value) or (workdir and compared):
      raise PuzzleError("give either --workdir=RUN or --compare=RUN_A,RUN_B")
    if workdir and not _OUT.value:
      print(redo(workdir))
      return
    if workdir:
      page = render(summary_of(workdir))
    elif len(compared) == 2:
      page = render_comparison(*map(summary_of, compared), names=(compared[0], compared[1]))
    else:
      raise PuzzleError(f"--compare takes two runs, got {', '.join(compared)}")
    with replacing(out := Path(_OUT.value or "compare.html")) as aside:
      aside.write_text(page, encoding="utf-8")
    print(out)
  except PuzzleError as e:
    sys.exit(f"error: {e}")
  except OSError as e:
    sys.exit(f"error: {e.filename} cannot be written ({e.strerror}); name another file with --out")


if __name__ == "__main__":
  app.run(main)
