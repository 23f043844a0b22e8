"""Specs and their arithmetic, against the programs and the oracle that they describe."""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from puzzle_jax import arch
from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig, RopeScaling, parse_subblock
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import decoder

MIXED = ("gqa4/w48", "gqa2/w16", "gqa2/w16", "linear/none", "none/linear", "none/none", "gqa1/w48")


def test_short_names_round_trip(architecture):
  assert [b.name for b in architecture(*MIXED).blocks] == list(MIXED)
  assert parse_subblock("attention", "gqa8") == arch.GQA(8)
  assert parse_subblock("ffn", "linear") == arch.LinearFFN() != parse_subblock("attention", "linear")
  ids = [s.id for s in BlockSpec.parse("linear/linear").subblocks]
  assert ids == ["attention.linear", "ffn.linear"]


@pytest.mark.parametrize("tie", [True, False])
def test_json_round_trip(architecture, tie):
  scaling = RopeScaling(8.0, 1.0, 4.0, 64)
  a = architecture(*MIXED, tie_embeddings=tie, qkv_bias=tie, rope_scaling=scaling if tie else None)
  back = Architecture.from_json(json.loads(str(a)))
  assert back == a
  assert hash(back) == hash(a)


def test_runs_are_neighbours_of_equal_spec(architecture):
  a = architecture("gqa2/w16", "gqa2/w16", "none/w16", "gqa2/w16")
  assert [(spec.name, n) for spec, n in a.runs()] == [("gqa2/w16", 2), ("none/w16", 1), ("gqa2/w16", 1)]


@pytest.mark.parametrize("kv_heads, tie, bias", [(4, False, False), (2, True, True), (1, False, True)])
def test_parameters_are_those_of_transformers(architecture, kv_heads, tie, bias):
  a = architecture(*[f"gqa{kv_heads}/w48"] * 3, tie_embeddings=tie, qkv_bias=bias, o_bias=bias)
  c = a.config
  with torch.device("meta"):
    llama = LlamaForCausalLM(
      LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=c.num_heads,
        num_key_value_heads=kv_heads,
        head_dim=c.head_dim,
        tie_word_embeddings=tie,
        attention_bias=bias,
      )
    )
  shapes = {name: tuple(p.shape) for name, p in llama.named_parameters()}
  assert a.checkpoint_shapes() == shapes
  assert a.num_params() == llama.num_parameters()


@pytest.mark.parametrize("tie", [True, False])
def test_arithmetic_is_that_of_the_arrays(architecture, tie):
  a = architecture(*MIXED, tie_embeddings=tie, qkv_bias=True)
  params = jax.eval_shape(lambda: decoder.init(a, jax.random.key(0)))
  assert a.num_params() == sum(x.size for x in jax.tree.leaves(params))
  assert [b.num_params(a.config) for b in a.blocks] == [
    sum(x.size for x in jax.tree.leaves(layer)) for layer in params["layers"]
  ]
  batch, length = 2, 16
  cache = jax.eval_shape(lambda: decoder.empty_cache(a, batch=batch, length=length, dtype=jnp.bfloat16))
  assert a.kv_bytes_per_token() * batch * length == sum(2 * x.size for x in jax.tree.leaves(cache))


@pytest.mark.parametrize("block", MIXED)
def test_flops_are_those_of_the_program(architecture, matmul_flops, block):
  tokens = 10
  a = architecture(block)

  def logits(params, ids):
    return decoder.logits(params, decoder.apply(a, params, ids).hidden_BTD)

  params = jax.eval_shape(lambda: decoder.init(a, jax.random.key(0)))
  program = jax.make_jaxpr(logits)(params, jnp.zeros((1, tokens), jnp.int32))
  assert matmul_flops(program.jaxpr) == tokens * a.flops_per_token(context=tokens)


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda c: ModelConfig(**(vars(c) | {"head_dim": 7})), "head_dim=7 must be even"),
    (lambda c: ModelConfig(**(vars(c) | {"hidden_size": 0})), "hidden_size=0 must be a whole number from 1"),
    (lambda c: arch.GQA(3).tensors(c), "gqa3: 3 KV heads do not divide 4 query heads"),
    (lambda c: arch.SwiGLU(0).tensors(c), "w0: an FFN needs at least one channel; use `none`"),
    (lambda c: BlockSpec.parse("gqa2"), "'gqa2' is not of the form attention/ffn"),
    (lambda c: BlockSpec.parse("w48/gqa2"), "'w48' is no attention subblock; known: gqaN, linear, none"),
    (lambda c: BlockSpec.parse("gqa007/w48"), "'gqa007' is no attention subblock; known: gqaN, .*without zeros before"),
    (lambda c: parse_subblock("ffn", "w0128"), "'w0128' is no ffn subblock"),
    (lambda c: parse_subblock("ffn", "w" + "9" * 5000), "is no ffn subblock"),
    (lambda c: RopeScaling(math.nan, 1.0, 4.0, 64), "scaling llama3: factor=nan must be a number above 0"),
    (lambda c: RopeScaling(8.0, -1.0, 4.0, 64), "low_freq_factor=-1.0 must be a number above 0"),
    (lambda c: RopeScaling(8.0, 1.0, math.inf, 64), "high_freq_factor=inf must be a number above 0"),
    (lambda c: RopeScaling(8.0, 4.0, 4.0, 64), "low_freq_factor=4.0 must be below high_freq_factor=4.0"),
    (lambda c: RopeScaling(8.0, 1.0, 4.0, 0), "original_max_context=0 must be a whole number from 1"),
    (lambda c: ModelConfig(**(vars(c) | {"tie_embeddings": "no"})), "tie_embeddings='no' must be true or false"),
    (lambda c: ModelConfig(**(vars(c) | {"rope_scaling": 8.0})), "rope_scaling=8.0 must hold the factors of llama3"),
    (lambda c: BlockSpec(arch.NoFFN(), arch.NoFFN()), "is no attention subblock"),
    (lambda c: Architecture.from_json({"format": "other/1"}), "'other/1' is not 'puzzle-architecture/1'"),
    (lambda c: Architecture.from_json({"format": arch.FORMAT, "config": {}}), "architecture: .*expected what"),
    (
      lambda c: Architecture.from_json({"format": arch.FORMAT, "config": vars(c) | {"experts": 8}, "blocks": []}),
      "unexpected keyword argument 'experts'",
    ),
  ],
)
def test_refuses(architecture, make, message):
  with pytest.raises(PuzzleError, match=message):
    make(architecture().config)


def test_what_a_table_or_an_engine_needs_imports_no_jax():
  modules = "puzzle_jax.arch, puzzle_jax.space, puzzle_jax.costs, puzzle_jax.store"
  code = f"import sys, {modules}; print({{'jax', 'torch', 'tensorflow'}} & set(sys.modules))"
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert result.stdout.strip() == "set()"
