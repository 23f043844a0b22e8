"""Searches a block table from anywhere for the best children under limits; needs no parent and no GPU.

python -m experiments.search --table=TABLE.json --out=DIR --max_memory_gib=40 --min_throughput=5000

Writes DIR/solution_0.json (the best), solution_1.json, … The formats are described in docs/search.md.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from puzzle_jax import search
from puzzle_jax.errors import PuzzleError
from puzzle_jax.store import write_json
from puzzle_jax.table import Table

_TABLE = flags.DEFINE_string("table", None, "The block table, JSON.", required=True)
_OUT = flags.DEFINE_string("out", None, "Where the solutions go; older ones there are removed.", required=True)
_SCENARIO = flags.DEFINE_string("scenario", None, "Where the limits hold; in each of the table's by default.")
_BATCH = flags.DEFINE_string("batch", "auto", "Requests at once; auto: the best of those that the table has costs for.")
_MEMORY = flags.DEFINE_float("max_memory_gib", None, "GiB of weights and KV cache.")
_RUNTIME = flags.DEFINE_float("max_runtime_s", None, "Seconds for the whole batch.")
_THROUGHPUT = flags.DEFINE_float("min_throughput", None, "Input + output tokens a second.")
_FIRST_TOKEN = flags.DEFINE_float("max_first_token_s", None, "Seconds of prefill of the whole batch.")
_TOKEN = flags.DEFINE_float("max_token_s", None, "Seconds of decoding per output token.")
_PARAMS = flags.DEFINE_float("max_params", None, "Parameters.")
_SOLUTIONS = flags.DEFINE_integer("solutions", 1, "How many children.")
_DIFFERENT = flags.DEFINE_integer("min_different_layers", 1, "In how many layers each differs from all before it.")
_FREEZE = flags.DEFINE_list("freeze", [], "Blocks that layers are held to: LAYER:ATTENTION/FFN,…")


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


def _line(k: int, child: search.Solution) -> str:
  return (
    f"solution_{k}.json: score {child.score:.6g} (gap {child.mip_gap:.2g}), batch {child.batch}, "
    f"{child.params / 1e9:.3f} B parameters, {child.memory_bytes / search.GIB:.3f} GiB, {child.runtime_s:.6g} s, "
    f"{child.throughput:.6g} tokens/s ({child.output_throughput:.6g} output tokens/s) in {child.scenario}"
  )


def _search(out: Path) -> None:
  batch = _BATCH.value
  if batch != "auto" and not (batch.isascii() and batch.isdigit()):
    raise PuzzleError(f"--batch={batch} is neither a number nor auto")
  children = search.solve(
    Table.read(_TABLE.value),
    search.Limits(
      max_memory_bytes=None if _MEMORY.value is None else _MEMORY.value * search.GIB,
      max_runtime_s=_RUNTIME.value,
      min_throughput=_THROUGHPUT.value,
      max_first_token_s=_FIRST_TOKEN.value,
      max_token_s=_TOKEN.value,
      max_params=_PARAMS.value,
    ),
    scenario=_SCENARIO.value,
    batch=None if batch == "auto" else int(batch),
    solutions=_SOLUTIONS.value,
    min_different_layers=_DIFFERENT.value,
    freeze=parse_freezes(_FREEZE.value),
  )
  for old in out.glob("solution_*.json"):
    old.unlink()
  for k, child in enumerate(children):
    write_json(out / f"solution_{k}.json", child.to_json())
    print(_line(k, child))
  if len(children) < _SOLUTIONS.value:
    print(f"no more than {len(children)} children meet the limits and differ in {_DIFFERENT.value} layers or more")


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
