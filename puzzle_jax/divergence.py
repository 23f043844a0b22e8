"""KL divergence of next-token distributions without ever holding [tokens, vocabulary] (paper sections 4 and 6).

For scores, many children are held against one parent, and both use the parent's LM head W. Then

    KL(p ‖ q) = Σ_v p_v (log p_v − log q_v) = lse(W h_q) − lse(W h_p) − (h_q − h_p) · m,   m = Σ_v p_v W_v

so the parent's whole distribution is kept, exactly, as D + 1 numbers a token (m and lse), and equal hidden states give
exactly 0. For training and evaluation, where the heads differ, `kl_and_nll` streams over chunks of tokens.

With `top_k` it is the KL of coarser distributions: the parent's likeliest tokens one by one, and all others together as
one more. So the child learns how much mass is elsewhere, not only how the likeliest share what they have, to which
renormalised top-k is biased (Anshumann et al., Sparse Logit Sampling, ACL 2025: the "ghost token").
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from puzzle_jax.model.subblocks import dot

VOCABULARY_CHUNK = 8192
_GROUP = 32  # tokens of which only the likeliest is looked at first
_LEAST = 1e-6  # of the probability of all other tokens: less is fp32's rounding of 1 - Σ p


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
    logits = dot("td,vd->tv", hidden_TD, weights, out=jnp.float32)
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
    logits = dot("td,vd->tv", hidden_TD, weights, out=jnp.float32)
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


@flax.struct.dataclass
class TopTokens:
  """The likeliest tokens of distributions, likeliest first; what is left of the mass is that of all others.

  Attributes:
    ids_TK: which tokens.
    log_p_TK: their log-probabilities, fp32.
  """

  ids_TK: jax.Array
  log_p_TK: jax.Array


@jax.custom_vjp
def _logits(hidden_TD: jax.Array, head_VD: jax.Array) -> jax.Array:
  """[T, V] in fp32 of matrices in any dtype: not rounded on the way, as the products' sums are fp32 anyway."""
  return dot("td,vd->tv", hidden_TD, head_VD, out=jnp.float32)


def _logits_forward(hidden_TD: jax.Array, head_VD: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _logits(hidden_TD, head_VD), (hidden_TD, head_VD)


def _logits_backward(kept: tuple[jax.Array, jax.Array], gradient_TV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """In the matrices' dtype: fp32 by bf16 would be computed as fp32 by fp32."""
  hidden_TD, head_VD = kept
  gradient = gradient_TV.astype(hidden_TD.dtype)
  return dot("tv,vd->td", gradient, head_VD), dot("tv,td->vd", gradient, hidden_TD).astype(head_VD.dtype)


_logits.defvjp(_logits_forward, _logits_backward)


@functools.partial(jax.checkpoint, static_argnums=3)
def _chunk_kl_and_nll(
  child: tuple[jax.Array, jax.Array],
  parent: tuple[jax.Array, jax.Array] | TopTokens,
  targets_T: jax.Array,
  temperature: float,
) -> tuple[jax.Array, jax.Array]:
  logits = _logits(*child)
  log_q = jax.nn.log_softmax(logits)
  nll_T = -jnp.take_along_axis(log_q, targets_T[:, None], axis=-1)[:, 0]
  if temperature != 1:
    log_q = jax.nn.log_softmax(logits / temperature)
  if isinstance(parent, TopTokens):
    log_p = _with_others(parent.log_p_TK)
    log_q = _with_others(jnp.take_along_axis(log_q, parent.ids_TK.astype(jnp.int32), axis=-1))
  else:
    log_p = jax.nn.log_softmax(_logits(*parent) / temperature)
  return temperature**2 * jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), nll_T


def _with_others(log_p_TK: jax.Array) -> jax.Array:
  """And the log-probability of all other tokens together, [T, K + 1]."""
  others = jnp.maximum(1 - jnp.sum(jnp.exp(log_p_TK), axis=-1, keepdims=True), _LEAST)
  return jnp.concatenate([log_p_TK, jnp.log(others)], axis=-1)


def _largest(x_TV: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """`jax.lax.top_k` that sorts little: the k largest are in the k groups whose largest are the largest."""
  if x_TV.shape[1] <= 2 * k * _GROUP:
    values_TK, ids_TK = jax.lax.top_k(x_TV, k)
    return values_TK, ids_TK
  padded = jnp.pad(x_TV, ((0, 0), (0, -x_TV.shape[1] % _GROUP)), constant_values=-jnp.inf)
  groups_TNG = padded.reshape(len(x_TV), -1, _GROUP)
  _, which_TK = jax.lax.top_k(jnp.max(groups_TNG, axis=-1), k)
  inside = jnp.take_along_axis(groups_TNG, which_TK[:, :, None], axis=1).reshape(len(x_TV), -1)
  values_TK, at_TK = jax.lax.top_k(inside, k)
  return values_TK, jnp.take_along_axis(which_TK, at_TK // _GROUP, axis=1) * _GROUP + at_TK % _GROUP


def _chunk_top_tokens(hidden_TD: jax.Array, head_VD: jax.Array, k: int, temperature: float) -> TopTokens:
  logits = _logits(hidden_TD, head_VD) / temperature
  values_TK, ids_TK = _largest(logits, k)
  return TopTokens(ids_TK, values_TK - jax.nn.logsumexp(logits, axis=-1, keepdims=True))


def top_tokens(hidden_TD: jax.Array, head_VD: jax.Array, *, k: int, temperature: float = 1.0) -> TopTokens:
  """The k likeliest next tokens, by chunks of tokens; fewer where the vocabulary is smaller."""
  tokens, head = hidden_TD.shape[0], head_VD.astype(hidden_TD.dtype)
  found = jax.lax.map(
    lambda hidden: _chunk_top_tokens(hidden, head, min(k, len(head)), temperature),
    _split(hidden_TD, min(token_chunk(), tokens)),
  )
  return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[:tokens], found)


def nll_and_greedy(hidden_TD: jax.Array, head_VD: jax.Array, targets_T: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Negative log likelihood of the targets (nats), and whether each is the likeliest token, [T], by chunks."""
  tokens = targets_T.shape[0]
  chunk = min(token_chunk(), tokens)

  def step(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    hidden, targets = inputs
    logits = dot("td,vd->tv", hidden, head_VD, out=jnp.float32)
    of_targets = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    return jax.nn.logsumexp(logits, axis=-1) - of_targets, jnp.argmax(logits, axis=-1) == targets

  nll, greedy = jax.lax.map(step, (_split(hidden_TD, chunk), _split(targets_T, chunk)))
  return nll.reshape(-1)[:tokens], greedy.reshape(-1)[:tokens]


def _split(x: jax.Array, chunk: int) -> jax.Array:
  """[chunks, chunk, …], the last one padded."""
  padded = jnp.pad(x, [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1))
  return padded.reshape(-1, chunk, *x.shape[1:])


def kl_and_nll(
  child: tuple[Any, Any],
  parent: tuple[Any, Any] | TopTokens,
  targets_T: Any,
  *,
  temperature: float = 1.0,
  top_k: int = 0,
  shards: int = 1,
) -> tuple[jax.Array, jax.Array]:
  """KL(parent ‖ child) and the child's negative log likelihood, [T] nats each, by chunks of tokens.

  Args:
    child: normed hidden states [T, D] and LM head [V, D].
    parent: the same of the parent, or its likeliest tokens at this temperature. With `top_k` no gradient reaches it.
    targets_T: the next tokens.
    temperature: that both distributions of the KL are softened by; the KL is multiplied by its square, so that
      gradients are as large as at 1 (Hinton et al., arXiv 1503.02531).
    top_k: of the parent's tokens, all others counting as one; 0: all one by one.
    shards: into how many equal parts the tokens lie over devices; chunks are cut within each, so that all have work.
  """
  if shards > 1:

    def parts(x: jax.Array) -> jax.Array:
      return x.reshape(shards, -1, *x.shape[1:])

    def with_copies(hidden_TD: jax.Array, head_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
      """A head for each part, as devices have them anyway: their gradients are summed once, not a chunk."""
      return parts(hidden_TD), jnp.broadcast_to(head_VD, (shards, *head_VD.shape))

    references = jax.tree.map(parts, parent) if isinstance(parent, TopTokens) else with_copies(*parent)
    within = functools.partial(kl_and_nll, temperature=temperature, top_k=top_k)
    kl_ST, nll_ST = jax.vmap(within)(with_copies(*child), references, parts(targets_T))
    return kl_ST.reshape(-1), nll_ST.reshape(-1)
  tokens = targets_T.shape[0]
  chunk = min(token_chunk(), tokens)
  head = child[1].astype(child[0].dtype)  # once, not a chunk
  parent_head = None if isinstance(parent, TopTokens) else parent[1].astype(parent[0].dtype)

  def step(inputs: tuple[jax.Array, Any, jax.Array]) -> tuple[jax.Array, jax.Array]:
    hidden, reference, targets = inputs
    if parent_head is not None:
      if top_k:  # outside of what is computed again in the backward pass
        k = min(top_k, len(parent_head))
        reference = jax.lax.stop_gradient(_chunk_top_tokens(reference, parent_head, k, temperature))
      else:
        reference = (reference, parent_head)
    return _chunk_kl_and_nll((hidden, head), reference, targets, temperature)

  reference = parent if isinstance(parent, TopTokens) else parent[0]
  inputs = jax.tree.map(lambda x: _split(x, chunk), (child[0], reference, targets_T))
  kl, nll = jax.lax.map(step, inputs)
  return kl.reshape(-1)[:tokens], nll.reshape(-1)[:tokens]
