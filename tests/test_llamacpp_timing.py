"""Costs in llama.cpp: the files that are timed, read back; and the arithmetic, in an engine whose seconds are known."""

import dataclasses
import json
import sys
import types
from typing import Any

import pytest
from children import byte_tokenizer, random_child

from puzzle_jax import space
from puzzle_jax.arch import BlockSpec
from puzzle_jax.costs import CostTable, Scenario
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import Parent, open_parent
from puzzle_jax.serving import llamacpp_timing
from puzzle_jax.serving.llamacpp_timing import TimingConfig

CHAT = Scenario("chat", 20, 30)
FIXED, PREFILL_TOKEN = 0.125, 0.25  # seconds of a step; of a prefill's token, by those of a step
STEP = {"gqa4": 3.0, "gqa1": 2.0, "linear": 1.0, "none": 0.0, "w512": 8.0, "w256": 5.0}
PER_TOKEN = {"gqa4": 0.04, "gqa1": 0.01}  # and of the context, for each token in it
CONFIG = TimingConfig(layers=6, rounds=3)


class Clock:
  """Time passes as the fake engine computes, not otherwise."""

  now = 0.0


class Llama:
  """llama.cpp whose seconds are the sum of the blocks that a file says it has."""

  def __init__(self, file: str, *, n_ctx: int, **settings: Any):
    if n_ctx > 1000:
      raise ValueError("Failed to create llama_context")
    self.blocks = open_parent(file).architecture.blocks
    self.n_ctx, self.settings, self.context = n_ctx, settings, 0

  def reset(self) -> None:
    self.context = 0

  def eval(self, tokens: list[int]) -> None:
    assert self.context + len(tokens) <= self.n_ctx
    parts = [s.name for block in self.blocks for s in block.subblocks]
    step = FIXED + sum(STEP[p] + PER_TOKEN.get(p, 0.0) * (self.context + 0.5) for p in parts)
    Clock.now += step if len(tokens) == 1 else PREFILL_TOKEN * len(tokens) * (FIXED + sum(STEP[p] for p in parts))
    self.context += len(tokens)


@pytest.fixture
def parent(tmp_path) -> Parent:
  shape = {"hidden_size": 64, "head_dim": 16, "vocab_size": 264}
  random_child(tmp_path / "parent", byte_tokenizer(), ("gqa4/w512",) * 6, **shape)
  return open_parent(str(tmp_path / "parent"))


@pytest.fixture
def engine(monkeypatch) -> None:
  monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Llama))
  monkeypatch.setattr(llamacpp_timing, "_version", lambda: "0")
  monkeypatch.setattr(llamacpp_timing, "time", types.SimpleNamespace(perf_counter=lambda: Clock.now))


def measure(parent: Parent, built: space.Space, quiet: Any, **options: Any) -> CostTable:
  return llamacpp_timing.measure(
    parent, built, scenarios=[CHAT], config=CONFIG, hardware="none", progress=quiet, **options
  )


@pytest.mark.usefixtures("engine")
def test_differences_recover_what_each_subblock_costs(parent, quiet):
  built = space.build(
    parent.architecture, attention=["gqa1", "linear", "none"], ffn=["w256", "none"], ffn_multiple=8, engine="llama_cpp"
  )
  blocks = ("gqa4/w512", "linear/w256", "none/none", "gqa1/w256", "none/w512", "gqa1/w512")
  child = dataclasses.replace(parent.architecture, blocks=tuple(map(BlockSpec.parse, blocks)))
  table = measure(parent, built, quiet, children={"child": child})
  middle = CHAT.input_tokens + CHAT.output_tokens / 2  # the context of the mean step
  for s in {s for layer in built.layers for s in (*layer.attention, *layer.ffn)}:
    found, step = table.subblocks[s.id]["chat"]["1"], STEP.get(s.name, 0.0)
    assert found["prefill_s"] == pytest.approx(20 * PREFILL_TOKEN * step, abs=1e-9)
    assert found["decode_s"] == pytest.approx(30 * (step + PER_TOKEN.get(s.name, 0.0) * middle), abs=1e-9)
  assert table.fixed["chat"]["1"] == pytest.approx({"prefill_s": 20 * PREFILL_TOKEN * FIXED, "decode_s": 30 * FIXED})
  assert max(abs(p["residual"]) for p in table.details["points"]) < 1e-9
  (found,) = table.details["children"]
  assert {phase: found[phase] for phase in found["predicted"]} == pytest.approx(found["predicted"])
  assert found["predicted"] == table.predict(child.blocks, "chat", "1")
  assert (table.kv_width, table.backend) == (2, "llamacpp")
  assert 5 / 8 < table.bytes_per_value < 1  # Q4_1 and a Q8_0 head
  assert CostTable.from_json(json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.usefixtures("engine")
def test_what_does_not_fit_is_said(parent, quiet):
  built = space.build(parent.architecture, attention=["gqa1"], ffn=["w256"], ffn_multiple=8, engine="llama_cpp")
  options = {"config": CONFIG, "hardware": "none", "progress": quiet}
  long = Scenario("long", 1000, 1)
  table = llamacpp_timing.measure(parent, built, scenarios=[long, CHAT], **options)
  assert table.scenarios == (CHAT,)
  (point,) = table.details["unreachable"]
  assert point == {"scenario": "long", "batch": 1, "why": "Failed to create llama_context"}
  with pytest.raises(PuzzleError, match=r"llama.cpp reached none of the scenarios: Failed to create llama_context"):
    llamacpp_timing.measure(parent, built, scenarios=[long], **options)


@pytest.mark.usefixtures("engine")
def test_refusals(parent, quiet, monkeypatch):
  with pytest.raises(PuzzleError, match="layers >= 6, rounds and threads >= 1 are needed"):
    TimingConfig(layers=5)
  whole = space.build(parent.architecture, attention=[], ffn=["linear"], ffn_multiple=8)
  with pytest.raises(PuzzleError, match=r"llama.cpp: layers 1, 2, 3, 4: linear in .*--config.space.engine=llama_cpp"):
    measure(parent, whole, quiet)
  monkeypatch.undo()
  monkeypatch.setattr(sys, "path", [])  # it may be installed here
  with pytest.raises(PuzzleError, match=r"llama.cpp is not installed: run `pip install llama-cpp-python` .tested: 0"):
    measure(parent, whole, quiet)
