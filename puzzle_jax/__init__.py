"""Puzzle in JAX: distillation-based architecture search for inference-optimised language models.

run = puzzle_jax.run(config, "runs/mine")    # or open_run("runs/mine")
print(run.child.chat("What is a neutron star?"))
"""

from typing import TYPE_CHECKING, Any

from puzzle_jax import environment
from puzzle_jax.errors import PuzzleError

if TYPE_CHECKING:
  from puzzle_jax.pipeline import run
  from puzzle_jax.runs import Run, open_run

__all__ = ["PuzzleError", "Run", "open_run", "run"]


def __getattr__(name: str) -> Any:
  # Lazily: `puzzle_jax.serving` and `puzzle_jax.arch` are to be had without JAX.
  if name in __all__:
    environment.prepare()
  if name in ("Run", "open_run"):
    from puzzle_jax import runs

    return getattr(runs, name)
  if name == "run":
    from puzzle_jax import pipeline

    return pipeline.run
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
