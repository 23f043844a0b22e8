"""Searches a block table from anywhere for the best children under limits; needs no parent and no GPU.

python -m experiments.search --table=TABLE.json --out=DIR --max_memory_gib=40 --min_throughput=5000

Writes DIR/solution_0.json (the best), solution_1.json, …, what each limit costs (sensitivity.json) and, with
--frontier, frontier.json and frontier.html. The formats and the method are described in docs/search.md.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from puzzle_jax import search
from puzzle_jax.errors import PuzzleError
from puzzle_jax.search import baselines
from puzzle_jax.search.frontier_page import frontier_page
from puzzle_jax.search.table import Table
from puzzle_jax.serving import engines
from puzzle_jax.store import write_json

_TABLE = flags.DEFINE_string("table", None, "The block table, JSON.", required=True)
_OUT = flags.DEFINE_string("out", None, "Where the results go; older ones there are removed.", required=True)
_SCENARIO = flags.DEFINE_string("scenario", None, "Where the limits hold; in each of the table's by default.")
_BATCH = flags.DEFINE_string("batch", "auto", "Requests at once; auto: the best of those that the table has costs for.")
_SOLUTIONS = flags.DEFINE_integer("solutions", 1, "How many children.")
_DIFFERENT = flags.DEFINE_integer("min_different_layers", 1, "In how many layers each differs from all before it.")
_FREEZE = flags.DEFINE_list("freeze", [], "Blocks that layers are held to: LAYER:ATTENTION/FFN,…")
_ENGINE = flags.DEFINE_enum("engine", None, list(engines.ENGINES), "Choose only what this serving engine runs.")
_BASELINE = flags.DEFINE_enum("baseline", None, list(baselines.BASELINES), "Choose by this rule instead.")
_SEED = flags.DEFINE_integer("seed", 0, "Of --baseline=random_feasible.")
_FRONTIER = flags.DEFINE_string("frontier", None, "Sweep a limit too: LIMIT:FROM:TO:POINTS, as min_speedup:1:3:21.")
_SENSITIVITY = flags.DEFINE_bool("sensitivity", True, "Say which limits bind and what relaxing them buys.")
_LIMITS = {
  "max_memory_gib": "GiB of weights and KV cache.",
  "max_runtime_s": "Seconds for the whole batch.",
  "min_throughput": "Input + output tokens a second.",
  "max_first_token_s": "Seconds of prefill of the whole batch.",
  "max_token_s": "Seconds of decoding per output token.",
  "max_params": "Parameters.",
  "max_kv_bytes_per_token": "Bytes of KV cache of all layers.",
  "min_speedup": "Throughput over the parent's.",
  "min_decode_speedup": "The parent's seconds of decoding over the child's.",
  "max_memory_ratio": "Memory over the parent's.",
  "max_params_ratio": "Parameters over the parent's.",
  "max_kv_ratio": "Bytes of KV cache over the parent's.",
  "max_first_token_ratio": "Seconds of prefill over the parent's.",
}
for _name, _text in _LIMITS.items():
  flags.DEFINE_float(_name, None, _text)


def parse_freezes(items: Sequence[str]) -> dict[int, str]:
  """From LAYER:ATTENTION/FFN; raises PuzzleError for other forms and for two blocks in one layer."""
  blocks: dict[int, str] = {}
  for item in items:
    layer, colon, block = item.partition(":")
    if not (colon and layer.isascii() and layer.isdigit() and block.count("/") == 1):
      raise PuzzleError(f"--freeze: {item!r} is not LAYER:ATTENTION/FFN, such as 3:gqa8/w14336")
    if blocks.setdefault(int(layer), block) != block:
      raise PuzzleError(f"--freeze: layer {layer} is held to both {blocks[int(layer)]} and {block}; keep one")
  return blocks


def parse_frontier(text: str) -> tuple[str, list[float]]:
  """A limit and its values, from LIMIT:FROM:TO:POINTS; raises PuzzleError for other forms."""
  try:
    name, first, last, points = text.split(":")
    values = np.linspace(float(first), float(last), int(points))
  except ValueError:
    name = ""
  if name not in _LIMITS:
    raise PuzzleError(f"--frontier={text} is not LIMIT:FROM:TO:POINTS with LIMIT one of {', '.join(_LIMITS)}")
  return ("max_memory_bytes", (values * search.GIB).tolist()) if name == "max_memory_gib" else (name, values.tolist())


def _search(out: Path) -> None:
  asked = {name: flags.FLAGS[name].value for name in _LIMITS}
  gib = asked.pop("max_memory_gib")
  limits = search.Limits(max_memory_bytes=None if gib is None else gib * search.GIB, **asked)
  batch, rule, solutions = _BATCH.value, _BASELINE.value, _SOLUTIONS.value
  if batch != "auto" and not (batch.isascii() and batch.isdigit()):
    raise PuzzleError(f"--batch={batch} is neither a number nor auto")
  where: dict[str, Any] = {"scenario": _SCENARIO.value, "batch": None if batch == "auto" else int(batch)}
  sweep = parse_frontier(_FRONTIER.value) if _FRONTIER.value else None
  table = Table.read(_TABLE.value).freeze(parse_freezes(_FREEZE.value))
  tables = engines.restrict(table, engines.ENGINES[_ENGINE.value]) if _ENGINE.value else [table]
  for old in [*out.glob("solution_*.json"), *out.glob("frontier.*"), *out.glob("sensitivity.json")]:
    old.unlink()

  if rule == "random_feasible":
    children = baselines.random_feasible(tables, limits, seed=_SEED.value, draws=solutions, **where)
  elif rule:
    children = baselines.BASELINES[rule](tables, limits, **where)
  else:
    children = search.solve(tables, limits, solutions=solutions, min_different_layers=_DIFFERENT.value, **where)
  for k, child in enumerate(children):
    write_json(out / f"solution_{k}.json", child.to_json())
    print(f"solution_{k}.json: {child}")
  if len(children) < solutions:
    print(f"{rule or 'the search'} finds no more than {len(children)} of the {solutions} children asked for")
  if _SENSITIVITY.value and not rule:
    prices = search.sensitivity(tables, limits, **where)
    write_json(out / "sensitivity.json", {"limits": [dataclasses.asdict(price) for price in prices]})
    for price in prices:
      print(price)
  if sweep:
    limit, values = sweep
    points = search.frontier(tables, limit, values, limits=limits, **where)
    if not any(point.solution for point in points):
      raise PuzzleError(f"--frontier={_FRONTIER.value}: no child meets any of its values; sweep others")
    found = search.frontier_json(limit, points)
    write_json(out / "frontier.json", found)
    (out / "frontier.html").write_text(frontier_page(limit, points), encoding="utf-8")
    same = [str(layer["layer"]) for layer in found["stable_layers"] if layer["share"] == 1]
    met = sum(point.solution is not None for point in points)
    print(f"frontier.html: {met} of {len(points)} values of {limit} can be met")
    print(f"the same block at all of them: layers {', '.join(same) or '(none)'}")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  try:
    _search(Path(_OUT.value))
  except PuzzleError as e:
    sys.exit(f"error: {e}")
  except OSError as e:
    sys.exit(f"error: --out={_OUT.value} cannot be written ({e.strerror}); choose another folder")


if __name__ == "__main__":
  app.run(main)
