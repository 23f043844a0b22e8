"""What there is to see of a run without its weights: its figures and its block table.

They are read from a work directory, from the URL of one, or from the small records that the repository carries: folders
laid out like a work directory, with `report/summary.json` and `search/table.json` alone (`experiments.keep_record`
writes them). The notebooks in colabs/ begin here.
"""

import dataclasses
import functools
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from puzzle_jax.errors import PuzzleError
from puzzle_jax.json_input import parse
from puzzle_jax.search.table import Table

FOLDER = Path(__file__).parents[1] / "experiments" / "results" / "smollm2_135m"  # in a checkout
NAMES = ("full_space", "quickstart")


@dataclasses.dataclass(frozen=True)
class Record:
  """A run's figures; `root` is its folder, or the URL of that."""

  root: str

  @functools.cached_property
  def summary(self) -> dict[str, Any]:
    """What the report shows (`report.summary`); of a work directory, of the stages that are finished.

    Raises:
      PuzzleError: there is none.
    """
    if (Path(self.root) / "config.json").is_file():
      from puzzle_jax.report.summary import summarise  # these import JAX
      from puzzle_jax.runs import open_run

      return summarise(open_run(self.root))
    return self._read("report/summary.json")

  @functools.cached_property
  def table(self) -> Table:
    """The block table of the search.

    Raises:
      PuzzleError: there is none.
    """
    return Table.from_json(self._read("search/table.json"))

  def _read(self, name: str) -> Any:
    path = f"{self.root.rstrip('/')}/{name}"
    try:
      if "://" in self.root:
        with urllib.request.urlopen(path, timeout=60) as response:
          found = response.read()
      else:
        found = Path(path).read_bytes()
    except (OSError, urllib.error.URLError) as e:
      raise PuzzleError(f"{path} cannot be read ({e}); name a run's work directory, or an https URL of one") from e
    return parse(found, path, "name a run's work directory, or an https URL of one")


def open_record(source: str | os.PathLike[str] = "", *, name: str = "full_space") -> Record:
  """Opens what there is to see of a run.

  Args:
    source: its work directory, or the https URL of one, such as a public bucket's. "": one of the repository's records.
    name: which of them, of `NAMES`.

  Raises:
    PuzzleError: no such record.
  """
  if not source and name not in NAMES:
    raise PuzzleError(f"there is no record {name!r}; known: {', '.join(NAMES)}")
  if not source and not FOLDER.is_dir():
    raise PuzzleError("the records come with a checkout of the repository; clone it, or name a run's work directory")
  return Record(os.fspath(source or FOLDER / name))
