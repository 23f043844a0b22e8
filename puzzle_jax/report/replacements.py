"""What scores say beyond the report's heat map: the cheapest and dearest replacements, and whether metrics agree (paper
section 4)."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import scipy.stats

from puzzle_jax.report import plots
from puzzle_jax.report.closing import Summary


@dataclasses.dataclass(frozen=True)
class Replacement:
  """A block in a layer's place: its score, nats a token (or the metric's unit), and what it saves in the scenario."""

  layer: int
  block: str
  score: float
  stderr: float
  saved_ms: float | None


def replacements(summary: Summary) -> list[Replacement]:
  """All that have a score, the cheapest first."""
  found = [
    Replacement(layer, block, score.value, score.stderr, plots.saved_ms(summary, layer, block))
    for layer, scores in enumerate(plots.block_scores(summary))
    for block, score in scores.items()
  ]
  return sorted(found, key=lambda r: r.score)


def metrics(summary: Summary) -> list[str]:
  """That the blocks were scored by."""
  entries = [entry for layer in summary.get("scores") or [] for entry in layer.values()]
  return [key for key in (entries[0] if entries else {}) if not key.endswith("_stderr")]


def rank_correlations(summary: Summary, names: Sequence[str] = ()) -> np.ndarray:
  """Spearman's coefficient between metrics (all, if none are named) over all measured blocks, [M, M]."""
  chosen = list(names) or metrics(summary)
  entries = [entry for layer in summary.get("scores") or [] for entry in layer.values()]
  values_ME = np.array([[entry[name] for entry in entries] for name in chosen])
  return np.array([[scipy.stats.spearmanr(a, b).statistic for b in values_ME] for a in values_ME])


def agreement(summary: Summary) -> go.Figure | None:
  """`rank_correlations` of all metrics as a matrix; None with fewer than two."""
  names = metrics(summary)
  if len(names) < 2:
    return None
  values = rank_correlations(summary, names)
  figure = go.Figure()
  hover = "%{y} and %{x}: %{z:.3f}<extra></extra>"
  scale = {"colorscale": plots.SCALE, "zmin": 0, "zmax": 1, "showscale": False}
  figure.add_heatmap(
    x=names, y=names, z=values, texttemplate="%{z:.3f}", hovertemplate=hover, xgap=2, ygap=2, textfont_size=14, **scale
  )
  plots._style(figure, height=90 + 60 * len(names), x="", y="")
  return figure.update_layout(width=160 + 110 * len(names)).update_yaxes(autorange="reversed", showgrid=False)
