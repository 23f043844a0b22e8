"""What global distillation minimises (paper section 6): the child held against the parent on a batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from puzzle_jax import data, divergence
from puzzle_jax import mesh as mesh_lib
from puzzle_jax.arch import Architecture
from puzzle_jax.divergence import TopTokens
from puzzle_jax.gkd_config import GKDConfig
from puzzle_jax.model import decoder


class Answered(NamedTuple):
  """Rows with what the parent says to them: a batch where it does not run online.

  Attributes:
    text: the rows [B, T].
    answers: its likeliest next tokens, [B, T, K].
  """

  text: data.PackedText
  answers: TopTokens


Batch = data.PackedText | Answered


def forward(
  architecture: Architecture,
  params: Any,
  batch: data.PackedText,
  config: GKDConfig,
  mesh: Mesh | None,
  teacher_LBTD: jax.Array | None = None,
) -> decoder.Output:
  """Of either model, as `config` says; `layers_L` are the teacher's, or if given the child's distances to them."""
  exact, dtype = config.attention == "exact", jnp.dtype(config.dtype)

  def of_layer(x_BTD: jax.Array, teacher_BTD: jax.Array | None) -> jax.Array:
    return x_BTD.astype(dtype) if teacher_BTD is None else _distance(x_BTD, teacher_BTD, batch.segment_ids > 0)

  if jax.default_backend() == "gpu" and (mesh is None or mesh.size == 1) and "runs" in params:
    # Nothing is copied into stacks and out of them. CPUs gain nothing and compile longer; over several devices a scan
    # keeps few weights gathered at a time.
    params = decoder.unstacked(architecture, params)
  return decoder.apply(
    architecture,
    params,
    batch.tokens,
    positions_BT=batch.positions if exact else None,
    segments_BT=batch.segment_ids if exact else None,
    dtype=dtype,
    remat=jax.checkpoint_policies.nothing_saveable if config.remat else decoder.products,
    rows=mesh_lib.rows_on(mesh, batch.num_rows),
    of_layer=of_layer,
    beside_L=teacher_LBTD,
  )


def losses(
  child: tuple[Architecture, Any],
  parent: tuple[Architecture, Any],
  batch: Batch,
  config: GKDConfig,
  mesh: Mesh | None = None,
) -> dict[str, jax.Array]:
  """Of a batch. On a mesh its rows stay where they lie, through all blocks: weights go to rows, not rows to weights.

  Args:
    child: architecture and parameters.
    parent: the same; not looked at where the batch brings its answers.
    batch: rows.
    config: of which temperature, top-k and weights count.
    mesh: on which the rows lie along `data`.

  Returns:
    `kl` and `lm`, means in nats a token; `cosine`, the mean over tokens of the summed distance of the hidden states
    (NaN without the parent's); `loss`, their weighted sum.
  """
  text = batch.text if isinstance(batch, Answered) else batch
  mask_T = data.target_mask(text.segment_ids).reshape(-1)
  count = jnp.maximum(jnp.sum(mask_T), 1)
  targets_T = jnp.roll(text.tokens, -1, axis=1).reshape(-1)

  def hidden_and_head(out: decoder.Output, head_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each device its own tokens, and the vocabulary over `model`: gathered once, not a chunk."""
    hidden_TD = out.hidden_BTD.reshape(len(targets_T), -1)
    if mesh is None:
      return hidden_TD, head_VD
    rows, vocabulary = mesh_lib.rows_spec(mesh, text.num_rows), mesh_lib.vocabulary_spec(mesh, len(head_VD))
    return mesh_lib.laid(mesh, hidden_TD, rows), mesh_lib.laid(mesh, head_VD, vocabulary)

  if isinstance(batch, Answered):
    reference: Any = jax.tree.map(lambda x: x.reshape(len(targets_T), -1), batch.answers)
    out, distance = forward(*child, text, config, mesh), jnp.asarray(jnp.nan)
  else:
    teacher = jax.lax.stop_gradient(forward(*parent, text, config, mesh))
    out = forward(*child, text, config, mesh, teacher.layers_L)
    # As the products take it: half as much to gather, and no gradient that would be rounded.
    head_VD = jax.lax.stop_gradient(decoder.head_weights(parent[1])).astype(teacher.hidden_BTD.dtype)
    reference, distance = hidden_and_head(teacher, head_VD), jnp.sum(out.layers_L)
  shards = 1 if mesh is None else mesh_lib.row_shards(mesh, text.num_rows)
  mean_T = mask_T / count
  loss, kl_T, nll_T = divergence.weighted_kl_and_nll(
    hidden_and_head(out, decoder.head_weights(child[1])),
    reference,
    targets_T,
    (config.kl_weight * mean_T, config.lm_weight * mean_T),
    config.kl_temperature,
    config.kl_top_k,
    shards,
  )
  parts = {"kl": jnp.sum(kl_T * mean_T), "lm": jnp.sum(nll_T * mean_T), "cosine": distance}
  return parts | {"loss": config.cosine_weight * distance + loss if config.cosine_weight else loss}


def _distance(a_BTD: jax.Array, b_BTD: jax.Array, real_BT: Any) -> jax.Array:
  """1 - cosine, mean over tokens."""
  a, b = a_BTD.astype(jnp.float32), b_BTD.astype(jnp.float32)
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  cosine_BT = jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-12)
  return jnp.sum((1 - cosine_BT) * real_BT) / jnp.maximum(jnp.sum(real_BT), 1)
