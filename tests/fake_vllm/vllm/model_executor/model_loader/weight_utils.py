"""What the worker changes."""

from typing import Any


def initialize_single_dummy_weight(param: Any, low: float = -1e-3, high: float = 1e-3) -> None:
  param.range = (low, high)
