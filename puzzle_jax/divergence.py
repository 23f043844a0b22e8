"""KL divergence of next-token distributions without ever holding [tokens, vocabulary] (paper sections 4 and 6).

For scores, many children are held against one parent, and both use the parent's LM head W. Then

    KL(p ‖ q) = Σ_v p_v (log p_v − log q_v) = lse(W h_q) − lse(W h_p) − (h_q − h_p) · m,   m = Σ_v p_v W_v

so the parent's whole distribution is kept, exactly, as D + 1 numbers a token (m and lse), and equal hidden states give
exactly 0. For training and evaluation, where the heads differ, `kl_and_nll` streams over chunks of tokens, and
`weighted_kl_and_nll` the gradient with it.

With `top_k` it is the KL of coarser distributions: the parent's likeliest tokens one by one, and all others together as
one more. So the child learns how much mass is elsewhere, not only how the likeliest share what they have, to which
renormalised top-k is biased (Anshumann et al., Sparse Logit Sampling, ACL 2025: the "ghost token").
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from puzzle_jax.model.subblocks import asked_precision, dot

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


def _for_logits(hidden_TD: jax.Array) -> jax.Array:
  """In fp16 where a GPU shall multiply in TF32: as many bits of mantissa, at bf16's rate. Its range holds normed hidden
  states and LM heads."""
  in_tf32 = asked_precision() == "tensorfloat32" and jax.default_backend() == "gpu"
  return hidden_TD.astype(jnp.float16) if in_tf32 and hidden_TD.dtype == jnp.float32 else hidden_TD


def log_normaliser(head_VD: jax.Array, hidden_TD: jax.Array) -> jax.Array:
  """log Σ_v exp(h·W_v), [T] in fp32, streamed over the vocabulary."""
  hidden_TD = _for_logits(hidden_TD)

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
  operand_TD = _for_logits(hidden_TD)
  lse_T = log_normaliser(head_VD, operand_TD)

  def step(mean_TD: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    weights, real = chunk
    logits = dot("td,vd->tv", operand_TD, weights, out=jnp.float32)
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


@jax.custom_vjp
def _of_targets(logits_TV: jax.Array, targets_T: jax.Array) -> jax.Array:
  return jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]


def _of_targets_forward(logits_TV: jax.Array, targets_T: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _of_targets(logits_TV, targets_T), (targets_T, jnp.arange(logits_TV.shape[1]))


def _of_targets_backward(kept: tuple[jax.Array, jax.Array], gradient_T: jax.Array) -> tuple[jax.Array, None]:
  """A choice at each logit, which joins the rest of their gradient: a scatter would be a pass of its own."""
  targets_T, vocabulary_V = kept
  return jnp.where(vocabulary_V[None] == targets_T[:, None], gradient_T[:, None], 0), None


_of_targets.defvjp(_of_targets_forward, _of_targets_backward)


def _chunk_kl_and_nll(
  child: tuple[jax.Array, jax.Array],
  parent: tuple[jax.Array, jax.Array] | TopTokens,
  targets_T: jax.Array,
  temperature: float,
) -> tuple[jax.Array, jax.Array]:
  logits = _logits(*child)
  lse_T = jax.nn.logsumexp(logits, axis=-1)
  nll_T = lse_T - _of_targets(logits, targets_T)
  if temperature != 1:
    logits = logits / temperature
    lse_T = jax.nn.logsumexp(logits, axis=-1)
  if isinstance(parent, TopTokens):
    log_p = _with_others(parent.log_p_TK)
    of_parents = jnp.take_along_axis(logits, parent.ids_TK.astype(jnp.int32), axis=-1)
    kl_T = jnp.sum(jnp.exp(log_p) * (log_p - _with_others(of_parents - lse_T[:, None])), axis=-1)
  else:
    kl_T = _kl(_logits(*parent) / temperature, logits, lse_T)
  return temperature**2 * kl_T, nll_T


def _kl(p_TV: jax.Array, q_TV: jax.Array, q_lse_T: jax.Array) -> jax.Array:
  """KL(p ‖ q) of two models' logits, exactly 0 if they are equal. Its gradient by q, softmax(q) - p, is had without the
  Σ p = 1 that automatic differentiation would add up from the logits once more."""
  fixed_T = jax.lax.stop_gradient(q_lse_T)
  log_p_TV = p_TV - jax.nn.logsumexp(p_TV, axis=-1, keepdims=True)
  kl_T = jnp.sum(jnp.exp(log_p_TV) * (log_p_TV - (q_TV - fixed_T[:, None])), axis=-1)
  return kl_T + (q_lse_T - fixed_T)


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
  """KL(parent ‖ child) and the child's negative log likelihood, [T] nats each, by chunks of tokens. For their gradients
  see `weighted_kl_and_nll`.

  Args:
    child: normed hidden states [T, D] and LM head [V, D].
    parent: the same of the parent, or its likeliest tokens at this temperature.
    targets_T: the next tokens.
    temperature: that both distributions of the KL are softened by; the KL is multiplied by its square, so that
      gradients are as large as at 1 (Hinton et al., arXiv 1503.02531).
    top_k: of the parent's tokens, all others counting as one; 0: all one by one.
    shards: into how many equal parts the tokens lie over devices; chunks are cut within each, so that all have work.
  """
  if shards > 1:
    within = functools.partial(kl_and_nll, temperature=temperature, top_k=top_k)
    kl_ST, nll_ST = jax.vmap(within)(*_parts(child, parent, shards), targets_T.reshape(shards, -1))
    return kl_ST.reshape(-1), nll_ST.reshape(-1)
  tokens = targets_T.shape[0]
  head, to_reference, inputs = _by_chunks(child, parent, targets_T, temperature, top_k)

  def step(inputs: tuple[jax.Array, Any, jax.Array]) -> tuple[jax.Array, jax.Array]:
    hidden, reference, targets = inputs
    return _chunk_kl_and_nll((hidden, head), to_reference(reference), targets, temperature)

  kl, nll = jax.lax.map(step, inputs)
  return kl.reshape(-1)[:tokens], nll.reshape(-1)[:tokens]


def _parts(child: Any, parent: Any, shards: int) -> tuple[Any, Any]:
  """Both models' tokens in equal parts, and a head for each part, as devices have them anyway: the heads' gradients are
  summed over devices once, not a chunk."""

  def cut(x: jax.Array) -> jax.Array:
    return x.reshape(shards, -1, *x.shape[1:])

  def with_copies(hidden_TD: jax.Array, head_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    return cut(hidden_TD), jnp.broadcast_to(head_VD, (shards, *head_VD.shape))

  return with_copies(*child), jax.tree.map(cut, parent) if isinstance(parent, TopTokens) else with_copies(*parent)


def _by_chunks(
  child: Any, parent: Any, targets_T: jax.Array, temperature: float, top_k: int
) -> tuple[jax.Array, Callable[[Any], Any], Any]:
  """The child's head in its products' dtype (once, not a chunk), what makes a chunk of the parent one to compare with,
  and the chunks of (hidden states, parent, targets)."""
  head, parent_head = child[1].astype(child[0].dtype), None
  if not isinstance(parent, TopTokens):
    parent_head = parent[1].astype(parent[0].dtype)

  def to_reference(reference: Any) -> Any:
    if parent_head is None:
      return reference
    if top_k:
      return _chunk_top_tokens(reference, parent_head, min(top_k, len(parent_head)), temperature)
    return reference, parent_head

  chunk = min(token_chunk(), targets_T.shape[0])
  reference = parent if isinstance(parent, TopTokens) else parent[0]
  return head, to_reference, jax.tree.map(lambda x: _split(x, chunk), (child[0], reference, targets_T))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def weighted_kl_and_nll(
  child: tuple[Any, Any],
  parent: tuple[Any, Any] | TopTokens,
  targets_T: Any,
  weights: tuple[Any, Any],
  temperature: float = 1.0,
  top_k: int = 0,
  shards: int = 1,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """A weighted sum of `kl_and_nll`'s figures, and these. The sum has a gradient, to the child alone.

  That gradient is computed chunk by chunk along with the sum, while a chunk's logits are there: to compute it in the
  backward pass would take both models' logits once more, six products with a head instead of four.

  Args:
    child, parent, targets_T, temperature, top_k, shards: of `kl_and_nll`.
    weights: of the KL and of the negative log likelihood, [T] each.
  """
  kl_T, nll_T = kl_and_nll(child, parent, targets_T, temperature=temperature, top_k=top_k, shards=shards)
  return weights[0] @ kl_T + weights[1] @ nll_T, kl_T, nll_T


def _with_gradient(
  child: Any, parent: Any, targets_T: Any, weights: Any, temperature: float, top_k: int, shards: int
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """What `weighted_kl_and_nll` gives, and the sum's gradients of hidden states and head."""
  if shards > 1:
    within = functools.partial(_with_gradient, temperature=temperature, top_k=top_k, shards=1)
    cut = jax.tree.map(lambda x: x.reshape(shards, -1), (targets_T, weights))
    (total_S, *figures), (hidden_STD, head_SVD) = jax.vmap(within)(*_parts(child, parent, shards), *cut)
    kl_T, nll_T = (x.reshape(-1) for x in figures)
    return (jnp.sum(total_S), kl_T, nll_T), (hidden_STD.reshape(child[0].shape), jnp.sum(head_SVD, axis=0))
  tokens = targets_T.shape[0]
  head, to_reference, inputs = _by_chunks(child, parent, targets_T, temperature, top_k)

  def step(sums: Any, inputs: Any) -> tuple[Any, Any]:
    (hidden, reference, targets), chunk_weights = inputs

    def weighted(hidden: jax.Array, head: jax.Array) -> tuple[jax.Array, Any]:
      kl, nll = _chunk_kl_and_nll((hidden, head), to_reference(reference), targets, temperature)
      return chunk_weights[0] @ kl + chunk_weights[1] @ nll, (kl, nll)

    (total, figures), (by_hidden, by_head) = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)(hidden, head)
    return (sums[0] + total, sums[1] + by_head.astype(jnp.float32)), (*figures, by_hidden)

  chunks = (inputs, jax.tree.map(lambda x: _split(x, inputs[2].shape[1]), weights))
  (total, by_head), found = jax.lax.scan(step, (jnp.zeros(()), jnp.zeros(head.shape)), chunks)
  kl_T, nll_T, by_hidden_TD = (x.reshape(-1, *x.shape[2:])[:tokens] for x in found)
  return (total, kl_T, nll_T), (by_hidden_TD, by_head.astype(child[1].dtype))


def _to_child(
  temperature: float, top_k: int, shards: int, kept: tuple[jax.Array, jax.Array], slopes: tuple[jax.Array, ...]
) -> tuple[Any, None, None, None]:
  del temperature, top_k, shards
  return jax.tree.map(lambda x: (slopes[0] * x).astype(x.dtype), kept), None, None, None


weighted_kl_and_nll.defvjp(_with_gradient, _to_child)
