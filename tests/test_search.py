"""The search against enumeration and scipy's MILP, and at the edge of its limits."""

import dataclasses
import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse

from puzzle_jax import search
from puzzle_jax.errors import PuzzleError
from puzzle_jax.search import Limits, Program, frontier, mip, sensitivity, solve, stable_layers
from puzzle_jax.search.table import Table

SCENARIO = {"input_tokens": 5, "output_tokens": 3}


def make_table(
  score: Any,
  *,
  prefill: Any = 0,
  decode: Any = 0,
  params: Any = 0,
  kv: Any = 0,
  batches: dict[int, float] | None = None,
  scenarios: dict[str, dict[str, int]] | None = None,
  fixed: dict[str, Any] | None = None,
  floor: tuple[float, float] | None = None,
) -> Table:
  """A table of arrays [L, J]; `batches` gives the factor on the seconds at each, parameters take two bytes."""
  score = np.asarray(score, float)
  columns = [np.broadcast_to(np.asarray(x), score.shape) for x in (prefill, decode, params, kv)]
  scenarios = scenarios or {"chat": SCENARIO}

  def variant(i: int, j: int) -> dict[str, Any]:
    p, d, n, k = (column[i, j].item() for column in columns)
    seconds = {str(b): {"prefill_s": p * f, "decode_s": d * f} for b, f in (batches or {1: 1}).items()}
    sizes = {"params": n, "param_bytes": 2 * n, "kv_bytes_per_token": k}
    costs = dict.fromkeys(scenarios, seconds)
    return {"attention": f"a{j}", "ffn": "f", "parent": j == 0, "score": score[i, j].item(), "costs": costs} | sizes

  layers = [{"variants": [variant(i, j) for j in range(score.shape[1])]} for i in range(score.shape[0])]
  data = {"format": "puzzle-block-table/1", "scenarios": scenarios, "layers": layers}
  if floor:
    seconds = dict(zip(("prefill_s", "decode_s"), floor, strict=True))
    data["floor"] = {name: {str(b): seconds for b in batches or {1: 1}} for name in scenarios}
  return Table.from_json(data | ({"fixed": fixed} if fixed else {}))


def random_table(seed: int, layers: int, variants: int, *, floor: bool = False) -> Table:
  """The parent costs most; costs are multiples of 1/8, so that sums of floats are exact too."""
  rng = np.random.default_rng(seed)
  shape = (layers, variants)
  prefill, decode = rng.integers(0, 100, (2, *shape)) / 8
  params, kv = rng.integers(0, 1000, (2, *shape))
  for column, most in ((prefill, 12.5), (decode, 12.5), (params, 1000), (kv, 1000)):
    column[:, 0] = most
  least = tuple(rng.integers(0, 60 * layers, 2) / 8) if floor else None
  return make_table(rng.normal(size=shape), prefill=prefill, decode=decode, params=params, kv=kv, floor=least)


UNITS: dict[str, Callable[[dict[str, Any]], Any]] = {  # each limit, from the totals of children and of the parent
  "max_memory_bytes": lambda t: t["memory"],
  "max_runtime_s": lambda t: t["prefill"] + t["decode"],
  "min_throughput": lambda t: 8 / np.maximum(t["prefill"] + t["decode"], 1e-9),
  "max_first_token_s": lambda t: t["prefill"],
  "max_token_s": lambda t: t["decode"] / 3,
  "max_params": lambda t: t["params"],
  "max_kv_bytes_per_token": lambda t: t["kv"],
  "min_speedup": lambda t: (t["prefill"] + t["decode"])[0] / np.maximum(t["prefill"] + t["decode"], 1e-9),
  "min_decode_speedup": lambda t: t["decode"][0] / np.maximum(t["decode"], 1e-9),
  "max_memory_ratio": lambda t: t["memory"] / t["memory"][0],
  "max_params_ratio": lambda t: t["params"] / t["params"][0],
  "max_kv_ratio": lambda t: t["kv"] / t["kv"][0],
  "max_first_token_ratio": lambda t: t["prefill"] / t["prefill"][0],
}


def enumerate_children(table: Table) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Every choice (the parent first) and each child's value of every limit."""
  choices = np.array(list(itertools.product(range(table.score.shape[1]), repeat=table.num_layers)))
  costs = table.costs["chat"][1]

  def total(x: np.ndarray) -> np.ndarray:
    return x[np.arange(table.num_layers), choices].sum(1)

  totals = {"prefill": total(costs.prefill_s), "decode": total(costs.decode_s), "kv": total(table.kv_bytes_per_token)}
  totals["prefill"] = np.maximum(totals["prefill"], costs.floor_prefill_s)
  totals["decode"] = np.maximum(totals["decode"], costs.floor_decode_s)
  totals |= {"params": total(table.params), "memory": total(table.param_bytes) + 8 * totals["kv"]}
  return choices, {name: value(totals) for name, value in UNITS.items()}


@pytest.mark.parametrize("block", range(4))
def test_same_as_enumeration_of_200_small_instances(block):
  """Half of them with floors below which no phase is."""
  infeasible = 0
  for seed in range(50 * block, 50 * block + 50):
    table = random_table(seed, layers=4, variants=4, floor=seed % 2 == 1)
    choices, values = enumerate_children(table)
    rng = np.random.default_rng(1000 + seed)
    names = rng.choice(list(UNITS), rng.integers(1, 7), replace=False)
    # Between two neighbouring values that children have: whether a child is inside is no question of rounding.
    limits, met = {}, np.ones(len(choices), bool)
    for name in names:
      ordered = np.unique(values[name])
      if len(ordered) < 3:  # all are at the floor
        continue
      k = int(rng.integers(1, len(ordered) - 1) if name.startswith("min") else rng.integers(len(ordered) // 2))
      limits[name] = float(ordered[k : k + 2].mean())
      met &= values[name] <= limits[name] if name.startswith("max") else values[name] >= limits[name]
    scores = table.score[np.arange(4), choices].sum(1)
    if met.any():
      (child,) = solve(table, Limits(**limits))
      best = choices[met][scores[met].argmin()]
      assert child.choice == tuple(best), (seed, limits)
      assert child.mip_gap == 0.0
    else:
      infeasible += 1
      with pytest.raises(PuzzleError, match=r"nearest reachable"):
        solve(table, Limits(**limits))
  assert 0 < infeasible < 40


def test_no_child_is_faster_than_the_floor():
  """Two layers of 2 + 3 seconds, or of nothing; phases take 1 and 4 seconds at least, together half the parent's."""
  table = make_table([[0, 1], [0, 2]], prefill=[[2, 0]] * 2, decode=[[3, 0]] * 2, floor=(1, 4))
  (child,) = solve(table, Limits(min_speedup=1.25))  # sums of one layer: 2 + 3; of none: 0 + 0
  assert (child.choice, child.runtime_s) == ((1, 0), 6)
  (child,) = solve(table, Limits(min_speedup=2.0))
  assert (child.choice, child.runtime_s) == ((1, 1), 5)
  with pytest.raises(PuzzleError, match=r"no child meets min_speedup=2.5: the nearest reachable is min_speedup=2 \("):
    solve(table, Limits(min_speedup=2.5))
  with pytest.raises(PuzzleError, match=r"no child meets max_first_token_s=0.5: the nearest reachable is .*=1 \("):
    solve(table, Limits(max_first_token_s=0.5))
  assert Table.from_json(table.to_json()).floor("chat", 1) == {"prefill_s": 1, "decode_s": 4}


def test_same_as_scipy_on_100_random_instances():
  for seed in range(100):
    table = random_table(seed, layers=12, variants=8)
    costs = table.costs["chat"][1]
    rows = np.stack([table.param_bytes + 8 * table.kv_bytes_per_token, costs.prefill_s + costs.decode_s, table.params])
    share = np.random.default_rng(seed).uniform(0.4, 0.9, 3)
    most = np.round((rows.min(2) + share[:, None] * (rows.mean(2) - rows.min(2))).sum(1)) + 1 / 16  # between multiples
    (child,) = solve(table, Limits(max_memory_bytes=most[0], max_runtime_s=most[1], max_params=most[2]))
    result = scipy.optimize.milp(
      table.score.ravel(),
      integrality=1,
      bounds=(0, 1),
      constraints=[
        (scipy.sparse.kron(scipy.sparse.eye_array(12), np.ones((1, 8))), 1, 1),
        (rows.reshape(3, -1) / most[:, None], -np.inf, 1),
      ],
      options={"mip_rel_gap": 0},
    )
    assert child.score == pytest.approx(table.score.ravel()[result.x > 0.5].sum(), rel=1e-9, abs=0)


def test_what_is_searched_first_changes_nothing(monkeypatch):
  """However few variants the core holds, even too few for any child, or all."""
  limits = Limits(min_speedup=2.0, max_memory_ratio=0.45, max_params_ratio=0.5)
  for seed in range(6):
    table = random_table(seed, layers=8, variants=6)
    found = []
    for core in (1, 2, 6):
      monkeypatch.setattr(mip, "_CORE", core)
      found.append(solve(table, limits, solutions=3, diverse_gap=0.0))
    assert [c.mip_gap for children in found for c in children] == [0.0] * 9
    assert [[c.choice for c in children] for children in found] == [[c.choice for c in found[0]]] * 3


def test_without_limits_each_layer_takes_its_best_and_nothing_is_solved(monkeypatch):
  monkeypatch.setattr(mip, "minimise", None)
  table = random_table(0, layers=6, variants=5)
  assert solve(table)[0].choice == tuple(table.score.argmin(1))


@pytest.mark.parametrize("limit", UNITS)
def test_the_parent_meets_its_own_figures(limit):
  table = random_table(1, layers=5, variants=3)
  parent = table.freeze(dict.fromkeys(range(5), "a0/f"))
  figures = solve(parent)[0]
  value = {
    "max_memory_bytes": figures.memory_bytes,
    "max_runtime_s": figures.runtime_s,
    "min_throughput": figures.throughput,
    "max_first_token_s": figures.first_token_s,
    "max_token_s": figures.token_s,
    "max_params": figures.params,
    "max_kv_bytes_per_token": figures.kv_bytes_per_token,
  }.get(limit, 1)
  assert solve(parent, Limits(**{limit: value}))[0].choice == (0,) * 5
  stricter = value * (1 - 1e-12 if limit.startswith("max") else 1 + 1e-12)
  with pytest.raises(PuzzleError, match=limit):
    solve(parent, Limits(**{limit: stricter}))


def test_reported_figures_given_back_as_limits_are_met():
  rng = np.random.default_rng(3)
  table = make_table(rng.random((9, 6)), prefill=rng.random((9, 6)), decode=rng.random((9, 6)), params=1, kv=1)
  child = solve(table, Limits(min_speedup=1.4))[0]
  limits = Limits(
    max_memory_bytes=child.memory_bytes,
    max_runtime_s=child.runtime_s,
    min_throughput=child.throughput,
    max_first_token_s=child.first_token_s,
    max_token_s=child.token_s,
    max_params=child.params,
    max_kv_bytes_per_token=child.kv_bytes_per_token,
    min_speedup=1.4,
  )
  assert solve(table, limits)[0].choice == child.choice


def test_numbers_are_decimals():
  """Three tenths are 0.3, though the sum of the floats is 0.30000000000000004."""
  table = make_table([[0.0, 1.0]] * 3, prefill=[[0.1, 0.0]] * 3)
  assert solve(table, Limits(max_runtime_s=0.3))[0].choice == (0, 0, 0)
  assert solve(table, Limits(max_runtime_s=np.nextafter(0.3, 0)))[0].choice == (0, 0, 1)


def _count_cuts(monkeypatch: pytest.MonkeyPatch) -> list[float]:
  cuts: list[float] = []
  cut = Program._cut

  def counted(self, *args):
    row = cut(self, *args)
    cuts.append(row.most)
    return row

  monkeypatch.setattr(Program, "_cut", counted)
  return cuts


def test_a_limit_within_rounding_of_many_equal_children(monkeypatch):
  """No solver tolerance tells 0.8 from 0.7999999999999999; multiples of 0.1 do."""
  cuts = _count_cuts(monkeypatch)
  rng = np.random.default_rng(0)
  score = np.stack([np.zeros(40), 1 + 0.01 * rng.random(40)], 1)
  table = make_table(score, decode=[[0.1, 0.0]] * 40)
  (child,) = solve(table, Limits(max_runtime_s=float(np.nextafter(0.8, 0))))
  assert child.choice.count(0) == 7
  assert child.score == pytest.approx(np.sort(score[:, 1])[:33].sum(), rel=1e-12)
  assert cuts == [7.5]


def test_a_limit_a_hair_below_a_child(monkeypatch):
  """Sixteen random digits have no common step: single children must be cut off."""
  cuts = _count_cuts(monkeypatch)
  for seed in range(5):
    rng = np.random.default_rng(seed)
    table = make_table(rng.random((6, 3)), prefill=rng.random((6, 3)))
    costs = table.costs["chat"][1].prefill_s
    choices = list(itertools.product(range(3), repeat=6))
    cost = {c: sum(Fraction(repr(float(costs[i, j]))) for i, j in enumerate(c)) for c in choices}
    best = solve(table, Limits(max_runtime_s=float(costs.mean(1).sum())))[0].choice
    hair = float(cost[best])
    while Fraction(repr(hair)) >= cost[best]:
      hair = float(np.nextafter(hair, 0))
    met = [c for c in choices if cost[c] <= Fraction(repr(hair))]
    (child,) = solve(table, Limits(max_runtime_s=hair))
    assert child.choice == min(met, key=table.total_score)
    assert child.choice != best
  assert cuts


def test_equal_scores_are_broken_the_same_way():
  table = make_table([[0.0, 1.0, 1.0, 1.0]] * 3, prefill=[[9.0, 3.0, 2.0, 2.0]] * 3)
  children = [solve(table, Limits(max_runtime_s=7.0))[0].choice for _ in range(3)]
  assert children == [(1, 2, 2)] * 3  # the first variant of equal score that leaves the limit met, layer by layer


def test_the_batch_of_the_best_child_and_of_ties():
  score, prefill, kv = [[0.0, 1.0]] * 4, [[4.0, 1.0]] * 4, [[10, 0]] * 4
  table = make_table(score, prefill=prefill, kv=kv, batches={1: 1.0, 4: 2.0, 16: 4.0})
  # Memory is 8 · batch · 10 a layer: batch 16 leaves one full layer, batch 4 all four; 4 beats 1 in throughput.
  memory = Limits(max_memory_bytes=1280)
  assert (solve(table, memory)[0].batch, solve(table, memory)[0].score) == (4, 0.0)
  assert (solve(table, memory, batch=16)[0].batch, solve(table, memory, batch=16)[0].score) == (16, 3.0)
  # At least 2 tokens/s leave batches 4 and 16 one full layer each: equal scores, and 16 is faster.
  both = solve(table, Limits(max_memory_bytes=1280, min_throughput=2.0))[0]
  assert (both.batch, both.score, both.throughput) == (16, 3.0, pytest.approx(128 / 28))
  with pytest.raises(PuzzleError, match="batch 2: nothing has a cost at batch 2"):
    solve(table, batch=2)


def test_limits_hold_in_each_scenario_or_in_the_named_one():
  scenarios = {"chat": SCENARIO, "long": {"input_tokens": 50, "output_tokens": 3}}
  table = make_table([[0.0, 1.0]] * 4, prefill=1, kv=[[10, 0]] * 4, scenarios=scenarios)
  limits = Limits(max_memory_bytes=600)  # 80 bytes a layer in `chat`, 530 in `long`
  both, chat = solve(table, limits)[0], solve(table, limits, scenario="chat")[0]
  assert (both.score, chat.score) == (3.0, 0.0)
  assert (both.scenario, list(both.scenarios)) == ("chat", ["chat", "long"])
  assert (both.memory_bytes, both.scenarios["long"].memory_bytes) == (80, 530)
  assert list(chat.scenarios) == ["chat"]
  with pytest.raises(PuzzleError, match=r"scenario 'code' is not in the table; it has chat, long"):
    solve(table, limits, scenario="code")


@pytest.mark.parametrize("apart", [1, 3])
def test_diverse_children_are_the_next_best(apart):
  table = random_table(5, layers=5, variants=4)
  limits = Limits(min_speedup=1.5)
  children = solve(table, limits, solutions=8, min_different_layers=apart, diverse_gap=0.0)
  choices, values = enumerate_children(table)
  scores = table.score[np.arange(5), choices].sum(1)
  met = values["min_speedup"] >= 1.5
  for child in children:
    assert child.choice == tuple(choices[met][scores[met].argmin()])
    met &= (choices != child.choice).sum(1) >= apart
  assert [c.score for c in children] == sorted(c.score for c in children)


def test_fewer_children_than_asked_for():
  table = make_table([[0.0, 1.0], [0.0, 2.0]])
  assert [c.score for c in solve(table, solutions=9, diverse_gap=0.0)] == [0.0, 1.0, 2.0, 3.0]
  assert [c.score for c in solve(table, solutions=9, min_different_layers=2)] == [0.0, 3.0]
  with pytest.raises(PuzzleError, match="min_different_layers=3 must be 1 to 2"):
    solve(table, min_different_layers=3)
  with pytest.raises(PuzzleError, match="solutions=0"):
    solve(table, solutions=0)


def test_a_gap_is_kept_and_reported():
  table = random_table(7, layers=30, variants=10)
  limits = Limits(min_speedup=2.0, max_memory_ratio=0.6)
  (best,), (rough,) = solve(table, limits), solve(table, limits, gap=0.05)
  assert best.mip_gap == 0.0
  assert 0 <= rough.mip_gap <= 0.05
  assert rough.score - rough.mip_gap * abs(rough.score) <= best.score + 1e-9 <= rough.score + 2e-9


def test_frozen_layers():
  table = random_table(8, layers=4, variants=4)
  child = solve(table, Limits(min_speedup=1.2), freeze={1: "a0/f", 3: "a2/f"})[0]
  choices, values = enumerate_children(table)
  met = (values["min_speedup"] >= 1.2) & (choices[:, 1] == 0) & (choices[:, 3] == 2)
  scores = table.score[np.arange(4), choices].sum(1)
  assert child.choice == tuple(choices[met][scores[met].argmin()])


def _numbers_after(text: str, name: str) -> list[float]:
  return [float(part.split()[0].rstrip(";,:")) for part in text.split(f"{name}=")[1:]]


@pytest.mark.parametrize("seed", range(4))
def test_a_limit_that_cannot_be_met_alone(seed):
  table = random_table(seed, layers=4, variants=4)
  _, values = enumerate_children(table)
  for name, value in values.items():
    extreme = value.min() if name.startswith("max") else value.max()
    beyond = extreme * (0.5 if name.startswith("max") else 2)
    if beyond == 0:
      continue
    with pytest.raises(PuzzleError, match=f"no child meets {name}=.*: the nearest reachable is {name}=") as error:
      solve(table, Limits(**{name: beyond}))
    nearest = _numbers_after(str(error.value), name)[1]
    assert nearest == pytest.approx(extreme, rel=1e-8)
    assert solve(table, Limits(**{name: nearest}))


def test_two_limits_that_conflict():
  table = make_table([[0.0, 0.0]] * 4, prefill=[[4.0, 1.0]] * 4, params=[[1, 5]] * 4, decode=[[1.0, 1.0]] * 4)
  limits = {"max_first_token_s": 9.0, "max_params": 11, "max_token_s": 2.0}
  message = r"no child meets max_first_token_s=9 and max_params=11 together: .* max_first_token_s=13 .* max_params=16"
  with pytest.raises(PuzzleError, match=message):  # seconds 16 - 3k, parameters 4 + 4k with k cheap layers
    solve(table, Limits(**limits))
  assert solve(table, Limits(**limits | {"max_first_token_s": 13.0}))
  assert solve(table, Limits(**limits | {"max_params": 16}))
  with pytest.raises(PuzzleError, match="relax a limit, a freeze or a restriction"):
    solve(table, Limits(**limits), freeze={0: "a0/f"})


def test_a_pair_is_named_where_one_conflicts():
  """Any two of the first three limits can be met, all three cannot; nor can the last two."""
  table = make_table(
    [[0.0] * 4] * 2,
    prefill=[[0.0, 2.0, 2.0, 9.0]] * 2,
    decode=[[3.0, 0.0, 3.0, 9.0]] * 2,
    params=[[2, 2, 0, 9]] * 2,
    kv=[[5, 5, 5, 0]] * 2,
  )
  three = {"max_first_token_s": 2.0, "max_token_s": 1.0, "max_params": 2}
  message = r"max_first_token_s=2 and max_token_s=1 and max_params=2 together: the nearest reachable"
  with pytest.raises(PuzzleError, match=message):
    solve(table, Limits(**three))
  for name in three:
    assert solve(table, Limits(**three | {name: None}))
  with pytest.raises(PuzzleError, match=r"no child meets max_first_token_s=2 and max_kv_bytes_per_token=4 together"):
    solve(table, Limits(**three, max_kv_bytes_per_token=4))


@pytest.mark.parametrize("seed", [0, 146])
def test_limits_that_fail_together_by_the_relaxed_program(seed):
  """Limits on which HiGHS ends without a result if told to keep tiny coefficients of the relaxed program."""
  rng = np.random.default_rng(seed)
  score, prefill, decode = rng.random((3, 40, 20))
  params, kv = rng.integers(0, 10**6, (40, 20)), rng.integers(0, 100, (40, 20))
  table = make_table(score, prefill=prefill, decode=decode, params=params, kv=kv)
  costs = (prefill + decode, 2 * params + 8 * kv, params)
  shares = np.random.default_rng(seed).uniform(0.1, 0.5, 3)
  most = [float(share * cost.mean(1).sum()) for share, cost in zip(shares, costs, strict=True)]
  with pytest.raises(PuzzleError, match="the nearest reachable"):
    solve(table, Limits(max_runtime_s=most[0], max_memory_bytes=most[1], max_params=most[2]))


def test_frontier_and_stable_layers():
  table = random_table(9, layers=8, variants=5)
  fastest = 1 / _reach(table, Limits())
  values = [1.0, 1.5, 2.0, fastest * 2]
  points = frontier(table, "min_speedup", values, limits=Limits(max_memory_ratio=0.9))
  assert [p.value for p in points] == values
  assert points[-1].solution is None
  children = [p.solution for p in points[:-1]]
  for value, child in zip(values, children, strict=False):
    (alone,) = solve(table, Limits(min_speedup=value, max_memory_ratio=0.9))
    assert dataclasses.replace(child, solve_s=0) == dataclasses.replace(alone, solve_s=0)
  assert [c.score for c in children] == sorted(c.score for c in children)
  for layer in stable_layers(children):
    blocks = [c.blocks[layer.layer] for c in children]
    assert layer.share == blocks.count(layer.block) / 3 == max(map(blocks.count, blocks)) / 3
  with pytest.raises(PuzzleError, match="limit 'speed' is unknown"):
    frontier(table, "speed", [1.0])
  assert frontier(table, "min_speedup", []) == []


def _reach(table: Table, limits: Limits) -> float:
  """The smallest runtime, as a share of the parent's."""
  (program,) = search.programs(table, dataclasses.replace(limits, min_speedup=1.0))
  return float(program.least(program.bounds[0]) / program.bounds[0].unit)


def test_sensitivity():
  table = random_table(10, layers=8, variants=5)
  limits = Limits(min_speedup=2.5, max_params=10**9, max_memory_ratio=0.5)
  here = solve(table, limits)[0].score
  for limit in sensitivity(table, limits):
    without = solve(table, dataclasses.replace(limits, **{limit.limit: None}))[0].score
    relaxed = solve(table, dataclasses.replace(limits, **{limit.limit: limit.relaxed}))[0].score
    assert (limit.score_without, limit.score_relaxed, limit.gain) == (without, relaxed, here - relaxed)
    assert limit.binding == (without < here)
  assert {s.limit: s.binding for s in sensitivity(table, limits)}["max_params"] is False
  (speed,) = (s for s in sensitivity(table, limits) if s.limit == "min_speedup")
  assert (speed.value, speed.relaxed, speed.binding) == (2.5, 2.475, True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "3", True])
def test_bad_limits_are_refused(value):
  with pytest.raises(PuzzleError, match="limit max_params="):
    Limits(max_params=value)
  with pytest.raises(PuzzleError, match="limit min_speedup=0 must be a finite number above 0"):
    Limits(min_speedup=0)


def test_solution_json():
  table = make_table(
    [[0.0, 0.5]] * 2, prefill=[[2.0, 1.0]] * 2, decode=[[6.0, 3.0]] * 2, params=7, kv=10, batches={4: 1}
  )
  child = solve(table, Limits(max_runtime_s=12.0))[0]
  seconds = child.to_json().pop("timing")["solve_s"]
  assert seconds == child.solve_s > 0
  performance = {
    "memory_bytes": 2 * 14 + 4 * 8 * 20,
    "runtime_s": 12,
    "throughput": pytest.approx(32 / 12),
    "output_throughput": 1,
    "first_token_s": 3,
    "token_s": 3,
  }
  assert child.to_json() == performance | {
    "choice": [0, 1],
    "blocks": ["a0/f", "a1/f"],
    "weights": [None, None],
    "batch": 4,
    "score": 0.5,
    "params": 14,
    "kv_bytes_per_token": 20,
    "mip_gap": 0.0,
    "scenario": "chat",
    "scenarios": {"chat": performance},
    "timing": {"solve_s": seconds},
  }
