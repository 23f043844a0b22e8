"""What people look at after a run: one HTML page (`render`) and the table in the terminal (`closing_table`)."""

from puzzle_jax.report.closing import closing_table
from puzzle_jax.report.page import render

__all__ = ["closing_table", "render"]
