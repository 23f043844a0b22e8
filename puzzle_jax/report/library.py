"""How well the block library's variants were distilled (paper sections 2 and 3): losses by layer, what the first
weights and what training were worth, and the training curves. Losses are held-out, of what a block adds (`delta`)."""

import statistics
from collections import defaultdict
from collections.abc import Iterator

import plotly.colors
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from puzzle_jax.report import plots
from puzzle_jax.report.closing import SLOTS, Summary, lookup

_FAMILIES = {"attention": "Blues", "ffn": "Oranges"}  # dark: the gentlest variant


def _losses(summary: Summary, when: str) -> dict[str, dict[int, float]]:
  """By variant and layer; `when`: `delta_init` or `delta_trained`."""
  found: dict[str, dict[int, float]] = defaultdict(dict)
  for layer, variants in enumerate(summary.get("library") or []):
    for name, report in variants.items():
      if (loss := lookup(report, "losses", when)) is not None:
        found[name][layer] = loss
  return dict(sorted(found.items(), key=lambda item: statistics.median(item[1].values())))


def _coloured(names: list[str], slot: str) -> Iterator[tuple[str, str]]:
  """The variants of a slot, each with its colour."""
  own = [name for name in names if name.startswith(f"{slot}.")]
  shades = [0.4 + 0.6 * (1 - i / max(len(own) - 1, 1)) for i in range(len(own))]
  yield from zip(own, plotly.colors.sample_colorscale(_FAMILIES[slot], shades) if own else [], strict=True)


def losses_by_layer(summary: Summary) -> go.Figure | None:
  """Of each variant in each layer: dotted at its first weights, drawn through after training."""
  first, trained = _losses(summary, "delta_init"), _losses(summary, "delta_trained")
  if not trained:
    return None
  titles = ["attention", "FFN"]
  figure = make_subplots(2, 1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.1)
  for row, slot in enumerate(SLOTS, start=1):
    for name, colour in _coloured(list(trained), slot):
      for losses, dash, when in ((first, "dot", "first weights"), (trained, "solid", "after training")):
        at = losses.get(name, {})
        hover = f"layer %{{x}}, {name}<br>%{{y:.3g}} {when}<extra></extra>"
        line, solid = {"color": colour, "dash": dash, "width": 2}, dash == "solid"
        label = {"name": name.partition(".")[2], "legendgroup": name, "showlegend": solid, "hovertemplate": hover}
        label["legend"] = "legend" if row == 1 else "legend2"
        figure.add_scatter(x=list(at), y=list(at.values()), mode="lines", line=line, row=row, col=1, **label)
  plots._style(figure, height=640, x="", y="held-out loss")
  figure.update_xaxes(title="layer", row=2, col=1)
  upright = {"orientation": "v", "x": 1.01, "xanchor": "left", "yanchor": "top"}
  figure.update_layout(legend=upright | {"y": 1.0}, legend2=upright | {"y": 0.45}, margin={"t": 32})
  return figure.update_yaxes(rangemode="tozero")


def worth(summary: Summary) -> go.Figure | None:
  """What first weights and training were worth: the loss as a share of leaving the subblock out, median over layers.

  1 is the loss of the subblock's `none`; the way from there to the hollow mark is the initialisation's work, the rest
  of the way to the full mark is training's. None where `none` is not in the space.
  """
  first, trained = _losses(summary, "delta_init"), _losses(summary, "delta_trained")
  figure, names = go.Figure(), [name for name in trained if not name.endswith(".none")]
  marks = []
  for losses in (first, trained):
    shares = []
    for name in names:
      left_out = first.get(f"{name.partition('.')[0]}.none", {})
      pairs = [loss / left_out[i] for i, loss in losses.get(name, {}).items() if left_out.get(i)]
      shares.append(statistics.median(pairs) if pairs else None)
    marks.append(shares)
  if not any(share is not None for share in marks[1]):
    return None
  for name, start, end in zip(names, *marks, strict=True):
    for x, width, colour in (((1.0, start), 2, plots.GRID), ((start, end), 4, plots.ATTENTION)):
      line = {"color": colour, "width": width}
      figure.add_scatter(x=x, y=(name, name), mode="lines", line=line, hoverinfo="skip", showlegend=False)
  for label, shares, symbol in zip(("first weights", "after training"), marks, ("circle-open", "circle"), strict=True):
    hover = f"%{{y}}<br>%{{x:.3f}} of the loss of leaving it out<extra>{label}</extra>"
    marker = {"size": 11, "symbol": symbol, "color": plots.ATTENTION, "line": {"width": 2}}
    figure.add_scatter(x=shares, y=names, mode="markers", name=label, marker=marker, hovertemplate=hover)
  plots._style(figure, height=110 + 34 * len(names), x="held-out loss over that of leaving the subblock out", y="")
  figure.update_xaxes(rangemode="tozero")
  return figure.update_yaxes(autorange="reversed")


def curves(summary: Summary) -> go.Figure | None:
  """The training loss of each variant, step by step: the median over layers. None without curves."""
  found = summary.get("library_curves")
  if not found:
    return None
  figure = go.Figure()
  for slot in SLOTS:
    for name, colour in _coloured(sorted(found, key=lambda name: found[name]["loss"][-1]), slot):
      hover, curve = f"step %{{x}}, {name}<br>%{{y:.3g}}<extra></extra>", found[name]
      figure.add_scatter(
        x=curve["step"], y=curve["loss"], name=name, mode="lines", line_color=colour, hovertemplate=hover
      )
  plots._style(figure, height=440, x="step", y="training loss", log_y=[x for c in found.values() for x in c["loss"]])
  return figure.update_layout(legend={"orientation": "v", "x": 1.01, "xanchor": "left", "y": 1, "yanchor": "top"})
