"""The pictures of README and docs, drawn from the records in a browser: python -m experiments.pictures

Needs playwright and Chromium (`pip install -e '.[dev]'`, and the system's package chromium).
"""

import shutil
import sys
from pathlib import Path

import plotly.graph_objects as go
from absl import app
from playwright.sync_api import sync_playwright

from puzzle_jax import search
from puzzle_jax.records import open_record
from puzzle_jax.report import children, library, plots
from puzzle_jax.search import baselines

FOLDER = Path(__file__).parents[1] / "docs" / "images"
_WIDTH = 900
_SPEEDUP = 1.5
_SPEEDS = tuple(1 + 0.05 * i for i in range(25))


def pictures() -> dict[str, go.Figure]:
  """By name: every block's score, the frontier with greedy's and uniform's children, the optimal child's strip; what
  each variant of the library loses, by layer, and what its first weights and its training were worth."""
  record = open_record()
  table, summary = record.table, record.summary
  limits = search.Limits(min_speedup=_SPEEDUP)
  (child,) = search.solve(table, limits)
  own = [layer[j].block for layer, j in zip(table.layers, table.parent, strict=True)]
  figures = {
    "heat_map": plots.heat_map(summary),
    "frontier": children.position(search.frontier(table, "min_speedup", _SPEEDS), baselines.compare(table, limits)),
    "strip": children.strip(own, child.blocks),
    "library_losses": library.losses_by_layer(summary),
    "library_worth": library.worth(summary),
  }
  return {name: figure for name, figure in figures.items() if figure is not None}


def main(argv: list[str]) -> None:
  del argv
  browser = next((p for name in ("chromium", "google-chrome") if (p := shutil.which(name))), None)
  if browser is None:
    sys.exit("error: no Chromium is installed; install the system's package chromium")
  FOLDER.mkdir(parents=True, exist_ok=True)
  with sync_playwright() as driver:
    page = driver.chromium.launch(executable_path=browser).new_page(viewport={"width": _WIDTH, "height": 400})
    for name, figure in pictures().items():
      page.set_content(figure.to_html(config={"displayModeBar": False}, default_width=f"{_WIDTH - 16}px"))
      page.wait_for_selector(".main-svg")
      page.locator(".plotly-graph-div").screenshot(path=FOLDER / f"{name}.png")


if __name__ == "__main__":
  app.run(main)
