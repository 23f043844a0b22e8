"""Blockwise local distillation (paper section 3): all variants of one layer, trained together on stored activations.

A job is one block in the place of the parent's, with the subblocks of it that are trained. Decoupled: an attention
variant in front of the parent's frozen FFN, or an FFN variant behind the parent's frozen attention, which is computed
once a batch. Coupled: a pair of variants, trained together. No gradient crosses jobs or layers: each has its own
clipping and its own check for non-finite values, so that one that fails spoils no other.

The loss compares what the blocks *add* to the residual stream, in fp32. "paper" normalises as the paper does, by the
mean square of the parent's output; there the few sink tokens with massive activations make up nearly all of the
normaliser. "delta" (default) normalises by what the parent's block adds, and caps the weight of sinks (`targets`).

Neighbouring layers of one shape can be trained side by side under `vmap`: every array here has a leading axis G.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from puzzle_jax import surgery
from puzzle_jax.activations import Batch
from puzzle_jax.arch import BlockSpec, ModelConfig, Subblock
from puzzle_jax.errors import PuzzleError, check_seed
from puzzle_jax.model import subblocks
from puzzle_jax.model.subblocks import Context
from puzzle_jax.space import LayerSpace
from puzzle_jax.targets import Weights, mean_square, parent_deltas, token_weights

_T = TypeVar("_T")

LOSSES = ("delta", "paper")
DTYPES = ("float32", "bfloat16")
ATTENTION_TARGETS = ("block", "attention")


@dataclasses.dataclass(frozen=True)
class BLDConfig:
  """How a library is distilled.

  Attributes:
    init: one of `surgery.METHODS`.
    least_squares: replace each variant's last matrix by the closed-form fit before training.
    fit_tokens: at most so many tokens of the first window for the fit.
    loss: one of `LOSSES`.
    attention_target: what an attention variant is held against: the parent's "attention", or as in the paper its
      "block", through its frozen FFN: for twice the FLOPs hardly better children (docs/block_library.md).
    steps: optimiser steps a layer, over all windows; 0 keeps the first weights.
    batch_rows: rows of the stored activations in one step.
    learning_rate: peak of warm-up and cosine.
    learning_rates: other peaks by variant, "PATTERN=RATE" as in "ffn.linear=1e-5" or "attention.*=1e-4".
    warmup_steps: of the learning rate.
    weight_decay: AdamW's.
    clip_norm: gradient norm of one variant.
    eval_steps: steps between losses on held-out tokens, of which each variant keeps its best weights; 0: at the end.
    patience: a layer ends when so many of these in a row bettered no variant; 0: never.
    dtype: of the matrix products in training; weights, losses, fits and evaluations are fp32.
    momentum_dtype: of AdamW's first moment; the second stays fp32, whose increments bf16 would lose.
    layers: neighbouring layers of one shape that are trained side by side.
    memory_gib: what a step may take on the device; 0: what the device has. Variants that do not fit together are
      trained in groups, one after the other.
    seed: of the order of batches and of random first weights.
  """

  init: str = "paper"
  least_squares: bool = True
  fit_tokens: int = 1_048_576
  loss: str = "delta"
  attention_target: str = "attention"
  steps: int = 100
  batch_rows: int = 4
  learning_rate: float = 1e-4
  learning_rates: tuple[str, ...] = ()
  warmup_steps: int = 10
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  eval_steps: int = 0
  patience: int = 0
  dtype: str = "float32"
  momentum_dtype: str = "float32"
  layers: int = 1
  memory_gib: float = 0.0
  seed: int = 0

  def __post_init__(self) -> None:
    for name, known in (
      ("loss", LOSSES),
      ("dtype", DTYPES),
      ("momentum_dtype", DTYPES),
      ("init", surgery.METHODS),
      ("attention_target", ATTENTION_TARGETS),
    ):
      if getattr(self, name) not in known:
        raise PuzzleError(f"bld.{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
    for name, least in (
      ("steps", 0),
      ("warmup_steps", 0),
      ("eval_steps", 0),
      ("patience", 0),
      ("memory_gib", 0),
      ("batch_rows", 1),
      ("layers", 1),
      ("fit_tokens", 1),
    ):
      if getattr(self, name) < least:
        raise PuzzleError(f"bld.{name}={getattr(self, name)} must be at least {least}")
    for name in ("learning_rate", "clip_norm"):
      if getattr(self, name) <= 0:
        raise PuzzleError(f"bld.{name}={getattr(self, name)} must be above 0")
    check_seed("bld.seed", self.seed)
    if self.patience and not self.eval_steps:
      raise PuzzleError(f"bld.patience={self.patience} needs bld.eval_steps of at least 1")
    for rule in self.learning_rates:
      self._rate(rule)

  @staticmethod
  def _rate(rule: str) -> tuple[str, float]:
    pattern, _, rate = rule.partition("=")
    try:
      value = float(rate)
    except ValueError:
      value = 0.0
    if not value > 0:
      raise PuzzleError(f"bld.learning_rates: {rule!r} is not of the form PATTERN=RATE, such as 'ffn.linear=1e-5'")
    return pattern, value

  def rate_of(self, name: str) -> float:
    """The peak learning rate of a variant."""
    rules = map(self._rate, self.learning_rates)
    return next((rate for pattern, rate in rules if fnmatch.fnmatchcase(name, pattern)), self.learning_rate)

  def optimizer(self, name: str) -> optax.GradientTransformation:
    """Of one variant."""
    warmup = min(self.warmup_steps, self.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, self.rate_of(name), warmup, max(self.steps, 1))
    adamw = optax.adamw(schedule, weight_decay=self.weight_decay, mu_dtype=jnp.dtype(self.momentum_dtype))
    return optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw)


@dataclasses.dataclass(frozen=True)
class CoupledConfig:
  """Which pairs are trained together; none by default.

  Attributes:
    blocks: `attention/ffn`, in every layer whose space has both and whose parent has neither.
    solutions: and the blocks of so many children of the search.
    min_different_layers: between any two of them.
    from_library: start from the decoupled weights; else from the parent's, as the library does.
    bld: how they are distilled.
  """

  blocks: tuple[str, ...] = ()
  solutions: int = 0
  min_different_layers: int = 1
  from_library: bool = True
  bld: BLDConfig = dataclasses.field(default_factory=BLDConfig)

  def __post_init__(self) -> None:
    for name in self.blocks:
      BlockSpec.parse(name)
    if self.solutions < 0 or self.min_different_layers < 1:
      raise PuzzleError(
        f"coupled: solutions={self.solutions} must be at least 0, min_different_layers={self.min_different_layers} "
        "at least 1"
      )

  @property
  def wanted(self) -> bool:
    return bool(self.blocks or self.solutions)


@dataclasses.dataclass(frozen=True)
class Job:
  """One thing to distil.

  Attributes:
    name: `attention.linear` and `ffn.w768` (decoupled), or `gqa1/w768` (coupled).
    block: what takes the parent's place.
    replaced: the slots of it that are not the parent's.
  """

  name: str
  block: BlockSpec
  replaced: tuple[str, ...]

  @property
  def subblocks(self) -> tuple[Subblock, ...]:
    return tuple(s for s in self.block.subblocks if s.slot in self.replaced)

  def entry(self, subblock: Subblock) -> str:
    """The name of a trained subblock in the library: coupled ones are worth something in their pair only."""
    return subblock.id if subblock.id == self.name else f"{subblock.id}@{self.name}"

  def num_params(self, config: ModelConfig) -> int:
    return sum(s.num_params(config) for s in self.subblocks)


def decoupled(space: LayerSpace) -> tuple[Job, ...]:
  """One job for each variant of a layer, no-ops included: those are not trained, but held against the parent too."""
  attention, ffn = space.parent.subblocks
  jobs = []
  for s in space.variants:
    block = BlockSpec(s, ffn) if s.slot == "attention" else BlockSpec(attention, s)
    jobs.append(Job(s.id, block, (s.slot,)))
  return tuple(jobs)


def coupled(space: LayerSpace, blocks: tuple[BlockSpec, ...]) -> tuple[Job, ...]:
  """One job for each of the blocks that lie in the space and differ from the parent's in both subblocks."""
  both = [b for b in blocks if b in space.blocks and all(s not in space.parent.subblocks for s in b.subblocks)]
  return tuple(Job(b.name, b, ("attention", "ffn")) for b in dict.fromkeys(both))


JobWeights = dict[str, Weights]  # by job: weights by slot


def split(weights: JobWeights) -> JobWeights:
  """The trained ones. A norm's scale folds into the matrices behind it: it stays the parent's."""

  def without_norms(block: Weights) -> Weights:
    return {slot: {k: w for k, w in p.items() if k != "norm"} for slot, p in block.items()}

  trained = {job: without_norms(block) for job, block in weights.items()}
  return {job: block for job, block in trained.items() if any(block.values())}


def with_norms(weights: Weights, parent: Weights) -> Weights:
  """The parent's own norms, one array for all variants, so that they are applied once."""
  return {slot: p | ({"norm": parent[slot]["norm"]} if p else {}) for slot, p in weights.items()}


@dataclasses.dataclass(frozen=True)
class _Against:
  """What all jobs of a layer are held against on one batch."""

  x: jax.Array
  context: subblocks.Context
  attention: jax.Array
  target: jax.Array
  weight: dict[str, jax.Array]  # of a token, by loss


def _against(spec: BlockSpec, config: ModelConfig, parent: Weights, batch: Batch, scale: tuple[Any, Any]) -> _Against:
  x, context, real = batch
  median, mean = scale
  attention, ffn = parent_deltas(spec, config, parent, x, context)
  target = attention.astype(jnp.float32) + ffn
  delta = token_weights(mean_square(target), real, median) / (jnp.sum(real) * mean)
  paper = real / jnp.sum(real * mean_square(x + target))
  return _Against(x, context, attention, target, {"delta": delta, "paper": paper})


def _losses(
  job: Job, config: ModelConfig, parent: Weights, weights: Weights, against: _Against, *, attention_only: bool = False
) -> dict[str, jax.Array]:
  """Both losses of one job."""
  x, context = against.x, against.context
  attention, ffn = job.block.subblocks
  first = against.attention
  if "attention" in job.replaced:
    first = subblocks.apply(attention, config, weights["attention"], x, context=context)[0]
  if attention_only and job.replaced == ("attention",):
    error = mean_square(first.astype(jnp.float32) - against.attention)
  else:
    own = weights["ffn"] if "ffn" in job.replaced else parent["ffn"]
    second = subblocks.apply(ffn, config, own, x + first, context=context)[0]
    error = mean_square(first.astype(jnp.float32) + second - against.target)
  return {name: jnp.sum(weight * error) for name, weight in against.weight.items()}


@functools.partial(jax.jit, static_argnames=("spec", "jobs", "config"))
def evaluate_batch(
  spec: BlockSpec,
  jobs: tuple[Job, ...],
  config: ModelConfig,
  parent: Weights,
  weights: JobWeights,
  batch: Batch,
  scale: tuple[Any, Any],
) -> dict[str, dict[str, jax.Array]]:
  """Both losses of every job on one batch, x [G, B, T, D]: [G] each."""

  def layer(
    context: Context, parent: Weights, weights: JobWeights, x: jax.Array, scale: Any
  ) -> dict[str, dict[str, jax.Array]]:
    against = _against(spec, config, parent, batch._replace(x=x, context=context), scale)
    return {job.name: _losses(job, config, parent, weights[job.name], against) for job in jobs}

  return _side_by_side(layer, batch.context, parent, weights, batch.x, scale)


def _side_by_side(layer: Callable[..., _T], context: Context, *trees: Any) -> _T:
  """`layer` of the context and each of G layers' trees, [G, …]; one alone is not mapped."""
  if jax.tree.leaves(trees)[0].shape[0] > 1:
    return jax.vmap(functools.partial(layer, dataclasses.replace(context, mapped=True)))(*trees)
  made = layer(context, *jax.tree.map(lambda leaf: leaf[0], trees))
  return jax.tree.map(lambda leaf: leaf[None], made)


def train_step(
  spec: BlockSpec,
  jobs: tuple[Job, ...],
  config: ModelConfig,
  settings: BLDConfig,
  parent: Weights,
  trained: JobWeights,
  states: dict[str, Any],
  batch: Batch,
  scale: tuple[Any, Any],
) -> tuple[JobWeights, dict[str, Any], dict[str, jax.Array]]:
  """One AdamW step of every job; one whose gradient is not finite keeps its weights.

  Args:
    spec: the parent's block.
    jobs: those that train.
    config: of the model.
    settings: how.
    parent: its weights by slot, [G, …].
    trained: `split` weights of the jobs, [G, …].
    states: of the jobs' optimisers.
    batch: x [G, B, T, D].
    scale: `Scale.median` and `Scale.mean` of each layer, [G].

  Returns:
    The weights, the states, and the loss of each job, [G].
  """

  def layer(
    context: Context, parent: Weights, trained: JobWeights, states: dict[str, Any], x: jax.Array, scale: Any
  ) -> tuple[JobWeights, dict[str, Any], dict[str, jax.Array]]:
    against = _against(spec, config, parent, batch._replace(x=x, context=context), scale)
    new_trained, new_states, losses = {}, {}, {}
    for job in jobs:

      def loss_of(weights: Weights, job: Job = job) -> jax.Array:
        whole = with_norms(weights, parent)
        only = settings.attention_target == "attention"
        return _losses(job, config, parent, whole, against, attention_only=only)[settings.loss]

      weights, state = trained[job.name], states[job.name]
      loss, gradient = jax.value_and_grad(loss_of)(weights)
      finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
      updates, new_state = settings.optimizer(job.name).update(gradient, state, weights)
      stepped = (optax.apply_updates(weights, updates), new_state)
      new_trained[job.name], new_states[job.name] = jax.tree.map(
        lambda new, old, finite=finite: jnp.where(finite, new, old), stepped, (weights, state)
      )
      losses[job.name] = loss
    return new_trained, new_states, losses

  context = dataclasses.replace(batch.context, dtype=jnp.dtype(settings.dtype))
  return _side_by_side(layer, context, parent, trained, states, batch.x, scale)


def init_states(settings: BLDConfig, trained: JobWeights) -> dict[str, Any]:
  """Fresh optimiser states of the jobs, [G, …]."""
  return {name: jax.vmap(settings.optimizer(name).init)(weights) for name, weights in trained.items()}
