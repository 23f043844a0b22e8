"""Thin mains, the benchmarks, and the records of measured runs."""

import sys
from pathlib import Path

from puzzle_jax import PuzzleError, environment

RESULTS = Path(__file__).parent / "results"

try:
  environment.prepare()
except PuzzleError as e:
  sys.exit(f"error: {e}")
