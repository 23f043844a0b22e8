"""The least-squares start: a variant's last matrix in closed form (docs/architecture.md).

Every subblock ends in one linear map of its `features`; the fit replaces that matrix by the one that best reproduces
what the parent's own subblock adds, on stored activations. So it serves linear subblocks, narrowed FFNs and pooled KV
heads alike. W_up·W_down can be worse than removing the FFN; the fit is never worse than what it starts from, on
held-out tokens.
"""

import functools
import math
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.activations import Batch
from puzzle_jax.arch import ModelConfig
from puzzle_jax.model import subblocks
from puzzle_jax.space import LayerSpace
from puzzle_jax.targets import Variants, Weights, mean_square, parent_deltas, token_weights

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # relative to the mean diagonal of the Gram matrix


Sums = dict[str, tuple[jax.Array, jax.Array]]  # each with what rounding has left out of it


@functools.partial(jax.jit, donate_argnums=0)
def _add(sums: Sums, features_TE: jax.Array, target_TD: jax.Array, weight_T: jax.Array) -> Sums:
  weighted = features_TE * weight_T[:, None]
  with jax.default_matmul_precision("highest"):
    products = {
      "gram": weighted.T @ features_TE,
      "cross": weighted.T @ target_TD,
      "square": jnp.sum(weight_T[:, None] * jnp.square(target_TD)),
    }
  result = {}
  for name, (total, rest) in sums.items():
    new = total + products[name]
    shown = new - total
    rest = rest + ((total - (new - shown)) + (products[name] - shown))  # exact: Knuth's two-sum
    result[name] = (new, rest)
  return result


class NormalEquations:
  """Streamed weighted least squares: min over W of Σ_t weight_t · ‖W·features_t − target_t‖².

  Products are fp32 a batch, summed on the device in two fp32 numbers each, which together are as good as fp64, and
  solved there in fp64: Gram matrices of activations have condition numbers to 1e10.
  """

  def __init__(self, num_features: int, num_targets: int):
    shapes = {"gram": (num_features, num_features), "cross": (num_features, num_targets), "square": ()}
    self._sums: Sums = {name: (jnp.zeros(shape), jnp.zeros(shape)) for name, shape in shapes.items()}

  def add(self, features_TE: jax.Array, target_TD: jax.Array, weight_T: jax.Array) -> None:
    """Adds tokens, fp32; weight 0 leaves a token out."""
    self._sums = _add(self._sums, features_TE, target_TD, weight_T)

  @functools.cached_property
  def _totals(self) -> dict[str, jax.Array]:
    """The sums in fp64."""
    with jax.enable_x64(True):
      return _to_fp64(self._sums)

  def loss(self, w_DE: np.ndarray) -> float:
    """Residual sum of squares of a solution, relative to the targets' own (1: as bad as a no-op)."""
    with jax.enable_x64(True):
      return float(_loss(self._totals, jnp.asarray(w_DE, jnp.float64)))

  def solve(self, ridge: float) -> np.ndarray:
    """W [D, E], fp64, with `ridge` times the mean diagonal added to the diagonal.

    It is not finite where massive activations' rounding outweighs so small a ridge.
    """
    with jax.enable_x64(True):
      return np.asarray(_solve(self._totals, ridge))

  def fit(self, heldout: "NormalEquations", *, start_DE: np.ndarray, ridges: Sequence[float] = RIDGES) -> np.ndarray:
    """The solution [D, E] of the ridge that does best on held-out tokens, or `start_DE` where that is better still.

    The largest ridge comes first, and smaller ones until one does worse: solving is what takes the time. Features that
    are not finite leave `start_DE`.
    """
    best, least, before = start_DE, heldout.loss(start_DE), math.inf
    for ridge in sorted(ridges, reverse=True):
      candidate = self.solve(ridge)
      loss = heldout.loss(candidate)
      if loss < least:
        best, least = candidate, loss
      if not loss <= before:  # or not finite
        break
      before = loss
    return best.astype(np.float32)


@jax.jit
def _to_fp64(sums: Sums) -> dict[str, jax.Array]:
  return {name: total.astype(jnp.float64) + rest for name, (total, rest) in sums.items()}


@jax.jit
def _loss(totals: dict[str, jax.Array], w_DE: jax.Array) -> jax.Array:
  residual = totals["square"] - 2 * jnp.sum(w_DE.T * totals["cross"]) + jnp.sum(w_DE * (w_DE @ totals["gram"]))
  return residual / totals["square"]


@jax.jit
def _solve(totals: dict[str, jax.Array], ridge: float) -> jax.Array:
  gram = totals["gram"]
  damping = ridge * jnp.trace(gram) / len(gram)
  factor = jax.scipy.linalg.cho_factor(gram + damping * jnp.eye(len(gram)))
  return jax.scipy.linalg.cho_solve(factor, totals["cross"]).T


@functools.partial(jax.jit, static_argnames=("space", "config"))
def _regression(
  space: LayerSpace, config: ModelConfig, parent: Weights, variants: Variants, batch: Batch, median: float
) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
  """Features [T, E], the parent's delta [T, D] and token weights [T] of every variant with a last matrix."""
  x, context, real = batch
  deltas = dict(zip(("attention", "ffn"), parent_deltas(space.parent, config, parent, x, context), strict=True))
  inputs = {"attention": x, "ffn": x + deltas["attention"]}
  weight = token_weights(mean_square(deltas["attention"] + deltas["ffn"]), real, median)
  result = {}
  for spec in space.variants:
    if spec.output is None:
      continue
    params = variants[spec.id]
    features = subblocks.features(spec, config, params, inputs[spec.slot], context=context)
    target = deltas[spec.slot].astype(jnp.float32)
    if f"{spec.output}_bias" in params:
      target = target - params[f"{spec.output}_bias"]
    flat = (a.reshape(-1, a.shape[-1]).astype(jnp.float32) for a in (features, target))
    result[spec.id] = (*flat, weight.reshape(-1))
  return result  # type: ignore[return-value]


def fit(
  space: LayerSpace,
  config: ModelConfig,
  parent: Weights,
  variants: Variants,
  *,
  train: Iterable[Batch],
  heldout: Iterable[Batch],
  median: float,
) -> Variants:
  """The variants with their last matrices fitted.

  Args:
    space: of the layer.
    config: of the model.
    parent: the layer's weights by slot.
    variants: first weights.
    train: batches of the layer's input to fit on.
    heldout: batches that choose the ridge.
    median: `Scale.median`, for the weight of each token.
  """

  def equations(batches: Iterable[Batch]) -> dict[str, NormalEquations]:
    result: dict[str, NormalEquations] = {}
    for batch in batches:
      for name, (features, target, weight) in _regression(space, config, parent, variants, batch, median).items():
        if name not in result:
          result[name] = NormalEquations(features.shape[1], target.shape[1])
        result[name].add(features, target, weight)
    return result

  fitted = dict(variants)
  train_equations, heldout_equations = equations(train), equations(heldout)
  for spec in space.variants:
    if spec.output is not None:
      start = np.asarray(variants[spec.id][spec.output])
      best = train_equations[spec.id].fit(heldout_equations[spec.id], start_DE=start)
      fitted[spec.id] = variants[spec.id] | {spec.output: best}
  return fitted
