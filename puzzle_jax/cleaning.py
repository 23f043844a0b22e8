"""What a finished run can do without: the stored activations and the library's weights, by far the most of it.

The report, the export and the child need neither. The stages stay done; a later start that does need them (another
target's child, for example) makes them anew.
"""

from puzzle_jax.errors import PuzzleError
from puzzle_jax.pipeline import STAGES
from puzzle_jax.runs import Run
from puzzle_jax.store import StageStore


def removable(store: StageStore) -> list[str]:
  """The files of a stage that only a new child would need."""
  return [n for n in store.names if store.root.name in ("activations", "library") and n.endswith(".safetensors")]


def clean(run: Run) -> int:
  """Removes what can go and returns its bytes.

  Raises:
    PuzzleError: a process is at work in the directory, or the run is not finished.
  """
  with run.workdir.lock():
    if unfinished := [s.name for s in STAGES if not run.store(s.name).done]:
      raise PuzzleError(
        f"{run.workdir.root} is not finished ({', '.join(unfinished)} to do), and what would be removed may be needed; "
        "finish the run first"
      )
    before = sum(run.store(s.name).size for s in STAGES)
    for stage in STAGES:
      store = run.store(stage.name)
      store.clean(removable(store))
    return before - sum(run.store(s.name).size for s in STAGES)
