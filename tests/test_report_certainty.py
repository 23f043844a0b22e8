"""Intervals, exchanges and the slider's children against other ways to get them."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from report_examples import make_summary

from puzzle_jax.report import certainty, closing, evaluation, frontier_slider, plots


@pytest.fixture
def summary() -> dict[str, Any]:
  return make_summary(layers=6)


def test_quality_intervals_are_students(summary: dict[str, Any]) -> None:
  found = {when: certainty.kl(summary, when) for when in ("before_gkd", "after_gkd")}
  for when, kl, error in (("before_gkd", 0.4021, 0.0203), ("after_gkd", 0.2134, 0.0121)):
    interval = found[when]
    assert interval is not None
    want = scipy.stats.t.interval(0.95, 4096 // 256 - 1, loc=kl, scale=error)
    assert (interval.low, interval.high) == pytest.approx(want)
  kept = certainty.quality(summary)
  assert kept is not None
  losses = scipy.stats.t.interval(0.95, 15, loc=math.log(10.41 / 9.104), scale=0.012)
  assert (kept.low, kept.high) == pytest.approx((math.exp(-losses[1]), math.exp(-losses[0])))
  assert kept.low < closing.quality_kept(summary) < kept.high  # type: ignore[operator]


def test_without_rows_or_errors(summary: dict[str, Any]) -> None:
  del summary["config"]
  interval = certainty.kl(summary)
  assert interval is not None
  assert interval.high - 0.2134 == pytest.approx(1.959964 * 0.0121)
  summary["models"]["child"]["kl_stderr"] = None
  assert certainty.kl(summary) is None
  del summary["timing_rounds"]
  assert certainty.speedup(summary) is None
  del summary["models"]["child"]["loss_change"]
  assert certainty.quality(summary) is None


def test_an_interval_of_a_divergence_does_not_go_below_0(summary: dict[str, Any]) -> None:
  summary["models"]["child"]["kl_stderr"] = 0.2
  assert certainty.kl(summary).low == 0.0  # type: ignore[union-attr]


def test_speedup_interval_is_a_paired_bootstrap(summary: dict[str, Any]) -> None:
  """Against scipy's, with another random stream and many more resamples."""
  rounds = [np.array([list(summary["timing_rounds"][m].values())]).squeeze() for m in ("parent", "child")]

  def ratio(picks: np.ndarray) -> float:
    parent, child = (np.sort(seconds[:, picks], axis=1)[:, :5].mean(axis=1).sum() for seconds in rounds)
    return parent / child

  bootstrap = scipy.stats.bootstrap(
    (np.arange(10),), ratio, vectorized=False, method="percentile", n_resamples=9999, rng=np.random.default_rng(1)
  ).confidence_interval
  found = certainty.speedup(summary)
  assert found is not None
  width = bootstrap.high - bootstrap.low
  assert (found.low, found.high) == pytest.approx(tuple(bootstrap), abs=0.08 * width)
  assert found.low < closing.speedup(summary) < found.high  # type: ignore[operator]
  for phase in summary["timing_rounds"]["child"].values():
    phase[:] = [2 * seconds for seconds in phase]
  halved = certainty.speedup(summary)
  assert halved is not None
  assert (halved.low, halved.high) == pytest.approx((found.low / 2, found.high / 2))


def brute_force(summary: dict[str, Any], *, shared: bool) -> tuple[int, set[frozenset[int]]]:
  """Pairs of layers, and those whose exchange is noise, from whole blocks' scores.

  Args:
    summary: of a run.
    shared: whether two blocks of a layer share the error of an equal subblock, as sums of single scores do.
  """
  layers, chosen = plots.block_scores(summary), plots.chosen_blocks(summary)
  parent = "gqa3/w1536"

  def score(layer: int, block: str) -> float:
    return 0.0 if block == parent else layers[layer][block].value

  def variance(layer: int, blocks: tuple[str, str]) -> float:
    if not shared:
      return sum(layers[layer][b].stderr ** 2 for b in blocks if b != parent)
    total = 0.0
    for slot in (0, 1):
      names = {b.split("/")[slot] for b in blocks}
      for name in names if len(names) == 2 else ():
        single = f"{name}/w1536" if slot == 0 else f"gqa3/{name}"
        total += 0.0 if single == parent else layers[layer][single].stderr ** 2
    return total

  pairs, noise = 0, set()
  for i, j in itertools.combinations(range(len(chosen)), 2):
    a, b = chosen[i], chosen[j]
    if a == b:
      continue
    pairs += 1
    worse = score(i, b) + score(j, a) - score(i, a) - score(j, b)
    if worse < 2 * math.sqrt(variance(i, (a, b)) + variance(j, (a, b))):
      noise.add(frozenset({i, j}))
  return pairs, noise


@pytest.mark.parametrize("composed", [True, False])
def test_exchanges(composed: bool) -> None:
  summary = make_summary(layers=12, composed=composed)
  found = certainty.exchanges(summary)
  assert found is not None
  pairs, noise = brute_force(summary, shared=not composed)
  assert found.pairs == pairs
  assert {frozenset({i, j}) for i, others in found.open.items() for j in others} == noise
  assert found.open_pairs == len(noise)
  assert 0 < len(noise) < pairs


def test_exchanges_of_what_is_known(summary: dict[str, Any]) -> None:
  twin = copy.deepcopy(summary)
  twin["scores"] = [twin["scores"][0]] * 6  # every layer the same: all is chance
  found = certainty.exchanges(twin)
  assert found is not None
  assert found.open_pairs == found.pairs > 0
  blocks = summary["models"]["child"]["blocks"]
  changed = next(i for i, block in enumerate(blocks) if block.endswith("/w768"))
  del summary["scores"][changed]["gqa3/w768"]  # such as a variant whose loss was not finite
  assert changed not in certainty.exchanges(summary).open  # type: ignore[union-attr]
  for layer in summary["scores"]:
    for entry in layer.values():
      entry["kl_stderr"] = 0.0
  assert certainty.exchanges(summary) is None


def test_error_of_a_sum_is_at_most_the_errors_added(summary: dict[str, Any]) -> None:
  scores = plots.block_scores(summary)
  blocks = ["gqa3/w1536", "gqa3/w768", "linear/w768", "none/none", "gqa3/w1536", "gqa1/w1536"]
  want = sum(scores[i][b].stderr for i, b in enumerate(blocks) if b != "gqa3/w1536")
  assert certainty.score_error(summary, blocks) == pytest.approx(want)
  assert certainty.score_error(summary, blocks[:-1]) is None


def test_predictions_by_hand(summary: dict[str, Any]) -> None:
  for model, seconds in (("parent", (0.1, 4.0, 0.08, 4.2)), ("child", (0.06, 2.0, 0.06, 2.5))):
    keys = ("predicted_prefill_s", "predicted_decode_s", "prefill_s", "decode_s")
    summary["models"][model] |= dict(zip(keys, seconds, strict=True))
    summary["models"][model]["throughput"] = 256 / sum(seconds[2:])
  del summary["timing_rounds"]
  summary["solution"]["score"] = 0.201
  rows = {row.label: (row.predicted.text, row.measured.text, row.off) for row in evaluation.predictions(summary)}
  assert rows == {
    "prefill, parent": ("100 ms", "80 ms", "+25.0 %"),
    "prefill, child": ("60 ms", "60 ms", "+0.0 %"),
    "decoding, parent": ("4 s", "4.2 s", "-4.8 %"),
    "decoding, child": ("2 s", "2.5 s", "-20.0 %"),
    "speed-up": (f"{4.1 / 2.06:.3f}×", f"{4.28 / 2.56:.3f}×", f"{100 * (4.1 / 2.06 / (4.28 / 2.56) - 1):+.1f} %"),
    "KL, nats a token": ("0.201", "0.402", "-50.0 %"),
  }


def test_qualities_and_their_figure(summary: dict[str, Any]) -> None:
  parent, before, after = evaluation.qualities(summary)
  assert (parent.kl.text, parent.perplexity, parent.kept.text) == ("0", "9.104", "100 %")
  assert (before.perplexity, before.kept.text) == ("12.63", f"{100 * 9.104 / 12.63:.1f} %")
  assert (after.kl.text, after.kl.interval) == ("0.213", str(certainty.kl(summary)))
  figure = evaluation.evaluation(summary)
  assert figure is not None
  (dots,) = figure.data
  assert list(dots.x) == [0.3123, 0.4021, 0.2134]
  interval = certainty.kl(summary)
  assert interval is not None
  assert (dots.x[2] - dots.error_x.arrayminus[2], dots.x[2] + dots.error_x.array[2]) == pytest.approx(
    (interval.low, interval.high)
  )


def test_slider_has_each_child_once(summary: dict[str, Any]) -> None:
  places = frontier_slider.positions(summary)
  assert [p.label for p in places if not p.is_child] == ["≥ 1.1×", "≥ 1.2×", "≥ 1.3×", "≥ 1.45×", "≥ 1.6×"]
  assert [p.throughput for p in places] == sorted(p.throughput for p in places)
  own = places[frontier_slider.start(places)]
  assert own.is_child
  assert own.target == "at least 1.3 times the parent's speed"
  assert own.strip == closing.strip(summary)
  models = summary["models"]
  predicted = [sum(models[m][f"predicted_{p}_s"] for p in ("prefill", "decode")) for m in ("parent", "child")]
  assert own.speedup == pytest.approx(predicted[0] / predicted[1])
  summary["frontier"][3]["blocks"] = summary["solution"]["blocks"]
  places = frontier_slider.positions(summary)
  assert len(places) == 5
  assert "≥ 1.3×" not in [p.label for p in places]
  figure = frontier_slider.frontier(summary)
  assert figure is not None
  assert (figure.data[-1].x[0], figure.data[-1].y[0]) == (own.throughput, own.score)
  summary["frontier"] = []
  assert frontier_slider.positions(summary) == []
