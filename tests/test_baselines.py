"""The baselines: what each is by hand, that all meet the limits, and that none beats the search."""

import itertools
from typing import Any

import numpy as np
import pytest

from puzzle_jax import search
from puzzle_jax.errors import PuzzleError
from puzzle_jax.search import Limits, baselines, solve
from puzzle_jax.search.baselines import BASELINES
from puzzle_jax.search.table import Table

ATTENTION, FFN = ("gqa2", "gqa1", "none"), ("w8", "w4", "none")


def make_table(
  scores: list[dict[str, float]], *, seconds: dict[str, float], params: dict[str, int] | None = None
) -> Table:
  """A table of blocks by name, each layer's first the parent; seconds and parameters are the same in every layer."""

  def variant(block: str, score: float, parent: bool) -> dict[str, Any]:
    attention, ffn = block.split("/")
    costs = {"chat": {"4": {"prefill_s": seconds[block], "decode_s": 0.0}}}
    sizes = {"params": (params or {}).get(block, 1), "kv_bytes_per_token": 8 if attention != "none" else 0}
    return {"attention": attention, "ffn": ffn, "parent": parent, "score": score, "costs": costs} | sizes

  layers = [{"variants": [variant(b, s, k == 0) for k, (b, s) in enumerate(layer.items())]} for layer in scores]
  scenarios = {"chat": {"input_tokens": 6, "output_tokens": 2}}
  return Table.from_json({"format": "puzzle-block-table/1", "scenarios": scenarios, "layers": layers})


def random_table(seed: int, layers: int = 8) -> Table:
  """Nine blocks a layer: smaller is cheaper and, mostly, worse."""
  rng = np.random.default_rng(seed)
  blocks = [f"{a}/{f}" for a, f in itertools.product(ATTENTION, FFN)]
  size = dict(zip(blocks, (3 * a + 5 * f for a, f in itertools.product((2, 1, 0), (2, 1, 0))), strict=True))
  scores = []
  for _ in range(layers):
    harm = np.abs(rng.normal(size=9)) * [16 - size[b] for b in blocks]
    scores.append(dict(zip(blocks, harm.tolist(), strict=True)))
  return make_table(scores, seconds={b: float(s) for b, s in size.items()}, params=size)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", BASELINES)
def test_meets_the_limits_and_does_not_beat_the_search(name, seed):
  table = random_table(seed)
  limits = Limits(min_speedup=1.5, max_memory_ratio=0.7, max_params_ratio=0.6)
  (child,) = BASELINES[name](table, limits)
  (program,) = search.programs(table, limits)
  assert not program.broken(child.choice)
  assert child.mip_gap is None
  assert child.score >= solve(table, limits)[0].score - 1e-12


@pytest.mark.parametrize("name", BASELINES)
def test_what_no_child_meets_is_said_as_the_search_says_it(name):
  table = random_table(0)
  limits = Limits(max_kv_bytes_per_token=1, min_speedup=1.0)
  with pytest.raises(
    PuzzleError, match=r"no child meets max_kv_bytes_per_token=1: the nearest reachable is .*=16"
  ) as error:
    BASELINES[name](table, limits, freeze={0: "gqa2/w8", 1: "gqa2/w8"})
  with pytest.raises(PuzzleError) as same:
    solve(table, limits, freeze={0: "gqa2/w8", 1: "gqa2/w8"})
  assert str(error.value) == str(same.value)


def test_greedy_hands_on_what_it_saves():
  seconds = {"gqa2/w8": 4.0, "gqa2/w4": 2.0, "gqa2/none": 1.0}
  scores = [
    {"gqa2/w8": 0.0, "gqa2/w4": 9.0, "gqa2/none": 9.0},  # mean 6: last, with 2.5 + 0.5 + 0.5 seconds
    {"gqa2/w8": 0.0, "gqa2/w4": 1.0, "gqa2/none": 2.0},  # mean 1: first, with 2.5 seconds
    {"gqa2/w8": 0.0, "gqa2/w4": 3.0, "gqa2/none": 3.5},  # mean 2.2: second, with 2.5 + 0.5 seconds
  ]
  table = make_table(scores, seconds=seconds)
  (child,) = baselines.greedy(table, Limits(max_runtime_s=7.5))
  assert child.blocks == ("gqa2/w4", "gqa2/w4", "gqa2/w4")
  (child,) = baselines.greedy(table, Limits(max_runtime_s=8.0))  # shares of 8/3: the last has 4 seconds
  assert child.blocks == ("gqa2/w8", "gqa2/w4", "gqa2/w4")


def test_greedy_goes_into_debt_where_nothing_fits():
  seconds = {"gqa2/w8": 4.0, "gqa2/w4": 3.0, "gqa2/none": 1.0}
  scores = [{"gqa2/w8": 0.0, "gqa2/w4": 0.5}, {"gqa2/w8": 1.0, "gqa2/w4": 2.0, "gqa2/none": 3.0}]
  (child,) = baselines.greedy(make_table(scores, seconds=seconds), Limits(max_runtime_s=4.0))  # shares of 2
  assert child.blocks == ("gqa2/w4", "gqa2/none")


def test_greedy_under_a_limit_of_nothing():
  table = random_table(0)
  (child,) = baselines.greedy(table, Limits(max_kv_bytes_per_token=0))
  assert child.choice == tuple(6 + table.score[:, 6:].argmin(1))  # the best block without attention in every layer


def test_greedy_may_fail_where_the_search_does_not():
  seconds = {"gqa2/w8": 4.0, "gqa2/w4": 3.0, "gqa2/none": 2.0, "none/none": 0.0}
  scores = [{"gqa2/w8": 0.0, "gqa2/w4": 9.0}, {"gqa2/w8": 0.0, "gqa2/none": 1.0, "none/none": 2.0}]
  table, limits = make_table(scores, seconds=seconds), Limits(max_runtime_s=4.0)
  assert solve(table, limits)[0].blocks == ("gqa2/w8", "none/none")
  with pytest.raises(PuzzleError, match="greedy finds no child that meets the limits, although there are some"):
    baselines.greedy(table, limits)


def test_noop_only_removes_by_score_until_the_limit_is_met():
  blocks = ("gqa2/w8", "none/w8", "gqa2/none", "none/none", "gqa2/w4")
  seconds = dict(zip(blocks, (3.0, 2.0, 1.0, 0.0, 0.5), strict=True))
  scores = [
    dict(zip(blocks, (0.0, 0.2, 0.3, 0.9, 0.01), strict=True)),
    dict(zip(blocks, (0.0, 0.1, 0.4, 0.9, 0.01), strict=True)),
  ]
  table = make_table(scores, seconds=seconds)
  expected = {  # the order of removal: 0.1, 0.2, 0.3, 0.4
    6.0: ("gqa2/w8", "gqa2/w8"),
    5.0: ("gqa2/w8", "none/w8"),
    4.0: ("none/w8", "none/w8"),
    3.9: ("none/none", "none/w8"),
    1.9: ("none/none", "none/none"),
  }
  for seconds_left, kept in expected.items():
    assert baselines.noop_only(table, Limits(max_runtime_s=seconds_left))[0].blocks == kept
  frozen = baselines.noop_only(table, Limits(max_runtime_s=3.9), freeze={0: "gqa2/w8"})[0]
  assert frozen.blocks == ("gqa2/w8", "none/none")


@pytest.mark.parametrize("seed", range(3))
def test_uniform_is_the_best_block_for_all_layers(seed):
  table = random_table(seed)
  (child,) = baselines.uniform(table, Limits(min_speedup=1.5))
  assert len(set(child.choice)) == 1
  seconds = [16, 11, 6, 13, 8, 3, 10, 5, 0]  # of blocks 0 to 8
  sums = table.score.sum(0)
  assert child.choice[0] == min((j for j in range(9) if seconds[j] <= 16 / 1.5), key=sums.__getitem__)
  (child,) = baselines.uniform(table, Limits(min_speedup=1.5), freeze={2: "gqa2/w8"})
  assert child.blocks[2] == "gqa2/w8"
  assert len(set(child.blocks[:2] + child.blocks[3:])) == 1


@pytest.mark.parametrize("seed", range(3))
def test_most_parameters(seed):
  table = random_table(seed, layers=5)
  (child,) = baselines.most_parameters(table, Limits(max_kv_bytes_per_token=16, max_runtime_s=50.0))
  # Two layers may keep their attention: 16 and 10 in turn, of 62 parameters (which are the seconds here) at most 50.
  reachable = {sum(c) for c in itertools.product((16, 13, 11, 8, 6, 3, 10, 5, 0), repeat=5) if sum(c) <= 50}
  assert child.params == max(reachable)


def test_random_children():
  table = random_table(0)
  limits = Limits(min_speedup=2.0)
  children = baselines.random_feasible(table, limits, seed=1, draws=20)
  assert [c.choice for c in children] == [c.choice for c in baselines.random_feasible(table, limits, seed=1, draws=20)]
  assert [c.choice for c in children] != [c.choice for c in baselines.random_feasible(table, limits, seed=2, draws=20)]
  assert len({c.choice for c in children}) == 20
  free = baselines.random_feasible(table, seed=1, draws=300)
  counts = np.bincount(np.concatenate([c.choice for c in free]), minlength=9) / (300 * 8)
  np.testing.assert_allclose(counts, 1 / 9, atol=0.03)  # without limits: uniform


def test_a_rule_by_name():
  """In one of several scenarios, where that is said; other seeds draw other children."""
  table, limits = random_table(1), Limits(max_runtime_s=60.0)
  for rule, found in (("mip", solve(table, limits)), ("greedy", baselines.greedy(table, limits))):
    assert baselines.chosen(table, limits, rule=rule).choice == found[0].choice
  drawn = {baselines.chosen(table, limits, rule="random_feasible", seed=seed).choice for seed in range(4)}
  assert len(drawn) > 1
  with pytest.raises(PuzzleError, match="scenario 'other' is not in the table"):
    baselines.chosen(table, limits, rule="uniform", scenario="other")
