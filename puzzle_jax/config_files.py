"""From the frozen `RunConfig` to the ConfigDict that flags can override."""

from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from puzzle_jax.config import RunConfig


def to_config_dict(config: RunConfig) -> ml_collections.ConfigDict:
  """Every field can be overridden on the command line, those that are None included."""

  def convert(values: Mapping[str, Any]) -> dict[str, Any]:
    # The fields that may be None are the search's limits: numbers all.
    converted = {k: config_dict.placeholder(float) if v is None else v for k, v in values.items()}
    return {k: convert(v) if isinstance(v, Mapping) else v for k, v in converted.items()}

  return ml_collections.ConfigDict(convert(config.to_dict()))
