"""Parent and child in an engine, and the engine against JAX: with the stand-in for vLLM, whose answers are known."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from children import byte_tokenizer, random_child
from test_vllm_timing import ENGINE, FAKE, SECONDS

from experiments.oracles import jax_tokens, vllm_tokens
from puzzle_jax.costs import Scenario
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.serving import served
from puzzle_jax.serving.hf_export import export_hf
from puzzle_jax.store import write_json

ROOT = Path(__file__).parents[1]
CHAT = Scenario("20/30", 20, 30)
SHAPE = {"hidden_size": 64, "head_dim": 16, "vocab_size": 264}
BLOCKS = {"parent": ("gqa4/w512",) * 3, "child": ("gqa4/w512", "none/w256", "gqa1/none")}


@pytest.fixture
def models(tmp_path) -> dict[str, Path]:
  for name, blocks in BLOCKS.items():
    random_child(tmp_path / name, byte_tokenizer(), blocks, **SHAPE)
    export_hf(tmp_path / name, tmp_path / "out/exports" / name, engine="vllm")
  return {name: tmp_path / "out/exports" / name for name in BLOCKS}


def test_figures(models, tmp_path, quiet):
  options = {"scenarios": [CHAT], "batches": (2, 30), "rounds": 2, "engine": ENGINE, "progress": quiet}
  found = served.serve(models, folders=dict.fromkeys(models, tmp_path / "measured"), **options)
  for name, blocks in BLOCKS.items():
    parts = [part for block in blocks for part in block.split("/")]
    layer = sum(SECONDS["step"][p] for p in parts)
    first = 2 * 20 * (0.125 + layer)
    steps = sum(0.125 + 2 * (layer + sum(SECONDS["per_token"].get(p, 0) for p in parts) * c) for c in range(21, 50))
    model = found[name]
    (figures,) = model.figures["20/30"].values()  # 30 requests of 50 tokens are more than the cache's 1024
    assert figures.first_token_s == pytest.approx(first)
    assert figures.token_s == pytest.approx(steps / 29)
    assert figures.throughput == pytest.approx(2 * 50 / (first + steps))
    assert figures.output_throughput == pytest.approx(2 * 30 / (first + steps))
    assert (model.kv_cache_tokens, model.max_batch) == (1024, {"20/30": 16})  # in blocks of 16 tokens
    assert model.weight_bytes == (models[name] / "model.safetensors").stat().st_size
  assert found["parent"].kv_bytes_per_token == 3 * 2 * 4 * 16 * 2
  assert found["child"].kv_bytes_per_token == 2 * (4 + 1) * 16 * 2
  text = served.table(found["parent"], found["child"])
  assert "KV cache (KiB a token)" in text
  assert f"{5 / 12:.2f}x" in text


def test_the_command_takes_exports_that_are_there(models, tmp_path):
  def said(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.serve_compare", "--engine=vllm", f"--out={tmp_path / 'out'}"]
    return subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, check=False)

  bad = said("--scenarios=20")
  assert bad.returncode == 1
  assert bad.stderr.strip() == "error: --scenarios: 20 is not INPUT/OUTPUT in tokens"
  good = said("--scenarios=20/30", "--batches=2", f"--engine_path={FAKE}")
  assert good.returncode == 0, good.stderr
  assert "vLLM, 0.25.1, 1 x Fake GPU" in good.stdout
  record = json.loads((tmp_path / "out/served.json").read_text())
  assert (
    record["child"]["figures"]["20/30"]["2"]["throughput"] > record["parent"]["figures"]["20/30"]["2"]["throughput"]
  )
  shutil.copytree(tmp_path / "out/exports/child", tmp_path / "other/exports/child")
  measured = {path: path.read_text() for path in (tmp_path / "out/measured/parent").rglob("*.jsonl")}
  shared = (f"--out={tmp_path / 'other'}", f"--parent_out={tmp_path / 'out'}", "--scenarios=20/30", "--batches=2")
  other = said(*shared, f"--engine_path={FAKE}")  # the later of two flags counts
  assert other.returncode == 0, other.stderr
  assert json.loads((tmp_path / "other/served.json").read_text()) == record
  assert measured
  assert {path: path.read_text() for path in measured} == measured  # not loaded again


def test_more_scenarios_of_the_same_prompts(models, tmp_path, quiet):
  options = {"batches": (2,), "rounds": 1, "engine": ENGINE, "progress": quiet}
  folders = dict.fromkeys(models, tmp_path / "measured")
  for outputs in ((30,), (20, 30), (10, 20)):
    scenarios = [Scenario(f"20/{n}", 20, n) for n in outputs]
    found = served.serve(models, scenarios=scenarios, folders=folders, **options)
    assert list(found["child"].figures) == [s.name for s in scenarios]


def test_other_weights_and_other_machines_are_not_taken_up(models, tmp_path, quiet):
  options = {"scenarios": [CHAT], "batches": (2,), "rounds": 1, "engine": ENGINE, "progress": quiet}
  folders = dict.fromkeys(models, tmp_path / "measured")
  found = served.serve(models, folders=folders, **options)
  again = served.serve({"parent": models["parent"], "child": models["parent"]}, folders=folders, **options)
  assert again["child"] == found["parent"]
  for log in (tmp_path / "measured/parent").rglob("*.jsonl"):
    log.write_text(log.read_text().replace("Fake GPU", "Other GPU"))
  with pytest.raises(PuzzleError, match="child was measured with hardware 1 x Fake GPU, another model with 1 x Other"):
    served.serve(models, folders=folders, **options)


def test_an_export_of_another_child_is_refused(tmp_path):
  for name, blocks in BLOCKS.items() | {("second", ("gqa4/w256",) * 3)}:
    random_child(tmp_path / name, byte_tokenizer(), blocks, **SHAPE)
  command = [sys.executable, "-m", "experiments.serve_compare", "--engine=vllm", f"--out={tmp_path / 'out'}"]
  command += [f"--parent={tmp_path / 'parent'}", "--export_only"]

  def said(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
      [*command, f"--child={tmp_path / name}"], cwd=ROOT, capture_output=True, text=True, check=False
    )

  assert [said("child").returncode for _ in range(2)] == [0, 0]
  refused = said("second")
  assert refused.stderr.strip().endswith("is of another model, --dtype or --engine than asked for: name another --out")


def test_a_parent_of_any_format_is_exported(tmp_path):
  from puzzle_jax.parents import open_parent

  random_child(tmp_path / "parent", byte_tokenizer(), BLOCKS["parent"], **SHAPE)
  served.export_parent(open_parent(str(tmp_path / "parent")), tmp_path / "out", dtype="float32", engine="vllm")
  rows = np.arange(20)[None]
  ours, theirs = (LanguageModel.open(tmp_path / name).logits(rows) for name in ("parent", "out"))
  np.testing.assert_array_equal(ours, theirs)


def test_greedy_tokens_are_those_of_the_model(tmp_path):
  random_child(tmp_path / "child", byte_tokenizer(), BLOCKS["child"], **SHAPE)
  rows = np.random.default_rng(0).integers(0, 264, (3, 40))
  found = jax_tokens.tokens(tmp_path / "child", rows, prompt=32)
  model = LanguageModel.open(tmp_path / "child")
  logits = model.logits(rows)
  assert found["forced"] == logits[:, 31:-1].argmax(-1).tolist()
  whole = np.concatenate([rows[:, :32], found["greedy"]], 1)  # greedy decoding is its own teacher
  logits = model.logits(whole)[:, 31:-1]
  assert found["greedy"] == logits.argmax(-1).tolist()
  best = np.sort(logits, -1)
  np.testing.assert_allclose(found["greedy_gaps"], best[..., -1] - best[..., -2], atol=1e-4)


def test_an_engine_is_held_against_jax(models, tmp_path, monkeypatch):
  """The stand-in's i-th token behind a prompt is the prompt's sum and i, modulo the vocabulary."""
  monkeypatch.setattr(vllm_tokens, "PROMPTS", 2)
  monkeypatch.setattr(vllm_tokens, "PROMPT", 8)
  monkeypatch.setattr(vllm_tokens, "TOKENS", 4)
  rows = np.random.default_rng(0).integers(0, 264, (2, 12)).tolist()
  forced = [[sum(row[: 8 + i]) % 264 for i in range(4)] for row in rows]
  greedy = [[(sum(row[:8]) + i) % 264 for i in range(4)] for row in rows]
  shared = {
    "rows": rows,
    "text": "made up",
    "blocks": {},
    "jax": "0",
    "greedy_gaps": [[1.0] * 4, [1.0, 1.0, 0.25, 2.0]],
  }
  write_json(tmp_path / "out/parent.json", shared | {"forced": forced, "greedy": greedy})
  forced = [forced[0], [(forced[1][0] + 1) % 264, *forced[1][1:]]]
  greedy = [greedy[0], [*greedy[1][:2], (greedy[1][2] + 1) % 264, 0]]
  write_json(tmp_path / "out/child.json", shared | {"forced": forced, "greedy": greedy})
  record = vllm_tokens.measure(tmp_path / "out", ENGINE)
  parent, child = record["models"]["parent"], record["models"]["child"]
  assert (parent["teacher_forced_agreement"], parent["prompts_that_differ"]) == (1.0, 0)
  assert child["teacher_forced_agreement"] == 7 / 8
  assert child["gaps_at_first_differences"] == [0.25]  # at the first of the two
  assert record["missed"] == ["child: teacher_forced_agreement"]
  with pytest.raises(PuzzleError, match=r"has no parent.json; write it first, with --workdir and --text"):
    vllm_tokens.measure(tmp_path, ENGINE)
