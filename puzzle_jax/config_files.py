"""What a config file is made of: a `RunConfig` as a ConfigDict that flags can override, variants, a sweep.

    VARIANTS = {"small": ..., "large": ...}  # functions that make a RunConfig


    def get_config(variant="small"):
      return choose(VARIANTS, variant)


    def sweep(add):
      for speedup in (1.25, 1.5):
        add({"search.limits.min_speedup": speedup})

Nothing else of the library knows ml_collections.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import ml_collections
from ml_collections import config_dict

from puzzle_jax.config import RunConfig
from puzzle_jax.errors import PuzzleError


def to_config_dict(config: RunConfig) -> ml_collections.ConfigDict:
  """Every field can be overridden on the command line, those that are None included."""

  def convert(values: Mapping[str, Any]) -> dict[str, Any]:
    # The fields that may be None are the search's limits: numbers all.
    converted = {k: config_dict.placeholder(float) if v is None else v for k, v in values.items()}
    return {k: convert(v) if isinstance(v, Mapping) else v for k, v in converted.items()}

  return ml_collections.ConfigDict(convert(config.to_dict()))


class Add(Protocol):
  """Adds a run to a sweep: what it overrides, such as `add({"search.limits.min_speedup": 1.5})`."""

  def __call__(self, overrides: Mapping[str, Any], /) -> None: ...


def choose(variants: Mapping[str, Callable[[], RunConfig]], name: str) -> ml_collections.ConfigDict:
  """The config of one of a file's variants.

  Raises:
    PuzzleError: there is no such variant (names those there are).
  """
  if name not in variants:
    raise PuzzleError(f"this config has no variant {name!r}; it has {', '.join(variants)}")
  return to_config_dict(variants[name]())
