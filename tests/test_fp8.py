"""8-bit exports: ModelOpt's layout, rounding against PyTorch's, and calibration against what the model itself reads."""

import functools
import json

import jax
import numpy as np
import pytest
import torch
from children import letter_tokenizer, load, random_child
from safetensors import safe_open

from puzzle_jax import store
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import decoder
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.parents import open_parent
from puzzle_jax.serving.hf_export import export_hf

BLOCKS = ("gqa2/w300", "linear/w64", "none/linear", "gqa4/none")
pytestmark = pytest.mark.usefixtures("modelling_files_cache")
TOKENS = torch.arange(3 * 10).reshape(3, 10) * 7 % 64
SHAPE = {"hidden_size": 64, "head_dim": 16}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run whose parent is the child itself: what its layers read is what the parent's read."""
  root = tmp_path_factory.mktemp("run")
  random_child(root / "child", letter_tokenizer(), BLOCKS, **SHAPE)
  model = LanguageModel.open(root / "child")
  tokens = (np.arange(6 * 20).reshape(6, 20) * 7 % 64).astype(np.int32)
  cut, padding = 12, 3  # two documents a row, then padding
  segments = np.repeat([[1] * cut + [2] * (20 - cut - padding) + [0] * padding], 6, axis=0).astype(np.int32)
  positions = np.repeat([[*range(cut), *range(20 - cut)]], 6, axis=0).astype(np.int32)
  run = jax.jit(functools.partial(decoder.apply, model.architecture))
  out = run(model.params, tokens, positions_BT=positions, segments_BT=segments)
  inputs = [np.asarray(model.params["embed"])[tokens], *np.asarray(out.layers_L)]
  data, activations = (store.StageStore(root / name) for name in ("data", "activations"))
  data.put_arrays("heldout.safetensors", {"tokens": tokens, "segment_ids": segments, "positions": positions})
  for i, x in enumerate(inputs):
    activations.put_arrays(f"heldout/layer_{i:02d}.safetensors", {"x": x})
  export_hf(root / "child", root / "float32", dtype="float32")
  export_hf(root / "child", root / "float8_tensor", dtype="float8_tensor", workdir=root)
  export_hf(root / "child", root / "float8_channel", dtype="float8_channel")
  return root


def tensors(folder):
  with safe_open(folder / "model.safetensors", framework="pt") as f:
    return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (not a dict)


@pytest.mark.parametrize("dtype", ["float8_tensor", "float8_channel"])
def test_weights_are_rounded_as_pytorch_rounds(workdir, dtype):
  found, exact = tensors(workdir / dtype), tensors(workdir / "float32")
  matrices = [n for n, w in exact.items() if w.ndim == 2 and n.startswith("model.layers.")]
  kinds = ("weight_scale", "input_scale") if dtype == "float8_tensor" else ("weight_scale",)
  scales = {n.replace("weight", kind) for n in matrices for kind in kinds}
  assert found.keys() == exact.keys() | scales
  for name, w in exact.items():
    if name not in matrices:
      assert torch.equal(found[name], w.to(torch.bfloat16))
      continue
    scale = found[name.replace("weight", "weight_scale")]
    assert scale.dtype == torch.float32
    assert scale.shape == (() if dtype == "float8_tensor" else w.shape[:1])
    wide = scale.reshape(-1, 1)
    assert torch.equal(found[name], (w / wide).clamp(-448, 448).to(torch.float8_e4m3fn)), name
    assert (found[name].float() * wide - w).abs().max() <= (w.abs() / 16).max()  # half of three bits


def test_what_engines_put_together_shares_a_scale(workdir):
  """vLLM and TensorRT-LLM would round q, k, v and gate, up again to the largest scale of each."""
  found, exact = tensors(workdir / "float8_tensor"), tensors(workdir / "float32")
  for stem, fused in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
    names = [f"model.layers.0.{stem}.{m}_proj" for m in fused]
    for kind in ("weight_scale", "input_scale"):
      assert len({float(found[f"{n}.{kind}"]) for n in names}) == 1
    largest = max(float(exact[f"{n}.weight"].abs().max()) for n in names)
    assert float(found[f"{names[0]}.weight_scale"]) == pytest.approx(largest / 448, rel=1e-6)


@torch.no_grad()
def test_calibration_sees_what_the_model_itself_reads(workdir):
  """Each document alone through the whole fp32 model."""
  model, largest = load(workdir / "float32"), {}
  for name, module in model.model.layers.named_modules():
    if isinstance(module, torch.nn.Linear):
      module.register_forward_pre_hook(
        lambda _, x, name=name: largest.update({name: max(largest.get(name, 0.0), float(x[0].abs().max()))})
      )
  tokens = torch.from_numpy(store.StageStore(workdir / "data").get_arrays("heldout.safetensors")["tokens"]).long()
  for document in (tokens[:, :12], tokens[:, 12:17]):
    model(document)
  found = tensors(workdir / "float8_tensor")
  scales = {n.removesuffix(".input_scale"): float(x) * 448 for n, x in found.items() if n.endswith("input_scale")}
  assert scales == pytest.approx({f"model.layers.{n}": x for n, x in largest.items()}, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float8_tensor", "float8_channel"])
@torch.no_grad()
def test_transformers_runs_it_and_saves_it_again(workdir, tmp_path, dtype):
  exact, model = load(workdir / "float32"), load(workdir / dtype, dtype="auto")
  assert model.model.layers[1].self_attn.linear_attn.weight.dtype == torch.float8_e4m3fn
  logits = model(TOKENS).logits
  error = (logits.float() - exact(TOKENS).logits).norm() / exact(TOKENS).logits.norm()
  assert 0.01 < error < 0.12  # three bits of mantissa
  model.save_pretrained(tmp_path / "again")
  assert torch.equal(load(tmp_path / "again", dtype="auto")(TOKENS).logits, logits)


def test_configurations(workdir):
  for dtype, algorithm in (("float8_tensor", "FP8"), ("float8_channel", "FP8_PER_CHANNEL_PER_TOKEN")):
    config = json.loads((workdir / dtype / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    for found, ignore in (
      (config["quantization_config"], "ignore"),
      (json.loads((workdir / dtype / "hf_quant_config.json").read_text())["quantization"], "exclude_modules"),
    ):
      assert (found["quant_algo"], found[ignore]) == (algorithm, ["lm_head"])
    assert config["quantization_config"]["quant_method"] == "modelopt"
    card = (workdir / dtype / "README.md").read_text()
    assert "PyTorch backend" in card
    assert "engine builder" not in card  # it reads no 8-bit weights of this layout
  with pytest.raises(PuzzleError, match=r"quantization_config=.*is not supported: take the model in bfloat16"):
    open_parent(str(workdir / "float8_channel"))


def test_refusals(workdir, tmp_path):
  with pytest.raises(PuzzleError, match="give the run's work directory as the child, or export as float8_channel"):
    export_hf(workdir / "child", tmp_path / "hf", dtype="float8_tensor")
  with pytest.raises(PuzzleError, match=r"has no data/heldout.safetensors, which float8_tensor takes its scales from"):
    export_hf(workdir / "child", tmp_path / "hf", dtype="float8_tensor", workdir=tmp_path)
  random_child(tmp_path / "other", letter_tokenizer(), ("gqa2/w64",))
  with pytest.raises(PuzzleError, match=r"activations of layer 0 are of shape \(6, 20, 64\); is this"):
    export_hf(tmp_path / "other", tmp_path / "hf", dtype="float8_tensor", workdir=workdir)
  with pytest.raises(
    PuzzleError, match=r"TensorRT-LLM .engine builder. does not read float8_channel weights; it reads"
  ):
    export_hf(workdir / "child", tmp_path / "hf", dtype="float8_channel", engine="tensorrt_llm_engine")
  random_child(tmp_path / "odd", letter_tokenizer(), ("gqa1/w64",), hidden_size=24, num_heads=2, head_dim=12)
  with pytest.raises(PuzzleError, match=r"q_proj.weight has shape \(24, 24\); in 8 bits engines need multiples of 16"):
    export_hf(tmp_path / "odd", tmp_path / "hf", dtype="float8_channel")
  assert not (tmp_path / "hf").exists()
