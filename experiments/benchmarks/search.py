"""How fast the search is, and whether other solvers find the same: python -m experiments.benchmarks.search.

Tables are made to resemble Llama-3.1-70B on one GPU (paper section 1: six attentions × nine FFNs a layer), their scores
random. Peers get the same problem without the search's preparation: `scipy.optimize.milp` (HiGHS too), CBC where PuLP
is installed, and enumeration of small instances. Writes experiments/results/search.json.
"""

import dataclasses
import datetime
import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse
from absl import app, flags

from puzzle_jax import search
from puzzle_jax.errors import PuzzleError
from puzzle_jax.search import Limits
from puzzle_jax.search.table import FORMAT, Table
from puzzle_jax.store import write_json

_OUT = flags.DEFINE_string("out", str(Path(__file__).parents[1] / "results" / "search.json"), "The record.")
_SEEDS = flags.DEFINE_integer("seeds", 5, "Tables of each size.", lower_bound=1)

BATCH, INPUT, OUTPUT = 256, 600, 600
_APART = 5  # layers in which each of several solutions differs from the others
SCENARIOS = {"chat": {"input_tokens": INPUT, "output_tokens": OUTPUT}}
HIDDEN, HEAD = 8192, 128

Case = tuple[Table, Limits]
Peer = Callable[[Table, Limits], float | None]


def llama_table(layers: int, *, kv_heads: list[int], widths: list[int], seed: int) -> Table:
  """A table of {GQA, linear, none} × {SwiGLU, linear, none}; times from a roofline, 1 % different in each layer."""
  rng = np.random.default_rng(seed)
  attention = [(f"gqa{k}", 2 * HIDDEN * HIDDEN + 2 * k * HEAD * HIDDEN, 4 * k * HEAD) for k in kv_heads]
  attention += [("linear", HIDDEN * HIDDEN, 0), ("none", 0, 0)]
  ffn = [*((f"w{w}", 3 * HIDDEN * w) for w in widths), ("linear", HIDDEN * HIDDEN), ("none", 0)]
  made = []
  for _ in range(layers):
    importance, clock = np.exp(rng.normal()), np.exp(rng.normal(0, 0.01))
    harm_a, harm_f = (np.sort(rng.random(n)) * importance for n in (len(attention), len(ffn)))
    harm_a[0] = harm_f[0] = 0.0
    variants = []
    for (a, (a_name, a_params, kv)), (f, (f_name, f_params)) in itertools.product(enumerate(attention), enumerate(ffn)):
      params = a_params + f_params
      prefill = 2 * params * BATCH * INPUT / 600e12 + 1e-4 * (kv > 0)
      decode = OUTPUT * (params / 2.5e12 + BATCH * kv * (INPUT + OUTPUT / 2) / 2.5e12 + 2e-5 * (kv > 0))
      seconds = {"prefill_s": float(prefill * clock), "decode_s": float(decode * clock)}
      parent = a == f == 0
      variants.append(
        {
          "attention": a_name,
          "ffn": f_name,
          "parent": parent,
          "score": float(0.01 * (0.3 * harm_a[a] + harm_f[f]) * np.exp(rng.normal(0, 0.1))),
          "params": params,
          "param_bytes": params,
          "kv_bytes_per_token": kv,
          "costs": {"chat": {str(BATCH): seconds}},
        }
      )
    made.append({"variants": variants})
  fixed = {"prefill_s": 0.05, "decode_s": 0.6}
  return Table.from_json(
    {
      "format": FORMAT,
      "scenarios": SCENARIOS,
      "fixed": {"params": 2**31, "param_bytes": 2**32, "costs": {"chat": {str(BATCH): fixed}}},
      "layers": made,
    }
  )


def paper_table(seed: int) -> Table:
  """80 layers of the paper's 54 variants."""
  widths = [28672 * share // 100 for share in (100, 87, 75, 50, 25, 20, 10)]
  return llama_table(80, kv_heads=[8, 4, 2, 1], widths=widths, seed=seed)


def large_table(seed: int) -> Table:
  """200 layers of 100 variants."""
  widths = [28672 * share // 8 for share in range(8, 0, -1)]
  return llama_table(200, kv_heads=list(range(8, 0, -1)), widths=widths, seed=seed)


def two_limits(table: Table) -> Limits:
  """Memory and speed, both binding."""
  parent = table.figures(table.parent, "chat", BATCH)
  return Limits(max_memory_bytes=0.45 * float(parent.memory_bytes), min_speedup=1.8)


def six_limits(table: Table) -> Limits:
  """Four more, each 2 % below what the best child under two limits needs."""
  child = search.solve(table, two_limits(table))[0]
  return dataclasses.replace(
    two_limits(table),
    max_params=0.98 * child.params,
    max_kv_bytes_per_token=0.98 * child.kv_bytes_per_token,
    max_first_token_s=0.98 * child.first_token_s,
    max_token_s=0.98 * child.token_s,
  )


def timed(name: str, target_s: float, cases: list[Case], *, solutions: int = 1) -> dict[str, Any]:
  """Seconds of `solve` with cvxpy's compile; the CPU's too, since the wall's depend on who else uses the machine."""
  wall, cpu, gaps = [], [], []
  for table, asked in cases:
    start, start_cpu = time.perf_counter(), time.process_time()
    found = search.solve(table, asked, solutions=solutions, min_different_layers=_APART if solutions > 1 else 1)
    wall.append(round(time.perf_counter() - start, 3))
    cpu.append(round(time.process_time() - start_cpu, 3))
    gaps.append([child.mip_gap or 0.0 for child in found])
  record = {
    "name": name,
    "target_s": target_s,
    "wall_s": wall,
    "cpu_s": cpu,
    "median_wall_s": statistics.median(wall),
    "first_gap": max(g[0] for g in gaps),
    "largest_gap": float(f"{max(map(max, gaps)):.4g}"),
  }
  print(record, flush=True)
  return record


def random_case(seed: int, layers: int, variants: int) -> Case:
  """Scores and costs without any structure, under three limits between the least and the mean."""
  rng = np.random.default_rng(seed)

  def variant(j: int) -> dict[str, Any]:
    sizes = {"params": int(rng.integers(1000)), "param_bytes": int(rng.integers(10**9))}
    sizes["kv_bytes_per_token"] = int(rng.integers(10**4))
    seconds = {"prefill_s": rng.random(), "decode_s": rng.random()}
    names = {"attention": f"a{j}", "ffn": "f", "parent": j == 0}
    return {**names, "score": rng.normal(), **sizes, "costs": {"chat": {str(BATCH): seconds}}}

  rows = [{"variants": [variant(j) for j in range(variants)]} for _ in range(layers)]
  table = Table.from_json({"format": FORMAT, "scenarios": SCENARIOS, "layers": rows})
  costs = [table.weights(quantity, "chat", BATCH) for quantity in ("memory_bytes", "runtime_s", "params")]
  shares = rng.uniform(0.4, 0.8, 3)
  most = [float((c.min(1) + share * (c.mean(1) - c.min(1))).sum()) for c, share in zip(costs, shares, strict=True)]
  return table, Limits(max_memory_bytes=most[0], max_runtime_s=most[1], max_params=most[2])


def _rows(table: Table, asked: Limits) -> tuple[list[np.ndarray], list[float]]:
  """The limits as the peers see them: weights and what they may add up to."""
  (program,) = search.programs(table, asked)
  return [program.weights(b) for b in program.bounds], [float(b.most - program.fixed(b)) for b in program.bounds]


def by_milp(table: Table, asked: Limits) -> float | None:
  """The least score by scipy.optimize.milp; None if infeasible."""
  weights, most = _rows(table, asked)
  layers, variants = table.score.shape
  one_each = scipy.sparse.kron(scipy.sparse.eye_array(layers), np.ones((1, variants)))
  scaled = np.stack([w.ravel() / m for w, m in zip(weights, most, strict=True)])
  result = scipy.optimize.milp(
    1e3 * table.score.ravel(),
    integrality=1,
    bounds=(0, 1),
    constraints=[(one_each, 1, 1), (1e3 * scaled, -np.inf, 1e3)],
    options={"mip_rel_gap": 0},
  )
  return None if result.x is None else float(table.score.ravel()[result.x > 0.5].sum())


def by_cbc(table: Table, asked: Limits) -> float | None:
  """The least score by CBC through PuLP; None if infeasible."""
  import pulp

  weights, most = _rows(table, asked)
  layers, variants = table.score.shape
  x = [[pulp.LpVariable(f"x{i}_{j}", cat="Binary") for j in range(variants)] for i in range(layers)]
  flat = [v for row in x for v in row]
  problem = pulp.LpProblem("puzzle", pulp.LpMinimize)
  problem += pulp.LpAffineExpression(zip(flat, (1e3 * table.score).ravel().tolist(), strict=True))
  for row in x:
    problem += pulp.lpSum(row) == 1
  for w, m in zip(weights, most, strict=True):
    problem += pulp.LpAffineExpression(zip(flat, (1e3 * w / m).ravel().tolist(), strict=True)) <= 1e3
  problem.solve(pulp.PULP_CBC_CMD(msg=False, gapRel=0.0, gapAbs=0.0, timeLimit=300))
  if problem.status != pulp.LpStatusOptimal:
    return None
  return float(table.score.ravel()[[v.value() > 0.5 for v in flat]].sum())


def by_enumeration(table: Table, asked: Limits) -> float | None:
  """The least score of all children that meet the limits, exactly; None if there is none."""
  (program,) = search.programs(table, asked)
  layers, variants = table.score.shape
  met = filter(program.possible, itertools.product(range(variants), repeat=layers))
  return min((float(table.total_score(choice)) for choice in met), default=None)


def by_search(table: Table, asked: Limits) -> float | None:
  """The least score by what is measured here; None if infeasible."""
  try:
    return search.solve(table, asked)[0].score
  except PuzzleError:
    return None


def compare(name: str, peer: Peer, cases: list[Case]) -> dict[str, Any]:
  """On how many instances a peer finds the same optimum, to 1e-9, and how long it takes compared with the search."""
  same, infeasible, ours, theirs = 0, 0, 0.0, 0.0
  for table, asked in cases:
    start = time.perf_counter()
    mine = by_search(table, asked)
    middle = time.perf_counter()
    other = peer(table, asked)
    theirs += time.perf_counter() - middle
    ours += middle - start
    infeasible += mine is None
    same += mine == other or (mine is not None and other is not None and math.isclose(mine, other, rel_tol=1e-9))
  record = {"name": name, "instances": len(cases), "same": same, "infeasible": infeasible}
  record |= {"seconds": round(theirs, 2), "search_seconds": round(ours, 2), "time_ratio": round(theirs / ours, 2)}
  print(record, flush=True)
  return record


def _cpu() -> str:
  for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
    if line.startswith("model name"):
      return line.partition(":")[2].strip()
  return platform.processor()


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  load = os.getloadavg()[0]
  paper, large = (list(map(make, range(_SEEDS.value))) for make in (paper_table, large_table))
  two = [(table, two_limits(table)) for table in paper]
  times = [
    timed("80 x 54, two limits", 1, two),
    timed("80 x 54, six limits", 3, [(table, six_limits(table)) for table in paper]),
    timed(f"80 x 54, two limits, ten solutions {_APART} layers apart", 30, two, solutions=10),
    timed("200 x 100, two limits", 10, [(table, two_limits(table)) for table in large]),
  ]
  small, middle = ([random_case(seed, *shape) for seed in range(n)] for n, shape in ((200, (5, 4)), (100, (12, 8))))
  peers = [
    compare("enumeration, 5 x 4", by_enumeration, small),
    compare("scipy.optimize.milp, 12 x 8", by_milp, middle),
    compare("scipy.optimize.milp, 80 x 54, two limits", by_milp, two),
  ]
  packages = ["cvxpy", "highspy", "scipy", "numpy"]
  if importlib.util.find_spec("pulp") is not None:
    packages.append("pulp")
    peers.append(compare("CBC, 12 x 8", by_cbc, middle))
    peers.append(compare("CBC, 80 x 54, two limits", by_cbc, two))
  record = {
    "command": "python -m experiments.benchmarks.search",
    "date": datetime.date.today().isoformat(),
    "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "load_before": round(load, 2)},
    "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages},
    "times": times,
    "peers": peers,
  }
  write_json(Path(_OUT.value), record)
  missed = [t["name"] for t in times if max(t["wall_s"]) > t["target_s"] or t["first_gap"] or t["largest_gap"] > 1e-3]
  missed += [p["name"] for p in peers if p["same"] < p["instances"]]
  sys.exit(f"missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
  app.run(main)
