"""The one exception a user sees for bad input: names the value and the remedy."""

from collections.abc import Collection

NO_MEMORY = ("out of memory", "can't allocate memory", "RESOURCE_EXHAUSTED", "Failed to create llama_context")


class PuzzleError(ValueError):
  """Bad input, found before work starts. The message names the value and what to do about it."""


def check_seed(name: str, seed: int) -> None:
  """Raises PuzzleError for what is no seed of random numbers."""
  if not 0 <= seed < 2**32:
    raise PuzzleError(f"{name}={seed} must be from 0 to {2**32 - 1}")


def why_no_memory(said: str, signs: Collection[str] = NO_MEMORY) -> str:
  """The line of what an engine said in which memory is short; empty: it is about something else."""
  short = (line for line in said.splitlines() if any(sign in line for sign in signs))
  return next(short, "").strip()[:300]
