"""TensorRT-LLM up to its call: command lines, requests, reports; and with a stand-in for its command."""

import json
import os
import sys
from pathlib import Path

import pytest
from children import byte_tokenizer, random_child

from puzzle_jax import space
from puzzle_jax.costs import Scenario
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import open_parent
from puzzle_jax.serving import served, tensorrt_llm, tensorrt_llm_timing
from puzzle_jax.serving.hf_export import export_hf

CHAT = Scenario("20/30", 20, 30)
REPORT = """[TRT-LLM] [I] Finished running
===========================================================
= PERFORMANCE OVERVIEW
===========================================================
Request Throughput (req/sec):                     16.2583
Total Output Throughput (tokens/sec):             1,625.8347
Total Token Throughput (tokens/sec):              2709.7245
Total Latency (ms):                               629830.3198
Average request latency (ms):                     62678.9133
Per User Output Throughput [w/ ctx] (tps/user):   9.8876
Per GPU Output Throughput (tps/gpu):            \t  1077.2770
Average time-to-first-token [TTFT] (ms):        \t  425.9885
Average time-per-output-token [TPOT] (ms):      \t  3.2344
Per User Output Speed (tps/user):                 312.0708
"""


def test_reports():
  figures = tensorrt_llm.parse_report(REPORT)
  assert figures == served.Figures(2709.7245, 1625.8347, 0.4259885, 0.0032344)
  with pytest.raises(PuzzleError, match=r"printed no 'Total Output Throughput .*; its last line: out of memory"):
    tensorrt_llm.parse_report("starting\n  out of memory \n\n")
  with pytest.raises(PuzzleError, match=r"printed no 'Average time-to-first-token"):  # not streaming
    tensorrt_llm.parse_report(REPORT.replace("TTFT", "other"))


def test_command_lines():
  bench = tensorrt_llm.bench_command(Path("out/mine"), Path("a.jsonl"), batch=64, ranks=2)
  assert " ".join(bench) == (
    "trtllm-bench --model mine --model_path out/mine throughput --backend pytorch --dataset a.jsonl --streaming "
    "--num_requests 64 --concurrency 64 --max_batch_size 64 --warmup 2 --tp 2"
  )
  assert " ".join(tensorrt_llm.serve_command(Path("out/mine"), scenario=CHAT, batch=64)) == (
    "trtllm-serve out/mine --backend pytorch --trust_remote_code --max_batch_size 64 --max_seq_len 50 --tp_size 1"
  )


def test_requests(tmp_path):
  tensorrt_llm.write_dataset(tmp_path / "a.jsonl", CHAT, requests=3, vocab_size=7)
  lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
  assert [(x["task_id"], len(x["input_ids"]), x["output_tokens"]) for x in lines] == [(i, 20, 30) for i in range(3)]
  assert len({tuple(x["input_ids"]) for x in lines}) == 3
  assert {t for x in lines for t in x["input_ids"]} == set(range(7))


def test_models_side_by_side(tmp_path, quiet, monkeypatch):
  models = {}
  for name, blocks in {"parent": ("gqa4/w512",) * 2, "child": ("gqa1/w256", "linear/none")}.items():
    random_child(tmp_path / name, byte_tokenizer(), blocks, vocab_size=264)
    models[name] = tmp_path / "out" / name
    export_hf(tmp_path / name, models[name], engine="tensorrt_llm")
  options = {"scenarios": [CHAT], "batches": (2,), "ranks": 1, "folder": tmp_path / "logs", "progress": quiet}
  monkeypatch.setenv("PATH", str(tmp_path / "bin"))
  with pytest.raises(PuzzleError, match=r"TensorRT-LLM is not installed here .*pip install tensorrt_llm.*container"):
    tensorrt_llm.serve(models, **options)
  (tmp_path / "bin").mkdir()
  stand_in = tmp_path / "bin/trtllm-bench"
  stand_in.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$*\"\nprintf '%s' '{REPORT}'\n")
  os.chmod(stand_in, 0o755)
  found = tensorrt_llm.serve(models, **options)
  assert found["child"].figures == {"20/30": {"2": tensorrt_llm.parse_report(REPORT)}}
  assert found["child"].kv_bytes_per_token * 8 == found["parent"].kv_bytes_per_token
  assert "--concurrency 2" in (tmp_path / "logs/child_20_30_2.log").read_text()
  text = served.table(found["parent"], found["child"])
  assert "first token (ms)" in text
  assert "most requests at once" not in text  # it does not say


def test_costs_by_difference(tmp_path, quiet, monkeypatch):
  """With a stand-in whose seconds are those of the layers that have attention, and one more."""
  random_child(tmp_path / "parent", byte_tokenizer(), ("gqa4/w512",) * 6, vocab_size=264)
  parent = open_parent(str(tmp_path / "parent"))
  built = space.build(parent.architecture, attention=["none"], ffn=["none"], ffn_multiple=256, engine="tensorrt_llm")
  config = tensorrt_llm_timing.TimingConfig(layers=6, rounds=2)
  options = {"scenarios": [CHAT], "batches": [2], "config": config, "hardware": "here", "folder": tmp_path / "parts"}
  monkeypatch.setenv("PATH", str(tmp_path / "bin"))
  with pytest.raises(PuzzleError, match="TensorRT-LLM is not installed here"):
    tensorrt_llm_timing.measure(parent, built, progress=quiet, **options)
  (tmp_path / "bin").mkdir()
  stand_in = tmp_path / "bin/trtllm-bench"
  stand_in.write_text(
    f"""#!{sys.executable}
import json, pathlib, sys
with open({str(tmp_path / "calls")!r}, "a") as calls:
  print(*sys.argv[1:], file=calls)
if sys.argv[sys.argv.index("--concurrency") + 1] == "64":
  print("torch: CUDA out of memory.")
  sys.exit("aborted")
model = pathlib.Path(sys.argv[sys.argv.index("--model_path") + 1])
assert (model / "model.safetensors").is_file() and (model / "tokenizer.json").is_file()
blocks = json.loads((model / "config.json").read_text())["block_configs"]
ms = 1000 * (1 + sum(2 * (not b["attention"]["no_op"]) + (not b["ffn"]["no_op"]) for b in blocks))
print({REPORT!r}.replace("425.9885", str(10 * ms)).replace("3.2344", str(ms)))
"""
  )
  os.chmod(stand_in, 0o755)
  table = tensorrt_llm_timing.measure(parent, built, progress=quiet, **options)
  for name, seconds in {"attention.gqa4": 2.0, "ffn.w512": 1.0, "attention.none": 0.0}.items():
    found = table.subblocks[name]["20/30"]["2"]
    assert found == pytest.approx({"prefill_s": 10 * seconds, "decode_s": 29 * seconds}, abs=1e-9)
  assert table.fixed["20/30"]["2"] == pytest.approx({"prefill_s": 10.0, "decode_s": 29.0})
  assert (table.backend, table.kv_width) == ("tensorrt_llm", 2)
  calls = (tmp_path / "calls").read_text()
  assert tensorrt_llm_timing.measure(parent, built, progress=quiet, **options) == table
  assert (tmp_path / "calls").read_text() == calls  # nothing is measured twice
  larger = tensorrt_llm_timing.measure(parent, built, progress=quiet, **options | {"batches": [2, 64]})
  assert (larger.subblocks, [p["why"] for p in larger.details["unreachable"]]) == (
    table.subblocks,
    ["torch: CUDA out of memory."],
  )
  tensorrt_llm_timing.measure(parent, built, progress=quiet, **options | {"hardware": "elsewhere"})
  assert (tmp_path / "calls").read_text().count("--concurrency 2") == 2 * calls.count("--concurrency 2")


def test_the_machine(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  (tmp_path / "trtllm-bench").touch(0o755)
  with pytest.raises(PuzzleError, match="TensorRT-LLM needs a GPU, and nvidia-smi names none"):
    tensorrt_llm.hardware(1)
  (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA H100\necho NVIDIA H100\n")
  os.chmod(tmp_path / "nvidia-smi", 0o755)
  assert tensorrt_llm.hardware(2) == "2 x NVIDIA H100"
