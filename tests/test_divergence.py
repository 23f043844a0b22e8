"""KL and likelihood by chunks of tokens against the definitions in fp64: temperature, top-k, bf16, gradients."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from puzzle_jax import divergence

TOKENS, VOCABULARY, HIDDEN = 11, 331, 24
RNG = np.random.default_rng(0)
CHILD, PARENT = (
  (RNG.standard_normal((TOKENS, HIDDEN), np.float32), 0.6 * RNG.standard_normal((VOCABULARY, HIDDEN), np.float32))
  for _ in range(2)
)
TARGETS = RNG.integers(VOCABULARY, size=TOKENS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
  """The last of three is padded."""
  monkeypatch.setattr(divergence, "token_chunk", lambda: 4)


def log_p(model: tuple[np.ndarray, np.ndarray], temperature: float = 1.0) -> np.ndarray:
  hidden, head = (np.asarray(x, np.float64) for x in model)
  return scipy.special.log_softmax(hidden @ head.T / temperature, axis=-1)


def kl(temperature: float, top_k: int) -> np.ndarray:
  p, q = (np.exp(log_p(model, temperature)) for model in (PARENT, CHILD))
  if top_k:
    order = np.argsort(-p, axis=-1)[:, :top_k]
    p, q = (np.take_along_axis(x, order, axis=-1) for x in (p, q))
    p, q = (np.concatenate([x, 1 - x.sum(axis=-1, keepdims=True)], axis=-1) for x in (p, q))
  return temperature**2 * np.sum(scipy.special.rel_entr(p, q), axis=-1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 4, 300])  # 4: by groups
def test_kl_is_the_definition(temperature: float, top_k: int) -> None:
  found, nll = divergence.kl_and_nll(CHILD, PARENT, TARGETS, temperature=temperature, top_k=top_k)
  np.testing.assert_allclose(found, kl(temperature, top_k), rtol=2e-4)
  np.testing.assert_allclose(nll, -log_p(CHILD)[np.arange(TOKENS), TARGETS], rtol=1e-5)


def test_a_coarser_distribution_tells_less_apart() -> None:
  some = [divergence.kl_and_nll(CHILD, PARENT, TARGETS, top_k=k)[0] for k in (1, 4, 64, 2 * VOCABULARY)]
  for fewer, more in itertools.pairwise(some):
    assert np.all(fewer <= more + 1e-5)
  np.testing.assert_allclose(some[-1], kl(1.0, 0), rtol=1e-4)


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (2.0, 4)])
def test_an_identical_child_has_kl_0(temperature: float, top_k: int) -> None:
  found, _ = divergence.kl_and_nll(PARENT, PARENT, TARGETS, temperature=temperature, top_k=top_k)
  np.testing.assert_allclose(found, 0, atol=1e-6)


def test_kept_answers_are_the_parent() -> None:
  """To the last bit, whether they come with the child or from before."""
  kept = divergence.top_tokens(*PARENT, k=4, temperature=2.0)
  order = np.argsort(-log_p(PARENT), axis=-1)[:, :4]
  np.testing.assert_array_equal(kept.ids_TK, order)
  np.testing.assert_allclose(kept.log_p_TK, np.take_along_axis(log_p(PARENT, 2.0), order, axis=-1), rtol=1e-5)
  online = divergence.kl_and_nll(CHILD, PARENT, TARGETS, temperature=2.0, top_k=4)
  jax.tree.map(np.testing.assert_array_equal, divergence.kl_and_nll(CHILD, kept, TARGETS, temperature=2.0), online)


@pytest.mark.parametrize("shape", [(3, 5000), (3, 4999), (3, 64)])
def test_the_largest_by_groups_are_the_largest(shape: tuple[int, int]) -> None:
  x = np.random.default_rng(1).permutation(np.prod(shape)).reshape(shape).astype(np.float32)
  for k in (1, 7, 60):
    found = divergence._largest(jnp.asarray(x), k)
    jax.tree.map(np.testing.assert_array_equal, found, tuple(jax.lax.top_k(x, k)))


@pytest.mark.parametrize("shards", [1, TOKENS])
@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (2.0, 0), (1.0, 4), (2.0, 4)])
def test_the_gradient_is_that_of_the_definition(temperature: float, top_k: int, shards: int) -> None:
  """d KL / d logit = T (q - p); with top-k, the others' mass is the parent's, shared as the child shares it."""

  kl_weight, nll_weight = RNG.random((2, TOKENS), np.float32)

  def total(child: tuple[jax.Array, jax.Array]) -> jax.Array:
    weights = (kl_weight, nll_weight)
    loss, *_ = divergence.weighted_kl_and_nll(child, PARENT, TARGETS, weights, temperature, top_k, shards)
    return 3 * loss

  hidden, head = jax.jit(jax.grad(total))(CHILD)
  p, q = (np.exp(log_p(model, temperature)) for model in (PARENT, CHILD))
  if top_k:
    among = np.zeros_like(p, bool)
    np.put_along_axis(among, np.argsort(-p, axis=-1)[:, :top_k], True, axis=-1)
    p, q_others = np.where(among, p, 0), np.where(among, 0, q)
    p += q_others / q_others.sum(-1, keepdims=True) * (1 - p.sum(-1, keepdims=True))
  likelihood = np.exp(log_p(CHILD)) - np.eye(VOCABULARY)[TARGETS]
  slope = 3 * (kl_weight[:, None] * temperature * (q - p) + nll_weight[:, None] * likelihood)
  np.testing.assert_allclose(hidden, slope @ CHILD[1], atol=2e-4)
  np.testing.assert_allclose(head, slope.T @ CHILD[0], atol=2e-4)


def test_logits_of_bf16_matrices_are_not_rounded() -> None:
  """What is left is the rounding of the matrices themselves: the definition on these gives the same."""
  rough = [tuple(jnp.asarray(x, jnp.bfloat16) for x in model) for model in (CHILD, PARENT)]
  found, nll = divergence.kl_and_nll(*rough, TARGETS)
  p, q = (log_p(model) for model in (rough[1], rough[0]))
  np.testing.assert_allclose(found, np.sum(np.exp(p) * (p - q), axis=-1), rtol=1e-4)
  np.testing.assert_allclose(nll, -q[np.arange(TOKENS), TARGETS], rtol=1e-5)
  ones = (np.ones(TOKENS, np.float32),) * 2
  gradient = jax.grad(lambda child: divergence.weighted_kl_and_nll(child, rough[1], TARGETS, ones)[0])(rough[0])
  assert [g.dtype for g in gradient] == [jnp.bfloat16] * 2


def test_a_gradient_takes_four_products_with_a_head(matmul_flops: Callable[[Any], int]) -> None:
  """Both models' logits, and the child's gradients."""
  ones = (np.ones(TOKENS, np.float32),) * 2
  program = jax.make_jaxpr(jax.grad(lambda c: divergence.weighted_kl_and_nll(c, PARENT, TARGETS, ones)[0]))(CHILD)
  chunk = 4
  assert matmul_flops(program.jaxpr) == pytest.approx(4 * 2 * chunk * VOCABULARY * HIDDEN, rel=1e-3)


@pytest.mark.parametrize("top_k", [0, 4])
def test_no_array_holds_all_tokens_by_the_vocabulary(top_k: int) -> None:
  """In the compiled gradient: the largest are a chunk's."""

  def total(child: tuple[jax.Array, jax.Array]) -> jax.Array:
    return divergence.weighted_kl_and_nll(child, PARENT, TARGETS, (np.ones(TOKENS, np.float32),) * 2, 1.0, top_k)[0]

  program = jax.jit(jax.grad(total)).lower(CHILD).compile().as_text()
  assert f"[4,{VOCABULARY}]" in program
  tokens_of = functools.partial("f32[{},{}]".format)
  assert tokens_of(TOKENS, VOCABULARY) not in program
  assert f"f32[3,4,{VOCABULARY}]" not in program
