"""The frontier as a page: score against throughput and memory (paper section 5). Imports no JAX."""

from collections.abc import Sequence

from plotly.subplots import make_subplots

from puzzle_jax.search.limits import GIB
from puzzle_jax.search.tradeoffs import FrontierPoint

_COLOUR = "#2b5c8a"


def frontier_page(limit: str, points: Sequence[FrontierPoint]) -> str:
  """HTML that needs no other file and no network, of what `tradeoffs.frontier` found for a limit."""
  reached = [(p.value, p.solution) for p in points if p.solution]
  scenario = reached[0][1].scenario
  score = [s.score for _, s in reached]
  text = [
    f"{limit} {value:.6g}<br>score {s.score:.6g}, batch {s.batch}<br>{s.throughput:.5g} tokens/s "
    f"({s.output_throughput:.5g} output tokens/s)<br>{s.memory_bytes / GIB:.4g} GiB, {s.params / 1e9:.4g} B parameters"
    for value, s in reached
  ]
  figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04)
  axes = {
    f"input + output tokens/s in {scenario}": [s.throughput for _, s in reached],
    f"memory in {scenario}, GiB": [s.memory_bytes / GIB for _, s in reached],
  }
  for column, (title, x) in enumerate(axes.items(), start=1):
    figure.add_scatter(
      x=x,
      y=score,
      text=text,
      mode="lines+markers",
      line={"color": _COLOUR},
      hovertemplate="%{text}<extra></extra>",
      row=1,
      col=column,
    )
    figure.update_xaxes(title=title, row=1, col=column)
  figure.update_yaxes(title="score (sum of the blocks'; lower is better)", row=1, col=1)
  title, missed = f"The best child at each {limit}", len(points) - len(reached)
  figure.update_layout(
    template="plotly_white",
    showlegend=False,
    height=480,
    title=f"{title} ({missed} of {len(points)} values cannot be met)" if missed else title,
  )
  return figure.to_html(include_plotlyjs=True, config={"responsive": True, "displaylogo": False})
