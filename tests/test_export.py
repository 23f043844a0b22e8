"""`experiments.export` and which child it takes."""

import filecmp
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from children import LLAMACPP, byte_tokenizer, random_child

from puzzle_jax.config import RunConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import open_parent
from puzzle_jax.serving.export import Child, export, find_child
from puzzle_jax.store import StageStore, write_json

SHAPE = {"hidden_size": 64, "head_dim": 16, "vocab_size": 264}
EVALUATION = {
  "before_gkd": {"kl": 0.5, "kl_stderr": 0.01, "perplexity": 31.0, "parent_perplexity": 20.0, "tokens": 4000},
  "after_gkd": {"kl": 0.25, "kl_stderr": 0.02, "perplexity": 23.5, "parent_perplexity": 20.0, "tokens": 4000},
  "timing": {"seconds": {"parent": {"prefill_s": 1.0, "decode_s": 4.0}, "child": {"prefill_s": 0.5, "decode_s": 2.0}}},
}


@pytest.fixture
def workdir(tmp_path):
  """What an export reads of a run's directory."""
  random_child(tmp_path / "source", byte_tokenizer(), LLAMACPP, **SHAPE)
  root = tmp_path / "run"
  for stage in ("child", "gkd"):
    store = StageStore(root / stage)
    store.begin({})
    with store.put_folder("model") as folder:
      for file in (tmp_path / "source").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    store.finish({})
  evaluated = StageStore(root / "evaluation")
  evaluated.begin({"inputs": {stage: StageStore(root / stage).content() for stage in ("child", "gkd")}})
  evaluated.put_json("evaluation.json", EVALUATION)
  evaluated.finish({})
  write_json(root / "config.json", RunConfig(parent=str(tmp_path / "source")).to_dict())
  return root


def test_which_child(workdir, tmp_path):
  distilled = Child(workdir / "gkd" / "model", workdir)
  for given in (workdir, workdir / "gkd", workdir / "gkd" / "model"):
    assert find_child(given) == distilled
  before = Child(workdir / "child" / "model", workdir, before_gkd=True)
  assert find_child(workdir / "child") == find_child(str(workdir / "child" / "model")) == before
  assert find_child(tmp_path / "source") == Child(tmp_path / "source")
  with pytest.raises(
    PuzzleError,
    match=r"holds no child \(architecture.json, or an export.s config.json\); name a finished run's work directory",
  ):
    find_child(tmp_path)
  manifest = workdir / "gkd" / "manifest.json"
  manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"done": False}))
  with pytest.raises(PuzzleError, match="gkd is not finished; start the run again"):
    find_child(workdir)
  (workdir / "child" / "model" / "model.safetensors").write_bytes(b"damaged")
  with pytest.raises(PuzzleError, match=r"model.safetensors is missing or corrupt"):
    find_child(workdir / "child")


def test_the_runs_figures_are_on_the_card(workdir, tmp_path):
  export(workdir, tmp_path / "hf")
  card = (tmp_path / "hf" / "README.md").read_text()
  assert card.startswith("---\n")
  assert "license: apache-2.0" in card
  assert "The parent's licence, apache-2.0, applies." in card
  assert "| perplexity | 20.00 | 23.50 |" in card
  assert "| KL to the parent (nats a token) | 0 | 0.2500 ± 0.0200 |" in card
  assert "| decode (tokens/s of each request) | 32.0 | 64.0 |" in card  # 128 tokens
  assert "TensorRT-LLM (PyTorch backend)" in card
  assert "engine builder" in card
  assert "vLLM" not in card  # it runs no linear attention
  export(workdir / "child", tmp_path / "before")
  card = (tmp_path / "before" / "README.md").read_text()
  assert "| perplexity | 20.00 | 31.00 |" in card
  assert "decode (" not in card
  trained = StageStore(workdir / "gkd")
  trained.put_json("history.json", {"steps": ["other ones"]})
  export(workdir, tmp_path / "after")
  assert "Measured" not in (tmp_path / "after" / "README.md").read_text()  # these figures are of the child before


def test_an_export_is_a_child_again(workdir, tmp_path):
  """Copied to where nothing else of the run is."""
  export(workdir, tmp_path / "hf", dtype="float32", engine="transformers")
  assert find_child(tmp_path / "hf") == Child(tmp_path / "hf")
  for name, child in {"of_the_run": workdir, "of_the_export": tmp_path / "hf"}.items():
    export(child, tmp_path / f"{name}.gguf", engine="llama_cpp")
  ours, theirs = (open_parent(str(tmp_path / f"{name}.gguf")) for name in ("of_the_run", "of_the_export"))
  assert (ours.architecture, ours.license) == (theirs.architecture, theirs.license)
  for name in ours.weights.shapes:
    np.testing.assert_array_equal(ours.weights.read(name), theirs.weights.read(name))
  assert ours.weights.tokenizer_metadata() == theirs.weights.tokenizer_metadata()
  export(tmp_path / "hf", tmp_path / "again", dtype="float32", engine="transformers")
  same = ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
  assert filecmp.cmpfiles(tmp_path / "hf", tmp_path / "again", same, shallow=False)[0] == same


def test_a_gguf_parents_tokenizer_is_taken_from_it(workdir, tmp_path):
  """Here it says that texts begin with BOS; the child's own tokenizer.json does not."""

  def adds_bos(file):
    return open_parent(str(file)).tokenizer().encode("") != []

  random_child(tmp_path / "other", byte_tokenizer(add_bos=True), LLAMACPP, **SHAPE)
  export(tmp_path / "other", tmp_path / "parent.gguf", format="gguf")
  export(workdir, tmp_path / "0.gguf", format="gguf")  # the run's parent is a folder
  export(workdir, tmp_path / "1.gguf", format="gguf", dtype="Q8_0", parent=str(tmp_path / "parent.gguf"))
  config = json.loads((workdir / "config.json").read_text())
  write_json(workdir / "config.json", config | {"parent": str(tmp_path / "parent.gguf")})
  export(workdir, tmp_path / "2.gguf", format="gguf")
  assert [adds_bos(tmp_path / f"{i}.gguf") for i in range(3)] == [False, True, True]
  random_child(tmp_path / "small", byte_tokenizer(), LLAMACPP, **SHAPE | {"vocab_size": 300})
  with pytest.raises(PuzzleError, match="tokenizer has 264 tokens, the child's embedding 300: name its parent"):
    export(tmp_path / "small", tmp_path / "3.gguf", format="gguf", parent=str(tmp_path / "parent.gguf"))
  with pytest.raises(PuzzleError, match="format 'onnx' is unknown; known: hf, gguf"):
    export(workdir, tmp_path / "x", format="onnx")


def test_the_command(workdir, tmp_path):
  command = [sys.executable, "-m", "experiments.export", f"--child={workdir}"]
  options = {"cwd": Path(__file__).parents[1], "capture_output": True, "text": True}
  out = tmp_path / "exports" / "child.gguf"
  made = subprocess.run([*command, "--format=gguf", "--dtype=Q4_1", f"--out={out}"], check=True, **options)
  assert made.stdout == f"exported {workdir} to {out}\n"
  assert open_parent(str(out)).architecture.num_layers == len(LLAMACPP)
  refused = subprocess.run([*command, "--engine=sglang", f"--out={tmp_path / 'x'}"], check=False, **options)
  assert refused.returncode == 1
  assert refused.stderr.startswith("error: SGLang: layer 1: linear in place of attention is not run; use gqaN or none;")
  assert "gqa4 in layer 0, gqa1 in layer 4" in refused.stderr
  assert not (tmp_path / "x").exists()


def test_imports_no_jax():
  modules = "puzzle_jax.serving.export, puzzle_jax.serving.gguf_export, puzzle_jax.serving.model_card"
  code = f"import sys, {modules}; sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
  code = "import sys, puzzle_jax.serving.calibration; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
