"""First weights against the paper's definitions written out in loops, and the fit against NumPy's least squares."""

import functools
from typing import Any

import numpy as np
import pytest

from puzzle_jax import arch, surgery
from puzzle_jax.arch import BlockSpec, parse_subblock
from puzzle_jax.errors import PuzzleError
from puzzle_jax.least_squares import RIDGES, NormalEquations
from puzzle_jax.model import decoder, subblocks

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
F = 16


@pytest.fixture(scope="module")
def parent(model) -> Any:
  """A parent of two KV heads of four, with biases: its config and its one layer's weights."""
  architecture, params = model(f"gqa2/w{F}", qkv_bias=True, o_bias=True)
  weights = {slot: {k: np.asarray(w) for k, w in p.items()} for slot, p in params["layers"][0].items()}
  return architecture, weights


def initial(
  parent: Any, slot: str, name: str, *, mean: np.ndarray | None = None, method: str = "paper", seed: int = 0
) -> dict[str, np.ndarray]:
  architecture, weights = parent
  return surgery.initial(
    parse_subblock(slot, name),
    getattr(architecture.blocks[0], slot),
    weights[slot],
    config=architecture.config,
    channel_mean=np.ones(F, np.float32) if mean is None else mean,
    method=method,
    seed=seed,
  )


@pytest.mark.parametrize("name", ["k", "v", "k_bias", "v_bias"])
def test_merged_heads_are_means(model, name):
  architecture, params = model("gqa4/w16", qkv_bias=True)
  weights = {k: np.asarray(w) for k, w in params["layers"][0]["attention"].items()}
  pooled = initial((architecture, {"attention": weights}), "attention", "gqa2")
  for head in range(2):
    a, b = (weights[name][8 * h : 8 * h + 8] for h in (2 * head, 2 * head + 1))
    close(pooled[name][8 * head : 8 * head + 8], (a + b) / 2)
  for kept in weights.keys() - {"k", "v", "k_bias", "v_bias"}:
    np.testing.assert_array_equal(pooled[kept], weights[kept])


def test_kept_channels_contribute_most(parent):
  down = parent[1]["ffn"]["down"]
  mean = np.random.default_rng(0).random(F).astype(np.float32)
  contribution = [mean[i] * np.sqrt(sum(down[d, i] ** 2 for d in range(len(down)))) for i in range(F)]
  keep = sorted(sorted(range(F), key=lambda i: -contribution[i])[:6])
  found = initial(parent, "ffn", "w6", mean=mean)
  assert keep != list(range(6))
  for j, i in enumerate(keep):
    for name in ("gate", "up"):
      np.testing.assert_array_equal(found[name][j], parent[1]["ffn"][name][i])
    np.testing.assert_array_equal(found["down"][:, j], down[:, i])
  np.testing.assert_array_equal(found["norm"], parent[1]["ffn"]["norm"])
  truncated = initial(parent, "ffn", "w6", mean=mean, method="truncate")
  np.testing.assert_array_equal(truncated["up"], parent[1]["ffn"]["up"][:6])


def test_linear_attention_is_the_product_by_head(parent):
  v, o = parent[1]["attention"]["v"], parent[1]["attention"]["o"]
  expected = sum(o[:, 8 * n : 8 * n + 8] @ v[8 * (n // 2) : 8 * (n // 2) + 8] for n in range(4))
  close(initial(parent, "attention", "linear")["linear"], expected)


def test_linear_attention_is_attention_to_oneself(model):
  """On rows of one token the parent's attention attends to that token only."""
  architecture, params = model("gqa2/w16")
  attention = params["layers"][0]["attention"]
  x = np.random.default_rng(0).standard_normal((5, 1, 32)).astype(np.float32)
  linear = initial((architecture, {"attention": attention}), "attention", "linear")
  context = decoder.context_of(architecture.config, np.zeros((5, 1), np.int32))
  full, _ = subblocks.apply(arch.GQA(2), architecture.config, attention, x, context=context)
  one, _ = subblocks.apply(arch.LinearAttention(), architecture.config, linear, x, context=context)
  close(one, full, atol=1e-5)


def test_linear_ffn_is_the_product(parent):
  up, down = parent[1]["ffn"]["up"], parent[1]["ffn"]["down"]
  expected = [[sum(down[i, f] * up[f, j] for f in range(F)) for j in range(32)] for i in range(32)]
  close(initial(parent, "ffn", "linear")["linear"], expected)


@pytest.mark.parametrize("slot", ["attention", "ffn"])
@pytest.mark.parametrize("method", surgery.METHODS)
def test_every_kind_has_the_shapes_of_its_spec(parent, slot, method):
  config, own = parent[0].config, parent[1][slot]
  for name in {"attention": ("gqa2", "gqa1", "linear", "none"), "ffn": (f"w{F}", "w5", "linear", "none")}[slot]:
    found = initial(parent, slot, name, method=method)
    shapes = {k: t.shape for k, t in parse_subblock(slot, name).tensors(config).items() if not k.endswith("_bias")}
    assert {k: w.shape for k, w in found.items() if not k.endswith("_bias")} == shapes
    assert all(w.dtype == np.float32 for w in found.values())
    if found:
      np.testing.assert_array_equal(found["norm"], own["norm"])
    if method != "random" and name in ("gqa2", f"w{F}"):
      assert found.keys() == own.keys()
      assert all(np.array_equal(found[k], own[k]) for k in own)  # the parent's own


def test_random_weights_go_by_their_seed(parent):
  one, same, other = (initial(parent, "attention", "gqa1", method="random", seed=s)["q"] for s in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert not np.array_equal(one, other)
  assert np.std(one) == pytest.approx(32**-0.5, rel=0.1)


@pytest.mark.parametrize(
  "own, slot, name, method, message",
  [
    ("none/w16", "attention", "gqa2", "paper", "gqa2 cannot be made of the parent's none"),
    ("gqa2/w16", "attention", "gqa4", "paper", "gqa4 cannot be made of the parent's gqa2: KV heads must divide"),
    ("gqa2/w16", "ffn", "w17", "paper", "w17 cannot be made of the parent's w16: it must be no wider"),
    ("gqa2/w16", "ffn", "w8", "best", "initialisation 'best' is not one of paper, truncate, random"),
  ],
)
def test_refuses(architecture, own, slot, name, method, message):
  with pytest.raises(PuzzleError, match=message):
    surgery.initial(
      parse_subblock(slot, name),
      getattr(BlockSpec.parse(own), slot),
      {},
      config=architecture().config,
      channel_mean=np.ones(F),
      method=method,
      seed=0,
    )


# Least squares


def equations(x: np.ndarray, y: np.ndarray, weight: np.ndarray | None = None, *, batch: int = 100) -> NormalEquations:
  weight = np.ones(len(x)) if weight is None else weight
  result = NormalEquations(x.shape[1], y.shape[1])
  for start in range(0, len(x), batch):
    result.add(*(np.float32(a[start : start + batch]) for a in (x, y, weight)))
  return result


@pytest.fixture(scope="module")
def problem() -> dict[str, np.ndarray]:
  """A noisy linear map of correlated features, and weights, a quarter of them 0."""
  rng = np.random.default_rng(0)
  mix, w = np.eye(12) + 0.1 * rng.standard_normal((12, 12)), rng.standard_normal((5, 12))
  x = rng.standard_normal((400, 12)) @ mix
  y = x @ w.T + rng.standard_normal((400, 5))
  return {"x": x, "y": y, "weight": rng.random(400) * (rng.random(400) > 0.25)}


def test_normal_equations_are_weighted_least_squares(problem):
  x, y, weight = problem["x"], problem["y"], problem["weight"]
  root = np.sqrt(weight)[:, None]
  expected, residual, *_ = np.linalg.lstsq(root * x, root * y)
  found = equations(x, y, weight)
  np.testing.assert_allclose(found.solve(0.0), expected.T, rtol=1e-4, atol=1e-4)
  assert found.loss(expected.T) == pytest.approx(residual.sum() / np.sum(weight[:, None] * y**2), rel=1e-4)
  guess = expected.T + 0.1
  naive = np.sum(weight[:, None] * (x @ guess.T - y) ** 2) / np.sum(weight[:, None] * y**2)
  assert found.loss(guess) == pytest.approx(naive, rel=1e-4)
  assert found.loss(np.zeros((5, 12))) == pytest.approx(1)
  ridge = 0.1 * np.trace(x.T @ (weight[:, None] * x)) / 12
  stacked = np.concatenate([root * x, np.sqrt(ridge) * np.eye(12)]), np.concatenate([root * y, np.zeros((12, 5))])
  np.testing.assert_allclose(found.solve(0.1), np.linalg.lstsq(*stacked)[0].T, rtol=1e-4, atol=1e-4)


def test_sums_of_many_batches_are_as_good_as_fp64():
  """2^24 + 1 + 1 + … stays 2^24 in fp32."""
  found = NormalEquations(1, 1)
  for value in [2.0**12, *[1.0] * 1000]:
    found.add(*(np.full(shape, value, np.float32) for shape in ((1, 1), (1, 1))), np.ones(1, np.float32))
  assert found.solve(0.0) == pytest.approx(1, rel=1e-12)
  assert found.loss(np.zeros((1, 1))) == 1.0
  assert [np.asarray(found._totals[name]).item() for name in ("gram", "square")] == [2**24 + 1000] * 2


@pytest.mark.parametrize("tokens", [6, 20, 400])  # fewer than features: the fit is all ridge
def test_the_fit_is_the_best_ridge_and_never_worse_than_the_start(problem, tokens):
  x, y = problem["x"], problem["y"]
  train, heldout = equations(x[:tokens], y[:tokens]), equations(x[200:], y[200:])
  rng = np.random.default_rng(1)
  perfect = np.linalg.lstsq(x[200:], y[200:])[0].T
  for start in (np.zeros((5, 12)), perfect + 1e-3 * rng.standard_normal((5, 12)), rng.standard_normal((5, 12))):
    losses = [heldout.loss(start), *(heldout.loss(train.solve(r)) for r in RIDGES)]
    assert heldout.loss(train.fit(heldout, start_DE=start)) == pytest.approx(min(losses), rel=1e-5)
  np.testing.assert_array_equal(train.fit(heldout, start_DE=perfect), np.float32(perfect))


def test_the_fit_stands_massive_activations():
  """One direction 10,000 times the others leaves the rounded Gram matrix indefinite at small ridges."""
  rng = np.random.default_rng(0)
  direction, w = rng.standard_normal(512), rng.standard_normal((4, 512))
  x = rng.standard_normal((1536, 512)) + 1e4 * rng.standard_normal((1536, 1)) * direction
  train, heldout = equations(x[:1024], x[:1024] @ w.T, batch=512), equations(x[1024:], x[1024:] @ w.T, batch=512)
  assert not np.isfinite(train.solve(RIDGES[0])).all()
  assert heldout.loss(train.fit(heldout, start_DE=np.zeros((4, 512)))) < 1e-4


def test_features_that_are_not_finite_leave_the_start(problem):
  x = problem["x"].copy()
  x[3, 3] = np.inf
  start = np.ones((5, 12), np.float32)
  bad, good = equations(x, problem["y"]), equations(problem["x"], problem["y"])
  np.testing.assert_array_equal(bad.fit(good, start_DE=start), start)


def test_a_fitted_linear_ffn_beats_the_product_and_a_no_op(parent):
  architecture, weights = parent
  own, config = weights["ffn"], architecture.config
  rng = np.random.default_rng(0)
  x = np.float32(rng.standard_normal((1, 600, 32)) + rng.standard_normal(32))
  context = decoder.context_of(config, np.zeros((1, 600), np.int32))
  product = initial(parent, "ffn", "linear")
  y = np.asarray(subblocks.apply(arch.SwiGLU(F), config, own, x, context=context)[0])[0]
  features = np.asarray(subblocks.features(arch.LinearFFN(), config, product, x, context=context))[0]
  train, heldout = equations(features[:400], y[:400]), equations(features[400:], y[400:])
  fitted = heldout.loss(train.fit(heldout, start_DE=product["linear"]))
  assert fitted < 0.9 < 1 < heldout.loss(product["linear"])
