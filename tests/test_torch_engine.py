"""The built-in PyTorch engine: against JAX and Transformers, its decode kernel's arithmetic, and costs from it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from children import MIXED, byte_tokenizer, load, random_child

from puzzle_jax import space
from puzzle_jax.arch import Architecture, RopeScaling
from puzzle_jax.costs import CostTable, Scenario
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.parents import open_parent
from puzzle_jax.serving import torch_attention, torch_engine, torch_timing
from puzzle_jax.serving.hf_export import export_hf
from puzzle_jax.serving.torch_engine import Cache, RandomWeights, Session
from puzzle_jax.serving.torch_timing import TimingConfig

ROOT = Path(__file__).parents[1]
BLOCKS = ("gqa4/w300", *MIXED, "gqa2/none")
CHAT = Scenario("6/10", 6, 10)


def session_of(folder: Path, *, batch: int = 2, length: int = 16) -> Session:
  model = torch_engine.load(open_parent(str(folder)), dtype="float32")
  heads = torch_engine.kv_heads(model.architecture)
  return Session(model, Cache(model.architecture.config, heads, batch=batch, length=length, dtype=torch.float32))


def teacher_forced(session: Session, tokens: torch.Tensor, prompt: int) -> np.ndarray:
  """Logits [B, T, V] behind the prompt and behind each token that follows it."""
  session.prefill(tokens[:, :prompt])
  found = [session.logits.clone()]
  for at in range(prompt, tokens.shape[1]):
    session.tokens.copy_(tokens[:, at])
    session.decode(1)
    found.append(session.logits.clone())
  return torch.stack(found, 1).numpy()


@pytest.mark.parametrize(
  "config",
  [
    {},
    {"tie_embeddings": True, "qkv_bias": True, "o_bias": True},
    {"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32)},
  ],
  ids=["plain", "tied_biases", "rope_scaling"],
)
def test_prefill_and_decode_equal_jax(tmp_path, config):
  random_child(tmp_path / "child", byte_tokenizer(), BLOCKS, **config)
  tokens = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
  expected = LanguageModel.open(str(tmp_path / "child")).logits(jnp.asarray(tokens.numpy()))
  found = teacher_forced(session_of(tmp_path / "child"), tokens, 5)
  np.testing.assert_allclose(found, np.asarray(expected)[:, 4:], atol=1e-4 * np.abs(expected).max())


def test_equal_transformers(tmp_path):
  random_child(tmp_path / "child", byte_tokenizer(), ("gqa2/w256",) * 3, vocab_size=264)
  export_hf(tmp_path / "child", tmp_path / "out", dtype="float32")
  tokens = torch.randint(264, (2, 9), generator=torch.Generator().manual_seed(0))
  with torch.inference_mode():
    expected = load(tmp_path / "out", dtype=torch.float32)(tokens).logits[:, 3:].numpy()
  found = teacher_forced(session_of(tmp_path / "out"), tokens, 4)  # the exported directory is read, too
  np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_long_batches_are_read_in_parts(tmp_path, monkeypatch):
  random_child(tmp_path / "child", byte_tokenizer(), BLOCKS)
  tokens = torch.randint(64, (5, 8), generator=torch.Generator().manual_seed(0))
  whole = teacher_forced(session_of(tmp_path / "child", batch=5), tokens, 6)
  monkeypatch.setattr(torch_engine, "_PREFILL_TOKENS", 12)  # two rows
  np.testing.assert_allclose(teacher_forced(session_of(tmp_path / "child", batch=5), tokens, 6), whole, atol=1e-5)
  with pytest.raises(PuzzleError, match="prompts 5 x 16 do not fit a cache of 5 x 16"):
    session_of(tmp_path / "child", batch=5).prefill(torch.zeros(5, 16, dtype=torch.int64))


def test_shares_of_a_cache_are_joined():
  rng = torch.Generator().manual_seed(0)
  q, k, v = (torch.randn(shape, generator=rng) for shape in ((2, 4, 8), (2, 2, 12, 8), (2, 2, 12, 8)))
  wide_k, wide_v = (x.repeat_interleave(2, 1) for x in (k, v))
  scores = torch.einsum("bnh,bnsh->bns", q, wide_k) * 8**-0.5
  outs, sums = [], []
  for part in (slice(0, 5), slice(5, 12)):
    outs.append(torch.einsum("bns,bnsh->bnh", scores[..., part].softmax(-1), wide_v[:, :, part]))
    sums.append(scores[..., part].logsumexp(-1))
  found = torch_attention.join(torch.stack(outs, 2), torch.stack(sums, 2), torch.float32)
  torch.testing.assert_close(found, torch_attention.masked_decode(q, k, v, torch.full((2,), 12)))


def test_shares_fill_the_gpu():
  assert torch_attention.splits_of(64, 8, 2048, 132) == 1
  assert torch_attention.splits_of(1, 8, 100_000, 132) == 33
  assert torch_attention.splits_of(1, 8, 300, 132) == 2  # no share below four blocks


def test_the_benchmark_of_decoding(tmp_path, monkeypatch):
  """At a tiny size, vLLM's step from a table whose steps are 1 s and 0.5 s a layer."""
  parent = tmp_path / "parent"
  random_child(parent, byte_tokenizer(), ("gqa2/w64",) * 6, vocab_size=264)
  block = {"kind": "decode", "batch": 2, "tokens": 10, "seconds": 0.0}
  lines = [block | {"model": f"gqa2/w64 x {d}", "tokens": t, "seconds": 1 + d / 2} for d in (6, 12) for t in (10, 40)]
  table = {"details": {"points": lines, "timing": {"decode_steps": 4}}, "hardware": "there"}
  (tmp_path / "vllm.json").write_text(json.dumps(table))
  code = f"import pathlib, experiments; experiments.RESULTS = pathlib.Path({str(tmp_path)!r}); "
  code += "from absl import app; from experiments.benchmarks import decode; app.run(decode.main)"
  given = [f"--parent={parent}", "--name=tiny", "--batch=2", "--context=32", "--layers=2,4", "--steps=2", "--rounds=2"]
  given += ["--bandwidth_mib=8", f"--vllm={tmp_path / 'vllm.json'}"]
  ended = subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True, text=True, check=False)
  assert ended.returncode == 0, ended.stderr
  record = json.loads((tmp_path / "decode_tiny.json").read_text())
  assert record["vllm"]["step_s"] == pytest.approx(1 + 6 / 2)
  a = open_parent(str(parent)).architecture
  head = 264 * a.config.hidden_size
  floor = 2 * (a.num_params() - head + 2 * a.config.hidden_size) + 2 * 32 * a.kv_bytes_per_token()
  assert record["floor_s"] * record["bandwidth_bytes_per_s"] == pytest.approx(floor)
  assert record["step_s"] == pytest.approx(
    sum(s * record["depths"][d]["seconds"] for d, s in (("2", -1.0), ("4", 2.0)))
  )


@pytest.fixture
def parent(architecture) -> Architecture:
  return architecture(*["gqa4/w48"] * 6, num_heads=4)


def options(quiet) -> dict:
  config = TimingConfig(dtype="float32", layers=6, rounds=2, decode_steps=2)
  return {"scenarios": [CHAT], "batches": (1, 3), "config": config, "hardware": "here", "progress": quiet}


def test_costs_explain_whole_models(parent, quiet, monkeypatch):
  """With seconds that are known: each model's are its blocks', the prefill's by its tokens, a step's by its context."""

  def once(session, prompts, scenario, steps):
    work = sum(b.num_params(parent.config) for b in session._model.architecture.blocks)
    heads = sum(torch_engine.kv_heads(session._model.architecture))
    found = {"prefill": 1.0 + prompts.numel() * work}
    return found | {str(c): 0.5 + work + heads * c for c in torch_timing.contexts(scenario)}

  monkeypatch.setattr(torch_timing, "_once", once)
  built = space.build(parent, attention=["gqa1", "linear", "none"], ffn=["w24", "linear", "none"], ffn_multiple=8)
  child = dataclasses.replace(parent, blocks=tuple(layer.blocks[3 * i] for i, layer in enumerate(built.layers)))
  table = torch_timing.measure(parent, built, children={"child": child}, **options(quiet))
  for s in by_name(built):
    size, heads = s.num_params(parent.config), getattr(s, "kv_heads", 0)
    found = table.subblocks[s.id][CHAT.name]["3"]
    assert found["prefill_s"] == pytest.approx(18 * size)
    assert found["decode_s"] == pytest.approx(sum(size + heads * c for c in range(6, 15)))
  assert table.fixed[CHAT.name]["3"] == pytest.approx({"prefill_s": 1.0, "decode_s": 4.5}, rel=1e-6)
  assert max(abs(p.get("affine_residual", 0)) for p in table.details["points"]) < 1e-9
  assert max(abs(c["error"]) for c in table.details["children"]) < 1e-9
  assert (table.backend, table.bytes_per_value, table.kv_width) == ("torch", 4, 4)


def by_name(built: space.Space) -> set:
  return {s for layer in built.layers for s in (*layer.attention, *layer.ffn)}


@pytest.mark.parametrize(
  "error, why",
  [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), "CUDA out of memory"),
    (
      RuntimeError("DefaultCPUAllocator: can't allocate memory: you"),
      "DefaultCPUAllocator: can't allocate memory: you",
    ),
  ],
)
def test_what_does_not_fit_is_said(parent, quiet, monkeypatch, error, why):
  built = space.build(parent, attention=["none"], ffn=["none"], ffn_multiple=8)
  real = torch_timing.Cache

  def full(*args, batch, **kwargs):
    if batch == 3:
      raise error
    return real(*args, batch=batch, **kwargs)

  monkeypatch.setattr(torch_timing, "Cache", full)
  table = torch_timing.measure(parent, built, **options(quiet))
  assert table.details["unreachable"] == [{"scenario": "6/10", "batch": 3, "why": why}]
  assert list(table.fixed["6/10"]) == ["1"]
  with pytest.raises(PuzzleError, match=f"PyTorch reached none of the scenarios at any batch: {why}"):
    torch_timing.measure(parent, built, **(options(quiet) | {"batches": (3,)}))


def test_bad_settings():
  with pytest.raises(PuzzleError, match="dtype=Q4_1 is not of the PyTorch engine; take bfloat16 or float32"):
    TimingConfig(dtype="Q4_1")
  with pytest.raises(PuzzleError, match="layers >= 6"):
    TimingConfig(layers=4)


def test_the_engine_needs_no_jax():
  code = "import sys, puzzle_jax.serving.torch_timing; assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("engine", ["torch", "jax"])
def test_the_command_writes_a_table(tmp_path, engine):
  command = [sys.executable, "-m", "experiments.profile", f"--engine={engine}", f"--out={tmp_path / 'costs.json'}"]
  random_child(tmp_path / "parent", byte_tokenizer(), ("gqa4/w64",) * 6, vocab_size=264)
  command += ["--config=configs/tiny.py", f"--config.parent={tmp_path / 'parent'}", "--scenarios=6/4", "--rounds=1"]
  ended = subprocess.run([*command, "--batches=2"], cwd=ROOT, capture_output=True, text=True, check=False)
  assert ended.returncode == 0, ended.stderr
  table = CostTable.from_json(json.loads((tmp_path / "costs.json").read_text()))
  assert (table.backend, list(table.fixed["6/4"])) == (engine, ["2"])
  if engine == "torch":
    (tmp_path / "folder").mkdir()
    refused = subprocess.run(
      [*command, f"--out={tmp_path / 'folder'}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert refused.stderr.strip().endswith("folder cannot be written; name a file in a folder of yours")


def test_random_weights_are_shared(parent):
  weights = RandomWeights(parent, dtype="float32")
  first, second = weights.model(parent), weights.model(dataclasses.replace(parent, blocks=parent.blocks[:3]))
  assert first.layers[2]["ffn"]["down"] is second.layers[2]["ffn"]["down"]
  assert first.layers[1]["ffn"]["down"] is not first.layers[2]["ffn"]["down"]


def test_parent_and_child_side_by_side(tmp_path):
  for name, blocks in {"parent": ("gqa4/w256",) * 2, "child": ("gqa1/w256", "linear/none")}.items():
    random_child(tmp_path / name, byte_tokenizer(), blocks, vocab_size=264)
    export_hf(tmp_path / name, tmp_path / "out/exports" / name, engine="torch")
  command = [sys.executable, "-m", "experiments.serve_compare", "--engine=torch", f"--out={tmp_path / 'out'}"]
  command += ["--scenarios=6/4", "--batches=2", "--rounds=1"]
  ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert ended.returncode == 0, ended.stderr
  assert "6/4, batch 2: tokens/s, in and out" in ended.stdout
  found = json.loads((tmp_path / "out/served.json").read_text())
  for model in found["parent"], found["child"]:
    figures = model["figures"]["6/4"]["2"]
    whole_s = 2 * 10 / figures["throughput"]
    assert figures["first_token_s"] + 3 * figures["token_s"] == pytest.approx(whole_s)
  assert found["parent"]["kv_bytes_per_token"] == 8 * found["child"]["kv_bytes_per_token"]
