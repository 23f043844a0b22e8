"""Costs in vLLM: everything up to its calls, with a stand-in whose seconds are known, in processes as the real ones."""

import dataclasses
import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from puzzle_jax import space
from puzzle_jax.arch import Architecture, BlockSpec
from puzzle_jax.costs import CostTable, Scenario
from puzzle_jax.errors import PuzzleError
from puzzle_jax.serving import engines, vllm_plugin, vllm_process, vllm_timing, vllm_worker
from puzzle_jax.serving.vllm_process import VLLM
from puzzle_jax.serving.vllm_timing import Plan, TimingConfig

FAKE = Path(__file__).parent / "fake_vllm"
SECONDS = json.loads((FAKE / "vllm/seconds.json").read_text())
CHAT, LONG = Scenario("20/30", 20, 30), Scenario("8/120", 8, 120)
ENGINE = VLLM(path=str(FAKE))
CONFIG = TimingConfig(layers=6, rounds=2, decode_steps=4)
PLAN = Plan((CHAT, LONG), (1, 4), CONFIG)


@pytest.fixture
def parent(architecture) -> Architecture:
  return architecture(*["gqa4/w512"] * 6, hidden_size=64, head_dim=16, vocab_size=264)


def space_of(parent: Architecture, ffn: tuple[str, ...] = ("w384", "w256", "w128")) -> space.Space:
  return space.build(parent, attention=["gqa1", "none"], ffn=[*ffn, "none"], ffn_multiple=8, engine="vllm")


def measure(parent: Architecture, tmp_path: Path, quiet: Any, *, plan: Plan = PLAN, **options: Any) -> CostTable:
  built = options.pop("built", None) or space_of(parent)
  return vllm_timing.measure(
    parent, built, plan=plan, engine=options.pop("engine", ENGINE), folder=tmp_path / "parts", progress=quiet, **options
  )


def expected(name: str, scenario: Scenario, batch: int) -> dict[str, float]:
  contexts = range(scenario.input_tokens + 1, scenario.tokens)
  step = SECONDS["step"][name]
  return {
    "prefill_s": batch * scenario.input_tokens * step,
    "decode_s": batch * sum(step + SECONDS["per_token"].get(name, 0.0) * c for c in contexts),
  }


def logs(tmp_path: Path) -> list[Path]:
  return sorted((tmp_path / "parts").rglob("*.jsonl"))


@pytest.mark.parametrize("short", [10, 128])
def test_differences_recover_what_each_subblock_costs(short, parent, tmp_path, quiet, monkeypatch):
  monkeypatch.setattr(vllm_timing, "_SHORT", short)
  built = space_of(parent)
  blocks = ("gqa4/w512", "none/w256", "gqa1/none", "gqa1/w384", "none/none", "gqa4/w128")
  child = dataclasses.replace(parent, blocks=tuple(map(BlockSpec.parse, blocks)))
  table = measure(parent, tmp_path, quiet, built=built, children={"child": child})
  for scenario in (CHAT, LONG):
    for batch in (1, 4):
      for s in {s for layer in built.layers for s in (*layer.attention, *layer.ffn)}:
        assert table.subblocks[s.id][scenario.name][str(batch)] == pytest.approx(expected(s.name, scenario, batch))
      fixed = {"prefill_s": batch * scenario.input_tokens * 0.125, "decode_s": (scenario.output_tokens - 1) * 0.125}
      assert table.fixed[scenario.name][str(batch)] == pytest.approx(fixed)
      parts = [expected(name, scenario, batch) for name in ("gqa4", "w512")]
      ends = {phase: fixed[phase] + 2 * sum(part[phase] for part in parts) for phase in fixed}
      assert table.floor[scenario.name][str(batch)] == pytest.approx(ends)  # of a model that is empty between them
  assert (table.backend, table.hardware, table.versions["vllm"]) == ("vllm", "1 x Fake GPU", "0.25.1")
  assert (table.bytes_per_value, table.kv_width, table.tensor_parallel) == (2, 2, 1)
  assert set(table.details["kv_cache_tokens"].values()) == {1024}
  lines = table.details["children"]
  assert [(x["model"], x["scenario"], x["batch"]) for x in lines[:3]] == [
    ("parent", "20/30", 1),
    ("parent", "20/30", 4),
    ("parent", "8/120", 1),
  ]
  assert len(lines) == 8
  assert max(abs(x["error"]) for x in lines) < 1e-9
  assert {x["limit"] for x in lines if x["model"] == "parent"} == {"gpu"}
  assert all(abs(p.get("affine_residual", 0)) < 1e-9 for p in table.details["points"])
  found = table.details["interpolation"]["20/30"]["1"]["ffn.w256"]["decode_s"]
  assert found == pytest.approx((2.0 + 6.0) / 2 / 5.0 - 1)  # between w128 and w384
  assert CostTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_what_was_measured_is_not_measured_again(parent, tmp_path, quiet, monkeypatch):
  plan = dataclasses.replace(PLAN, scenarios=(CHAT,), batches=(2,))
  monkeypatch.setenv("FAKE_VLLM", f"dies:{tmp_path / 'died'}")
  first = measure(parent, tmp_path, quiet, plan=plan, built=space_of(parent, ()))
  assert (tmp_path / "died").exists()  # and the next worker went on
  loads = [sum("engine" in json.loads(line) for line in log.read_text().splitlines()) for log in logs(tmp_path)]
  assert sorted(loads) == [1] * (len(loads) - 1) + [2]
  broken = logs(tmp_path)[0]
  lines = broken.read_text().splitlines(keepends=True)
  broken.write_text("".join(lines[:-1]) + lines[-1][:20])  # killed while it wrote
  monkeypatch.setenv("FAKE_VLLM", "missing")
  with pytest.raises(PuzzleError, match=r"vLLM is not installed here .*pip install vllm` .tested: 0.25.1"):
    measure(parent, tmp_path, quiet, plan=plan, built=space_of(parent, ()))
  monkeypatch.delenv("FAKE_VLLM")
  before = {log: log.stat().st_mtime_ns for log in logs(tmp_path)}
  again = measure(parent, tmp_path, quiet, plan=plan, built=space_of(parent, ()))
  assert again.details.pop("wall_s") > first.details.pop("wall_s") > 0  # a load more
  assert again == first
  assert [log for log, then in before.items() if log.stat().st_mtime_ns != then] == [broken]


def test_models_side_by_side(parent, tmp_path, quiet, monkeypatch):
  plan, built = Plan((CHAT,), (1,), CONFIG), space_of(parent, ())
  alone = measure(parent, tmp_path, quiet, plan=plan, built=built)
  engine = dataclasses.replace(ENGINE, gpus=("2", "5"))
  together = measure(parent, tmp_path / "both", quiet, plan=plan, built=built, engine=engine)
  assert (together.subblocks, together.fixed) == (alone.subblocks, alone.fixed)
  told = {log.read_text().splitlines()[0] for log in (tmp_path / "both").rglob("vllm.log")}
  assert told == {"GPUs 2", "GPUs 5"}
  monkeypatch.setenv("FAKE_VLLM", "old")
  with pytest.raises(PuzzleError, match=r"vLLM 0.9.1 is too old"):  # the first error, not what ends the others
    measure(parent, tmp_path / "again", quiet, plan=plan, built=built, engine=engine)
  with pytest.raises(PuzzleError, match="2 GPUs are not to be split into groups of 4"):
    _ = dataclasses.replace(engine, tensor_parallel=4).side_by_side


def test_steps_are_those_in_which_all_requests_decode():
  """Prompts read in three steps: the first answer of 11 tokens ends two steps before the last; one step is held up."""
  point = {"settle": 1, "steps": 8}
  came = [10.0, 20.0, 30.0, 31.0, 32.0, 33.0, 34.0, 39.0, 40.0, 41.0, 42.0, 52.0, 62.0]
  found = vllm_worker._step_seconds([came], 11, point)
  assert found == {"seconds": [pytest.approx(1.0)], "mean_s": [pytest.approx(11 / 7)]}
  (why,) = vllm_worker._step_seconds([came], 5, point).values()
  assert why == "9 steps read the prompts, which leaves too few for all to decode"


def test_attention_and_ffn_are_told_apart_where_only_one_may_be_missing(parent, tmp_path, quiet):
  built = space.build(parent, attention=["gqa1"], ffn=["w256", "none"], ffn_multiple=8, engine="vllm")
  table = measure(parent, tmp_path, quiet, plan=Plan((CHAT,), (1,), CONFIG), built=built)
  for name, costs in table.subblocks.items():
    assert costs["20/30"]["1"] == pytest.approx(expected(name.partition(".")[2], CHAT, 1)), name


def test_a_measurement_is_not_gone_on_with_on_another_machine(parent, tmp_path, quiet):
  plan, built = Plan((CHAT,), (1,), CONFIG), space_of(parent, ())
  measure(parent, tmp_path, quiet, plan=plan, built=built)
  begun = logs(tmp_path)[0]
  engine, first, *_ = begun.read_text().replace("Fake GPU", "Other GPU").splitlines()
  begun.write_text(f"{engine}\n{first}\n")
  message = rf"{begun.name} was begun with hardware 1 x Other GPU, here it is 1 x Fake GPU: name another folder"
  with pytest.raises(PuzzleError, match=message):
    measure(parent, tmp_path, quiet, plan=plan, built=built)


def test_scenarios_of_one_token(parent, tmp_path, quiet):
  table = measure(parent, tmp_path, quiet, plan=Plan((Scenario("20/1", 20, 1),), (1,), CONFIG), built=space_of(parent))
  assert table.subblocks["attention.gqa4"]["20/1"]["1"] == pytest.approx(
    {"prefill_s": expected("gqa4", CHAT, 1)["prefill_s"], "decode_s": 0.0}
  )


def test_an_interpreter_that_is_none(parent, tmp_path, quiet):
  with pytest.raises(
    PuzzleError, match=r"/none/python cannot be started .No such file.*; name the Python that has vLLM"
  ):
    measure(parent, tmp_path, quiet, engine=VLLM(python="/none/python"))


def test_what_holds_steps_up_belongs_to_no_block(parent, tmp_path, quiet, monkeypatch):
  """Of the fixed part, for each step behind a short answer; and the host's tokens may come in bunches."""
  monkeypatch.setattr(vllm_timing, "_SHORT", 10)
  plan, built = dataclasses.replace(PLAN, scenarios=(CHAT,)), space_of(parent, ())
  table = measure(parent, tmp_path, quiet, plan=plan, built=built)
  for log in logs(tmp_path):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for line in lines:
      if "mean_s" in line:
        line["mean_s"] = [s + 0.25 for s in line["seconds"]]
        line["seconds"] = [0.01] if "none none" in str(log) else line["seconds"]
    log.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  slower = measure(parent, tmp_path, quiet, plan=plan, built=built)
  assert slower.details["stall_s"] == pytest.approx({"1": 0.25, "4": 0.25})
  assert slower.subblocks["attention.gqa4"]["20/30"]["4"] == pytest.approx(
    table.subblocks["attention.gqa4"]["20/30"]["4"]
  )
  for batch in ("1", "4"):
    for part in ("fixed", "floor"):
      more, less = (getattr(t, part)["20/30"][batch]["decode_s"] for t in (slower, table))
      assert more - less == pytest.approx(20 * 0.25)


def test_the_schedule_of_attention_is_that_of_the_layers_own_kv_heads(monkeypatch):
  class Builder:
    def __init__(self, kv_cache_spec: Any, model_kv_heads: int):
      self.num_heads_kv = model_kv_heads

  backends = types.ModuleType("vllm.v1.attention.backends")
  backends.flash_attn = types.SimpleNamespace(FlashAttentionMetadataBuilder=Builder)
  for name in ("vllm", "vllm.v1", "vllm.v1.attention"):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  monkeypatch.setitem(sys.modules, backends.__name__, backends)
  spec = types.SimpleNamespace(num_kv_heads=1)
  assert Builder(spec, 3).num_heads_kv == 3
  for _ in range(2):
    vllm_plugin.register()
    assert Builder(spec, 3).num_heads_kv == 1


def test_other_widths_are_interpolated(parent, tmp_path, quiet):
  plan = Plan((CHAT,), (1,), dataclasses.replace(CONFIG, ffn_widths=3))
  table = measure(parent, tmp_path, quiet, plan=plan)
  names = {p["model"] for p in table.details["points"]}
  measured = {int(n.split("/w")[1].split()[0]) for n in names if "/w" in n}
  (left_out,) = {512, 384, 256, 128} - measured
  low, high = max(w for w in measured if w < left_out), min(w for w in measured if w > left_out)
  share = (left_out - low) / (high - low)
  line = (1 - share) * expected(f"w{low}", CHAT, 1)["decode_s"] + share * expected(f"w{high}", CHAT, 1)["decode_s"]
  assert table.subblocks[f"ffn.w{left_out}"]["20/30"]["1"]["decode_s"] == pytest.approx(line)


def test_what_does_not_fit_is_said_and_the_rest_goes_on(parent, tmp_path, quiet, monkeypatch):
  """A KV cache of 1024 tokens: batch 16 of 50 tokens fits, of 128 does not; at first it fails in the engine."""
  monkeypatch.setenv("FAKE_VLLM", "batch:16")
  plan = dataclasses.replace(PLAN, batches=(1, 4, 16))
  table = measure(parent, tmp_path, quiet, plan=plan, built=space_of(parent, ()), children={})
  assert {s: sorted(b) for s, b in table.fixed.items()} == {"20/30": ["1", "4"], "8/120": ["1", "4"]}
  assert {(x["scenario"], x["batch"]) for x in table.details["unreachable"]} == {("20/30", 16), ("8/120", 16)}
  assert "CUDA out of memory" in table.details["unreachable"][0]["why"]
  assert {x["batch"] for x in table.details["children"]} == {1, 4}
  monkeypatch.delenv("FAKE_VLLM")
  other = tmp_path / "again"
  table = measure(parent, other, quiet, plan=plan, built=space_of(parent, ()))
  assert sorted(table.fixed["20/30"]) == ["1", "16", "4"]  # its longest context is not needed
  assert sorted(table.fixed["8/120"]) == ["1", "4"]
  assert "the KV cache holds 1024 tokens" in table.details["unreachable"][0]["why"]


@pytest.mark.parametrize(
  "mode, message",
  [
    ("old", r"vLLM 0.9.1 is too old; 0.25.1 is the one that was tested"),
    ("taken", r"the GPU's memory is taken by another process; end that, and start again"),
    ("small", r"vLLM loaded none of the models: memory is short"),
  ],
)
def test_engines_that_do_not_do(parent, tmp_path, quiet, monkeypatch, mode, message):
  monkeypatch.setattr(vllm_process, "_WAIT_S", 0.0)
  monkeypatch.setenv("FAKE_VLLM", mode)
  with pytest.raises(PuzzleError, match=message):
    measure(parent, tmp_path, quiet, built=space_of(parent, ()))


def test_parts_of_another_machine(parent, tmp_path, quiet):
  plan = Plan((CHAT,), (1,), CONFIG)
  measure(parent, tmp_path, quiet, plan=plan, built=space_of(parent, ()))
  log = logs(tmp_path)[0]
  log.write_text(log.read_text().replace("Fake GPU", "Other GPU"))
  with pytest.raises(PuzzleError, match=r"holds measurements of hardware 1 x Fake GPU and 1 x Other GPU: name another"):
    measure(parent, tmp_path, quiet, plan=plan, built=space_of(parent, ()))


def test_8_bit_weights_are_smaller(parent, tmp_path, quiet):
  plan = Plan((CHAT,), (1,), dataclasses.replace(CONFIG, dtype="float8_channel"))
  table = measure(parent, tmp_path, quiet, plan=plan, built=space_of(parent, ()))
  a = parent
  matrices = sum(b.num_params(a.config) for b in a.blocks)
  assert table.weight_bytes(a) == matrices + 2 * (a.num_params() - matrices)
  half = dataclasses.replace(a, blocks=a.blocks[:3])
  assert table.weight_bytes(a) - table.weight_bytes(half) == matrices // 2
  (config, *_) = (tmp_path / "parts").rglob("config.json")
  assert json.loads(config.read_text())["quantization_config"]["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"


def test_tensor_parallelism(architecture):
  child = architecture("gqa4/w48", "gqa1/w24", "none/none")
  engines.check_ranks("vllm", child, 2)
  engines.check_ranks("vllm", child, 4)  # one KV head, copied to four GPUs
  with pytest.raises(PuzzleError, match="4 query heads are not to be split over 3 GPUs"):
    engines.check_ranks("vllm", child, 3)
  three: Architecture = architecture("gqa3/w48", num_heads=6)
  with pytest.raises(PuzzleError, match="layer 0: 3 KV heads are neither to be split over 2 GPUs nor to be copied"):
    engines.check_ranks("vllm", three, 2)
  with pytest.raises(PuzzleError, match="layer 0: an FFN of 46 is not to be split over 4 GPUs"):
    engines.check_ranks("vllm", architecture("gqa4/w46"), 4)
  assert [engines.kv_copies(f"{a}/w48", 4) for a in ("none", "gqa1", "gqa2", "gqa4", "gqa8")] == [1, 4, 2, 1, 1]


def test_settings():
  with pytest.raises(PuzzleError, match="layers >= 6, rounds, decode_steps and passes >= 1 are needed"):
    TimingConfig(layers=2)
  found = ENGINE.settings(Path("model"), max_length=100, batches=(3, 600), dummy=True)
  assert found["compilation_config"]["cudagraph_capture_sizes"] == [1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 600]
  assert found["model"] == os.path.abspath("model")


def test_8_bit_dummies_are_not_zeros(monkeypatch):
  """Of uniform numbers up to a thousandth, 8-bit floats keep few above 0."""
  small = np.random.default_rng(0).uniform(-1e-3, 1e-3, 10_000).astype(ml_dtypes.float8_e4m3fn)
  assert np.mean(small.astype(np.float32) == 0) > 0.9
  ranges = []
  loader = types.ModuleType("vllm.model_executor.model_loader")
  loader.weight_utils = types.SimpleNamespace(
    initialize_single_dummy_weight=lambda param, low=-1e-3, high=1e-3: ranges.append((low, high))
  )
  for name in ("vllm", "vllm.model_executor"):
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
  monkeypatch.setitem(sys.modules, loader.__name__, loader)
  vllm_worker._fill_8_bits()
  for size in (1, 2):
    param = types.SimpleNamespace(is_floating_point=lambda: True, element_size=lambda size=size: size)
    loader.weight_utils.initialize_single_dummy_weight(param)
  assert ranges == [(-1.0, 1.0), (-1e-3, 1e-3)]
