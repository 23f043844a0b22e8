"""JSON that others wrote: read, or refused by one error that says where it is and what to do (imports no JAX)."""

import json
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
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


def mapping(value: Any, where: str, known: Sequence[str] = ()) -> Mapping[str, Any]:
  """An object, of whose keys all are known if any are given; else PuzzleError."""
  if not isinstance(value, Mapping):
    raise PuzzleError(f"{where}: expected an object, found {value!r}")
  for key in value:
    if known and key not in known:
      raise PuzzleError(f"{where}: unknown key {key!r}; known: {', '.join(known)}")
  return value


def number(value: Any, where: str, *, signed: bool = False) -> float:
  """A finite number, negative only where `signed`; else PuzzleError."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    raise PuzzleError(f"{where} is {value!r}, not a number")
  if isinstance(value, int) and (abs(value) > sys.float_info.max or float(value) != value):
    raise PuzzleError(f"{where} is a whole number of {value.bit_length()} bits, too large to be held exactly")
  if not math.isfinite(value) or (value < 0 and not signed):
    raise PuzzleError(f"{where} is {value!r}; it must be finite" + ("" if signed else " and not negative"))
  return float(value)


def costs_of(value: Any, where: str, scenarios: Collection[str]) -> dict[tuple[str, int], tuple[float, float]]:
  """Of `{scenario: {batch: {"prefill_s": …, "decode_s": …}}}` the two seconds by scenario and batch.

  Raises:
    PuzzleError: another shape, a scenario that is not among `scenarios`, or seconds that are none.
  """
  found = {}
  for scenario, batches in mapping(value, f"{where}: costs").items():
    if scenario not in scenarios:
      raise PuzzleError(
        f"{where}: costs of scenario {scenario!r}, which the table does not describe; it has {', '.join(scenarios)}"
      )
    for batch, seconds in mapping(batches, f"{where}: costs of {scenario}").items():
      if not re.fullmatch("[1-9][0-9]{0,9}", batch):
        raise PuzzleError(f"{where}: batch {batch!r} of scenario {scenario} is no positive whole number")
      here = f"{where}: scenario {scenario}, batch {batch}"
      keys = ("prefill_s", "decode_s")
      mapping(seconds, here, keys)
      for key in keys:
        if key not in seconds:
          raise PuzzleError(f"{here}: {key} is missing")
      prefill, decode = (number(seconds[key], f"{here}: {key}") for key in keys)
      found[scenario, int(batch)] = (prefill, decode)
  return found
