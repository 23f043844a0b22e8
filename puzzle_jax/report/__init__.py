"""What people look at after a run: one HTML page (`render`), the table in the terminal (`closing_table`), and a page of
two runs side by side (`render_comparison`)."""

from puzzle_jax.report.closing import closing_table
from puzzle_jax.report.compare import render_comparison
from puzzle_jax.report.page import render

__all__ = ["closing_table", "render", "render_comparison"]
