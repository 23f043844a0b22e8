"""The one exception a user sees for bad input: names the value and the remedy."""


class PuzzleError(ValueError):
  """Bad input, found before work starts. The message names the value and what to do about it."""
