"""Two runs side by side on one page: what was asked, what differs, what came out, and which differences are noise."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import plotly.graph_objects as go
import scipy.stats

from puzzle_jax.report import certainty, closing, evaluation, page, plots
from puzzle_jax.report.certainty import Interval
from puzzle_jax.report.closing import MISSING, Summary, duration, lookup, number, ratio
from puzzle_jax.report.templates import figures_html, plotly_js, template

SIDES = ("A", "B")
_COLOURS = (plots.ATTENTION, plots.FFN)


@dataclasses.dataclass(frozen=True)
class Line:
  """A line of a table: the same of both runs, formatted; `change` is B's over or against A's."""

  label: str
  a: str
  b: str
  change: str = ""


@dataclasses.dataclass(frozen=True)
class Difference:
  """B's figure less A's, and its 95 % interval."""

  value: float
  interval: Interval

  @property
  def is_noise(self) -> bool:
    return self.interval.low <= 0 <= self.interval.high


def kl_difference(a: Summary, b: Summary) -> Difference | None:
  """Of the children's KL to their parents, with errors as if the runs were independent, so rather too wide; None where
  they were not evaluated on the same text against the same parent, or without errors."""
  values, errors = ([certainty.evaluated(s, "after_gkd", key) or 0.0 for s in (a, b)] for key in ("kl", "kl_stderr"))
  text = ("source", "shares", "sampling", "text_field", "heldout_fraction", "seq_len", "heldout_tokens", "eval_tokens")
  same = _same(a, b, ("parent", "name"), ("eval_tokens",), *(("config", "data", key) for key in (*text, "seed")))
  if not (same and all(errors)):
    return None
  value = values[1] - values[0]
  half = certainty.standard_errors(certainty.num_rows(a, "eval_tokens")) * math.hypot(*errors)
  return Difference(value, Interval(value - half, value + half))


def speed_is_comparable(a: Summary, b: Summary) -> bool:
  """Whether seconds of both runs are of one kind of machine, scenario and batch."""
  return _same(a, b, ("hardware",), ("target", "scenario"), ("target", "batch"))


def _same(a: Summary, b: Summary, *paths: tuple[str, ...]) -> bool:
  return all(lookup(a, *path) == lookup(b, *path) for path in paths)


def _flat(values: Mapping[str, Any], path: str = "") -> dict[str, str]:
  """Nested values by dotted path, as text."""
  found: dict[str, str] = {}
  for key, value in values.items():
    name = f"{path}.{key}" if path else key
    if isinstance(value, Mapping) and value:
      found |= _flat(value, name)
    else:
      found[name] = value if isinstance(value, str) and value else json.dumps(value)
  return found


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Line]:
  """What differs between two nested mappings."""
  flat_a, flat_b = _flat(a), _flat(b)
  lines = [Line(k, flat_a.get(k, MISSING), flat_b.get(k, MISSING)) for k in dict.fromkeys([*flat_a, *flat_b])]
  return [line for line in lines if line.a != line.b]


def _change(a: float | None, b: float | None) -> str:
  part = ratio(b, a)
  return MISSING if part is None else f"{part:.2f}×"


def _lines(a: Mapping[str, float | None], b: Mapping[str, float | None], form: Callable[[Any], str]) -> list[Line]:
  """Of numbers by label, those that either run has."""
  return [Line(k, form(a.get(k)), form(b.get(k)), _change(a.get(k), b.get(k))) for k in dict.fromkeys([*a, *b])]


def _children(a: Summary, b: Summary) -> list[Line]:
  """The children's figures, each with its ratio to its own parent."""
  tables = [{row.label: row for row in closing.rows(s)} for s in (a, b)]
  labels = dict.fromkeys([*tables[0], *tables[1]])

  def cell(table: dict[str, closing.Row], label: str) -> str:
    row = table.get(label)
    return MISSING if row is None else f"{row.child} ({row.ratio})" if row.ratio else row.child

  return [Line(label, *(cell(table, label) for table in tables)) for label in labels]


def _costs(summary: Summary) -> dict[str, float | None]:
  """Seconds of each subblock in the target's scenario."""
  where = (lookup(summary, "target", "scenario", "name"), str(lookup(summary, "target", "batch") or 1))
  found: dict[str, float | None] = {}
  for name, by_scenario in (lookup(summary, "costs", "subblocks") or {}).items():
    seconds = [lookup(by_scenario, *where, phase) for phase in ("prefill_s", "decode_s")]
    if None not in seconds:
      found[name] = sum(seconds)
  return dict(sorted(found.items()))


def _stages(summary: Summary, key: str) -> dict[str, float | None]:
  found = {stage["name"]: stage.get(key) for stage in summary.get("stages") or []}
  return found | ({"all": sum(v for v in found.values() if v is not None)} if found else {})


def _layers_apart(a: Summary, b: Summary) -> list[int] | None:
  """The layers in which the children's blocks differ; None if they have not the same number of layers."""
  blocks = [plots.chosen_blocks(s) for s in (a, b)]
  if not blocks[0] or len(blocks[0]) != len(blocks[1]):
    return None
  return [i for i, (x, y) in enumerate(zip(*blocks, strict=True)) if x != y]


def _samples(a: Summary, b: Summary) -> list[dict[str, str]]:
  """What both children answered, for the prompts that both were given."""
  answers = {sample["prompt"]: sample["child"] for sample in b.get("samples") or []}
  return [
    {"prompt": s["prompt"], "A": s["child"], "B": answers[s["prompt"]]}
    for s in a.get("samples") or []
    if s["prompt"] in answers
  ]


def frontiers(a: Summary, b: Summary) -> go.Figure | None:
  """Both frontiers, and where the children stand."""
  figure = go.Figure()
  for side, colour, summary in zip(SIDES, _COLOURS, (a, b), strict=True):
    own = plots.frontier(summary)
    for trace, name in zip(own.data if own else (), (f"{side}: optimal children", f"{side}: the child"), strict=False):
      figure.add_trace(
        trace.update(name=name, marker={"color": colour}, hovertemplate=f"{side}<br>{trace.hovertemplate}")
      )
  if not figure.data:
    return None
  return plots._style(figure, height=360, x="predicted tokens/s, input and output", y="sum of scores")


def _shared_scores(a: Summary, b: Summary) -> list[tuple[str, plots.Score, plots.Score]]:
  """Of every block that both runs scored by the same metric."""
  if a.get("metric") != b.get("metric"):
    return []
  return [
    (f"layer {layer}, {name}", scores_a[name], scores_b[name])
    for layer, (scores_a, scores_b) in enumerate(zip(plots.block_scores(a), plots.block_scores(b), strict=False))
    for name in scores_a
    if name in scores_b
  ]


def rank_correlation(a: Summary, b: Summary) -> float | None:
  """Spearman's, of the scores of the blocks that both runs scored."""
  shared = _shared_scores(a, b)
  if len(shared) < 3:
    return None
  return float(scipy.stats.spearmanr([x.value for _, x, _ in shared], [y.value for *_, y in shared]).statistic)


def scores(a: Summary, b: Summary) -> go.Figure | None:
  """The score of every block that both runs scored, one against the other."""
  shared = _shared_scores(a, b)
  if not shared:
    return None
  values_a, values_b = ([max(pair[side].value, plots.FLOOR) for _, *pair in shared] for side in (0, 1))
  text = [f"{name}<br>A {x}<br>B {y}" for name, x, y in shared]
  ends = [min(values_a + values_b), max(values_a + values_b)]
  line, marker = {"color": plots.GREY}, {"size": 6, "color": plots.ATTENTION, "opacity": 0.6}
  hover = "%{text}<extra></extra>"
  figure = go.Figure()
  figure.add_scatter(x=ends, y=ends, mode="lines", line=line, name="equal", hoverinfo="skip")
  figure.add_scatter(
    x=values_a, y=values_b, text=text, mode="markers", marker=marker, name="a block", hovertemplate=hover
  )
  plots._style(figure, height=420, x="score in A, nats a token", y="score in B", log_y=ends)
  return figure.update_xaxes(type="log", tickformat="~g", dtick=1)


def render_comparison(a: Summary, b: Summary, *, names: tuple[str, str]) -> str:
  """The page of two runs.

  Args:
    a: summary of the first.
    b: of the second.
    names: what the runs are called, such as their directories.

  Returns:
    HTML that needs no other file and no network.
  """
  summaries = (a, b)
  kl_rows = {
    f"{side}: {label}": row
    for side, s in zip(SIDES, summaries, strict=True)
    for label, row in evaluation.kl_rows(s).items()
  }
  return template("compare.html").render(
    names=names,
    runs=summaries,
    sides=SIDES,
    targets=[closing.targets(s) for s in summaries],
    kept=[closing.quality_kept(s) for s in summaries],
    speedups=[closing.speedup(s) for s in summaries],
    speed_intervals=[certainty.speedup(s) for s in summaries],
    kl=kl_difference(a, b),
    comparable_speed=speed_is_comparable(a, b),
    faster=ratio(lookup(b, "models", "child", "throughput"), lookup(a, "models", "child", "throughput")),
    config=_differing(a.get("config") or {}, b.get("config") or {}),
    facts=_differing(page.facts(a), page.facts(b)),
    strips=[closing.strip(s) for s in summaries],
    apart=_layers_apart(a, b),
    children=_children(a, b),
    qualities=[evaluation.qualities(s) for s in summaries],
    costs=_lines(_costs(a), _costs(b), duration),
    seconds=_lines(_stages(a, "seconds"), _stages(b, "seconds"), duration),
    bytes=_lines(_stages(a, "bytes"), _stages(b, "bytes"), lambda value: number(value, "B")),
    correlation=rank_correlation(a, b),
    samples=_samples(a, b),
    commands=[s.get("command") for s in summaries],
    key=closing.KEY,
    plots=figures_html(
      {"frontiers": frontiers(a, b), "scores": scores(a, b), "evaluation": evaluation.kl_figure(kl_rows)}
    ),
    plotly_js=plotly_js(),
  )
