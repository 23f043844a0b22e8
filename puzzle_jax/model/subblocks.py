"""Flax definitions of the subblock kinds of `arch`: pure functions of (params, x), residual not included.

Weights are declared by the spec (`Subblock.tensors`), so a module only says what is computed. Letters: B batch,
T query tokens, S key/value tokens, N query heads, K KV heads, H head size, D hidden, F FFN width.
"""

import contextlib
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from puzzle_jax import arch

_QUERY_BLOCKS, _LEAST_BLOCK = 4, 64  # of exact attention: so many blocks, of so many tokens at least

Params = dict[str, jax.Array]
Cache = dict[str, jax.Array]  # k and v [B, S, K, H]; empty for kinds without one


@flax.struct.dataclass
class Context:
  """What a subblock needs besides x: where the tokens stand, and how precisely to compute.

  Attributes:
    positions_BT: position of each token in its document; with a cache also the slot that it takes.
    cos_BTH, sin_BTH: rotary tables, fp32.
    segments_BT: document of each token (0: padding), or None for one document a row, which is the fast path.
    dtype: of the matrix products and of what a subblock adds, None for x's. Norms, softmax and rotary tables are fp32.
    mapped: under `vmap`, whose rule for cuDNN's attention fails where heads share a mask (jax-ml/jax#34920).
  """

  positions_BT: jax.Array
  cos_BTH: jax.Array
  sin_BTH: jax.Array
  segments_BT: jax.Array | None = None
  dtype: Any = flax.struct.field(pytree_node=False, default=None)
  mapped: bool = flax.struct.field(pytree_node=False, default=False)


def dot(equation: str, x: jax.Array, w: jax.Array, *, out: Any = None) -> jax.Array:
  """`einsum` in x's dtype, returned in it or in `out`.

  fp32 is fp32 unless `jax.default_matmul_precision` is set: GPUs would take TF32.
  """
  with _precision_of(x.dtype):
    return jnp.einsum(equation, x, w.astype(x.dtype), preferred_element_type=out)


def asked_precision() -> str | None:
  """What `jax.default_matmul_precision` was set to, if it was."""
  return jax.config.values["jax_default_matmul_precision"]


def _precision_of(dtype: Any) -> Any:
  unset = asked_precision() is None
  return jax.default_matmul_precision("highest") if unset and dtype == jnp.float32 else contextlib.nullcontext()


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, *, eps: float, dtype: Any = None) -> jax.Array:
  """RMS norm, computed in fp32, returned in `dtype` or x's."""
  x = x_BTD.astype(jnp.float32)
  x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
  return (x * scale_D[None, None]).astype(dtype or x_BTD.dtype)


def rope_tables(config: arch.ModelConfig, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
  """cos and sin [B, T, H] in fp32, halves repeated (the checkpoints' rotate-half convention)."""
  frequencies = config.rope_theta ** -(jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
  if (s := config.rope_scaling) is not None:
    wavelength = 2 * jnp.pi / frequencies
    smooth = (s.original_max_context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)  # 0: long waves, scaled in full; 1: short waves, left alone
    frequencies = frequencies * ((1 - smooth) / s.factor + smooth)
  angles = positions_BT[..., None].astype(jnp.float32) * frequencies[None, None]
  angles = jnp.concatenate([angles, angles], axis=-1)
  return jnp.cos(angles), jnp.sin(angles)


def _rotate(x_BTNH: jax.Array, context: Context) -> jax.Array:
  x = x_BTNH.astype(jnp.float32)
  first, second = jnp.split(x, 2, axis=-1)
  rotated = jnp.concatenate([-second, first], axis=-1)
  out = x * context.cos_BTH[:, :, None] + rotated * context.sin_BTH[:, :, None]
  return out.astype(x_BTNH.dtype)


def _has_flash(q_BTNH: jax.Array) -> bool:
  """Whether cuDNN's flash attention takes such queries here, with a mask, too."""
  tokens, size = q_BTNH.shape[1], q_BTNH.shape[-1]
  fits = q_BTNH.dtype == jnp.bfloat16 and tokens % 2 == 0 and size % 8 == 0 and size <= 128
  return jax.default_backend() == "gpu" and fits


def _attend(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array | None = None, *, causal: bool = True
) -> jax.Array:
  """Softmax attention; by cuDNN where it can be, if causal."""
  implementation: Any = "cudnn" if causal and _has_flash(q_BTNH) else "xla"
  mask = None if mask_BTS is None else mask_BTS[:, None]
  with _precision_of(q_BTNH.dtype):
    return jax.nn.dot_product_attention(
      q_BTNH, k_BSKH, v_BSKH, mask=mask, is_causal=causal, implementation=implementation
    )


def _put(cache_BKSH: jax.Array, new_BTKH: jax.Array, positions_BT: jax.Array) -> jax.Array:
  """Keys or values to the slots of their positions."""
  rows = jnp.arange(new_BTKH.shape[0])[:, None]
  return cache_BKSH.at[rows, :, positions_BT].set(new_BTKH.astype(cache_BKSH.dtype))


def _attend_cached(q_BTNH: jax.Array, cache: Cache, positions_BT: jax.Array) -> jax.Array:
  """Attention to all slots up to the query's own; the products are batched over rows and KV heads as the cache lies."""
  k_BKSH, v_BKSH = (cache[name].astype(q_BTNH.dtype) for name in ("k", "v"))
  batch, tokens, heads, size = q_BTNH.shape
  q_BTKGH = q_BTNH.reshape(batch, tokens, k_BKSH.shape[1], -1, size)
  scores_BKGTS = dot("btkgh,bksh->bkgts", q_BTKGH, k_BKSH, out=jnp.float32) * size**-0.5
  seen_BTS = jnp.arange(k_BKSH.shape[2])[None, None] <= positions_BT[..., None]
  p_BKGTS = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], scores_BKGTS, -jnp.inf), axis=-1)
  return dot("bkgts,bksh->btkgh", p_BKGTS.astype(v_BKSH.dtype), v_BKSH).reshape(batch, tokens, heads, size)


def _attend_within(context: Context, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
  """Causal attention within documents: cuDNN's with a mask, or block by block of queries against the keys up to the
  block's end, which leaves out three eighths of a whole mask."""
  segments_BT, tokens = context.segments_BT, q_BTNH.shape[1]
  assert segments_BT is not None
  if _has_flash(q_BTNH) and not context.mapped:
    return _attend(q_BTNH, k_BSKH, v_BSKH, segments_BT[:, :, None] == segments_BT[:, None])
  size = max(_LEAST_BLOCK, -(-tokens // _QUERY_BLOCKS))
  outputs = []
  for start in range(0, tokens, size):
    stop = min(start + size, tokens)
    causal = jnp.tril(jnp.ones((stop - start, stop), bool), k=start)
    mask = (segments_BT[:, start:stop, None] == segments_BT[:, None, :stop]) & causal[None]
    outputs.append(_attend(q_BTNH[:, start:stop], k_BSKH[:, :stop], v_BSKH[:, :stop], mask, causal=False))
  return jnp.concatenate(outputs, axis=1)


class _Subblock(nn.Module):
  """Declares the spec's weights as Flax parameters and normalises the input."""

  spec: arch.Subblock
  config: arch.ModelConfig

  def weights(self) -> Params:
    def init(name: str, shape: tuple[int, ...]) -> Any:
      if len(shape) == 2:
        return nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
      return nn.initializers.ones if name == "norm" else nn.initializers.zeros

    tensors = self.spec.tensors(self.config)
    return {name: self.param(name, init(name, t.shape), t.shape, jnp.float32) for name, t in tensors.items()}

  def normed(self, x_BTD: jax.Array, p: Params, context: Context) -> jax.Array:
    return rms_norm(x_BTD, p["norm"], eps=self.config.norm_eps, dtype=context.dtype)

  def output(self, features_BTE: jax.Array, w_DE: jax.Array) -> jax.Array:
    """The last, linear map. Its input is sown as `features`: channel statistics and least-squares fits read it."""
    self.sow("intermediates", "features", features_BTE)
    return dot("bte,de->btd", features_BTE, w_DE)


class GQAttention(_Subblock):
  """Grouped-query attention with rotary positions."""

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
    assert isinstance(self.spec, arch.GQA)
    p = self.weights()
    h_BTD = self.normed(x_BTD, p, context)

    def project(name: str, heads: int) -> jax.Array:
      y = dot("btd,ed->bte", h_BTD, p[name])
      if f"{name}_bias" in p:
        y = y + p[f"{name}_bias"].astype(y.dtype)[None, None]
      return y.reshape(*y.shape[:2], heads, self.config.head_dim)

    q = _rotate(project("q", self.config.num_heads), context)
    k = _rotate(project("k", self.spec.kv_heads), context)
    v = project("v", self.spec.kv_heads)
    if cache:
      cache = {"k": _put(cache["k"], k, context.positions_BT), "v": _put(cache["v"], v, context.positions_BT)}
      y = _attend_cached(q, cache, context.positions_BT)
    elif context.segments_BT is not None:
      y = _attend_within(context, q, k, v)
    else:
      y = _attend(q, k, v)
    y_BTE = y.reshape(*q.shape[:2], self.config.q_size)
    y_BTD = self.output(y_BTE, p["o"])
    if "o_bias" in p:
      y_BTD = y_BTD + p["o_bias"].astype(y_BTD.dtype)[None, None]
    return y_BTD, cache or {}


class GatedFFN(_Subblock):
  """SwiGLU."""

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
    del cache
    p = self.weights()
    h_BTD = self.normed(x_BTD, p, context)
    channels_BTF = jax.nn.silu(dot("btd,fd->btf", h_BTD, p["gate"])) * dot("btd,fd->btf", h_BTD, p["up"])
    return self.output(channels_BTF, p["down"]), {}


class LinearMap(_Subblock):
  """One matrix after the norm."""

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
    del cache
    p = self.weights()
    return self.output(self.normed(x_BTD, p, context), p["linear"]), {}


class Nothing(_Subblock):
  """A no-op: adds zero to the residual."""

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context, cache: Cache | None = None) -> tuple[jax.Array, Cache]:
    del cache
    return jnp.zeros_like(x_BTD, dtype=context.dtype), {}


MODULES: dict[type[arch.Subblock], type[_Subblock]] = {
  arch.GQA: GQAttention,
  arch.SwiGLU: GatedFFN,
  arch.LinearAttention: LinearMap,
  arch.LinearFFN: LinearMap,
  arch.NoAttention: Nothing,
  arch.NoFFN: Nothing,
}


def module(spec: arch.Subblock, config: arch.ModelConfig) -> _Subblock:
  """The Flax module of a spec."""
  return MODULES[type(spec)](spec, config)


def init(spec: arch.Subblock, config: arch.ModelConfig, key: jax.Array) -> Params:
  """Random fp32 weights of a subblock."""
  x = jnp.zeros((1, 1, config.hidden_size))
  cos, sin = rope_tables(config, jnp.zeros((1, 1), jnp.int32))
  variables = module(spec, config).init(key, x, Context(jnp.zeros((1, 1), jnp.int32), cos, sin))
  return dict(variables.get("params", {}))


def apply(
  spec: arch.Subblock,
  config: arch.ModelConfig,
  params: Params,
  x_BTD: jax.Array,
  *,
  context: Context,
  cache: Cache | None = None,
) -> tuple[jax.Array, Cache]:
  """What the subblock adds to the residual, [B, T, D] in the context's dtype, and its updated cache."""
  return module(spec, config).apply({"params": params}, x_BTD, context, cache)  # type: ignore[return-value]


def features(
  spec: arch.Subblock, config: arch.ModelConfig, params: Params, x_BTD: jax.Array, *, context: Context
) -> jax.Array:
  """What the subblock's last matrix multiplies, [B, T, E] (for SwiGLU the channels); E is 0 for a no-op."""
  _, state = module(spec, config).apply({"params": params}, x_BTD, context, mutable=["intermediates"])
  sown = state.get("intermediates", {}).get("features")
  return sown[0] if sown else jnp.zeros((*x_BTD.shape[:2], 0), x_BTD.dtype)
