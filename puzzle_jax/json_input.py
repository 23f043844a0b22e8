"""JSON that others wrote: read, or refused by one error that says where it is and what to do (imports no JAX)."""

import json
from pathlib import Path
from typing import Any

from puzzle_jax.errors import PuzzleError

_LEVELS = 100  # what is nested deeper could be neither copied nor shown in an error


def parse(text: str | bytes, where: str, remedy: str) -> Any:
  """A JSON value.

  Raises:
    PuzzleError: it is none, or is nested too deeply.
  """
  try:
    value = json.loads(text if isinstance(text, str) else text.decode())
  except RecursionError:
    value, deep = None, True
  except ValueError as e:
    raise PuzzleError(f"{where} is not JSON ({e}); {remedy}") from e
  else:
    deep = _is_deep(value)
  if deep:
    raise PuzzleError(f"{where} is JSON of more than {_LEVELS} levels, one in the other; {remedy}")
  return value


def _is_deep(value: Any) -> bool:
  level = [value]
  for _ in range(_LEVELS):
    inner = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)]
    if not inner:
      return False
    level = [x for values in inner for x in values]
  return True


def read_object(path: Path, remedy: str) -> dict[str, Any]:
  """The JSON object of a file; lets OSError through.

  Raises:
    PuzzleError: the file holds something else.
  """
  data = parse(path.read_bytes(), str(path), remedy)
  if not isinstance(data, dict):
    raise PuzzleError(f"{path} holds no JSON object; {remedy}")
  return data
