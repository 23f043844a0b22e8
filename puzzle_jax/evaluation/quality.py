"""Perplexity of parent and child, and KL(parent ‖ child), on held-out text."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from puzzle_jax import data, divergence
from puzzle_jax import mesh as mesh_lib
from puzzle_jax.arch import Architecture, ModelConfig
from puzzle_jax.model import decoder
from puzzle_jax.scoring import mean_and_error

Model = tuple[Architecture, Any]


def _rows(child: Model, parent: Model, batch: data.PackedText, mesh: Mesh | None) -> dict[str, jax.Array]:
  """KL and negative log likelihoods of both, summed over each row, and each row's number of predicted tokens."""
  last, heads = [], []
  for architecture, params in (child, parent):
    x_BTD, _ = decoder.apply_by_block(
      architecture,
      params,
      batch.tokens,
      positions_BT=batch.positions,
      segments_BT=batch.segment_ids,
      rows=mesh_lib.rows_on(mesh, batch.num_rows),
    )
    last.append(x_BTD)
    heads.append(decoder.head_of(params))
  return _sums(parent[0].config, tuple(heads), tuple(last), batch, mesh)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _sums(
  config: ModelConfig,
  heads: tuple[Any, Any],
  last_BTD: tuple[jax.Array, jax.Array],
  batch: data.PackedText,
  mesh: Mesh | None,
) -> dict[str, jax.Array]:
  """Of child and parent: what their heads say of what their last blocks give."""
  mask_BT = data.target_mask(batch.segment_ids)
  targets_T = jnp.roll(batch.tokens, -1, axis=1).reshape(-1)
  ours, theirs = (
    (decoder.final_norm(config, head, x_BTD).reshape(len(targets_T), -1), decoder.head_weights(head))
    for head, x_BTD in zip(heads, last_BTD, strict=True)
  )
  shards = mesh_lib.row_shards(mesh, batch.num_rows) if mesh else 1
  kl_T, nll_T = divergence.kl_and_nll(ours, theirs, targets_T, shards=shards)
  _, parent_nll_T = divergence.kl_and_nll(theirs, theirs, targets_T, shards=shards)
  values = {"kl": kl_T, "child": nll_T, "parent": parent_nll_T}
  return {k: jnp.sum(v.reshape(mask_BT.shape) * mask_BT, axis=1) for k, v in values.items()} | {
    "tokens": jnp.sum(mask_BT, axis=1)
  }


def by_row(child: Model, parent: Model, packed: data.PackedText, *, batch_rows: int) -> dict[str, np.ndarray]:
  """Sums over each row, fp64 [R]: `kl`, negative log likelihoods of `child` and `parent` (nats), `tokens` predicted."""
  sums: dict[str, list[float]] = {"kl": [], "child": [], "parent": [], "tokens": []}
  mesh = mesh_lib.mesh_of(parent[1])
  for start in range(0, len(packed.tokens), batch_rows):
    batch = packed.rows(slice(start, start + batch_rows))
    if mesh:
      batch = mesh_lib.put(mesh, batch, mesh_lib.rows_spec(mesh, batch.num_rows))
    for name, values in mesh_lib.fetch(_rows(child, parent, batch, mesh)).items():
      sums[name] += np.asarray(values, np.float64).tolist()
  return {name: np.array(values) for name, values in sums.items()}


def compare(child: Model, parent: Model, packed: data.PackedText, *, batch_rows: int) -> dict[str, float]:
  """Quality of a child on packed rows.

  Args:
    child: architecture and parameters; both models on one device, or on one mesh.
    parent: the same.
    packed: held-out rows.
    batch_rows: rows on the device at once.

  Returns:
    `kl` (nats a token), `perplexity`, `parent_perplexity`, `loss_change` (the child's negative log likelihood less the
    parent's, nats a token: the logarithm of the ratio of perplexities) and `tokens`; `kl_stderr` and
    `loss_change_stderr`, standard errors over rows, the latter of paired rows.
  """
  sums = by_row(child, parent, packed, batch_rows=batch_rows)
  tokens = sums["tokens"]
  kl, kl_stderr = mean_and_error(sums["kl"], tokens)
  change, change_stderr = mean_and_error(sums["child"] - sums["parent"], tokens)
  return {
    "kl": kl,
    "kl_stderr": kl_stderr,
    "loss_change": change,
    "loss_change_stderr": change_stderr,
    "perplexity": float(np.exp(np.sum(sums["child"]) / tokens.sum())),
    "parent_perplexity": float(np.exp(np.sum(sums["parent"]) / tokens.sum())),
    "tokens": float(tokens.sum()),
  }
