"""Thin mains, the benchmarks, and the records of measured runs."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
