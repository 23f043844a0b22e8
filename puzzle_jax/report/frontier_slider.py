"""The frontier to move along: the search's best child at each target, the run's own among them (paper section 5)."""

import dataclasses
from collections.abc import Sequence

import plotly.graph_objects as go

from puzzle_jax.report import certainty, closing, plots
from puzzle_jax.report.closing import Cell, Summary, lookup, ratio


@dataclasses.dataclass(frozen=True)
class Position:
  """A child that the search found, with what it predicts of it.

  Attributes:
    target: what was asked, in words.
    label: that in short.
    throughput: input and output tokens/s.
    speedup: over the parent's predicted throughput; None: not known.
    score: the sum of its blocks'.
    score_error: at most, of that; None: not known.
    memory_bytes: weights and KV cache; None: not known.
    params: None: not known.
    strip: as `closing.strip`; empty if its blocks are not known.
    is_child: it is the child that the run made.
  """

  target: str
  label: str
  throughput: float
  speedup: float | None
  score: float
  score_error: float | None
  memory_bytes: float | None
  params: float | None
  strip: dict[str, list[Cell]]
  is_child: bool


def positions(summary: Summary) -> list[Position]:
  """By predicted throughput; the run's child once, even where the frontier has it too. Empty without a frontier."""
  solution, found = summary.get("solution") or {}, []
  for point in summary.get("frontier") or []:
    speed = point.get("min_speedup")
    if speed and _is_drawn(point) and point.get("blocks") != solution.get("blocks", []):
      found.append(_position(summary, point, closing.limit_words("min_speedup", speed), f"≥ {speed:g}×"))
  if found and _is_drawn(solution):
    words = " and ".join(target.words for target in closing.targets(summary))
    found.append(_position(summary, solution, words or "no target", "this run's", is_child=True))
  return sorted(found, key=lambda position: (position.throughput, -position.score))


def _is_drawn(point: Summary) -> bool:
  return None not in (point.get("throughput"), point.get("score"))


def _position(summary: Summary, point: Summary, target: str, label: str, *, is_child: bool = False) -> Position:
  parent, blocks = lookup(summary, "models", "parent", "blocks") or [], point.get("blocks") or []
  return Position(
    target=target,
    label=label,
    throughput=point["throughput"],
    speedup=ratio(point["throughput"], closing.predicted_throughput(summary, "parent")),
    score=point["score"],
    score_error=certainty.score_error(summary, blocks),
    memory_bytes=point.get("memory_bytes"),
    params=point.get("params"),
    strip=closing.cells_of(parent, blocks) if blocks and len(blocks) == len(parent) else {},
    is_child=is_child,
  )


def start(places: Sequence[Position]) -> int:
  """Where the slider stands first: at the run's own child."""
  return next((i for i, place in enumerate(places) if place.is_child), 0)


def frontier(summary: Summary) -> go.Figure | None:
  """`plots.frontier`, and on top the place of the slider (the last trace, which the page's script moves)."""
  figure, places = plots.frontier(summary), positions(summary)
  if figure is None or not places:
    return figure
  place = places[start(places)]
  ring = {"symbol": "circle-open", "size": 20, "color": plots.INK, "line": {"width": 2}}
  figure.add_scatter(
    x=[place.throughput], y=[place.score], marker=ring, mode="markers", name="shown below", hoverinfo="skip"
  )
  return figure
