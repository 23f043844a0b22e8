"""Replace-1-block scores (paper section 4): one block of the intact parent replaced, measured on held-out tokens.

Each score starts at the replaced layer from the stored activations; the prefix is never recomputed. Two compiled
programs serve all layers: one a block spec, and the parent's suffix, whose first layer is an argument. Scores are
differences to the parent, in nats a token, with the standard error over sequences; lower is better.

"composed" scores every attention × FFN pair; "subblocks" replaces one subblock at a time and adds up: cheaper.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax import activations, divergence
from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig
from puzzle_jax.data import PackedText, target_mask
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import decoder, subblocks
from puzzle_jax.space import LayerSpace

GRANULARITIES = ("composed", "subblocks")
METRICS = ("kl", "lm_loss")


@dataclasses.dataclass(frozen=True)
class _Rows:
  """A batch of held-out rows: what the parent predicts there, and the true next tokens."""

  rows: slice
  context: subblocks.Context
  reference: divergence.Reference
  nll_BT: np.ndarray
  targets_T: jax.Array
  mask_BT: np.ndarray


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def _replaced(spec: BlockSpec, config: ModelConfig, params: Any, x_BTD: jax.Array, context: Any) -> jax.Array:
  return decoder.block_apply(spec, config, params, x_BTD, context=context)[0]


@functools.partial(jax.jit, static_argnames=("architecture",))
def _suffix(
  architecture: Architecture,
  params: Any,
  x_BTD: jax.Array,
  start: jax.Array,
  context: subblocks.Context,
  reference: divergence.Reference,
  targets_T: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """KL to the reference and negative log likelihood, [B, T], of the parent's layers from `start` on."""
  config, first = architecture.config, 0
  for (spec, length), run in zip(architecture.runs(), params["runs"], strict=True):

    def layer(i: jax.Array, x: jax.Array, spec: Any = spec, run: Any = run, first: int = first) -> jax.Array:
      weights = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i - first, keepdims=False), run)
      return decoder.block_apply(spec, config, weights, x, context=context)[0]

    x_BTD = jax.lax.fori_loop(jnp.maximum(start, first), first + length, layer, x_BTD)
    first += length
  hidden = decoder.final_norm(config, params, x_BTD)
  flat = hidden.reshape(-1, hidden.shape[-1])
  kl, nll = divergence.kl_and_nll_to(reference, decoder.head_weights(params), flat, targets_T=targets_T)
  return kl.reshape(x_BTD.shape[:2]), nll.reshape(x_BTD.shape[:2])


class Scorer:
  """Scores blocks of one parent on one set of held-out rows.

  Args:
    architecture: the parent's.
    params: its "runs" form.
    packed: the held-out rows.
    last_RTD: the stored input of the final norm.
    batch_rows: rows on the device at once.
  """

  def __init__(
    self, architecture: Architecture, params: Any, *, packed: PackedText, last_RTD: np.ndarray, batch_rows: int
  ):
    self._architecture, self._params = architecture, params
    head = decoder.head_weights(params)
    self._batches = []
    for start in range(0, len(last_RTD), batch_rows):
      rows = slice(start, start + batch_rows)
      tokens = packed.tokens[rows]
      targets = jnp.asarray(np.roll(tokens, -1, axis=1).reshape(-1))
      x = jnp.asarray(last_RTD[rows])
      hidden = decoder.final_norm(architecture.config, params, x)
      reference = divergence.reference(head, hidden.reshape(-1, hidden.shape[-1]))
      context = activations.to_context(architecture.config, packed, rows)
      last = jnp.asarray(architecture.num_layers)
      _, nll = _suffix(architecture, params, x, last, context, reference, targets)
      mask = np.asarray(target_mask(packed.segment_ids[rows]))
      self._batches.append(_Rows(rows, context, reference, np.asarray(nll), targets, mask))

  def score(self, layer: int, spec: BlockSpec, weights: Mapping[str, Any], x_RTD: np.ndarray) -> dict[str, float]:
    """The scores of one block.

    Args:
      layer: where it stands.
      spec: the block.
      weights: its weights by slot.
      x_RTD: the stored input of the layer.

    Returns:
      Each metric (nats a token above the parent's) and its standard error over rows, `<metric>_stderr`.
    """
    rows: dict[str, list[float]] = {metric: [] for metric in METRICS}
    tokens: list[float] = []
    for batch in self._batches:
      x = jnp.asarray(x_RTD[batch.rows])
      x = _replaced(spec, self._architecture.config, weights, x, batch.context)
      kl, nll = _suffix(
        self._architecture, self._params, x, jnp.asarray(layer + 1), batch.context, batch.reference, batch.targets_T
      )
      values = {"kl": np.asarray(kl, np.float64), "lm_loss": np.asarray(nll, np.float64) - batch.nll_BT}
      for metric, value in values.items():
        rows[metric] += np.sum(value * batch.mask_BT, axis=1).tolist()
      tokens += np.sum(batch.mask_BT, axis=1).tolist()
    result = {}
    for metric, sums in rows.items():
      result[metric], result[f"{metric}_stderr"] = mean_and_error(np.array(sums), np.array(tokens))
    return result


def mean_and_error(sums_R: np.ndarray, tokens_R: np.ndarray) -> tuple[float, float]:
  """Mean a token over rows, and its standard error (ratio estimator over rows); the error of a single row is 0."""
  mean = float(sums_R.sum() / tokens_R.sum())
  residual = sums_R - mean * tokens_R
  rows = len(sums_R)
  variance = rows / (rows - 1) * np.sum(residual**2) / tokens_R.sum() ** 2 if rows > 1 else 0.0
  return mean, float(math.sqrt(variance))


def blocks_to_score(space: LayerSpace, granularity: str) -> tuple[BlockSpec, ...]:
  """The blocks whose scores determine all others of the layer."""
  if granularity not in GRANULARITIES:
    raise PuzzleError(f"scores.granularity={granularity!r} is not one of {', '.join(GRANULARITIES)}")
  return space.single_replacements if granularity == "subblocks" else space.blocks[1:]


def compose(
  space: LayerSpace, scores: Mapping[str, Mapping[str, float]], *, metric: str
) -> dict[str, tuple[float, float]]:
  """Score and standard error of every block of a layer, by block name; the parent's own is 0.

  Where a pair was not scored itself, its subblocks' scores are summed.
  """
  parent = space.parent
  result = {parent.name: (0.0, 0.0)}

  def measured(block: BlockSpec) -> tuple[float, float]:
    entry = scores[block.name]
    return entry[metric], entry[f"{metric}_stderr"]

  for block in space.blocks[1:]:
    if block.name in scores:
      result[block.name] = measured(block)
      continue
    parts = [BlockSpec(block.attention, parent.ffn), BlockSpec(parent.attention, block.ffn)]
    if all(part.name in scores for part in parts):
      values = [measured(part) for part in parts]
      result[block.name] = (sum(v for v, _ in values), math.hypot(*(e for _, e in values)))
  return result


def block_weights(
  space: LayerSpace, block: BlockSpec, parent: Mapping[str, Any], library: Mapping[str, Any]
) -> dict[str, Any]:
  """The weights of a block: the parent's own subblocks, or the library's variants."""
  own = dict(zip(("attention", "ffn"), space.parent.subblocks, strict=True))
  return {s.slot: parent[s.slot] if s == own[s.slot] else library[s.id] for s in block.subblocks}
