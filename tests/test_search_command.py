"""`python -m experiments.search`: its options, files and exit codes, where JAX and PyTorch cannot be imported."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from puzzle_jax import search
from puzzle_jax.search import Limits, Solution, baselines, solve
from puzzle_jax.search.table import Table
from puzzle_jax.serving import engines

ROOT = Path(__file__).parents[1]
BLOCKS = [f"{a}/{f}" for a, f in itertools.product(("gqa4", "gqa2", "linear", "none"), ("w512", "w256", "none"))]

_WITHOUT_JAX = """
import importlib.abc, runpy, sys

class Blocked(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    if name in ("jax", "jaxlib", "flax", "torch", "tensorflow"):
      raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
runpy.run_module("experiments.search", run_name="__main__", alter_sys=True)
"""


def random_table(seed: int, layers: int) -> Table:
  """Twelve blocks a layer, the first the parent's; two scenarios, two batches."""
  rng = np.random.default_rng(seed)

  def variant(j: int, block: str) -> dict[str, Any]:
    attention, ffn = block.split("/")
    size = (12 - j) * 1000
    seconds = {str(b): {"prefill_s": size * b / 4e5, "decode_s": size * b**0.5 / 1e5} for b in (1, 4)}
    return {
      "attention": attention,
      "ffn": ffn,
      "parent": j == 0,
      "score": float(rng.random() * j),
      "params": size,
      "param_bytes": 2 * size,
      "kv_bytes_per_token": 16 * int(attention[3:]) if attention.startswith("gqa") else 0,
      "costs": {"chat": seconds, "long": seconds},
    }

  scenarios = {"chat": {"input_tokens": 6, "output_tokens": 2}, "long": {"input_tokens": 60, "output_tokens": 2}}
  rows = [{"variants": [variant(j, block) for j, block in enumerate(BLOCKS)]} for _ in range(layers)]
  return Table.from_json({"format": "puzzle-block-table/1", "scenarios": scenarios, "layers": rows})


@pytest.fixture
def table(tmp_path) -> Table:
  """In tmp_path/table.json."""
  table = random_table(0, layers=6)
  (tmp_path / "table.json").write_text(json.dumps(table.to_json()))
  return table


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
  """The command with the folder's table; its results go to `out`."""
  command = [sys.executable, "-c", _WITHOUT_JAX, f"--table={folder / 'table.json'}", f"--out={folder / 'out'}"]
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)


def results(folder: Path) -> dict[str, Any]:
  return {p.name: json.loads(p.read_text()) for p in sorted((folder / "out").glob("*.json"))}


def test_every_limit_and_several_solutions(tmp_path, table):
  (tmp_path / "out").mkdir()
  for stale in ("solution_7.json", "frontier.json"):  # of an earlier run
    (tmp_path / "out" / stale).write_text("{}")
  limits = Limits(
    max_memory_bytes=2.0**-13 * 2**30,
    max_runtime_s=0.9,
    min_throughput=30.0,
    max_first_token_s=0.5,
    max_token_s=0.5,
    max_params=6e4,
    max_kv_bytes_per_token=300.0,
    min_speedup=1.2,
    min_decode_speedup=1.1,
    max_memory_ratio=0.9,
    max_params_ratio=0.8,
    max_kv_ratio=0.9,
    max_first_token_ratio=0.9,
  )
  flags = {name: value for name, value in limits.items() if name != "max_memory_bytes"} | {"max_memory_gib": 2.0**-13}
  done = run(
    tmp_path,
    *(f"--{name}={value}" for name, value in flags.items()),
    "--scenario=chat",
    "--batch=4",
    "--solutions=2",
    "--min_different_layers=2",
    "--freeze=0:gqa2/w512,3:none/w256",
  )
  assert done.returncode == 0, done.stderr
  expected = solve(
    table,
    limits,
    scenario="chat",
    batch=4,
    solutions=2,
    min_different_layers=2,
    freeze={0: "gqa2/w512", 3: "none/w256"},
  )
  found = results(tmp_path)
  assert list(found) == ["sensitivity.json", "solution_0.json", "solution_1.json"]
  for k, child in enumerate(expected):
    written, own = found[f"solution_{k}.json"], child.to_json()
    del written["timing"], own["timing"]
    assert written == own
    assert set(own) == {f.name for f in dataclasses.fields(Solution)} - {"solve_s"}
  assert [row["limit"] for row in found["sensitivity.json"]["limits"]] == [name for name, _ in limits.items()]
  assert "output tokens/s" in done.stdout


def test_the_batch_is_chosen_and_what_binds_is_said(tmp_path, table):
  done = run(tmp_path, "--min_throughput=55", "--max_params=1e9")
  assert done.returncode == 0, done.stderr
  limits = Limits(min_throughput=55.0, max_params=1e9)
  (child,) = solve(table, limits)
  found = results(tmp_path)
  assert (found["solution_0.json"]["batch"], found["solution_0.json"]["score"]) == (child.batch, child.score)
  assert list(found["solution_0.json"]["scenarios"]) == ["chat", "long"]
  throughput, params = search.sensitivity(table, limits)
  assert found["sensitivity.json"] == {"limits": [dataclasses.asdict(throughput), dataclasses.asdict(params)]}
  assert re.search(r"^min_throughput=55 binds: 1 % looser would lower the score by", done.stdout, re.MULTILINE)
  assert "max_params=1e+09 does not bind" in done.stdout


def test_frontier(tmp_path, table):
  done = run(tmp_path, "--min_speedup=1.1", "--frontier=min_speedup:1:20:5", "--nosensitivity")
  assert done.returncode == 0, done.stderr
  found = results(tmp_path)
  assert list(found) == ["frontier.json", "solution_0.json"]
  points = search.frontier(table, "min_speedup", [1.0, 5.75, 10.5, 15.25, 20.0])
  for written, point in zip(found["frontier.json"]["points"], points, strict=True):
    assert written["value"] == point.value
    assert (written["solution"] and written["solution"]["score"]) == (point.solution and point.solution.score)
  assert [p["solution"] is None for p in found["frontier.json"]["points"]] == [False, False, False, True, True]
  steady = search.stable_layers(p.solution for p in points if p.solution)
  assert found["frontier.json"]["stable_layers"] == [dataclasses.asdict(layer) for layer in steady]
  page = (tmp_path / "out" / "frontier.html").read_text()
  assert "(2 of 5 values cannot be met)" in page
  assert not re.search(r"""<(script|link|img)[^>]*(src|href)=["']?http""", page)
  assert "3 of 5 values of min_speedup can be met" in done.stdout


def test_engine_and_baseline(tmp_path, table):
  done = run(tmp_path, "--min_speedup=1.5", "--engine=sglang")
  assert done.returncode == 0, done.stderr
  written = results(tmp_path)["solution_0.json"]
  (child,) = solve(engines.restrict(table, engines.ENGINES["sglang"]), Limits(min_speedup=1.5))
  assert written["blocks"] == list(child.blocks)
  assert engines.rejections(engines.ENGINES["sglang"], written["blocks"]) == []

  done = run(tmp_path, "--min_speedup=1.5", "--baseline=greedy")
  assert done.returncode == 0, done.stderr
  (child,) = baselines.greedy(table, Limits(min_speedup=1.5))
  found = results(tmp_path)
  assert list(found) == ["solution_0.json"]
  assert (found["solution_0.json"]["blocks"], found["solution_0.json"]["mip_gap"]) == (list(child.blocks), None)
  assert "not proven" in done.stdout

  done = run(tmp_path, "--min_speedup=1.5", "--baseline=random_feasible", "--seed=3", "--solutions=2")
  children = baselines.random_feasible(table, Limits(min_speedup=1.5), seed=3, draws=2)
  assert [written["blocks"] for written in results(tmp_path).values()] == [list(c.blocks) for c in children]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--min_throughput=1e9"], "error: no child meets min_throughput=1000000000"),
    (["--freeze=0:gqa4/w512,0:none/none"], "error: --freeze: layer 0 is held to both gqa4/w512 and none/none; keep"),
    (
      ["--freeze=0:linear/w512", "--engine=vllm"],
      "error: layer 0: vLLM runs none of its variants (linear/w512: lin",
    ),
    (["--frontier=speed:1:2:3"], "error: --frontier=speed:1:2:3 is not LIMIT:FROM:TO:POINTS with LIMIT one of max_"),
    (["--frontier=min_speedup:1:2"], "error: --frontier=min_speedup:1:2 is not LIMIT:FROM:TO:POINTS"),
    (["--batch=many"], "error: --batch=many is neither a number nor auto"),
  ],
)
def test_fails_with_one_message(tmp_path, table, arguments, message):
  done = run(tmp_path, *arguments)
  assert done.returncode == 1
  assert done.stderr.startswith(message)
  assert len(done.stderr.splitlines()) == 1
  assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
