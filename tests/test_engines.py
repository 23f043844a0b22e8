"""The capability table: each rule, and the search under it against enumeration."""

import itertools
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from puzzle_jax.arch import KINDS, Architecture, BlockSpec, ModelConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.search import Limits, solve
from puzzle_jax.search.table import Table
from puzzle_jax.serving import engines
from puzzle_jax.serving.engines import ENGINES, check_export, objection, rejections, restrict

PORTABLE = ["gqa4/w512", "none/w256", "none/none", "gqa4/w256"]


def make_table(layers: list[list[str]], *, seed: int = 0) -> Table:
  """A table of blocks by name, the first of each layer the parent's; random scores and seconds."""
  rng = np.random.default_rng(seed)

  def variant(j: int, block: str) -> dict[str, Any]:
    attention, ffn = block.split("/")
    seconds = {"chat": {"1": {"prefill_s": float(rng.random()) + (j == 0), "decode_s": 0.0}}}
    return {"attention": attention, "ffn": ffn, "parent": j == 0, "score": float(rng.random()), "costs": seconds}

  rows = [{"variants": [variant(j, block) for j, block in enumerate(blocks)]} for blocks in layers]
  scenarios = {"chat": {"input_tokens": 1, "output_tokens": 1}}
  return Table.from_json({"format": "puzzle-block-table/1", "scenarios": scenarios, "layers": rows})


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_runs_the_portable_blocks(name):
  assert rejections(ENGINES[name], PORTABLE) == []


# Blocks of a child of four layers; which engines reject it; what they say.
REJECTED = [
  ("gqa4/w512 linear/w512 gqa4/w512 linear/w512", "vllm sglang mlx_lm portable", "layers 1, 3: linear in place of att"),
  ("gqa4/w512 gqa4/linear gqa4/w512 gqa4/w512", "vllm sglang llama_cpp mlx_lm portable", "layer 1: linear in place of"),
  (
    "none/w512 gqa4/w512 gqa4/w512 gqa4/w512",
    "vllm sglang llama_cpp portable",
    "layer 0: the first layer must have attention",
  ),
  ("gqa4/w512 gqa4/w512 gqa4/w512 none/none", "llama_cpp portable", "layer 3: the last layer must have an FFN"),
  ("gqa4/w512 gqa4/none none/none gqa4/w512", "llama_cpp portable", "layer 1: attention without an FFN is not run"),
  ("gqa4/w512 gqa2/w512 gqa4/w512 none/w512", "sglang portable", "gqa4 in layers 0, 2, gqa2 in layer 1: all layers"),
  (
    "gqa4/w512 gqa4/w512 gqa4/w300 gqa4/w512",
    "tensorrt_llm tensorrt_llm_engine sglang mlx_lm portable",
    "layer 2: the FFN's width is no multiple of 256",
  ),
  ("gqa4/w512 gqa4/w512 gqa4/w300 gqa4/w512", "llama_cpp", "layer 2: the FFN's width is no multiple of 32"),
]


@pytest.mark.parametrize(("child", "names", "message"), REJECTED)
def test_what_an_engine_rejects_is_named_with_its_layers(child, names, message):
  for name, engine in ENGINES.items():
    found = rejections(engine, child.split())
    if name in names.split():
      assert len(found) == 1, (name, found)
      assert found[0].startswith(f"{engine.title}: {message}")
    else:
      assert not any(message in sentence for sentence in found), (name, found)


def test_all_reasons_are_given():
  found = rejections(ENGINES["sglang"], ["none/w300", "gqa4/linear", "gqa2/w512"])
  assert len(found) == 3


def test_portable_is_what_all_others_run():
  blocks = [f"{a}/{f}" for a, f in itertools.product(("gqa4", "linear", "none"), ("w512", "w300", "linear", "none"))]
  others = [engine for name, engine in ENGINES.items() if name != "portable"]
  for layer, block in itertools.product(range(3), blocks):
    objections = [objection(e, layer, block, num_layers=3) for e in (ENGINES["portable"], *others)]
    assert bool(objections[0]) == any(objections[1:])
  for field in ("kv_heads_vary", "attention_bias", "own_head_dim", "tied_embeddings"):
    assert getattr(ENGINES["portable"], field) == all(getattr(e, field) for e in others)
  hf = [engine.dtypes for engine in others if engine.format == "hf"]
  assert ENGINES["portable"].dtypes == frozenset.intersection(*hf)


def test_an_export_is_checked_as_a_whole():
  def check(
    name: str, blocks: str = "gqa4/w512", *, format: str = "hf", dtype: str = "bfloat16", **config: Any
  ) -> None:
    shape: dict[str, Any] = {"vocab_size": 8, "hidden_size": 64, "num_heads": 4, "head_dim": 16, "max_context": 8}
    architecture = Architecture(ModelConfig(**(shape | config)), tuple(map(BlockSpec.parse, blocks.split())))
    check_export(name, architecture, format=format, dtype=dtype)

  check("tensorrt_llm", "gqa4/w512 linear/linear", dtype="float8_tensor")
  check("llama_cpp", format="gguf", dtype="Q4_0", qkv_bias=True, head_dim=32)
  with pytest.raises(PuzzleError, match=r"llama.cpp reads gguf, not hf; engines for hf: tensorrt_llm, .*transformers"):
    check("llama_cpp")
  with pytest.raises(PuzzleError, match="SGLang does not read float8_channel weights; it reads bfloat16, float32, f"):
    check("sglang", dtype="float8_channel")
  with pytest.raises(PuzzleError, match=r"builder\) leaves out the biases of attention, and takes heads of 64 / 4"):
    check("tensorrt_llm_engine", o_bias=True, head_dim=32)
  with pytest.raises(PuzzleError, match=r"vLLM: layer 1: linear in .*; use gqaN or none. Search again .*engine=vllm"):
    check("vllm", "gqa4/w512 linear/w512")


def test_every_kind_has_an_engine():
  assert set().union(*(engine.subblocks for engine in ENGINES.values())) == set(KINDS)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ENGINES)
def test_the_search_under_an_engine_is_the_best_of_what_it_runs(name, seed):
  """Against enumeration; a layer has fewer variants, so that not every number of KV heads is to be had in it."""
  blocks = ["gqa4/w512", "gqa2/w512", "gqa2/none", "linear/w256", "none/linear", "none/w300", "none/none"]
  table = make_table([blocks, blocks, ["gqa2/w512", "linear/w512", "gqa1/w256"]], seed=seed)
  limits = Limits(min_speedup=1.3)
  (child,) = solve(restrict(table, ENGINES[name]), limits)
  assert rejections(ENGINES[name], child.blocks) == []
  seconds, parent = table.costs["chat"][1].prefill_s, table.costs["chat"][1].prefill_s[[0, 1, 2], [0, 0, 0]].sum()
  best = np.inf
  for choice in itertools.product(range(7), range(7), range(3)):
    named = [table.layers[i][j].block for i, j in enumerate(choice)]
    if seconds[[0, 1, 2], choice].sum() * 1.3 <= parent and not rejections(ENGINES[name], named):
      best = min(best, table.score[[0, 1, 2], choice].sum())
  assert child.score == pytest.approx(best, rel=1e-12)


def test_equal_kv_heads_are_tried_number_by_number():
  table = make_table([["gqa4/w512", "gqa2/w512"], ["gqa4/w512", "gqa2/w512", "none/w512"]])
  four, two = restrict(table, ENGINES["sglang"])
  np.testing.assert_array_equal(four.allowed, [[True, False, False], [True, False, True]])
  np.testing.assert_array_equal(two.allowed, [[False, True, False], [False, True, True]])
  children = solve([four, two], solutions=9, diverse_gap=0.0)
  assert len(children) == 4
  assert [c.score for c in children] == sorted(c.score for c in children)
  with pytest.raises(PuzzleError, match="SGLang needs as many KV heads in all layers; no number leaves a variant"):
    restrict(make_table([["gqa4/w512"], ["gqa2/w512"]]), ENGINES["sglang"])
  without = make_table([["linear/w512"], ["none/w512"]])
  with pytest.raises(PuzzleError, match=r"layer 0: SGLang runs none of its variants \(linear/w512: linear in place of"):
    restrict(without, ENGINES["sglang"])
  assert len(restrict(without, engines.Engine(title="any", kv_heads_vary=False))) == 1


def test_unknown_names():
  assert engines.by_name("vllm").title == "vLLM"
  with pytest.raises(PuzzleError, match=r"engine 'vlm' is unknown; known: .*vllm"):
    engines.by_name("vlm")
  with pytest.raises(PuzzleError, match="'swa4' is no attention subblock"):
    rejections(ENGINES["vllm"], ["swa4/w512"])


def test_imports_no_jax():
  code = "import sys, puzzle_jax.serving.engines; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
