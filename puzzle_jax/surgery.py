"""A variant's first weights, from the parent's (paper section 2).

`METHODS`: "paper" is what the paper does (channel contribution, mean-pooled KV heads, W_V·W_O and W_up·W_down
products), "truncate" takes the first channels or heads and "random" draws all weights; both show what the paper's
choice is worth. `least_squares` then fits the last matrix.
"""

import functools
import math
from collections.abc import Mapping

import numpy as np

from puzzle_jax import arch
from puzzle_jax.arch import ModelConfig, Subblock
from puzzle_jax.errors import PuzzleError

METHODS = ("paper", "truncate", "random")

Weights = Mapping[str, np.ndarray]


@functools.singledispatch
def from_parent(
  spec: Subblock, parent: Subblock, weights: Weights, *, config: ModelConfig, channel_mean: np.ndarray, truncate: bool
) -> dict[str, np.ndarray]:
  """The weights of `spec` made of the parent's subblock; one implementation a kind.

  Args:
    spec: the variant.
    parent: the parent's subblock of the same slot.
    weights: the parent's weights, fp32.
    config: of the model.
    channel_mean: [E] mean absolute value of what the parent's last matrix multiplies, on calibration tokens.
    truncate: keep the first channels or heads instead of the paper's choice.
  """
  raise PuzzleError(f"no initialisation of {spec.name} from the parent's {parent.name}; known: see surgery.py")


@from_parent.register
def _(
  spec: arch.GQA, parent: Subblock, weights: Weights, *, config: ModelConfig, channel_mean: np.ndarray, truncate: bool
) -> dict[str, np.ndarray]:
  """Mean-pools the K and V heads that are merged (Ainslie et al., GQA)."""
  del channel_mean
  if not isinstance(parent, arch.GQA) or parent.kv_heads % spec.kv_heads:
    raise PuzzleError(f"{spec.name} cannot be made of the parent's {parent.name}: KV heads must divide its own")

  def pool(w: np.ndarray) -> np.ndarray:
    groups = w.reshape(spec.kv_heads, -1, config.head_dim, *w.shape[1:])
    return (groups[:, 0] if truncate else groups.mean(axis=1)).reshape(-1, *w.shape[1:])

  return {name: pool(w) if name in ("k", "v", "k_bias", "v_bias") else w for name, w in weights.items()}


@from_parent.register
def _(
  spec: arch.SwiGLU,
  parent: Subblock,
  weights: Weights,
  *,
  config: ModelConfig,
  channel_mean: np.ndarray,
  truncate: bool,
) -> dict[str, np.ndarray]:
  """Keeps the channels with the largest mean contribution |X_i|·‖W_down[:, i]‖, in their order."""
  del config
  if not isinstance(parent, arch.SwiGLU) or spec.width > parent.width:
    raise PuzzleError(f"{spec.name} cannot be made of the parent's {parent.name}: it must be no wider")
  contribution = channel_mean * np.linalg.norm(weights["down"], axis=0)
  best = np.argsort(-contribution, kind="stable")[: spec.width]
  keep = np.arange(spec.width) if truncate else np.sort(best)
  return {
    "norm": weights["norm"],
    "gate": weights["gate"][keep],
    "up": weights["up"][keep],
    "down": weights["down"][:, keep],
  }


@from_parent.register
def _(
  spec: arch.LinearAttention,
  parent: Subblock,
  weights: Weights,
  *,
  config: ModelConfig,
  channel_mean: np.ndarray,
  truncate: bool,
) -> dict[str, np.ndarray]:
  """W_O·W_V with KV heads repeated to query heads: each token attends to itself only."""
  del spec, channel_mean, truncate
  if not isinstance(parent, arch.GQA):
    return dict(weights)
  heads = weights["v"].reshape(parent.kv_heads, config.head_dim, -1)
  v = np.repeat(heads, config.num_heads // parent.kv_heads, axis=0).reshape(config.q_size, -1)
  return {"norm": weights["norm"], "linear": weights["o"] @ v}


@from_parent.register
def _(
  spec: arch.LinearFFN,
  parent: Subblock,
  weights: Weights,
  *,
  config: ModelConfig,
  channel_mean: np.ndarray,
  truncate: bool,
) -> dict[str, np.ndarray]:
  """W_down·W_up: the gate is ignored."""
  del spec, config, channel_mean, truncate
  if not isinstance(parent, arch.SwiGLU):
    return dict(weights)
  return {"norm": weights["norm"], "linear": weights["down"] @ weights["up"]}


@from_parent.register(arch.NoAttention)
@from_parent.register(arch.NoFFN)
def _(spec: Subblock, *args: object, **kwargs: object) -> dict[str, np.ndarray]:
  del spec, args, kwargs
  return {}


def initial(
  spec: Subblock,
  parent: Subblock,
  weights: Weights,
  *,
  config: ModelConfig,
  channel_mean: np.ndarray,
  method: str,
  seed: int,
) -> dict[str, np.ndarray]:
  """First weights of a variant, fp32, by one of `METHODS`; the norm's scale is always the parent's."""
  if method not in METHODS:
    raise PuzzleError(f"initialisation {method!r} is not one of {', '.join(METHODS)}")
  weights = {k: np.asarray(w, np.float32) for k, w in weights.items()}
  if method == "random":
    rng = np.random.default_rng(seed)
    fresh = {k: t.shape for k, t in spec.tensors(config).items()}
    scale = {k: 1 / math.sqrt(s[-1]) if len(s) == 2 else 0.0 for k, s in fresh.items()}
    drawn = {k: (scale[k] * rng.standard_normal(s)).astype(np.float32) for k, s in fresh.items()}
    return drawn | {k: weights[k] for k in fresh if k == "norm"}
  return from_parent(spec, parent, weights, config=config, channel_mean=channel_mean, truncate=method == "truncate")
