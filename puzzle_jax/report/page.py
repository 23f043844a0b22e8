"""The report of a run: one HTML file that holds all it shows, plotly's script included, and loads nothing.

Numbers are made here and in `plots` and `closing`; the words around them are in `page.html`.
"""

import collections
import functools
from collections.abc import Iterator, Sequence

import jinja2
import plotly.graph_objects as go
import plotly.offline
from markupsafe import Markup

from puzzle_jax.report import closing, plots
from puzzle_jax.report.closing import Cell, Summary, lookup, number


@functools.cache
def _template() -> jinja2.Template:
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("puzzle_jax.report", "."),
    autoescape=True,
    undefined=jinja2.ChainableUndefined,  # what a summary lacks is false
    lstrip_blocks=True,
  )
  environment.filters["number"] = number
  return environment.get_template("page.html")


def _counts(cells: Sequence[Cell]) -> str:
  """How many layers have which subblock, the commonest first."""
  counts = collections.Counter(cell.label for cell in cells).most_common()
  return ", ".join(f"{n} × {label}" for label, n in counts)


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


def _kl_interval(summary: Summary) -> tuple[float, float] | None:
  """95 %, of the child's KL to the parent."""
  kl, error = (lookup(summary, "models", "child", key) for key in ("kl", "kl_stderr"))
  return None if kl is None or not error else (max(kl - 1.96 * error, 0.0), kl + 1.96 * error)


def _facts(summary: Summary) -> dict[str, str]:
  """What the run was made with, and its files."""
  parent = {key: lookup(summary, "parent", key) for key in ("source", "license")}
  facts = {"parent": parent["source"], "license": parent["license"], "hardware": summary.get("hardware")}
  facts |= {**(summary.get("versions") or {}), **(summary.get("files") or {})}
  return {label: value for label, value in facts.items() if value}


def _html(figures: dict[str, go.Figure]) -> Iterator[tuple[str, Markup]]:
  config = {"responsive": True, "displayModeBar": False}
  for name, figure in figures.items():
    html = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)
    yield name, Markup(html)  # plotly escapes what stands in its JSON


def render(summary: Summary) -> str:
  """The page of a run.

  Args:
    summary: of the run; what is missing or null in it is left out, with a note.

  Returns:
    HTML that needs no other file and no network.
  """
  strip, scores = closing.strip(summary), plots.block_scores(summary)
  layers = list(zip(*strip.values(), strict=True))
  return _template().render(
    s=summary,
    targets=closing.targets(summary),
    ratios=_ratios(summary),
    kept=closing.quality_kept(summary),
    speedup=closing.speedup(summary),
    errors={model: closing.prediction_error(summary, model) for model in ("parent", "child")},
    kl_interval=_kl_interval(summary),
    rows=closing.rows(summary),
    strip=strip,
    counts={slot: _counts(cells) for slot, cells in strip.items()},
    unchanged=sum(all(cell.is_parent for cell in layer) for layer in layers),
    num_scores=sum(map(len, scores)),
    has_errors=any(score.stderr for layer in scores for score in layer.values()),
    noise=_noise(scores),
    facts=_facts(summary),
    floor=plots.FLOOR,
    key=closing.KEY,
    plots=dict(_html(plots.figures(summary))),
    plotly_js=Markup(plotly.offline.get_plotlyjs()),
  )
