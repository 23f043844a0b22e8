"""Replace-1-block scores against whole models run naively, and the arithmetic on top of them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from puzzle_jax import activations, arch, divergence, scoring
from puzzle_jax.arch import Architecture, BlockSpec
from puzzle_jax.data import PackedText, target_mask
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import decoder
from puzzle_jax.space import LayerSpace
from puzzle_jax.store import StageStore

PARENT = ("gqa2/w48", "gqa2/w48", "gqa4/w16", "gqa2/w48")  # three runs
apply = jax.jit(decoder.apply, static_argnums=0)


@pytest.fixture(scope="module")
def parent(model) -> tuple[Architecture, Any]:
  return model(*PARENT)


@pytest.fixture(scope="module")
def stored(parent, packed, quiet, tmp_path_factory) -> list[np.ndarray]:
  """The input of each layer and of the final norm, as the pipeline stores them."""
  architecture, params = parent
  store = StageStore(tmp_path_factory.mktemp("activations"))
  store.begin({})
  head = {k: np.asarray(v) for k, v in params.items() if k != "layers"}
  reader: Any = SimpleNamespace(architecture=architecture, head=lambda: head, layer=lambda i: params["layers"][i])
  sets = dict.fromkeys(activations.SETS, packed)
  dtypes: Any = {"compute_dtype": jnp.float32, "train_dtype": jnp.float32}
  activations.write(store, reader, sets, batch_rows=8, progress=quiet, **dtypes)
  return [activations.read(store, "heldout", i) for i in range(architecture.num_layers + 1)]


@pytest.fixture(scope="module")
def scorer(parent, packed, stored) -> scoring.Scorer:
  architecture, params = parent
  runs = decoder.stacked(architecture, params)
  return scoring.Scorer(architecture, runs, packed=packed, last_RTD=stored[-1], batch_rows=4)


def naive(parent: tuple[Architecture, Any], child: tuple[Architecture, Any], packed: PackedText) -> dict[str, float]:
  """Both metrics from whole models and log_softmax over the whole vocabulary."""

  def log_probs(architecture: Architecture, params: Any) -> np.ndarray:
    out = apply(architecture, params, packed.tokens, positions_BT=packed.positions, segments_BT=packed.segment_ids)
    return np.asarray(jax.nn.log_softmax(decoder.logits(params, out.hidden_BTD)), np.float64)

  log_p, log_q = log_probs(*parent), log_probs(*child)
  rows, columns = np.nonzero(np.asarray(target_mask(packed.segment_ids)))
  log_p, log_q, targets = log_p[rows, columns], log_q[rows, columns], packed.tokens[rows, columns + 1]
  tokens = np.arange(len(targets))
  return {
    "kl": np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)),
    "lm_loss": np.mean(log_p[tokens, targets] - log_q[tokens, targets]),
  }


@pytest.mark.parametrize("layer, block", [(0, "gqa2/linear"), (1, "none/none"), (2, "linear/w8"), (3, "gqa1/w48")])
def test_a_score_is_that_of_the_whole_child(model, parent, scorer, stored, packed, layer, block):
  params = parent[1]
  blocks = (*PARENT[:layer], block, *PARENT[layer + 1 :])
  child, other = model(*blocks, seed=1)
  weights = other["layers"][layer]
  layers = [*params["layers"][:layer], weights, *params["layers"][layer + 1 :]]
  expected = naive(parent, (child, params | {"layers": layers}), packed)
  found = scorer.score(layer, BlockSpec.parse(block), weights, stored[layer])
  assert expected["kl"] > 0.05
  for metric in scoring.METRICS:
    assert found[metric] == pytest.approx(expected[metric], abs=1e-5)


@pytest.mark.parametrize("layer", range(4))
def test_the_parent_s_own_block_scores_0(parent, scorer, stored, layer):
  """To the rounding of one program against another: an ulp of the log normaliser, some 5 nats, is 5e-7."""
  architecture, params = parent
  found = scorer.score(layer, architecture.blocks[layer], params["layers"][layer], stored[layer])
  assert max(abs(value) for value in found.values()) < 5e-7


def test_equal_hidden_states_have_kl_0_exactly():
  rng = np.random.default_rng(0)
  head, hidden = jnp.asarray(rng.standard_normal((50, 8), np.float32)), jnp.asarray(rng.standard_normal((9, 8)) * 3)
  kl, _ = divergence.kl_and_nll_to(divergence.reference(head, hidden), head, hidden, targets_T=jnp.zeros(9, int))
  np.testing.assert_array_equal(kl, np.zeros(9))


@pytest.mark.parametrize("vocabulary, chunk, tokens", [(50, 8192, 7), (50, 25, 7), (53, 16, 8)])
def test_streamed_kl_is_naive_kl(monkeypatch, vocabulary, chunk, tokens):
  """One head through `Reference`, by chunks of the vocabulary; two heads by chunks of tokens."""
  monkeypatch.setattr(divergence, "VOCABULARY_CHUNK", chunk)
  monkeypatch.setattr(divergence, "TOKEN_CHUNK", 5)
  divergence.reference.clear_cache()
  rng = np.random.default_rng(0)
  normal: Callable[..., np.ndarray] = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
  head, p, targets = normal(vocabulary, 8), normal(tokens, 8), np.arange(tokens)
  other, q = head + 0.3 * normal(vocabulary, 8), p + 0.3 * normal(tokens, 8)

  def expected(head_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    log_p, log_q = (scipy.special.log_softmax(h.astype(float) @ w.T, axis=1) for h, w in ((p, head), (q, head_q)))
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=1), -log_q[targets, targets]

  reference = divergence.reference(head, p)
  one = divergence.kl_and_nll_to(reference, head, jnp.asarray(q), targets_T=targets)
  two = divergence.kl_and_nll((q, other), (p, head), jnp.asarray(targets))
  for found, (kl, nll) in ((one, expected(head)), (two, expected(other))):
    np.testing.assert_allclose(found[0], kl, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], nll, rtol=0, atol=1e-5)


def test_one_program_a_spec_and_one_for_the_suffix(model, parent, scorer, stored):
  scoring._replaced.clear_cache()
  scoring._suffix.clear_cache()
  for block in ("gqa2/w8", "none/w48"):
    for layer in range(4):
      weights = model(block)[1]["layers"][0]
      scorer.score(layer, BlockSpec.parse(block), weights, stored[layer])
  assert (scoring._replaced._cache_size(), scoring._suffix._cache_size()) == (2, 1)


# Arithmetic


def test_standard_error_is_the_bootstrap_s():
  rng = np.random.default_rng(0)
  tokens = rng.integers(5, 40, 60).astype(float)
  sums = tokens * (0.3 + 0.1 * rng.standard_normal(60))
  mean, error = scoring.mean_and_error(sums, tokens)
  assert mean == pytest.approx(sums.sum() / tokens.sum())
  draws = rng.integers(0, 60, (20_000, 60))
  means = sums[draws].sum(axis=1) / tokens[draws].sum(axis=1)
  assert error == pytest.approx(np.std(means), rel=0.05)


def test_standard_error_of_equal_rows_is_the_textbook_s():
  values = np.random.default_rng(0).standard_normal(12)
  mean, error = scoring.mean_and_error(8 * values, np.full(12, 8.0))
  assert (mean, error) == pytest.approx((np.mean(values), np.std(values, ddof=1) / np.sqrt(12)))
  assert scoring.mean_and_error(np.array([3.0]), np.array([2.0])) == (1.5, 0.0)


SPACE = LayerSpace((arch.GQA(2), arch.NoAttention()), (arch.SwiGLU(48), arch.SwiGLU(8), arch.NoFFN()))


def entry(value: float, error: float) -> dict[str, float]:
  return {"kl": value, "kl_stderr": error, "lm_loss": -value, "lm_loss_stderr": 2 * error}


def test_pairs_that_were_not_scored_are_sums_of_subblocks():
  scores = {"none/w48": entry(0.3, 0.03), "gqa2/w8": entry(0.1, 0.04), "none/none": entry(0.5, 0.01)}
  composed = scoring.compose(SPACE, scores, metric="kl")
  assert composed == {
    "gqa2/w48": (0.0, 0.0),
    "gqa2/w8": (0.1, 0.04),
    "none/w48": (0.3, 0.03),
    "none/w8": (pytest.approx(0.4), pytest.approx(0.05)),
    "none/none": (0.5, 0.01),  # measured; gqa2/none was not, and is left out
  }
  assert scoring.compose(SPACE, scores, metric="lm_loss")["none/w8"] == pytest.approx((-0.4, 0.1))


def test_blocks_to_score_are_enough_to_compose_all():
  for granularity, number in (("composed", 5), ("subblocks", 3)):
    blocks = scoring.blocks_to_score(SPACE, granularity)
    assert len(blocks) == number
    scores = {block.name: entry(1.0, 0.1) for block in blocks}
    assert scoring.compose(SPACE, scores, metric="kl").keys() == {block.name for block in SPACE.blocks}
  with pytest.raises(PuzzleError, match="granularity='all' is not one of composed, subblocks"):
    scoring.blocks_to_score(SPACE, "all")


def test_block_weights_are_the_parent_s_or_the_library_s():
  library = {"attention.none": {}, "ffn.w8": {"up": 1}}
  found = scoring.block_weights(SPACE, BlockSpec.parse("gqa2/w8"), {"attention": {"q": 2}, "ffn": {"up": 3}}, library)
  assert found == {"attention": {"q": 2}, "ffn": {"up": 1}}
