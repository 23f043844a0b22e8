"""The report's figures, from the summary's numbers alone (paper sections 3 to 6; plotly, no JAX).

Scores are nats a token above the parent. On their logarithmic axes, what is below `FLOOR` is drawn there: in fp32 it is
rounding.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from puzzle_jax.report.closing import Summary, lookup, number

FLOOR = 1e-6

INK, GREY, GRID = "#1d2730", "#9aa3ab", "#e4e7ea"
ATTENTION, FFN, PARENT = "#2b5c8a", "#c2701c", "#8b949c"
SCALE = [(0.0, "#f6f1e4"), (0.35, "#efc77f"), (0.65, "#d5703b"), (1.0, "#6d1a36")]  # light to dark, in print too


@dataclasses.dataclass(frozen=True)
class Score:
  """Of a block, nats a token above the parent; `summed` from its subblocks' where the pair was not measured."""

  value: float
  stderr: float
  summed: bool

  @property
  def is_noise(self) -> bool:
    """Not told apart from the parent: less than two standard errors above 0."""
    return self.value < 2 * self.stderr

  def __str__(self) -> str:
    how = " (sum of its subblocks)" if self.summed else ""
    return f"{self.value:.3g} ± {self.stderr:.2g}{how}{'; noise' if self.is_noise else ''}"


def block_scores(summary: Summary) -> list[dict[str, Score]]:
  """By layer and block name, of every block but the parent's own that has a score; empty without scores."""
  metric, layers = summary.get("metric") or "kl", []
  for space, measured in zip(summary.get("space") or [], summary.get("scores") or [], strict=False):
    scores = {}
    for attention, ffn in itertools.product(space["attention"], space["ffn"]):
      pair = f"{attention}/{ffn}"
      parts = [pair] if pair in measured else [f"{attention}/{space['ffn'][0]}", f"{space['attention'][0]}/{ffn}"]
      values = [lookup(measured, part, metric) for part in parts]
      errors = [lookup(measured, part, f"{metric}_stderr") or 0.0 for part in parts]
      if None not in values:
        scores[pair] = Score(sum(values), math.hypot(*errors), len(parts) > 1)
    layers.append(scores)
  return layers


def chosen_blocks(summary: Summary) -> list[str]:
  """The child's blocks, one a layer; empty without a child."""
  return lookup(summary, "models", "child", "blocks") or lookup(summary, "solution", "blocks") or []


def _style(figure: go.Figure, *, height: int, x: str, y: str, log_y: Sequence[float] = ()) -> go.Figure:
  """`log_y`: what a logarithmic axis has to show."""
  axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GREY, "fixedrange": True}
  figure.update_layout(
    template="none",
    height=height,
    margin={"l": 8, "r": 8, "t": 8, "b": 48 if x else 40},
    font={"family": "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif", "size": 12, "color": INK},
    legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "xanchor": "left"},
    dragmode=False,  # a finger scrolls the page
    hoverlabel={"bgcolor": "white", "font": {"color": INK}, "align": "left"},
  )
  if log_y:
    ticks = "D2" if max(log_y) < 1e3 * min(log_y) else 1  # 1, 2, 5 or decades
    figure.update_yaxes(type="log", tickformat="~g", dtick=ticks)
  figure.update_xaxes(title={"text": x, "standoff": 8}, **axis)
  return figure.update_yaxes(title={"text": y, "standoff": 8}, automargin=True, **axis)


def _layer_step(layers: Sequence[Any]) -> int:
  """Between the ticks of an axis of layers."""
  return 1 if len(layers) <= 10 else 5 if len(layers) <= 50 else 10


def heat_map(summary: Summary) -> go.Figure | None:
  """The score of every block (rows, the gentlest first) by layer, its colour logarithmic; the chosen are marked."""
  layers, chosen = block_scores(summary), chosen_blocks(summary)
  values: dict[str, list[float]] = {}
  for name, score in itertools.chain.from_iterable(layer.items() for layer in layers):
    values.setdefault(name, []).append(score.value)
  if not values:
    return None
  rows = sorted(values, key=lambda name: statistics.median(values[name]))
  rows = [name for name in dict.fromkeys(chosen) if name not in values] + rows
  logs = [[math.log10(max(s.value, FLOOR)) if (s := layer.get(row)) else None for layer in layers] for row in rows]
  text = [[str(layer.get(row, "the parent's own, or not scored")) for layer in layers] for row in rows]
  known = [z for line in logs for z in line if z is not None]
  ticks: list[float] = [*range(math.ceil(min(known)), math.floor(max(known)) + 1)]
  ticks = ticks if len(ticks) > 1 else [min(known), max(known)]
  bar = {"tickvals": ticks, "ticktext": [f"{10.0**t:.2g}" for t in ticks], "orientation": "h", "thickness": 10}
  bar |= {"y": 1.0, "yanchor": "bottom", "title": {"text": "nats a token above the parent", "side": "top"}}
  hover = "layer %{x}, %{y}<br>%{text}<extra></extra>"
  figure, x = go.Figure(), list(range(len(layers)))
  gaps = {"xgap": 1 if len(layers) <= 40 else 0, "ygap": 1}
  figure.add_heatmap(x=x, y=rows, z=logs, text=text, colorscale=SCALE, colorbar=bar, hovertemplate=hover, **gaps)
  noise = [(i, name) for i, layer in enumerate(layers) for name, score in layer.items() if score.is_noise]
  marks = {"hoverinfo": "skip", "mode": "markers", "showlegend": False}
  cross = {"symbol": "x-thin", "size": 5, "line": {"color": INK, "width": 1}}
  ring = {"symbol": "circle", "size": 7, "color": "white", "line": {"color": INK, "width": 1.5}}
  figure.add_scatter(x=[i for i, _ in noise], y=[n for _, n in noise], marker=cross, name="noise", **marks)
  figure.add_scatter(x=list(range(len(chosen))), y=chosen, marker=ring, name="chosen", **marks)
  _style(figure, height=130 + 20 * len(rows), x="layer", y="")
  figure.update_yaxes(type="category", range=[len(rows) - 0.5, -0.5], showgrid=False)
  return figure.update_xaxes(showgrid=False, range=[-0.5, len(layers) - 0.5], dtick=_layer_step(layers))


def marginals(summary: Summary) -> go.Figure | None:
  """What a layer's attention and its FFN matter: the mean score of the blocks that replace one and keep the other."""
  figure, layers = go.Figure(), block_scores(summary)
  for slot, other, colour in (("attention", "ffn", ATTENTION), ("ffn", "attention", FFN)):
    x, y = [], []
    for i, (space, scores) in enumerate(zip(summary.get("space") or [], layers, strict=False)):
      pairs = [{other: space[other][0], slot: name} for name in space[slot][1:]]
      found = [s.value for p in pairs if (s := scores.get(f"{p['attention']}/{p['ffn']}"))]
      if found:
        x.append(i)
        y.append(max(statistics.fmean(found), FLOOR))
    hover = f"layer %{{x}}, {slot}<br>%{{y:.3g}} nats a token<extra></extra>"
    name = "FFN" if slot == "ffn" else slot
    figure.add_scatter(
      x=x, y=y, name=f"{name} replaced", mode="lines+markers", marker={"color": colour}, hovertemplate=hover
    )
  means = [y for trace in figure.data for y in trace.y]
  if not means:
    return None
  _style(figure, height=300, x="layer", y="mean score, nats a token", log_y=means)
  return figure.update_xaxes(dtick=_layer_step(layers))


def _seconds(summary: Summary, block: str) -> float | None:
  """Of a block, for the target's scenario and batch."""
  where = (lookup(summary, "target", "scenario", "name"), str(lookup(summary, "target", "batch") or 1))
  ids = [f"{slot}.{name}" for slot, name in zip(("attention", "ffn"), block.split("/"), strict=True)]
  parts = [lookup(summary, "costs", "subblocks", i, *where, phase) for i in ids for phase in ("prefill_s", "decode_s")]
  return None if None in parts else sum(parts)


def saved_ms(summary: Summary, layer: int, block: str) -> float | None:
  """What a block saves in the target's scenario in place of the parent's own; None without costs."""
  space = summary["space"][layer]
  own, seconds = _seconds(summary, f"{space['attention'][0]}/{space['ffn'][0]}"), _seconds(summary, block)
  return None if own is None or seconds is None else 1e3 * (own - seconds)


def cost_against_score(summary: Summary) -> go.Figure | None:
  """What each block saves against what it costs in quality, with standard errors, the chosen ringed; without the
  parent's own, at 0."""
  layers, chosen = block_scores(summary), chosen_blocks(summary)
  points = [
    (saved, max(score.value, FLOOR), score, i, name)
    for i, scores in enumerate(layers)
    for name, score in scores.items()
    if (saved := saved_ms(summary, i, name)) is not None
  ]
  if not points:
    return None
  picked = [p for p in points if p[3] < len(chosen) and chosen[p[3]] == p[4]]
  figure = go.Figure()
  for name, group, marker in (
    ("scored", points, {"size": 6, "color": [p[3] for p in points], "colorscale": "Viridis", "opacity": 0.75}),
    ("chosen", picked, {"size": 12, "symbol": "circle-open", "color": "#c1121f", "line": {"width": 2}}),
  ):
    x, y, text = [p[0] for p in group], [p[1] for p in group], [f"layer {i}, {n}<br>{s}" for *_, s, i, n in group]
    # Down to the axis's floor at most: it is logarithmic.
    up, down = [p[2].stderr for p in group], [min(p[2].stderr, p[1] - FLOOR) for p in group]
    bars = {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "width": 0, "thickness": 0.7}
    hover = "%{text}<br>saves %{x:.3g} ms<extra></extra>"
    bars |= {"color": GREY, "visible": name == "scored"}
    figure.add_scatter(x=x, y=y, text=text, name=name, error_y=bars, mode="markers", marker=marker, hovertemplate=hover)
  bar = {"title": {"text": "layer", "side": "top"}, "thickness": 10, "len": 0.8, "dtick": _layer_step(layers)}
  figure.data[0].marker.update(showscale=True, colorbar=bar)
  return _style(figure, height=420, x="ms saved in the scenario", y="score, nats a token", log_y=[p[1] for p in points])


def frontier(summary: Summary) -> go.Figure | None:
  """The best score that the search reaches at each speed, as the table predicts it; and the child's place."""
  points = [p for p in summary.get("frontier") or [] if None not in (p.get("score"), p.get("throughput"))]
  if not points:
    return None
  points.sort(key=lambda p: p["throughput"])
  solution = summary.get("solution") or {}
  figure = go.Figure()
  for name, group, mode, marker in (
    ("optimal children", points, "lines+markers", {"color": ATTENTION, "size": 8}),
    ("this child", [solution] if solution else [], "markers", {"color": FFN, "size": 13, "symbol": "diamond"}),
  ):
    text = [number(p.get("memory_bytes"), "B") for p in group]
    hover = "%{x:.4g} tokens/s<br>score %{y:.3g}<br>%{text}<extra></extra>"
    x, y = [p.get("throughput") for p in group], [p.get("score") for p in group]
    figure.add_scatter(x=x, y=y, text=text, name=name, mode=mode, marker=marker, hovertemplate=hover)
  return _style(figure, height=340, x="predicted tokens/s, input and output", y="sum of scores")


def distillation(summary: Summary) -> go.Figure | None:
  """Held-out loss of each library variant at its first weights and after BLD: the median over layers."""
  found: dict[str, dict[str, list[float]]] = {}
  for layer in summary.get("library") or []:
    for name, report in layer.items():
      for when in ("delta_init", "delta_trained"):
        if (loss := lookup(report, "losses", when)) is not None:
          found.setdefault(name, {}).setdefault(when, []).append(loss)
  if not found:
    return None
  figure = go.Figure()
  for when, name, colour in (("delta_init", "first weights", PARENT), ("delta_trained", "after training", ATTENTION)):
    medians = [statistics.median(losses[when]) if when in losses else None for losses in found.values()]
    hover = "%{y}<br>%{x:.3g}<extra>" + name + "</extra>"
    bars = {"orientation": "h", "name": name, "marker": {"color": colour}, "hovertemplate": hover}
    figure.add_bar(x=medians, y=list(found), **bars)
  _style(figure, height=110 + 36 * len(found), x="held-out loss", y="")
  return figure.update_yaxes(autorange="reversed")


def global_distillation(summary: Summary) -> go.Figure | None:
  """GKD's loss and its parts, step by step, and the KL on held-out rows where it was measured."""
  figure, steps = go.Figure(), summary.get("gkd") or []
  lines = (
    ("loss", "loss", INK),
    ("kl", "KL", FFN),
    ("cosine", "cosine", ATTENTION),
    ("heldout_kl", "held out", PARENT),
  )
  for key, name, colour in lines:
    points = [(i + 1, s[key]) for i, s in enumerate(steps) if s.get(key) is not None]
    if points:
      x, y = [p[0] for p in points], [p[1] for p in points]
      hover = "step %{x}<br>%{y:.4g}<extra>" + name + "</extra>"
      figure.add_scatter(x=x, y=y, name=name, mode="lines", line={"color": colour}, hovertemplate=hover)
  if not figure.data:
    return None
  return _style(figure, height=320, x="step", y="training loss").update_yaxes(rangemode="tozero")


def predicted_against_measured(summary: Summary) -> go.Figure | None:
  """Seconds of prefill and of decoding of the whole scenario, of both models; each phase on its own scale."""
  phases, models = {"prefill_s": "prefill", "decode_s": "decoding"}, ("parent", "child")
  figure = make_subplots(1, len(phases), subplot_titles=list(phases.values()), horizontal_spacing=0.16)
  for prefix, name, colour in (("predicted_", "predicted", PARENT), ("", "measured", ATTENTION)):
    found = [[lookup(summary, "models", model, prefix + key) for model in models] for key in phases]
    if all(value is None for seconds in found for value in seconds):
      return None
    for column, seconds in enumerate(found, start=1):
      hover = f"%{{x}}, {list(phases.values())[column - 1]}<br>%{{y:.4g}} s<extra>{name}</extra>"
      bars = {"name": name, "legendgroup": name, "showlegend": column == 1, "marker": {"color": colour}}
      figure.add_bar(x=models, y=seconds, hovertemplate=hover, row=1, col=column, **bars)
  _style(figure, height=340, x="", y="seconds").update_layout(margin={"t": 64}, legend={"y": 1.12})
  return figure.update_yaxes(title="", col=2)


_Figure = Callable[[Summary], go.Figure | None]
FIGURES: tuple[_Figure, ...] = (heat_map, marginals, cost_against_score, frontier)
FIGURES += (distillation, global_distillation, predicted_against_measured)


def figures(summary: Summary) -> dict[str, go.Figure]:
  """By name, those that the summary has the numbers for."""
  return {make.__name__: figure for make in FIGURES if (figure := make(summary)) is not None}
