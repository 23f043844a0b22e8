"""Blockwise local distillation (paper section 3): all variants of one layer, trained together on stored activations.

Decoupled: an attention variant is trained in front of the parent's frozen FFN, an FFN variant behind the parent's
frozen attention, which is computed once a batch. No gradient crosses variants or layers: each has its own clipping and
its own check for non-finite values, so that one that fails spoils no other.

The loss compares what the blocks *add* to the residual stream, in fp32. "paper" normalises as the paper does, by the
mean square of the parent's output; there the few sink tokens with massive activations make up nearly all of the
normaliser. "delta" (default) normalises by what the parent's block adds, and caps the weight of sinks (`targets`).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from puzzle_jax import least_squares, surgery, targets
from puzzle_jax.activations import Batch
from puzzle_jax.arch import ModelConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import subblocks
from puzzle_jax.space import LayerSpace
from puzzle_jax.targets import Scale, Variants, Weights, mean_square, parent_deltas, token_weights

LOSSES = ("delta", "paper")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class BLDConfig:
  """How a library is distilled.

  Attributes:
    init: one of `surgery.METHODS`.
    least_squares: replace each variant's last matrix by the closed-form fit before training.
    loss: one of `LOSSES`.
    steps: optimiser steps a layer; 0 keeps the first weights.
    batch_rows: rows of the stored activations in one step.
    learning_rate: peak of warm-up and cosine.
    warmup_steps: of the learning rate.
    weight_decay: AdamW's.
    clip_norm: gradient norm of one variant.
    dtype: of the matrix products in training; weights, losses, fits and evaluations are fp32.
    seed: of the order of batches and of random first weights.
  """

  init: str = "paper"
  least_squares: bool = True
  loss: str = "delta"
  steps: int = 100
  batch_rows: int = 4
  learning_rate: float = 1e-4
  warmup_steps: int = 10
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  dtype: str = "float32"
  seed: int = 0

  def __post_init__(self) -> None:
    if self.loss not in LOSSES:
      raise PuzzleError(f"bld.loss={self.loss!r} is not one of {', '.join(LOSSES)}")
    if self.dtype not in DTYPES:
      raise PuzzleError(f"bld.dtype={self.dtype!r} is not one of {', '.join(DTYPES)}")
    if self.init not in surgery.METHODS:
      raise PuzzleError(f"bld.init={self.init!r} is not one of {', '.join(surgery.METHODS)}")
    if self.steps < 0 or self.batch_rows < 1 or self.learning_rate <= 0 or self.warmup_steps < 0:
      raise PuzzleError(f"bld: steps, warmup_steps >= 0, batch_rows >= 1 and learning_rate > 0 are needed; got {self}")

  def optimizer(self) -> optax.GradientTransformation:
    warmup = min(self.warmup_steps, self.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, max(self.steps, 1))
    return optax.chain(optax.clip_by_global_norm(self.clip_norm), optax.adamw(schedule, weight_decay=self.weight_decay))


@dataclasses.dataclass(frozen=True)
class Distilled:
  """A layer's trained variants.

  Attributes:
    weights: by variant name, fp32.
    losses: by variant name: held-out loss at the first weights and after training, in both normalisations.
    curve: by variant name: the training loss of each step.
  """

  weights: dict[str, dict[str, np.ndarray]]
  losses: dict[str, dict[str, float]]
  curve: dict[str, list[float]]


def _variant_losses(
  space: LayerSpace, config: ModelConfig, parent: Weights, variants: Variants, batch: Any, scale: tuple[Any, Any]
) -> dict[str, dict[str, jax.Array]]:
  """Both losses of every variant on one batch (x, context, real)."""
  x, context, real = batch
  median, mean = scale
  attention, ffn = parent_deltas(space, config, parent, (x, context))
  target = jax.lax.stop_gradient(attention.astype(jnp.float32) + ffn)
  weight = token_weights(mean_square(target), real, median) / jnp.sum(real)
  paper = real / jnp.sum(real * mean_square(x + target))
  losses = {}
  for spec in space.variants:
    params = variants[spec.id]
    if spec.slot == "attention":
      first = subblocks.apply(spec, config, params, x, context=context)[0]
      second = subblocks.apply(space.ffn[0], config, parent["ffn"], x + first, context=context)[0]
    else:
      first = attention
      second = subblocks.apply(spec, config, params, x + attention, context=context)[0]
    error = mean_square(first.astype(jnp.float32) + second - target)
    losses[spec.id] = {"delta": jnp.sum(weight * error) / mean, "paper": jnp.sum(paper * error)}
  return losses


@functools.partial(jax.jit, static_argnames=("space", "config"))
def evaluate_batch(
  space: LayerSpace, config: ModelConfig, parent: Weights, variants: Variants, batch: Any, scale: tuple[Any, Any]
) -> dict[str, dict[str, jax.Array]]:
  """Both losses of every variant on one batch (x, context, real)."""
  return _variant_losses(space, config, parent, variants, batch, scale)


def _split(variant: Weights) -> tuple[Weights, Weights]:
  """Trained and frozen weights: a norm's scale folds into the matrices that follow it, so training it adds nothing."""
  return {k: w for k, w in variant.items() if k != "norm"}, {k: w for k, w in variant.items() if k == "norm"}


@functools.partial(jax.jit, static_argnames=("space", "config", "settings"), donate_argnames=("trained", "states"))
def train_step(
  space: LayerSpace,
  config: ModelConfig,
  settings: BLDConfig,
  parent: Weights,
  trained: Variants,
  frozen: Variants,
  states: dict[str, Any],
  batch: Any,
  scale: tuple[Any, Any],
) -> tuple[Variants, dict[str, Any], dict[str, jax.Array]]:
  """One AdamW step of every variant of a layer; a variant whose gradient is not finite keeps its weights."""
  x, context, real = batch
  batch = (x, context.replace(dtype=jnp.dtype(settings.dtype)), real)

  def total(trained: Variants) -> tuple[jax.Array, dict[str, jax.Array]]:
    variants = {name: trained[name] | frozen[name] for name in trained}
    losses = _variant_losses(space, config, parent, variants, batch, scale)
    chosen = {name: both[settings.loss] for name, both in losses.items()}
    return sum(chosen[name] for name in trained), chosen  # type: ignore[return-value]

  (_, losses), gradients = jax.value_and_grad(total, has_aux=True)(trained)
  optimizer = settings.optimizer()
  new_trained, new_states = {}, {}
  for name, weights in trained.items():
    finite = jnp.isfinite(losses[name]) & jnp.isfinite(optax.tree.norm(gradients[name]))
    updates, state = optimizer.update(gradients[name], states[name], weights)
    stepped = (optax.apply_updates(weights, updates), state)
    new_trained[name], new_states[name] = jax.tree.map(
      lambda new, old, finite=finite: jnp.where(finite, new, old), stepped, (weights, states[name])
    )
  return new_trained, new_states, losses


def _evaluate(
  space: LayerSpace, config: ModelConfig, parent: Weights, variants: Variants, heldout: list[Batch], scale: Scale
) -> dict[str, dict[str, float]]:
  """Mean of both losses over the held-out batches."""
  sums: dict[str, dict[str, float]] = {name: dict.fromkeys(LOSSES, 0.0) for name in variants}
  for batch in heldout:
    inputs = (batch.x_BTD, batch.context, batch.real_BT)
    losses = jax.device_get(evaluate_batch(space, config, parent, variants, inputs, (scale.median, scale.mean)))
    for name, both in losses.items():
      for kind, value in both.items():
        sums[name][kind] += float(value) / len(heldout)
  return sums


def distil_layer(
  space: LayerSpace,
  config: ModelConfig,
  parent: Mapping[str, Mapping[str, np.ndarray]],
  *,
  settings: BLDConfig,
  statistics: Mapping[str, np.ndarray],
  train: list[Batch],
  heldout: list[Batch],
  layer: int,
) -> Distilled:
  """Initialises and trains all variants of one layer.

  Args:
    space: of the layer.
    config: of the model.
    parent: the layer's weights by slot.
    settings: how.
    statistics: `activations.read_statistics`.
    train: batches of the layer's input, `settings.batch_rows` rows each.
    heldout: the same of held-out tokens.
    layer: index, for the order of batches.
  """
  own: Weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), dict(parent))
  scale = targets.scale_of(space, config, own, heldout)
  variants: Variants = {}
  for spec in space.variants:
    variants[spec.id] = surgery.initial(
      spec,
      space.attention[0] if spec.slot == "attention" else space.ffn[0],
      parent[spec.slot],
      config=config,
      channel_mean=statistics[spec.slot],
      method=settings.init,
      seed=settings.seed,
    )
  if settings.least_squares:
    variants = least_squares.fit(space, config, own, variants, train=train, heldout=heldout, median=scale.median)
  variants = jax.tree.map(jnp.asarray, variants)
  before = _evaluate(space, config, own, variants, heldout, scale)

  split = {name: _split(weights) for name, weights in variants.items() if weights}
  trained = {name: jax.tree.map(jnp.copy, parts[0]) for name, parts in split.items()}
  frozen = {name: parts[1] for name, parts in split.items()}
  states = {name: settings.optimizer().init(weights) for name, weights in trained.items()}
  curve: dict[str, list[Any]] = {name: [] for name in trained}
  trained_space = dataclasses.replace(
    space,
    attention=tuple(s for s in space.attention if s is space.attention[0] or s.id in trained),
    ffn=tuple(s for s in space.ffn if s is space.ffn[0] or s.id in trained),
  )
  rng = np.random.default_rng((settings.seed, layer))
  order: list[int] = []
  for _ in range(settings.steps if trained else 0):
    order = order or rng.permutation(len(train)).tolist()
    batch = train[order.pop()]
    inputs = (batch.x_BTD, batch.context, batch.real_BT)
    trained, states, losses = train_step(
      trained_space, config, settings, own, trained, frozen, states, inputs, (scale.median, scale.mean)
    )
    for name, loss in losses.items():
      curve[name].append(loss)  # fetched after the loop: the device does not wait
  after_variants = variants | {name: trained[name] | frozen[name] for name in trained}
  after = _evaluate(space, config, own, after_variants, heldout, scale)

  weights, report = {}, {}
  for name in variants:
    better = after[name][settings.loss] < before[name][settings.loss]  # also False for a loss that is not finite
    weights[name] = jax.device_get((after_variants if better else variants)[name])
    report[name] = {
      f"{kind}_{when}": value[name][kind] for when, value in (("init", before), ("trained", after)) for kind in LOSSES
    }
  return Distilled(weights, report, {name: [float(x) for x in losses] for name, losses in curve.items()})
