"""The report of a run: one HTML file that holds all it shows, plotly's script included, and loads nothing.

Numbers are made here and in `plots`, `closing`, `certainty`, `evaluation` and `frontier_slider`; the words around them
are in `page.html`.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from puzzle_jax.report import certainty, closing, evaluation, frontier_slider, plots
from puzzle_jax.report.closing import Summary, lookup
from puzzle_jax.report.templates import figures_html, plotly_js, template

_STAGES = {
  "data": "packs text for training, scores and evaluation",
  "costs": "times every variant",
  "activations": "stores what each of the parent's layers reads",
  "library": "distils the variants, one block at a time",
  "scores": "measures each variant alone in the parent",
  "search": "chooses one block a layer",
  "child": "puts the chosen blocks together",
  "gkd": "trains the whole child against the parent",
  "evaluation": "holds parent and child against each other",
  "export": "writes the child for other programs",
}


@dataclasses.dataclass(frozen=True)
class Stage:
  """A line of the table of stages; `share` is its time over the longest one's."""

  name: str
  what: str
  seconds: float | None
  bytes: int | None
  share: float


def stages(summary: Summary) -> list[Stage]:
  """The finished stages."""
  found = summary.get("stages") or []
  longest = max((stage.get("seconds") or 0.0 for stage in found), default=0.0) or 1.0
  return [
    Stage(s["name"], _STAGES.get(s["name"], ""), s.get("seconds"), s.get("bytes"), (s.get("seconds") or 0.0) / longest)
    for s in found
  ]


def _version(versions: Any) -> str:
  return ", ".join(f"{name} {value}" for name, value in (versions or {}).items())


def _made_by(summary: Summary) -> dict[str, list[str]]:
  """The stages by the versions that they were made with."""
  found: dict[str, list[str]] = {}
  for stage in summary.get("stages") or []:
    found.setdefault(_version(stage.get("versions")), []).append(stage["name"])
  return found


def _ratios(summary: Summary) -> dict[str, float | None]:
  """The child's numbers over the parent's."""
  parent, child = (lookup(summary, "models", model) or {} for model in ("parent", "child"))
  return {key: closing.ratio(child.get(key), parent.get(key)) for key in {**parent, **child} if key != "blocks"}


def _noise(scores: Sequence[dict[str, plots.Score]]) -> dict[str, list[int]]:
  """By block, the layers where its score is noise."""
  found: dict[str, list[int]] = {}
  for layer, by_name in enumerate(scores):
    for name, score in by_name.items():
      if score.is_noise:
        found.setdefault(name, []).append(layer)
  return found


def _worst_fit(summary: Summary) -> float | None:
  """How far the costs' sums are off, at worst, for the models that they were fitted to; relative."""
  points = lookup(summary, "costs", "details", "points") or []
  return max((abs(p["residual"]) for p in points if p.get("residual") is not None), default=None)


def facts(summary: Summary) -> dict[str, str]:
  """What the run was made with, and its files."""
  parent = {key: lookup(summary, "parent", key) for key in ("source", "license")}
  found = {"parent": parent["source"], "license": parent["license"], "hardware": summary.get("hardware")}
  found |= {"git describe" if k == "git" else k: v for k, v in (summary.get("versions") or {}).items()}
  return {label: value for label, value in (found | (summary.get("files") or {})).items() if value}


def render(summary: Summary) -> str:
  """The page of a run.

  Args:
    summary: of the run; what is missing or null in it is left out, with a note.

  Returns:
    HTML that needs no other file and no network.
  """
  strip, scores, places = closing.strip(summary), plots.block_scores(summary), frontier_slider.positions(summary)
  layers = list(zip(*strip.values(), strict=True))
  own = {make.__name__: make(summary) for make in (frontier_slider.frontier, evaluation.evaluation)}
  return template("page.html").render(
    s=summary,
    targets=closing.targets(summary),
    ratios=_ratios(summary),
    kept=closing.quality_kept(summary),
    quality_interval=certainty.quality(summary),
    speedup=closing.speedup(summary),
    speedup_interval=certainty.speedup(summary),
    predicted_speedup=closing.ratio(
      closing.predicted_throughput(summary, "child"), closing.predicted_throughput(summary, "parent")
    ),
    errors={model: closing.prediction_error(summary, model) for model in ("parent", "child")},
    kl_interval=certainty.kl(summary),
    eval_rows=certainty.num_rows(summary, "eval_tokens"),
    heldout_rows=certainty.num_rows(summary, "heldout_tokens"),
    rows=closing.rows(summary),
    child_strip=strip,
    unchanged=sum(all(cell.is_parent for cell in layer) for layer in layers),
    stages=stages(summary),
    num_scores=sum(map(len, scores)),
    has_errors=any(score.stderr for layer in scores for score in layer.values()),
    noise=_noise(scores),
    exchanges=certainty.exchanges(summary),
    places=places,
    start=frontier_slider.start(places),
    worst_fit=_worst_fit(summary),
    predictions=evaluation.predictions(summary),
    qualities=evaluation.qualities(summary),
    text_qualities=evaluation.text_qualities(summary),
    accuracies=evaluation.accuracies(summary),
    facts=facts(summary),
    made_by=_made_by(summary),
    config=json.dumps(summary.get("config"), indent=1),
    floor=plots.FLOOR,
    key=closing.KEY,
    plots=figures_html(plots.figures(summary) | own),
    plotly_js=plotly_js(),
  )
