"""Blockwise local distillation (paper section 3): all variants of one layer, trained together on stored activations.

Decoupled: an attention variant is trained in front of the parent's frozen FFN, an FFN variant behind the parent's
frozen attention, which is computed once a batch. No gradient crosses variants or layers: each has its own clipping and
its own check for non-finite values, so that one that fails spoils no other.

The loss compares what the blocks *add* to the residual stream, in fp32. "paper" normalises as the paper does, by the
mean square of the parent's output; there the few sink tokens with massive activations make up nearly all of the
normaliser. "delta" (default) normalises by what the parent's block adds, and caps the weight of a token whose delta is
more than `SINK_CAP` times the median.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from puzzle_jax import surgery
from puzzle_jax.activations import Batch
from puzzle_jax.arch import ModelConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import subblocks
from puzzle_jax.space import LayerSpace

LOSSES = ("delta", "paper")
SINK_CAP = 10.0

Weights = dict[str, Any]
Variants = dict[str, Weights]  # by `Subblock.id`


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
  seed: int = 0

  def __post_init__(self) -> None:
    if self.loss not in LOSSES:
      raise PuzzleError(f"bld.loss={self.loss!r} is not one of {', '.join(LOSSES)}")
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


@functools.partial(jax.jit, static_argnames=("space", "config"))
def parent_deltas(space: LayerSpace, config: ModelConfig, parent: Weights, batch: Any) -> tuple[jax.Array, jax.Array]:
  """What the parent's attention and FFN add, [B, T, D] each."""
  x, context = batch
  attention = subblocks.apply(space.attention[0], config, parent["attention"], x, context=context)[0]
  ffn = subblocks.apply(space.ffn[0], config, parent["ffn"], x + attention, context=context)[0]
  return attention, ffn


def _mean_square(x_BTD: jax.Array) -> jax.Array:
  return jnp.mean(jnp.square(x_BTD.astype(jnp.float32)), axis=-1)


@dataclasses.dataclass(frozen=True)
class Scale:
  """The normalisers of a layer's loss, fixed from held-out tokens: the median and the capped mean of delta squares."""

  median: float
  mean: float

  @classmethod
  def of(cls, squares_T: np.ndarray) -> "Scale":
    median = float(np.median(squares_T))
    return cls(median, float(np.mean(np.minimum(squares_T, SINK_CAP * median))))


def token_weights(square_BT: jax.Array, real_BT: jax.Array, median: jax.Array | float) -> jax.Array:
  """Weight of each token, so that none counts for more than `SINK_CAP` median tokens."""
  return real_BT * jnp.minimum(1.0, SINK_CAP * median / jnp.maximum(square_BT, 1e-30))


def _variant_losses(
  space: LayerSpace, config: ModelConfig, parent: Weights, variants: Variants, batch: Any, scale: tuple[Any, Any]
) -> dict[str, dict[str, jax.Array]]:
  """Both losses of every variant on one batch (x, context, real)."""
  x, context, real = batch
  median, mean = scale
  attention, ffn = parent_deltas(space, config, parent, (x, context))
  target = jax.lax.stop_gradient((attention + ffn).astype(jnp.float32))
  weight = token_weights(_mean_square(target), real, median) / jnp.sum(real)
  paper = real / jnp.sum(real * _mean_square(x + attention + ffn))
  losses = {}
  for spec in space.variants:
    params = variants[spec.id]
    if spec.slot == "attention":
      first = subblocks.apply(spec, config, params, x, context=context)[0]
      second = subblocks.apply(space.ffn[0], config, parent["ffn"], x + first, context=context)[0]
    else:
      first = attention
      second = subblocks.apply(spec, config, params, x + attention, context=context)[0]
    error = _mean_square((first + second).astype(jnp.float32) - target)
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

  def total(trained: Variants) -> tuple[jax.Array, dict[str, jax.Array]]:
    variants = {name: trained[name] | frozen[name] for name in trained}
    losses = _variant_losses(space, config, parent, variants, batch, scale)
    chosen = {name: both[settings.loss] for name, both in losses.items()}
    return sum(chosen[name] for name in trained), chosen  # type: ignore[return-value]

  (_, losses), gradients = jax.value_and_grad(total, has_aux=True)(trained)
  optimizer = settings.optimizer()
  new_trained, new_states = {}, {}
  for name, weights in trained.items():
    finite = jnp.isfinite(losses[name]) & jnp.isfinite(optax.global_norm(gradients[name]))
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


def first_weights(
  space: LayerSpace,
  config: ModelConfig,
  parent: Mapping[str, Mapping[str, np.ndarray]],
  *,
  settings: BLDConfig,
  statistics: Mapping[str, np.ndarray],
  train: Iterable[Batch],
  heldout: list[Batch],
  scale: Scale,
) -> Variants:
  """The first weights of a layer's variants (`surgery`), by least squares on the stored activations if asked."""
  variants: Variants = {}
  for spec in space.variants:
    own = space.attention[0] if spec.slot == "attention" else space.ffn[0]
    variants[spec.id] = surgery.initial(
      spec,
      own,
      parent[spec.slot],
      config=config,
      channel_mean=statistics[spec.slot],
      method=settings.init,
      seed=settings.seed,
    )
  fitted = [spec for spec in space.variants if spec.output is not None]
  if not settings.least_squares or not fitted:
    return variants

  def equations(batches: Iterable[Batch]) -> dict[str, surgery.NormalEquations]:
    result = {}
    for spec in fitted:
      rows, columns = variants[spec.id][spec.output].shape
      result[spec.id] = surgery.NormalEquations(columns, rows)
    for batch in batches:
      inputs = (batch.x_BTD, batch.context, batch.real_BT)
      for name, (features, target, weight) in _regression(
        space, config, dict(parent), variants, inputs, scale.median
      ).items():
        result[name].add(features, target, weight)
    return result

  train_equations, heldout_equations = equations(train), equations(heldout)
  for spec in fitted:
    name = spec.id
    start = variants[name][spec.output]
    variants[name] = variants[name] | {spec.output: train_equations[name].fit(heldout_equations[name], start_DE=start)}
  return variants


@functools.partial(jax.jit, static_argnames=("space", "config"))
def _regression(
  space: LayerSpace, config: ModelConfig, parent: Weights, variants: Variants, batch: Any, median: float
) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
  """Features [T, E], the parent's delta [T, D] and token weights [T] of every variant with a last matrix."""
  x, context, real = batch
  deltas = dict(zip(("attention", "ffn"), parent_deltas(space, config, parent, (x, context)), strict=True))
  inputs = {"attention": x, "ffn": x + deltas["attention"]}
  weight = token_weights(_mean_square(deltas["attention"] + deltas["ffn"]), real, median)
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
  parent = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), dict(parent))
  squares = []
  for batch in heldout:
    attention, ffn = parent_deltas(space, config, dict(parent), (batch.x_BTD, batch.context))
    squares.append(np.asarray(_mean_square(attention + ffn))[np.asarray(batch.real_BT) > 0])
  scale = Scale.of(np.concatenate(squares))
  variants = first_weights(
    space, config, parent, settings=settings, statistics=statistics, train=train, heldout=heldout, scale=scale
  )
  variants = jax.tree.map(jnp.asarray, variants)
  before = _evaluate(space, config, dict(parent), variants, heldout, scale)

  split = {name: _split(weights) for name, weights in variants.items() if weights}
  trained = {name: jax.tree.map(jnp.copy, parts[0]) for name, parts in split.items()}
  frozen = {name: parts[1] for name, parts in split.items()}
  states = {name: settings.optimizer().init(weights) for name, weights in trained.items()}
  curve: dict[str, list[float]] = {name: [] for name in trained}
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
      trained_space, config, settings, dict(parent), trained, frozen, states, inputs, (scale.median, scale.mean)
    )
    for name, loss in losses.items():
      curve[name].append(loss)  # type: ignore[arg-type]  # fetched after the loop: the device does not wait
  after_variants = variants | {name: trained[name] | frozen[name] for name in trained}
  after = _evaluate(space, config, dict(parent), after_variants, heldout, scale)

  weights, report = {}, {}
  for name in variants:
    better = after[name][settings.loss] < before[name][settings.loss]  # also False for a loss that is not finite
    weights[name] = jax.device_get((after_variants if better else variants)[name])
    report[name] = {
      f"{kind}_{when}": value[name][kind] for when, value in (("init", before), ("trained", after)) for kind in LOSSES
    }
  return Distilled(weights, report, {name: [float(x) for x in losses] for name, losses in curve.items()})
