"""KL divergence of next-token distributions without ever holding [tokens, vocabulary] (paper sections 4 and 6).

For scores, many children are held against one parent, and both use the parent's LM head W. Then

    KL(p ‖ q) = Σ_v p_v (log p_v − log q_v) = lse(W h_q) − lse(W h_p) − (h_q − h_p) · m,   m = Σ_v p_v W_v

so the parent's whole distribution is kept, exactly, as D + 1 numbers a token (m and lse), and equal hidden states give
exactly 0. For training and evaluation, where the heads differ, `kl_and_nll` streams over chunks of tokens.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from puzzle_jax.model.subblocks import dot

VOCABULARY_CHUNK = 8192


def token_chunk() -> int:
  """Tokens whose logits there are at a time."""
  return 512 if jax.default_backend() == "cpu" else 2048


@flax.struct.dataclass
class Reference:
  """The parent's next-token distributions, exactly.

  Attributes:
    hidden_TD: the parent's normed hidden states.
    log_normaliser_T: log Σ_v exp(logit_v).
    mean_embedding_TD: Σ_v p_v W_v.
  """

  hidden_TD: jax.Array
  log_normaliser_T: jax.Array
  mean_embedding_TD: jax.Array


def _chunks(head_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The head as [chunks, C, D] and a mask [chunks, C] of the rows that are no padding."""
  size = head_VD.shape[0]
  chunk = min(VOCABULARY_CHUNK, size)
  padded = jnp.pad(head_VD, ((0, -size % chunk), (0, 0)))
  real = jnp.arange(padded.shape[0]) < size
  return padded.reshape(-1, chunk, head_VD.shape[1]), real.reshape(-1, chunk)


def log_normaliser(head_VD: jax.Array, hidden_TD: jax.Array) -> jax.Array:
  """log Σ_v exp(h·W_v), [T] in fp32, streamed over the vocabulary."""

  def step(lse_T: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    weights, real = chunk
    logits = dot("td,vd->tv", hidden_TD, weights).astype(jnp.float32)
    here = jax.nn.logsumexp(jnp.where(real, logits, -jnp.inf), axis=-1)
    return jnp.logaddexp(lse_T, here), None

  start = jnp.full(hidden_TD.shape[0], -jnp.inf, jnp.float32)
  return jax.lax.scan(step, start, _chunks(head_VD))[0]


@jax.jit
def reference(head_VD: jax.Array, hidden_TD: jax.Array) -> Reference:
  """The parent's distributions at its normed hidden states."""
  lse_T = log_normaliser(head_VD, hidden_TD)

  def step(mean_TD: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    weights, real = chunk
    logits = dot("td,vd->tv", hidden_TD, weights).astype(jnp.float32)
    p = jnp.where(real, jnp.exp(logits - lse_T[:, None]), 0.0)
    return mean_TD + dot("tv,vd->td", p, weights), None

  start = jnp.zeros(hidden_TD.shape, jnp.float32)
  return Reference(hidden_TD, lse_T, jax.lax.scan(step, start, _chunks(head_VD))[0])


def kl_and_nll_to(
  parent: Reference, head_VD: jax.Array, hidden_TD: jax.Array, *, targets_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """KL(parent ‖ child) and the child's negative log likelihood of the targets, [T] nats each; one head for both."""
  lse_T = log_normaliser(head_VD, hidden_TD)
  moved = (hidden_TD - parent.hidden_TD).astype(jnp.float32)
  kl_T = lse_T - parent.log_normaliser_T - jnp.sum(moved * parent.mean_embedding_TD, axis=-1)
  target_logits = jnp.sum(hidden_TD.astype(jnp.float32) * head_VD[targets_T].astype(jnp.float32), axis=-1)
  return kl_T, lse_T - target_logits


@jax.checkpoint
def _chunk_kl_and_nll(
  child: tuple[jax.Array, jax.Array], parent: tuple[jax.Array, jax.Array], targets_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
  (hidden_q, head_q), (hidden_p, head_p) = child, parent
  log_q = jax.nn.log_softmax(dot("td,vd->tv", hidden_q, head_q).astype(jnp.float32))
  log_p = jax.nn.log_softmax(dot("td,vd->tv", hidden_p, head_p).astype(jnp.float32))
  kl_T = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
  nll_T = -jnp.take_along_axis(log_q, targets_T[:, None], axis=-1)[:, 0]
  return kl_T, nll_T


def nll_and_greedy(hidden_TD: jax.Array, head_VD: jax.Array, targets_T: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Negative log likelihood of the targets (nats), and whether each is the likeliest token, [T], by chunks."""
  tokens = targets_T.shape[0]
  chunk = min(token_chunk(), tokens)

  def step(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    hidden, targets = inputs
    logits = dot("td,vd->tv", hidden, head_VD).astype(jnp.float32)
    of_targets = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - of_targets, jnp.argmax(logits, axis=-1) == targets

  nll, greedy = jax.lax.map(step, (_split(hidden_TD, chunk), _split(targets_T, chunk)))
  return nll.reshape(-1)[:tokens], greedy.reshape(-1)[:tokens]


def _split(x: jax.Array, chunk: int) -> jax.Array:
  """[chunks, chunk, …], the last one padded."""
  padded = jnp.pad(x, [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1))
  return padded.reshape(-1, chunk, *x.shape[1:])


def kl_and_nll(
  child: tuple[Any, Any], parent: tuple[Any, Any], targets_T: Any, *, shards: int = 1
) -> tuple[jax.Array, jax.Array]:
  """KL(parent ‖ child) and the child's negative log likelihood, [T] nats each, by chunks of tokens.

  Args:
    child: normed hidden states [T, D] and LM head [V, D].
    parent: the same of the parent.
    targets_T: the next tokens.
    shards: into how many equal parts the tokens lie over devices; chunks are cut within each, so that all have work.
  """
  if shards > 1:
    # A copy of the heads for each part, as devices have them anyway: their gradients are summed once, not a chunk.
    copies = [jnp.broadcast_to(head, (shards, *head.shape)) for _, head in (child, parent)]
    parts = [x.reshape(shards, -1, *x.shape[1:]) for x in (child[0], parent[0], targets_T)]
    kl_ST, nll_ST = jax.vmap(kl_and_nll)((parts[0], copies[0]), (parts[1], copies[1]), parts[2])
    return kl_ST.reshape(-1), nll_ST.reshape(-1)
  tokens = targets_T.shape[0]
  chunk = min(token_chunk(), tokens)

  heads = [head.astype(hidden.dtype) for hidden, head in (child, parent)]  # once, not a chunk

  def step(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    hidden_q, hidden_p, targets = inputs
    return _chunk_kl_and_nll((hidden_q, heads[0]), (hidden_p, heads[1]), targets)

  kl, nll = jax.lax.map(step, tuple(_split(x, chunk) for x in (child[0], parent[0], targets_T)))
  return kl.reshape(-1)[:tokens], nll.reshape(-1)[:tokens]
