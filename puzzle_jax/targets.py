"""What a variant is held against: what the parent's subblocks add to the residual stream, and how much a token counts.

A few sink tokens have massive activations: in SmolLM2's middle layers four tokens of 4,096 make over 90 % of the mean
square of a block's output. A token's weight is capped so that none counts for more than `SINK_CAP` median tokens.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.activations import Batch
from puzzle_jax.arch import BlockSpec, ModelConfig
from puzzle_jax.mesh import fetch
from puzzle_jax.model import subblocks

SINK_CAP = 10.0

Weights = dict[str, Any]  # of a block by slot, or of a subblock by name
Variants = dict[str, Weights]  # by `Subblock.id`


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def parent_deltas(
  spec: BlockSpec, config: ModelConfig, parent: Weights, x: jax.Array, context: subblocks.Context
) -> tuple[jax.Array, jax.Array]:
  """What the parent's attention and FFN add, [B, T, D] each."""
  attention = subblocks.apply(spec.attention, config, parent["attention"], x, context=context)[0]
  ffn = subblocks.apply(spec.ffn, config, parent["ffn"], x + attention, context=context)[0]
  return attention, ffn


def mean_square(x_BTD: jax.Array) -> jax.Array:
  """Over the hidden dimension, [B, T] in fp32."""
  return jnp.mean(jnp.square(x_BTD.astype(jnp.float32)), axis=-1)


@dataclasses.dataclass(frozen=True)
class Scale:
  """The normalisers of a layer's loss, fixed from held-out tokens: the median and the capped mean of delta squares."""

  median: float
  mean: float

  @classmethod
  def of(cls, squares_T: np.ndarray) -> "Scale":
    median = float(np.median(squares_T))
    return cls(median, float(np.mean(np.minimum(squares_T, SINK_CAP * median))))


def token_weights(square_BT: jax.Array, real_BT: jax.Array, median: jax.Array | float) -> jax.Array:
  """Weight of each token, so that none counts for more than `SINK_CAP` median tokens."""
  return real_BT * jnp.minimum(1.0, SINK_CAP * median / jnp.maximum(square_BT, 1e-30))


def scale_of(spec: BlockSpec, config: ModelConfig, parent: Weights, heldout: Iterable[Batch]) -> Scale:
  """The normalisers of a layer from its held-out tokens."""
  squares = []
  for batch in heldout:
    attention, ffn = parent_deltas(spec, config, parent, batch.x, batch.context)
    square_BT, real_BT = fetch((mean_square(attention + ffn), batch.real_BT))
    squares.append(square_BT[real_BT > 0])
  return Scale.of(np.concatenate(squares))
