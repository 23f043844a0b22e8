"""Children that the search found, to look at side by side: the strip of their blocks, and where they stand against the
frontier (paper section 5)."""

import dataclasses
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from puzzle_jax.report import closing, plots
from puzzle_jax.report.closing import number
from puzzle_jax.search import FrontierPoint, Solution

_SLOTS = {"attention": ("attention", plots.ATTENTION), "ffn": ("FFN", plots.FFN)}
_MARKS = (("diamond", plots.FFN), ("square", plots.GREY), ("triangle-up", plots.GREY), ("cross", plots.GREY))


@dataclasses.dataclass(frozen=True)
class Row:
  """A child in a table."""

  child: str
  score: float
  tokens_per_s: float
  first_token_ms: float
  memory: str
  parameters: str


def rows(children: Mapping[str, Solution | None]) -> list[Row]:
  """Children by name, one a row; None is left out."""
  return [
    Row(name, s.score, s.throughput, 1e3 * s.first_token_s, number(s.memory_bytes, "B"), number(s.params))
    for name, s in children.items()
    if s is not None
  ]


def strip(parent: Sequence[str], child: Sequence[str]) -> go.Figure:
  """The child's blocks, layer by layer: a full bar is the parent's own subblock, hatched is one matrix, empty is none.

  Args:
    parent: the parent's blocks.
    child: the child's, as many.
  """
  cells = closing.cells_of(parent, child)
  figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
  for row, (slot, (title, colour)) in enumerate(_SLOTS.items(), start=1):
    layers, here = list(range(len(cells[slot]))), cells[slot]
    figure.add_bar(x=layers, y=[1] * len(here), marker_color="#eef0f2", hoverinfo="skip", row=row, col=1)
    # The hatching has the marker's colour; what plotly calls fgcolor is not used beside that.
    hatch = {
      "shape": ["/" if c.stem == "linear" else "" for c in here],
      "size": 5,
      "solidity": 0.35,
      "bgcolor": "white",
    }
    hover = "layer %{x}: %{text}<extra></extra>"
    figure.add_bar(
      x=layers,
      y=[c.share for c in here],
      text=[c.label for c in here],
      textposition="none",
      marker={"color": colour, "pattern": hatch, "line": {"width": 0}},
      hovertemplate=hover,
      row=row,
      col=1,
    )
    figure.update_yaxes(title=title, row=row, col=1)
  plots._style(figure, height=190, x="", y="")
  for row, (title, _) in enumerate(_SLOTS.values(), start=1):
    figure.update_yaxes(title=title, showticklabels=False, showgrid=False, range=[0, 1.02], row=row, col=1)
  figure.update_xaxes(showgrid=False, dtick=plots._layer_step(child), range=[-0.5, len(child) - 0.5])
  figure.update_xaxes(title="layer", row=2, col=1)
  return figure.update_layout(barmode="overlay", bargap=0.08, showlegend=False)


def position(points: Sequence[FrontierPoint], children: Mapping[str, Solution | None]) -> go.Figure:
  """Children among the best at each speed.

  Args:
    points: what `search.frontier` found; those that were not met are left out.
    children: by name, such as what `search.baselines.compare` found; None is left out.
  """
  best = [p.solution for p in points if p.solution]
  groups = [("optimal at each speed", best, {"mode": "lines+markers", "marker": {"color": plots.ATTENTION, "size": 7}})]
  for (name, child), (symbol, colour) in zip(children.items(), _MARKS, strict=False):
    marker = {"symbol": symbol, "size": 14, "color": colour, "line": {"color": plots.INK, "width": 1}}
    groups.append((name, [child] if child else [], {"mode": "markers", "marker": marker}))
  figure = go.Figure()
  for name, group, look in groups:
    text = [f"{number(s.memory_bytes, 'B')}, {number(s.params)} parameters" for s in group]
    x, y = [s.throughput for s in group], [s.score for s in group]
    hover = "%{x:.4g} tokens/s<br>score %{y:.3g}<br>%{text}<extra>" + name + "</extra>"
    figure.add_scatter(x=x, y=y, text=text, name=name, hovertemplate=hover, **look)
  return plots._style(figure, height=380, x="predicted tokens/s, input and output", y="sum of scores")
