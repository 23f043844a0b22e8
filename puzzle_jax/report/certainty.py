"""How sure a run's figures are: 95 % intervals, and which of the search's choices rest on noise.

Quality: Student's t over packed rows of text (the normal distribution where their number is not known). Speed: a
bootstrap over the rounds in which parent and child were timed in turn.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

from puzzle_jax.report import plots
from puzzle_jax.report.closing import Summary, lookup

_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Interval:
  """95 %."""

  low: float
  high: float

  def __str__(self) -> str:
    return f"{self.low:#.3g} to {self.high:#.3g}"


def num_rows(summary: Summary, tokens: str) -> int | None:
  """Packed rows of `eval_tokens` or `heldout_tokens`."""
  total, length = (lookup(summary, "config", "data", key) for key in (tokens, "seq_len"))
  return total // length if total and length else None


def standard_errors(rows: int | None) -> float:
  """Half the width of an interval, in standard errors over so many rows."""
  return float(scipy.stats.t.ppf(0.975, rows - 1) if rows and rows > 1 else scipy.stats.norm.ppf(0.975))


def evaluated(summary: Summary, when: str, key: str) -> float | None:
  """A figure of the child's evaluation, `before_gkd` or `after_gkd`."""
  return lookup(summary, "models", "child", key) if when == "after_gkd" else lookup(summary, when, key)


def _half_width(summary: Summary, when: str, key: str) -> float | None:
  error = evaluated(summary, when, f"{key}_stderr")
  return standard_errors(num_rows(summary, "eval_tokens")) * error if error else None


def kl(summary: Summary, when: str = "after_gkd") -> Interval | None:
  """Of the child's KL to its parent."""
  value, half = evaluated(summary, when, "kl"), _half_width(summary, when, "kl")
  return None if value is None or half is None else Interval(max(value - half, 0.0), value + half)


def quality(summary: Summary, when: str = "after_gkd") -> Interval | None:
  """Of the next-token quality that the child keeps (`closing.quality_kept`), from losses paired by row."""
  change, half = evaluated(summary, when, "loss_change"), _half_width(summary, when, "loss_change")
  return None if change is None or half is None else Interval(math.exp(-change - half), math.exp(-change + half))


def speedup(summary: Summary) -> Interval | None:
  """Of the measured speed-up. What a slower hour of the machine would change is not in it."""
  rounds = [[lookup(summary, "timing_rounds", m, p) for p in ("prefill_s", "decode_s")] for m in ("parent", "child")]
  if not all(all(model) for model in rounds):
    return None
  seconds_MPR = np.array(rounds)
  num = seconds_MPR.shape[-1]
  picks_SR = np.random.default_rng(0).integers(num, size=(_RESAMPLES, num))
  # As in `costs.jax_timing`: the mean of the faster half counts.
  faster_MPSR = np.sort(seconds_MPR[..., picks_SR], axis=-1)[..., : (num + 1) // 2]
  parent_S, child_S = faster_MPSR.mean(axis=-1).sum(axis=1)
  low, high = np.quantile(parent_S / child_S, [0.025, 0.975])
  return Interval(float(low), float(high))


def score_error(summary: Summary, blocks: Sequence[str]) -> float | None:
  """The standard error of a child's sum of scores, at most: that of its blocks added up, all being of the same text."""
  layers = plots.block_scores(summary)
  if len(layers) != len(blocks):
    return None
  return sum(layer[name].stderr for layer, name in zip(layers, blocks, strict=True) if name in layer)


@dataclasses.dataclass(frozen=True)
class Exchanges:
  """What exchanging the blocks of two layers would cost: no speed and no memory, and in quality perhaps only noise.

  Attributes:
    pairs: of layers with different blocks that could be exchanged.
    open: by layer, those it could as well be exchanged with: the sums of scores cannot be told apart.
  """

  pairs: int
  open: dict[int, tuple[int, ...]]

  @property
  def open_pairs(self) -> int:
    return sum(map(len, self.open.values())) // 2


def exchanges(summary: Summary) -> Exchanges | None:
  """Which of the child's blocks stand where they stand by chance; None without a child or the scores' errors.

  Two sums of scores cannot be told apart when they differ by less than two standard errors of the difference, taken as
  if the scores were independent. On the same text they are not, so that some pairs that do differ are counted too.
  """
  chosen, space, metric = plots.chosen_blocks(summary), summary.get("space") or [], summary.get("metric") or "kl"
  scores = summary.get("scores") or []
  if not len(chosen) == len(space) == len(scores) or not _have_errors(scores, metric):
    return None
  own = [_parts(*layer, metric) for layer in zip(space, scores, chosen, strict=True)]
  pairs, found = 0, dict[int, list[int]]()
  for i, j in itertools.combinations(range(len(chosen)), 2):
    if chosen[i] == chosen[j] or _parent(space[i]) != _parent(space[j]):
      continue
    here = _step(own[i], _parts(space[i], scores[i], chosen[j], metric))
    there = _step(own[j], _parts(space[j], scores[j], chosen[i], metric))
    if here is None or there is None:
      continue
    pairs += 1
    if here[0] + there[0] < 2 * math.hypot(here[1], there[1]):
      found.setdefault(i, []).append(j)
      found.setdefault(j, []).append(i)
  return Exchanges(pairs, {layer: tuple(sorted(found[layer])) for layer in sorted(found)})


def _have_errors(scores: Sequence[Any], metric: str) -> bool:
  return any(entry.get(f"{metric}_stderr") for layer in scores for entry in layer.values())


def _parent(space: Any) -> str:
  return f"{space['attention'][0]}/{space['ffn'][0]}"


_Parts = dict[str, tuple[float, float]]  # scores and their errors, by the block that was measured


def _parts(space: Any, measured: Any, block: str, metric: str) -> _Parts | None:
  """The measured scores that a block's is the sum of: none for the parent's; None if one lacks."""
  attention, ffn = block.split("/")
  singles = [f"{attention}/{space['ffn'][0]}", f"{space['attention'][0]}/{ffn}"]
  parts = [part for part in ([block] if block in measured else singles) if part != _parent(space)]
  found = {part: (lookup(measured, part, metric), lookup(measured, part, f"{metric}_stderr") or 0.0) for part in parts}
  return None if any(value is None for value, _ in found.values()) else found


def _step(old: _Parts | None, new: _Parts | None) -> tuple[float, float] | None:
  """How much higher the sum of the new parts is, and that difference's standard error: what both share has none."""
  if old is None or new is None:
    return None
  difference = sum(value for value, _ in new.values()) - sum(value for value, _ in old.values())
  return difference, math.hypot(*((old | new)[part][1] for part in old.keys() ^ new.keys()))
