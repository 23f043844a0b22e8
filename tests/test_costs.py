"""Cost tables: their arithmetic, what the search reads of them, and the timing by difference."""

import dataclasses
import json
import math
from typing import Any

import jax
import pytest

from puzzle_jax import costs, space
from puzzle_jax.arch import Architecture, BlockSpec
from puzzle_jax.costs import CostTable, Scenario, jax_timing
from puzzle_jax.costs.jax_timing import TimingConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.search.table import Table

CHAT = Scenario("chat", 20, 30)
SECONDS = {  # of a subblock at batch 1: prefill, decode
  "attention.gqa2": (0.5, 4.0),
  "attention.gqa1": (0.25, 3.0),
  "attention.none": (0.0, 0.0),
  "ffn.w48": (1.0, 8.0),
  "ffn.w24": (0.5, 5.0),
}
FIXED = (0.125, 2.0)


def seconds(prefill: float, decode: float, *, batch: int) -> dict[str, float]:
  return {"prefill_s": batch * prefill, "decode_s": (1 + batch) / 2 * decode}


@pytest.fixture
def parent(architecture) -> Architecture:
  return architecture(*["gqa2/w48"] * 3)


@pytest.fixture
def built(parent) -> space.Space:
  return space.build(parent, attention=["gqa", "none"], ffn=[0.5], ffn_multiple=8)


@pytest.fixture
def table() -> CostTable:
  def at(pair: tuple[float, float]) -> dict[str, dict[str, dict[str, float]]]:
    return {"chat": {str(batch): seconds(*pair, batch=batch) for batch in (1, 4, 16)}}

  subblocks = {name: at(pair) for name, pair in SECONDS.items()}
  return CostTable("made up", "none", {}, 2, (CHAT,), subblocks, at(FIXED), {"points": []})


def test_json_round_trip(table):
  assert CostTable.from_json(json.loads(json.dumps(table.to_json()))) == table
  with pytest.raises(PuzzleError, match="format 'x' is not 'puzzle-costs/1'"):
    CostTable.from_json(table.to_json() | {"format": "x"})
  with pytest.raises(PuzzleError, match=r"cost table: .*'fixed'; expected the keys"):
    CostTable.from_json({k: v for k, v in table.to_json().items() if k != "fixed"})


@pytest.mark.parametrize(
  "path, value, message",
  [
    (["hardware"], 3, "hardware is 3, not of type str"),
    (["versions"], {"jax": 1}, "versions .* not all texts"),
    (["tensor_parallel"], 0, "tensor_parallel is 0, not a whole number from 1"),
    (["bytes_per_value"], math.nan, "bytes_per_value is nan; it must be finite"),
    (["bytes_per_value"], 0, "bytes_per_value is 0, not above 0"),
    (["scenarios"], [], r"scenarios \[\]; there must be some"),
    (["scenarios", 0, "input_tokens"], "64", "scenario chat: input and output tokens must be whole numbers from 1"),
    (["subblocks"], {}, "it has no subblocks"),
    (["subblocks", "ffn.w48", "chat"], {}, "ffn.w48 and `fixed` do not both have scenario chat, batch 1;"),
    (["subblocks", "ffn.w48", "chat", "4"], {"prefill_s": 1.0}, "ffn.w48: scenario chat, batch 4: decode_s is missing"),
    (
      ["subblocks", "ffn.w48", "chat", "4", "decode_s"],
      -1.0,
      "batch 4: decode_s is -1.0; it must be finite and not neg",
    ),
    (["fixed"], {}, "fixed has no seconds of scenario chat"),
    (["fixed", "chat", "4", "prefill_s"], "1", "fixed: scenario chat, batch 4: prefill_s is '1', not a number"),
    (["fixed", "other"], {}, "costs of scenario 'other', which the table does not describe; it has chat"),
  ],
)
def test_a_file_that_holds_something_else_is_refused(table, tmp_path, path, value, message):
  data = json.loads(json.dumps(table.to_json()))
  node = data
  for key in path[:-1]:
    node = node[key]
  node[path[-1]] = value
  file = tmp_path / "costs.json"
  file.write_text(json.dumps(data))
  with pytest.raises(PuzzleError, match=rf"costs\.json: .*{message}"):
    CostTable.read(file)
  file.write_text("[" * 100_000)
  with pytest.raises(PuzzleError, match=r"costs\.json is JSON of more than 100 levels"):
    CostTable.read(file)


def test_a_model_costs_the_fixed_part_and_the_sum_of_its_subblocks(table, architecture):
  child = architecture("gqa2/w48", "gqa1/w24", "none/w48")
  expected = {
    "prefill_s": 4 * (0.125 + (0.5 + 1.0) + (0.25 + 0.5) + 1.0),
    "decode_s": 2.5 * (2.0 + (4.0 + 8.0) + (3.0 + 5.0) + 8.0),
  }
  assert table.predict(child.blocks, "chat", "4") == pytest.approx(expected)
  assert table.fixed["chat"]["4"] == seconds(*FIXED, batch=4)  # predict added to a copy
  with pytest.raises(PuzzleError, match=r"no ffn.linear; it has attention.gqa1, .*: measure the costs anew"):
    table.predict(architecture("gqa2/linear").blocks, "chat", "1")


def test_no_phase_is_below_the_floor(table, parent, built, architecture):
  child, least = architecture("gqa2/w48", "gqa1/w24", "none/w48"), {"prefill_s": 10.0, "decode_s": 100.0}
  above = table.predict(child.blocks, "chat", "4")
  assert above["prefill_s"] > 10
  assert above["decode_s"] < 100
  floored = dataclasses.replace(table, floor={"chat": {"4": least}})
  assert floored.predict(child.blocks, "chat", "4") == {"prefill_s": above["prefill_s"], "decode_s": 100.0}
  assert floored.predict(child.blocks, "chat", "1") == table.predict(child.blocks, "chat", "1")
  assert CostTable.from_json(json.loads(json.dumps(floored.to_json()))) == floored
  scores = [{b.name: (0.0, 0.0) for b in x.blocks} for x in built.layers]
  read = Table.from_json(costs.block_table(parent, built, scores, floored))
  assert read.floor("chat", 4) == least
  assert read.figures(read.parent, "chat", 1).decode_s < read.figures(read.parent, "chat", 4).decode_s == 100
  with pytest.raises(PuzzleError, match="floor has scenario chat, batch 7, `fixed` has not"):
    CostTable.from_json(floored.to_json() | {"floor": {"chat": {"7": least}}})


def test_scenarios_have_tokens():
  assert CHAT.tokens == 50
  with pytest.raises(PuzzleError, match="scenario chat: input and output tokens must be whole numbers from 1"):
    Scenario("chat", 1, 0)


def test_the_block_table_is_the_one_that_the_search_reads(table, parent, built):
  scores = [{b.name: (0.1 * i * j, 0.01) for j, b in enumerate(x.blocks)} for i, x in enumerate(built.layers)]
  del scores[1]["none/w48"]  # a block without a score is not offered
  data = costs.block_table(parent, built, scores, table)
  assert data == json.loads(json.dumps(data))
  assert [len(x["variants"]) for x in data["layers"]] == [6, 5, 6]
  read = Table.from_json(data)
  assert read.parent == (0, 0, 0)
  assert read.batches(["chat"]) == (1, 4, 16)
  choice, blocks = (0, 2, 5), ("gqa2/w48", "gqa1/w48", "none/w24")
  assert tuple(read.layers[i][j].block for i, j in enumerate(choice)) == blocks
  child = Architecture(parent.config, tuple(map(BlockSpec.parse, blocks)))
  found, predicted = read.figures(choice, "chat", 4), table.predict(child.blocks, "chat", "4")
  assert (float(found.prefill_s), float(found.decode_s)) == pytest.approx(tuple(predicted.values()))
  assert found.params == child.num_params()
  assert found.memory_bytes == 2 * child.num_params() + 4 * 50 * child.kv_bytes_per_token()
  assert float(read.total_score(choice)) == pytest.approx(0.1 * 2 + 0.2 * 5)
  assert read.score_stderr[1, 1] == 0.01


def test_an_engine_without_tied_embeddings_holds_a_copy(table, parent, built):
  tied = dataclasses.replace(parent, config=dataclasses.replace(parent.config, tie_embeddings=True))
  width, embedding = 2, parent.config.vocab_size * parent.config.hidden_size
  once, twice = (costs.head_bytes(tied, engine=engine, width=width) for engine in ("vllm", "tensorrt_llm"))
  assert once == width * costs.outer_params(tied)
  assert twice == once + width * embedding
  scores = [{b.name: (0.0, 0.0) for b in layer.blocks} for layer in built.layers]
  made = costs.block_table(tied, built, scores, dataclasses.replace(table, head_bytes=twice))
  assert made["fixed"]["param_bytes"] == twice


def test_tables_of_another_machine_or_engine_are_refused(table):
  costs.check_target(table, hardware="none", engine="vllm")  # JAX's seconds stand in for any engine's
  vllm = dataclasses.replace(table, backend="vllm", hardware="1 x H100")
  for engine in ("", "vllm", "portable"):
    costs.check_target(vllm, hardware="1 x H100", engine=engine)
  with pytest.raises(PuzzleError, match=r"measured on 1 x H100, the target is none: .* --config.costs.hardware='1 x"):
    costs.check_target(vllm, hardware="none", engine="vllm")
  with pytest.raises(PuzzleError, match=r"measured in vllm, the child shall run in sglang: .*search.engine=vllm"):
    costs.check_target(vllm, hardware="1 x H100", engine="sglang")


def test_another_version_is_warned_of(table, monkeypatch):
  found = {"vllm": "0.26.0"}
  monkeypatch.setattr(costs.importlib.metadata, "version", found.__getitem__)
  vllm = dataclasses.replace(table, backend="vllm", versions={"vllm": "0.25.1"})
  assert costs.other_version(vllm) == (
    "the cost table was measured in vllm 0.25.1, 0.26.0 is installed here; seconds may differ"
  )
  found["vllm"] = "0.25.1"
  assert costs.other_version(vllm) == ""


def test_more_gpus_than_kv_heads_keep_copies(table, parent, built):
  scores = [{b.name: (0.0, 0.0) for b in layer.blocks} for layer in built.layers]
  one, four = (
    costs.block_table(parent, built, scores, dataclasses.replace(table, tensor_parallel=ranks)) for ranks in (1, 4)
  )
  for a, b in zip(one["layers"][0]["variants"], four["layers"][0]["variants"], strict=True):
    copies = {"gqa2": 2, "gqa1": 4, "none": 1}[a["attention"]]
    assert b["kv_bytes_per_token"] == copies * a["kv_bytes_per_token"]


# Timing


def test_differences_recover_what_each_subblock_costs(monkeypatch, parent, built, quiet):
  """A machine on which the seconds of a model are exactly the sum of its parts."""
  parts = SECONDS | {"ffn.none": (0.0, 0.0)}

  def time(programs: Any, rounds: int, tick: Any) -> dict[Any, jax_timing.Timing]:
    result = {}
    for name, phase, slots in programs:
      spec, depth = name
      column = 0 if phase == "prefill" else 1
      layer = sum(parts[s.id][column] for s in spec.subblocks)
      total = FIXED[column] + depth * layer
      result[name, phase, slots] = jax_timing.Timing(total if phase == "prefill" else total / CHAT.output_tokens, 0.0)
    return result

  monkeypatch.setattr(jax_timing, "_time", time)
  config = TimingConfig(layers=5)
  found = jax_timing.measure(parent, built, scenarios=[CHAT], batches=[1], config=config, progress=quiet)
  assert found.subblocks.keys() == SECONDS.keys()
  for name, pair in SECONDS.items():
    assert tuple(found.subblocks[name]["chat"]["1"].values()) == pytest.approx(pair)
  assert tuple(found.fixed["chat"]["1"].values()) == pytest.approx(FIXED)
  points = found.details["points"]
  timed = {(p["block"], p["layers"], p["phase"]) for p in points}
  assert {("gqa2/w48", 5, "decode"), ("gqa2/w48", 2, "prefill"), ("gqa2/none", 5, "prefill")} <= timed
  assert max(abs(p["residual"]) for p in points if "residual" in p) < 1e-9
  assert found == CostTable.from_json(json.loads(json.dumps(found.to_json())))


def test_what_does_not_fit_is_said(monkeypatch, parent, built, quiet):
  real = jax_timing._Program

  def program(*args, batch, **options):
    if batch == 4:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    return real(*args, batch=batch, **options)

  monkeypatch.setattr(jax_timing, "_Program", program)
  options = {"scenarios": [CHAT], "config": TimingConfig(layers=2, rounds=1, decode_steps=1), "progress": quiet}
  table = jax_timing.measure(parent, built, batches=[2, 4], **options)
  assert list(table.fixed["chat"]) == ["2"]
  assert [p["batch"] for p in table.details["unreachable"]] == [4]
  with pytest.raises(PuzzleError, match="JAX reached none of the scenarios at any batch: RESOURCE_EXHAUSTED"):
    jax_timing.measure(parent, built, batches=[4], **options)


def test_a_real_timing(model, quiet):
  """FFNs large enough to be seen above the noise; what is none costs nothing."""
  architecture, params = model("gqa2/w4096", hidden_size=128)
  built = space.build(architecture, attention=["none"], ffn=["w256"], ffn_multiple=8)
  config = TimingConfig(layers=2, rounds=3, decode_steps=2)
  found = jax_timing.measure(architecture, built, scenarios=[CHAT], batches=[2], config=config, progress=quiet)
  assert (found.backend, found.bytes_per_value) == ("jax", 4)
  cost = {name: at["chat"]["2"] for name, at in found.subblocks.items()}
  for phase in ("prefill_s", "decode_s"):
    assert cost["ffn.w4096"][phase] > cost["ffn.w256"][phase] >= cost["attention.none"][phase] == 0
    assert found.fixed["chat"]["2"][phase] >= 0
  assert all(p["seconds"] > 0 for p in found.details["points"])
  small = dataclasses.replace(architecture, blocks=(BlockSpec.parse("none/none"),))
  models = {"parent": (architecture, params), "child": (small, params | {"layers": [{"attention": {}, "ffn": {}}]})}
  whole = jax_timing.time_models(models, scenario=CHAT, batch=2, config=config)
  assert whole["parent"]["prefill_s"] > whole["child"]["prefill_s"] > 0
  assert whole["parent"]["decode_s"] > whole["child"]["decode_s"] > 0
  for phase, rounds in whole["child"]["rounds"].items():
    assert whole["child"][phase] == pytest.approx(sum(sorted(rounds)[:2]) / 2)  # the faster half of three
    assert len(rounds) == 3


@pytest.mark.parametrize("change", [{"layers": 1}, {"rounds": 0}, {"decode_steps": 0}])
def test_refuses(change):
  with pytest.raises(PuzzleError, match="layers >= 2, rounds >= 1 and decode_steps >= 1 are needed"):
    TimingConfig(**change)
