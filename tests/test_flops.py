"""FLOPs of distillation against the products in the gradients' own programs."""

import jax
import jax.numpy as jnp
import pytest

from puzzle_jax import arch, flops
from puzzle_jax.arch import BlockSpec, ModelConfig
from puzzle_jax.model import decoder, subblocks
from puzzle_jax.space import LayerSpace

CONFIG = ModelConfig(vocab_size=7, hidden_size=32, num_heads=4, head_dim=8, max_context=64, rope_theta=1e4)


@pytest.mark.parametrize("name", ["w48", "linear"])
def test_a_trained_ffn_is_its_gradient_s_program(matmul_flops, name):
  spec, tokens = arch.parse_subblock("ffn", name), 16
  params = subblocks.init(spec, CONFIG, jax.random.key(0))
  context = decoder.context_of(CONFIG, jnp.arange(tokens)[None])

  def loss(trained: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.sum(subblocks.apply(spec, CONFIG, trained | {"norm": params["norm"]}, x, context=context)[0] ** 2)

  weights = {k: w for k, w in params.items() if k != "norm"}
  program = jax.make_jaxpr(jax.grad(loss))(weights, jnp.ones((1, tokens, 32)))
  assert matmul_flops(program.jaxpr) == tokens * flops.trained(spec, CONFIG)
  if name == "w48":
    assert flops.trained(spec, CONFIG) == 14 * 32 * 48


@pytest.mark.parametrize("name", ["gqa4", "gqa1", "linear"])
def test_trained_attention_is_its_gradient_s_program(matmul_flops, name):
  spec, tokens = arch.parse_subblock("attention", name), 16
  params = subblocks.init(spec, CONFIG, jax.random.key(0))
  context = decoder.context_of(CONFIG, jnp.arange(tokens)[None])

  def loss(trained: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.sum(subblocks.apply(spec, CONFIG, trained | {"norm": params["norm"]}, x, context=context)[0] ** 2)

  weights = {k: w for k, w in params.items() if k != "norm"}
  program = jax.make_jaxpr(jax.grad(loss))(weights, jnp.ones((1, tokens, 32)))
  assert matmul_flops(program.jaxpr) == tokens * flops.trained(spec, CONFIG, context=tokens)


def test_a_step_of_a_layer_by_hand():
  space = LayerSpace(
    (arch.GQA(4), arch.LinearAttention(), arch.NoAttention()), (arch.SwiGLU(48), arch.SwiGLU(16), arch.NoFFN())
  )
  d, parent = 32, BlockSpec.parse("gqa4/w48")
  expected = parent.flops_per_token(CONFIG, context=8)  # the parent once
  expected += 4 * d * d + 12 * d * 48  # linear attention, and the frozen FFN forward and back
  expected += 14 * d * 16
  assert flops.decoupled_step(space, CONFIG, context=8) == expected


def test_a_global_step_is_its_gradient_s_program(matmul_flops):
  child, parent = (
    arch.Architecture(CONFIG, tuple(map(BlockSpec.parse, blocks)))
    for blocks in (("gqa4/w48", "linear/w16", "none/linear"), ("gqa4/w48",) * 3)
  )
  params = {model: decoder.init(model, jax.random.key(0)) for model in (child, parent)}
  tokens = jnp.zeros((1, 16), jnp.int32)

  def loss(trained: dict[str, jax.Array]) -> jax.Array:
    total = 0.0
    for model, weights in ((child, trained), (parent, params[parent])):
      out = decoder.apply(model, weights, tokens)
      total += jnp.sum(decoder.logits(weights, out.hidden_BTD) ** 2)
    return total

  found = matmul_flops(jax.make_jaxpr(jax.grad(loss))(params[child]).jaxpr)
  assert found == 16 * flops.global_step(child, parent, context=16)
