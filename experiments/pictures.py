"""The pictures of README and docs, drawn from the records in a browser: python -m experiments.pictures

Needs playwright and Chromium (`pip install -e '.[dev]'`, and the system's package chromium).
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from absl import app
from playwright.sync_api import sync_playwright
from plotly.subplots import make_subplots

from experiments import RESULTS, flagship_tables
from puzzle_jax import search
from puzzle_jax.records import open_record
from puzzle_jax.report import children, library, plots
from puzzle_jax.report.closing import lookup
from puzzle_jax.search import baselines
from puzzle_jax.store import read_json

FOLDER = Path(__file__).parents[1] / "docs" / "images"
_WIDTH = 900
_SPEEDUP = 1.5
_SPEEDS = tuple(1 + 0.05 * i for i in range(25))


def pictures() -> dict[str, go.Figure]:
  """By name: every block's score, the frontier with greedy's and uniform's children, the optimal child's strip; what
  each variant of the library loses, by layer, and what its first weights and its training were worth; once there is a
  record of them, the flagship's children."""
  record = open_record()
  table, summary = record.table, record.summary
  limits = search.Limits(min_speedup=_SPEEDUP)
  (child,) = search.solve(table, limits)
  own = [layer[j].block for layer, j in zip(table.layers, table.parent, strict=True)]
  figures: dict[str, go.Figure | None] = {
    "heat_map": plots.heat_map(summary),
    "frontier": children.position(search.frontier(table, "min_speedup", _SPEEDS), baselines.compare(table, limits)),
    "strip": children.strip(own, child.blocks),
    "library_losses": library.losses_by_layer(summary),
    "library_worth": library.worth(summary),
  }
  if (path := RESULTS / "flagship.json").is_file():
    figures |= flagship(read_json(path))
  return {name: figure for name, figure in figures.items() if figure is not None}


def flagship(record: dict[str, Any]) -> dict[str, go.Figure | None]:
  """The strip of each child, and quality against speed, measured and (open) predicted: accuracy preserved, and KL, with
  95 % intervals."""
  found = [(child, x) for child in record["children"] if (x := flagship_tables.speedup(record, child)) is not None]
  means = [(c, x, mean) for c, x in found if lookup(mean := lookup(c, "tasks", "mean"), "ratio") is not None]
  kls = [(child, x, after) for child, x in found if (after := lookup(child, "heldout", "after_gkd"))]
  predicted = {child["run"]: flagship_tables.speedup(record, child, "predicted_speedup") for child, _ in found}
  figure = make_subplots(1, 2, horizontal_spacing=0.12)
  ends = [[mean["ratio"] if mean[end] is None else mean[end] for end in ("ratio", "low", "high")] for *_, mean in means]
  percent = [(100.0, 100.0, 100.0), *([100 * value for value in three] for three in ends)]
  _curve(figure, means, percent, predicted, column=1)
  nats = [[after["kl"] + sign * 1.96 * after["kl_stderr"] for sign in (0, -1, 1)] for *_, after in kls]
  _curve(figure, kls, [(0.0, 0.0, 0.0), *nats], predicted, column=2)
  star = {"marker": {"symbol": "star", "size": 12, "color": plots.FFN}, "text": ["the paper's 51B"]}
  figure.add_scatter(x=[2.17], y=[98.4], mode="markers+text", textposition="top center", row=1, col=1, **star)
  plots._style(figure, height=360, x=f"times the parent's throughput, {record['scenario']} tokens", y="")
  fastest = max([2.17, *(x for _, x in found), *filter(None, predicted.values())])
  figure.update_xaxes(range=[0.9, fastest + 0.25])
  figure.update_yaxes(title="% of the parent's accuracy", row=1, col=1)
  figure.update_yaxes(title="KL on held-out text, nats a token", row=1, col=2).update_layout(showlegend=False)
  strips = {
    f"flagship_{child['target']:g}": children.strip(record["parent"]["blocks"], child["blocks"])
    for child in record["children"]
  }
  return strips | {"flagship_frontier": figure if means or kls else None}


def _curve(
  figure: go.Figure,
  points: Sequence[tuple[dict[str, Any], float, Any]],
  values: Sequence[Sequence[float]],
  predicted: Mapping[str, float | None],
  *,
  column: int,
) -> None:
  """The parent and its children, each value with the ends of its interval; a line through where they were predicted."""
  bars: dict[str, Any] = {"type": "data", "symmetric": False, "thickness": 1.5, "width": 5}
  bars |= {"array": [high - y for y, _, high in values], "arrayminus": [y - low for y, low, _ in values]}
  x, text = [1.0, *(x for _, x, _ in points)], ["parent", *(flagship_tables.name(child) for child, *_ in points)]
  place = "top right" if column == 1 else "bottom right"  # beside the line
  y, mark = [y for y, *_ in values], {"color": plots.ATTENTION, "size": 9}
  where = {"row": 1, "col": column}
  figure.add_scatter(x=x, y=y, text=text, textposition=place, error_y=bars, mode="markers+text", marker=mark, **where)
  ahead = [1.0, *(predicted[child["run"]] for child, *_ in points)]
  line = {"color": plots.ATTENTION, "width": 1, "dash": "dot"}
  hollow = mark | {"symbol": "circle-open"}
  figure.add_scatter(x=ahead, y=y, mode="lines+markers", marker=hollow, line=line, **where)


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
