"""Exported children in Transformers: against Llama itself where the blocks are the parent's, else by identities."""

import dataclasses
import functools
import json
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from children import MIXED, letter_tokenizer, load, random_child
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from puzzle_jax import checkpoint, weights
from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import decoder
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.parents import open_parent
from puzzle_jax.parents.families import ffn_width
from puzzle_jax.serving import hf_export
from puzzle_jax.serving.hf_export import export_hf

LLAMA3 = {
  "rope_type": "llama3",
  "rope_theta": 10_000.0,
  "factor": 8.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 32,
}
pytestmark = pytest.mark.usefixtures("modelling_files_cache")
TOKENS = torch.arange(3 * 10).reshape(3, 10) * 7 % 64


@pytest.fixture(scope="module")
def tokenizer():
  return letter_tokenizer()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tokenizer):
  folder = tmp_path_factory.mktemp("mixed")
  random_child(folder / "child", tokenizer, MIXED)
  export_hf(folder / "child", folder / "hf", dtype="float32")
  return folder


@pytest.mark.parametrize(
  "config",
  [
    {},
    {"num_key_value_heads": 1, "tie_word_embeddings": True},
    {"num_key_value_heads": 2, "rope_parameters": LLAMA3, "head_dim": 16},
    {"attention_bias": True, "intermediate_size": 100},
  ],
  ids=["mha", "mqa-tied", "gqa-llama3", "bias-padded"],
)
@torch.no_grad()
def test_a_child_of_all_parent_blocks_is_the_parent(tmp_path, tokenizer, config):
  base = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 256, "max_position_embeddings": 128}
  torch.manual_seed(0)
  llama = LlamaForCausalLM(LlamaConfig(**(base | config), num_hidden_layers=2, num_attention_heads=4)).eval()
  for p in llama.parameters():
    torch.nn.init.normal_(p, std=0.3)
  llama.save_pretrained(tmp_path / "parent")
  parent = open_parent(str(tmp_path / "parent"))
  (tmp_path / "child").mkdir()
  layers = [parent.layer(i) for i in range(2)]
  checkpoint.write_checkpoint(
    tmp_path / "child", parent.architecture, parent.head(), layers, tokenizer=tokenizer, metadata={}
  )
  export_hf(tmp_path / "child", tmp_path / "hf", dtype="float32")
  model = load(tmp_path / "hf")
  tokens = torch.randint(64, (2, 60))
  expected = llama(tokens).logits
  assert expected.std() > 0.3
  if "intermediate_size" in config:  # padding changes the shape of a sum
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-5)
  else:
    torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=0)


@torch.no_grad()
def test_the_blocks_compute_what_they_should(mixed):
  """A float64 forward pass of the unpadded child, written out."""
  child, model = checkpoint.read_checkpoint(mixed / "child"), load(mixed / "hf")
  c, head = child.architecture.config, {k: torch.from_numpy(v).double() for k, v in child.head().items()}
  mask = torch.full((10, 10), -torch.inf).triu(1).double()
  angles = torch.arange(10)[:, None] / c.rope_theta ** (torch.arange(0, c.head_dim, 2) / c.head_dim)[None]
  rotation = torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())

  def norm(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + c.norm_eps).rsqrt() * weight

  def rotate(x):  # [B, N, T, H]; the two halves of a head are the parts of a complex number
    half = c.head_dim // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * rotation
    return torch.cat([turned.real, turned.imag], -1)

  def attend(x, w):
    q, k, v = ((x @ w[n].T).unflatten(-1, (-1, c.head_dim)).transpose(1, 2) for n in "qkv")
    k, v = (y.repeat_interleave(c.num_heads // k.shape[1], 1) for y in (k, v))
    scores = rotate(q) @ rotate(k).transpose(-1, -2) / c.head_dim**0.5 + mask
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ w["o"].T

  x = head["embed"][TOKENS]
  for i in range(child.architecture.num_layers):
    layer = child.layer(i, np.float64)
    a, f = ({k: torch.from_numpy(v) for k, v in layer[slot].items()} for slot in ("attention", "ffn"))
    if a:
      h = norm(x, a["norm"])
      x = x + (h @ a["linear"].T if "linear" in a else attend(h, a))
    if f:
      h = norm(x, f["norm"])
      gated = torch.nn.functional.silu(h @ f["gate"].T) * (h @ f["up"].T) if "gate" in f else None
      x = x + (h @ f["linear"].T if gated is None else gated @ f["down"].T)
  expected = norm(x, head["norm"]) @ head["head"].T
  torch.testing.assert_close(model(TOKENS).logits.double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_transformers_computes_what_jax_computes(mixed, tmp_path):
  """fp32: equal. bf16: JAX is about as far from fp32, on the same weights, as Transformers is."""
  ours = LanguageModel.open(mixed / "child").logits(TOKENS.numpy())
  np.testing.assert_allclose(load(mixed / "hf")(TOKENS).logits.numpy(), ours, rtol=0, atol=1e-5)
  export_hf(mixed / "child", tmp_path / "hf")
  exact = LanguageModel.open(tmp_path / "hf").logits(TOKENS.numpy())
  half = LanguageModel.open(tmp_path / "hf", dtype=jnp.bfloat16)
  run = jax.jit(functools.partial(decoder.apply, half.architecture, dtype=jnp.bfloat16))
  hidden = run(half.params, TOKENS.numpy()).hidden_BTD
  theirs = load(tmp_path / "hf", dtype="auto")(TOKENS).logits.float().numpy()
  error = [np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in (decoder.logits(half.params, hidden), theirs)]
  assert 1e-3 < error[0] < 1.25 * error[1] < 0.05, error


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_cache_and_padding_change_nothing(mixed, attention):
  model = load(mixed / "hf", attn_implementation=attention)
  whole = model(TOKENS).logits
  first = model(TOKENS[:, :6], use_cache=True)
  rest = model(TOKENS[:, 6:8], past_key_values=first.past_key_values, use_cache=True)
  last = model(TOKENS[:, 8:], past_key_values=rest.past_key_values)
  stepwise = torch.cat([first.logits, rest.logits, last.logits], 1)
  torch.testing.assert_close(stepwise, whole, rtol=0, atol=1e-5)
  mask = torch.ones_like(TOKENS)
  mask[:, :4] = 0
  positions = (mask.cumsum(-1) - 1).clamp(min=0)
  padded = model(TOKENS, attention_mask=mask, position_ids=positions).logits[:, 4:]
  torch.testing.assert_close(padded, model(TOKENS[:, 4:]).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generates_the_same_with_and_without_cache(mixed, options):
  model = load(mixed / "hf")
  options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": -1, **options}
  mask = torch.ones_like(TOKENS)
  mask[0, :3] = 0
  cached = model.generate(TOKENS, attention_mask=mask, use_cache=True, **options)
  options.pop("cache_implementation", None)
  assert cached.shape == (3, 30)
  assert torch.equal(cached, model.generate(TOKENS, attention_mask=mask, use_cache=False, **options))


@torch.no_grad()
def test_a_model_without_any_attention(tmp_path, tokenizer):
  random_child(tmp_path / "child", tokenizer, ("none/w256", "linear/none"))
  export_hf(tmp_path / "child", tmp_path / "hf", dtype="float32")
  model = load(tmp_path / "hf")
  options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
  assert torch.equal(model.generate(TOKENS, **options), model.generate(TOKENS, use_cache=False, **options))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")  # Transformers 5.23
@torch.no_grad()
def test_hidden_states_gradients_and_checkpointing(mixed):
  model = load(mixed / "hf")
  states = model(TOKENS, output_hidden_states=True).hidden_states
  assert len(states) == len(MIXED) + 1
  assert torch.equal(states[4], states[5])  # none/none
  grads = []
  for checkpointing in (False, True):
    model.train()
    model.zero_grad()
    if checkpointing:
      model.gradient_checkpointing_enable()
    with torch.enable_grad():
      model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
  assert min(g.abs().max() for g in grads[0].values()) > 0
  torch.testing.assert_close(grads[0], grads[1])


def test_configuration_round_trip_and_attributes(mixed, tmp_path):
  written = json.loads((mixed / "hf" / "config.json").read_text())
  config = AutoConfig.from_pretrained(mixed / "hf", trust_remote_code=True)
  blocks = config.block_configs
  assert [b.attention.no_op for b in blocks] == [True, False, True, False, True, False]
  assert [b.attention.n_heads_in_group for b in blocks] == [None, 4, None, None, None, 2]
  assert [b.ffn.ffn_mult for b in blocks] == [24.0, 12.0, None, None, None, 12.0]
  model = load(mixed / "hf")
  model.save_pretrained(tmp_path / "again")
  saved = json.loads((tmp_path / "again" / "config.json").read_text())
  for key in ("block_configs", "model_type", "architectures", "num_key_value_heads", "intermediate_size"):
    assert saved[key] == written[key], key
  again = load(tmp_path / "again")
  assert again.config.to_dict()["block_configs"] == written["block_configs"]
  with torch.no_grad():
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_engines_find_what_they_ask_for(mixed, tmp_path):
  """vLLM asks whether `ffn_mult` is there, TensorRT-LLM's engine builder for dataclasses; workers get the config."""
  export_hf(mixed / "child", tmp_path / "hf", dtype="float32", engine="transformers")
  config = AutoConfig.from_pretrained(tmp_path / "hf", trust_remote_code=True)
  ffns = [block.ffn for block in config.block_configs]
  assert [hasattr(ffn, "ffn_mult") for ffn in ffns] == [False, True, True, True, True, False]
  assert (ffns[0].intermediate_size, ffns[5].intermediate_size) == (300, 100)
  written = json.loads((tmp_path / "hf" / "config.json").read_text())["block_configs"]
  assert [dataclasses.asdict(block) for block in config.block_configs] == written
  assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


@torch.no_grad()
def test_an_lm_head_of_its_own_where_the_engine_wants_one(tmp_path, tokenizer):
  random_child(tmp_path / "child", tokenizer, ("gqa2/w300", "linear/linear"), tie_embeddings=True)
  export_hf(tmp_path / "child", tmp_path / "tied", dtype="float32")
  export_hf(tmp_path / "child", tmp_path / "own", dtype="float32", engine="tensorrt_llm")
  tied, own = load(tmp_path / "tied"), load(tmp_path / "own")
  assert tied.lm_head.weight is tied.model.embed_tokens.weight
  assert own.lm_head.weight is not own.model.embed_tokens.weight
  assert torch.equal(tied(TOKENS).logits, own(TOKENS).logits)
  assert {b.ffn.width for b in open_parent(str(tmp_path / "own")).architecture.blocks[:1]} == {512}


def test_an_engine_that_would_not_run_it(mixed, tmp_path):
  message = (
    r"vLLM: layer 0: the first .*; vLLM: layer 2: linear in .*; vLLM: layer 3: linear .* --config.search.engine=vllm"
  )
  with pytest.raises(PuzzleError, match=message):
    export_hf(mixed / "child", tmp_path / "hf", engine="vllm")
  with pytest.raises(PuzzleError, match=r"llama.cpp reads gguf, not hf; engines for hf: tensorrt_llm, "):
    export_hf(mixed / "child", tmp_path / "hf", engine="llama_cpp")
  assert not (tmp_path / "hf").exists()


def test_an_export_can_be_a_parent(mixed):
  parent, child = open_parent(str(mixed / "hf")), checkpoint.read_checkpoint(mixed / "child")
  parent.validate()
  assert [b.name for b in parent.architecture.blocks] == [
    "none/w512",
    "gqa1/w256",
    "none/linear",
    "linear/none",
    "none/none",
    "gqa2/w256",
  ]
  assert parent.architecture.config == child.architecture.config
  assert parent.license == "apache-2.0"
  for name, array in parent.head().items():
    np.testing.assert_array_equal(array, child.head()[name])
  np.testing.assert_array_equal(parent.layer(5)["ffn"]["up"][:100], child.layer(5)["ffn"]["up"])
  assert not parent.layer(5)["ffn"]["up"][100:].any()
  logits = [LanguageModel.open(mixed / name).logits(TOKENS.numpy()) for name in ("child", "hf")]
  np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)  # padding changes the shape of a sum


@pytest.mark.parametrize("hidden", [576, 2048, 3072, 4096, 5120, 8192])
def test_ffn_mult_gives_every_width_back(hidden):
  config = ModelConfig(vocab_size=8, hidden_size=hidden, num_heads=1, head_dim=64, max_context=8)
  for width in range(256, 4 * hidden + 1, 256):
    architecture = Architecture(config, (BlockSpec.parse(f"none/w{width}"),))
    ffn = hf_export.block_config(architecture.blocks[0], architecture)["ffn"]
    assert ffn_width(ffn, hidden) == width


@torch.no_grad()
def test_exact_widths_where_asked_for(mixed, tmp_path):
  export_hf(mixed / "child", tmp_path / "hf", dtype="float32", engine="transformers")
  ffns = [b["ffn"] for b in json.loads((tmp_path / "hf" / "config.json").read_text())["block_configs"]]
  assert (ffns[0]["intermediate_size"], "ffn_mult" in ffns[0], ffns[1]["ffn_mult"]) == (300, False, 12.0)
  torch.testing.assert_close(load(tmp_path / "hf")(TOKENS).logits, load(mixed / "hf")(TOKENS).logits)
  assert open_parent(str(tmp_path / "hf")).architecture == checkpoint.read_checkpoint(mixed / "child").architecture


@torch.no_grad()
def test_biases_of_queries_alone_are_completed_with_zeros(tmp_path, tokenizer):
  random_child(tmp_path / "child", tokenizer, ("gqa2/w256",), qkv_bias=True)
  export_hf(tmp_path / "child", tmp_path / "hf", dtype="float32")
  attention = load(tmp_path / "hf").model.layers[0].self_attn
  assert attention.q_proj.bias.abs().max() > 0
  assert attention.o_proj.bias.abs().max() == 0


@torch.no_grad()
def test_bfloat16_and_shards(mixed, tmp_path, monkeypatch):
  monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
  export_hf(mixed / "child", tmp_path / "hf")
  assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
  model, exact = load(tmp_path / "hf", dtype="auto"), load(mixed / "hf")
  assert model.dtype == torch.bfloat16
  for name, p in exact.to(torch.bfloat16).state_dict().items():
    assert torch.equal(model.state_dict()[name], p), name


def test_tokenizer_generation_config_and_card(mixed, tokenizer, tmp_path):
  theirs = AutoTokenizer.from_pretrained(mixed / "hf", trust_remote_code=True)
  text = "hello world.<turn>"
  assert theirs(text).input_ids == tokenizer.encode(text)
  messages = [{"role": "user", "content": "hello"}]
  assert theirs.apply_chat_template(messages, tokenize=False) == tokenizer.render_chat(messages)
  model = load(mixed / "hf")
  assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == ([28, 29], 28)
  card = (mixed / "hf" / "README.md").read_text()
  assert "license: apache-2.0" in card
  assert "| 3 | linear | none |" in card
  export_hf(mixed / "child", tmp_path / "hf", figures="Perplexity 12.")
  assert "Perplexity 12." in (tmp_path / "hf" / "README.md").read_text()


def test_refuses_bad_input(mixed, tmp_path, tokenizer):
  random_child(tmp_path / "odd", tokenizer, ("gqa3/w256",), hidden_size=40, num_heads=3)
  with pytest.raises(PuzzleError, match="refuses 3 heads with hidden_size=40"):
    export_hf(tmp_path / "odd", tmp_path / "hf")
  with pytest.raises(
    PuzzleError, match="'float8' is not supported; choose one of bfloat16, float32, float8_tensor, float8_channel"
  ):
    export_hf(mixed / "child", tmp_path / "hf", dtype="float8")
  with pytest.raises(PuzzleError, match="hf is not empty; name a new directory"):
    export_hf(mixed / "child", mixed / "hf")
  shutil.copytree(mixed / "child", tmp_path / "child")
  (tmp_path / "child" / "model.safetensors").unlink()
  with pytest.raises(PuzzleError, match=r"holds neither model.safetensors"):
    export_hf(tmp_path / "child", tmp_path / "hf")
