"""What was predicted against what was measured, and the child's quality with its intervals: two tables and a figure."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from puzzle_jax.report import certainty, closing, plots
from puzzle_jax.report.certainty import Interval
from puzzle_jax.report.closing import Summary, duration, lookup, ratio

WHEN = {"before_gkd": "before global distillation", "after_gkd": "the child"}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A number with its 95 % interval, formatted; an empty interval is not known."""

  text: str
  interval: str = ""


@dataclasses.dataclass(frozen=True)
class Prediction:
  """A predicted and a measured figure; `off` is how far the prediction lies above."""

  label: str
  predicted: Estimate
  measured: Estimate
  off: str


def predictions(summary: Summary) -> list[Prediction]:
  """Seconds of both models, the speed-up, and the quality lost; without what is not known."""
  found = []

  def add(label: str, predicted: float, measured: float, texts: tuple[Estimate, Estimate]) -> None:
    found.append(Prediction(label, *texts, f"{100 * (predicted / measured - 1):+.1f} %"))

  for phase, words in (("prefill_s", "prefill"), ("decode_s", "decoding")):
    for model in ("parent", "child"):
      predicted, measured = (lookup(summary, "models", model, prefix + phase) for prefix in ("predicted_", ""))
      if predicted and measured:
        add(f"{words}, {model}", predicted, measured, (Estimate(duration(predicted)), Estimate(duration(measured))))
  parent, child = (closing.predicted_throughput(summary, model) for model in ("parent", "child"))
  predicted, measured = ratio(child, parent), closing.speedup(summary)
  if predicted and measured:
    interval = certainty.speedup(summary)
    texts = Estimate(f"{predicted:.3f}×"), Estimate(f"{measured:.3f}×", str(interval or ""))
    add("speed-up", predicted, measured, texts)
  predicted, measured = lookup(summary, "solution", "score"), lookup(summary, "before_gkd", "kl")
  if predicted and measured and summary.get("metric") == "kl":
    texts = _kl(predicted, _sum_interval(summary)), _kl(measured, certainty.kl(summary, "before_gkd"))
    add("KL, nats a token", predicted, measured, texts)
  return found


def _kl(value: float, interval: Interval | None) -> Estimate:
  return Estimate(f"{value:#.3g}", str(interval or ""))


def _sum_interval(summary: Summary) -> Interval | None:
  """Of the sum of the chosen blocks' scores."""
  score, error = lookup(summary, "solution", "score"), certainty.score_error(summary, plots.chosen_blocks(summary))
  if score is None or not error:
    return None
  half = certainty.standard_errors(certainty.num_rows(summary, "heldout_tokens")) * error
  return Interval(max(score - half, 0.0), score + half)


@dataclasses.dataclass(frozen=True)
class Quality:
  """A model's: KL to the parent (nats a token), perplexity, and the share of the parent's next-token quality."""

  label: str
  kl: Estimate
  perplexity: str
  kept: Estimate


def qualities(summary: Summary) -> list[Quality]:
  """Of the parent, and of the child before and after global distillation; empty without an evaluation."""
  parent = lookup(summary, "models", "parent", "perplexity")
  found = []
  for when, label in WHEN.items():
    kl, perplexity = (certainty.evaluated(summary, when, key) for key in ("kl", "perplexity"))
    if kl is not None and perplexity and parent:
      interval = certainty.quality(summary, when)
      percent = f"{100 * interval.low:.1f} to {100 * interval.high:.1f}" if interval else ""
      kept = Estimate(f"{100 * parent / perplexity:.1f} %", percent)
      found.append(Quality(label, _kl(kl, certainty.kl(summary, when)), f"{perplexity:.4g}", kept))
  return [Quality("the parent", Estimate("0"), f"{parent:.4g}", Estimate("100 %")), *found] if found else []


@dataclasses.dataclass(frozen=True)
class TextQuality:
  """On a text at a context length: perplexities, KL to the parent (nats a token), the quality kept."""

  text: str
  context: int
  tokens: float
  parent: str
  child: str
  kl: Estimate
  kept: Estimate


def text_qualities(summary: Summary) -> list[TextQuality]:
  """Of what was measured besides the run's own held-out rows."""
  found = []
  for row in lookup(summary, "texts") or []:
    half = certainty.standard_errors(row.get("rows"))
    kl, error, change = row["kl"], half * row["kl_stderr"], row["loss_change"]
    low, high = (math.exp(-change + sign * half * row["loss_change_stderr"]) for sign in (-1, 1))
    found.append(
      TextQuality(
        row["text"],
        row["context"],
        row["tokens"],
        f"{row['parent_perplexity']:.4g}",
        f"{row['perplexity']:.4g}",
        _kl(kl, Interval(max(kl - error, 0.0), kl + error) if error else None),
        Estimate(f"{100 * math.exp(-change):.1f} %", f"{100 * low:.1f} to {100 * high:.1f}" if high > low else ""),
      )
    )
  return found


@dataclasses.dataclass(frozen=True)
class Accuracy:
  """Of parent and child on a task; `kept` is the child's over the parent's."""

  task: str
  how: str
  items: str
  parent: str
  child: str
  kept: Estimate


def accuracies(summary: Summary) -> list[Accuracy]:
  """A line a task and way to judge it, and last the mean of all tasks."""
  found = []

  def add(task: str, how: str, items: str, value: Mapping[str, Any]) -> None:
    kept = Estimate(closing.MISSING)
    if value["ratio"] is not None:
      known = value["low"] is not None
      kept = Estimate(
        f"{100 * value['ratio']:.1f} %", f"{100 * value['low']:.1f} to {100 * value['high']:.1f}" if known else ""
      )
    found.append(Accuracy(task, how, items, f"{100 * value['parent']:.1f} %", f"{100 * value['child']:.1f} %", kept))

  tasks = lookup(summary, "tasks", "tasks") or {}
  for name, task in tasks.items():
    how = "likeliest choice" if "normalised" in task else "greedy target"
    add(name, how, f"{task['items']:,}", task["preserved"])
    if "normalised" in task:
      add(name, "likeliest a character", f"{task['items']:,}", task["normalised"])
  if mean := lookup(summary, "tasks", "mean"):
    add("mean", "likeliest choice or target", f"{sum(task['items'] for task in tasks.values()):,}", mean)
  return found


Intervals = Mapping[str, tuple[float | None, Interval | None]]  # by label; None: not known


def kl_rows(summary: Summary) -> Intervals:
  """The child's KL as the search estimates it, and before and after global distillation."""
  rows = {
    label: (certainty.evaluated(summary, when, "kl"), certainty.kl(summary, when)) for when, label in WHEN.items()
  }
  if summary.get("metric") != "kl":
    return rows
  return {"sum of block scores": (lookup(summary, "solution", "score"), _sum_interval(summary))} | rows


def evaluation(summary: Summary) -> go.Figure | None:
  """The KLs of `kl_rows` with their intervals."""
  return kl_figure(kl_rows(summary))


def kl_figure(rows: Intervals) -> go.Figure | None:
  """KLs with their intervals; None where no interval is known."""
  known = {label: (value, interval) for label, (value, interval) in rows.items() if value is not None}
  if not any(interval for _, interval in known.values()):
    return None
  values, spans = [v for v, _ in known.values()], [i or Interval(v, v) for v, i in known.values()]
  bars: dict[str, Any] = {"type": "data", "symmetric": False, "thickness": 2, "width": 6}
  bars["array"] = [span.high - value for value, span in zip(values, spans, strict=True)]
  bars["arrayminus"] = [value - span.low for value, span in zip(values, spans, strict=True)]
  text = [f"{value:#.3g}" + (f" (95 %: {interval})" if interval else "") for value, interval in known.values()]
  hover = "%{y}<br>KL %{text}<extra></extra>"
  marker = {"size": 10, "color": plots.ATTENTION}
  figure = go.Figure()
  figure.add_scatter(
    x=values, y=list(known), text=text, error_x=bars, mode="markers", marker=marker, hovertemplate=hover
  )
  plots._style(figure, height=80 + 40 * len(known), x="KL, nats a token", y="")
  figure.update_xaxes(rangemode="tozero")
  return figure.update_yaxes(autorange="reversed", type="category")
