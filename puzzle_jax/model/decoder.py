"""The decoder over an `Architecture`: one `apply` for parent and child (paper section 1).

Parameters are plain nested dicts: `{"embed": [V, D], "norm": [D], ("head": [V, D]), "layers": [block, …]}` with
`block = {"attention": {...}, "ffn": {...}}`. `stacked` turns "layers" into "runs": one stacked tree for each run of
equal specs, which `apply` scans over. Scans compile once a run; a loop over layers decodes faster on CPUs, where a scan
copies each layer's weights out of the stack (measured: 10 against 23 GB/s).
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig
from puzzle_jax.model import subblocks
from puzzle_jax.model.subblocks import Cache, Context

Tree = dict[str, Any]
Array = jax.Array | np.ndarray


@flax.struct.dataclass
class Output:
  """Of `apply`.

  Attributes:
    hidden_BTD: after the final norm; `logits` makes next-token logits of it.
    layers_L: the output of each block [L, B, T, D], or what `of_layer` makes of it.
    cache: one entry a layer, when a cache was given.
  """

  hidden_BTD: jax.Array
  layers_L: Any
  cache: list[Cache] | None = None


def context_of(
  config: ModelConfig, positions_BT: Array, *, segments_BT: Array | None = None, dtype: Any = None
) -> subblocks.Context:
  positions_BT = jnp.asarray(positions_BT)
  cos, sin = subblocks.rope_tables(config, positions_BT)
  return Context(positions_BT, cos, sin, None if segments_BT is None else jnp.asarray(segments_BT), dtype)


def block_apply(
  spec: BlockSpec, config: ModelConfig, params: Tree, x_BTD: jax.Array, *, context: Context, cache: Cache | None = None
) -> tuple[jax.Array, Cache]:
  """One block with its residuals."""
  delta, cache = subblocks.apply(spec.attention, config, params["attention"], x_BTD, context=context, cache=cache)
  x_BTD = x_BTD + delta
  delta, _ = subblocks.apply(spec.ffn, config, params["ffn"], x_BTD, context=context)
  return x_BTD + delta, cache


def products(primitive: Any, *args: Any, **params: Any) -> bool:
  """For `remat`: keeps what matrix products, sums and flash attention give; the rest costs less to compute than to
  read."""
  del args
  if primitive.name == "dot_general":
    return not any(params["dimension_numbers"][1])  # attention's scores have batch dimensions
  return primitive.name in ("reduce_sum", "dot_product_attention_fwd_wrapper")  # the latter of cuDNN, in jax.nn


def embed(params: Tree, tokens_BT: Array) -> jax.Array:
  """The residual stream's beginning, fp32."""
  return params["embed"][tokens_BT].astype(jnp.float32)


def final_norm(config: ModelConfig, params: Tree, x_BTD: jax.Array) -> jax.Array:
  return subblocks.rms_norm(x_BTD, params["norm"], eps=config.norm_eps)


def head_weights(params: Tree) -> jax.Array:
  """The LM head [V, D]: the embedding when tied."""
  return params["head"] if "head" in params else params["embed"]


def head_of(params: Mapping[str, Any]) -> Tree:
  """All but the layers: what stands before the first block and behind the last."""
  return {k: v for k, v in params.items() if k != "layers"}


def logits(params: Tree, hidden_BTD: jax.Array) -> jax.Array:
  """Next-token logits [B, T, V] in fp32 of normed hidden states."""
  return subblocks.dot("btd,vd->btv", hidden_BTD, head_weights(params)).astype(jnp.float32)


def _kept(x_BTD: jax.Array, rows: NamedSharding | None) -> jax.Array:
  return x_BTD if rows is None else jax.lax.with_sharding_constraint(x_BTD, rows)


def _start(
  config: ModelConfig,
  params: Tree,
  tokens_BT: Array,
  positions_BT: Array | None,
  segments_BT: Array | None,
  rows: NamedSharding | None,
  *,
  dtype: Any = jnp.float32,
) -> tuple[jax.Array, Context]:
  """What the first block reads, and the context of all; arguments as of `apply`."""
  if positions_BT is None:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
  context = context_of(config, positions_BT, segments_BT=segments_BT, dtype=dtype)
  return _kept(embed(params, tokens_BT), rows), context


_compiled_start = jax.jit(_start, static_argnames=("config", "rows"))


def apply(
  architecture: Architecture,
  params: Tree,
  tokens_BT: Array,
  *,
  positions_BT: Array | None = None,
  segments_BT: Array | None = None,
  cache: list[Cache] | None = None,
  dtype: Any = jnp.float32,
  remat: Callable[..., bool] | None = None,
  rows: NamedSharding | None = None,
  of_layer: Callable[[jax.Array, Any], Any] = lambda x_BTD, beside: x_BTD,
  beside_L: Any = None,
) -> Output:
  """Runs the model.

  Args:
    architecture: what `params` belong to.
    params: with "layers" (loop) or "runs" (scan, no cache); see the module's docstring.
    tokens_BT: token ids.
    positions_BT: position in the document; counted from 0 along the row when absent.
    segments_BT: document ids for packed rows; absent: one document a row.
    cache: of `empty_cache`; tokens are written to the slots that `positions_BT` names.
    dtype: of the matrix products; the residual stream, norms, softmax and rotary tables are fp32 throughout.
    remat: what the backward pass finds kept of each block's inside, the rest being computed again: a policy of
      `jax.checkpoint`, such as `products` or `jax.checkpoint_policies.nothing_saveable`; None: all that it reads.
    rows: how the rows of the residual stream lie on devices, there to be kept through all blocks; None: anyhow.
    of_layer: makes of a block's output, and of what lies beside it, what there is to give back: what is made on the
      spot need not be kept.
    beside_L: arrays with an entry a layer.
  """
  config = architecture.config
  x, context = _start(config, params, tokens_BT, positions_BT, segments_BT, rows, dtype=dtype)

  def block(
    spec: BlockSpec, layer: Tree, x: jax.Array, layer_cache: Cache | None, beside: Any
  ) -> tuple[jax.Array, Cache, Any]:
    x, layer_cache = block_apply(spec, config, layer, x, context=context, cache=layer_cache)
    x = _kept(x, rows)
    return x, layer_cache, of_layer(x, beside)

  run_block = jax.checkpoint(block, policy=remat, static_argnums=0) if remat else block
  outputs, new_cache = [], []
  if "runs" in params:
    start = 0
    for (spec, length), run in zip(architecture.runs(), params["runs"], strict=True):

      def step(x: jax.Array, inputs: tuple[Tree, Any], spec: BlockSpec = spec) -> tuple[jax.Array, Any]:
        layer, beside = inputs
        x, _, output = run_block(spec, layer, x, None, beside)
        return x, output

      beside = jax.tree.map(lambda b, start=start, length=length: b[start : start + length], beside_L)
      x, of_run = jax.lax.scan(step, x, (run, beside), length=length)
      outputs.append(of_run)
      start += length
    layers = jax.tree.map(lambda *runs: jnp.concatenate(runs), *outputs)
  else:
    for i, (spec, layer) in enumerate(zip(architecture.blocks, params["layers"], strict=True)):
      beside = jax.tree.map(lambda b, i=i: b[i], beside_L)
      x, layer_cache, output = run_block(spec, layer, x, cache[i] if cache is not None else None, beside)
      outputs.append(output)
      new_cache.append(layer_cache)
    layers = jax.tree.map(lambda *layers: jnp.stack(layers), *outputs)
  return Output(final_norm(config, params, x).astype(dtype), layers, new_cache if cache is not None else None)


@functools.partial(jax.jit, static_argnames=("spec", "config", "rows"), donate_argnames="cache")
def compiled_block(
  spec: BlockSpec,
  config: ModelConfig,
  params: Tree,
  x_BTD: jax.Array,
  context: Context,
  cache: Cache | None = None,
  *,
  rows: NamedSharding | None = None,
) -> tuple[jax.Array, Cache]:
  """`block_apply` as a program of its own, the same for all blocks of a spec."""
  x_BTD, cache = block_apply(spec, config, params, x_BTD, context=context, cache=cache)
  return _kept(x_BTD, rows), cache


def apply_by_block(
  architecture: Architecture,
  params: Tree,
  tokens_BT: Array,
  *,
  positions_BT: Array | None = None,
  segments_BT: Array | None = None,
  cache: list[Cache] | None = None,
  rows: NamedSharding | None = None,
) -> tuple[jax.Array, list[Cache]]:
  """`apply` in fp32 without a program of the whole model: to be called outside `jax.jit`.

  There is a program for each kind of block instead, which compiles in a fraction of the time (for a first answer of
  SmolLM2 on two cores 4 s in place of 18; on a GPU the whole program of it and a child took a minute) and runs as fast
  where a program a layer does not weigh.

  Args:
    architecture, params: the "layers" form.
    tokens_BT, positions_BT, segments_BT, rows: as of `apply`.
    cache: as of `apply`; it is used up.

  Returns:
    The residual stream [B, T, D] before the final norm, and the cache.
  """
  config = architecture.config
  x_BTD, context = _compiled_start(config, head_of(params), tokens_BT, positions_BT, segments_BT, rows)
  new_cache = []
  for i, (spec, layer) in enumerate(zip(architecture.blocks, params["layers"], strict=True)):
    before = None if cache is None else cache[i]
    x_BTD, after = compiled_block(spec, config, layer, x_BTD, context, before, rows=rows)
    new_cache.append(after)
  return x_BTD, new_cache


def _stack(layers: Iterator[Tree], length: int) -> Tree:
  """So many layers of equal spec as one tree; of NumPy's arrays one layer at a time lies beside it."""
  first = next(layers)
  if any(isinstance(x, jax.Array) for x in jax.tree.leaves(first)):
    return jax.tree.map(lambda *xs: jnp.stack(xs), first, *itertools.islice(layers, length - 1))
  run = jax.tree.map(lambda x: np.empty((length, *x.shape), x.dtype), first)
  for i, layer in enumerate(itertools.chain([first], itertools.islice(layers, length - 1))):
    for whole, x in zip(jax.tree.leaves(run), jax.tree.leaves(layer), strict=True):
      whole[i] = x
  return run


def stacked(architecture: Architecture, params: Tree) -> Tree:
  """`params` with "runs" in place of "layers": the form for training.

  NumPy's arrays stay on the host; "layers" may be an iterator that reads one layer after the other.
  """
  layers = iter(params["layers"])
  runs = [_stack(layers, length) for _, length in architecture.runs()]
  return head_of(params) | {"runs": runs}


def unstacked(architecture: Architecture, params: Tree) -> Tree:
  """Inverse of `stacked`."""
  layers = []
  for (_, length), run in zip(architecture.runs(), params["runs"], strict=True):
    layers += [jax.tree.map(lambda x, i=i: x[i], run) for i in range(length)]
  return {k: v for k, v in params.items() if k != "runs"} | {"layers": layers}


def empty_cache(architecture: Architecture, *, batch: int, length: int, dtype: Any = jnp.float32) -> list[Cache]:
  """A KV cache of `length` slots for `batch` rows: keys and values [B, K, S, H], a head's slots side by side."""

  def layer(spec: BlockSpec) -> Cache:
    heads = spec.kv_bytes_per_token(architecture.config, bytes_per_value=1) // (2 * architecture.config.head_dim)
    shape = (batch, heads, length, architecture.config.head_dim)
    return {"k": jnp.zeros(shape, dtype), "v": jnp.zeros(shape, dtype)} if heads else {}

  return [layer(spec) for spec in architecture.blocks]


def init(architecture: Architecture, key: jax.Array, *, keep: Callable[[Any], Any] = lambda made: made) -> Tree:
  """Random fp32 parameters; `keep` is done to each layer as it is made, such as `jax.device_get`."""
  c = architecture.config
  keys = jax.random.split(key, 2 * architecture.num_layers + 2)
  params: Tree = {"norm": keep(jnp.ones(c.hidden_size))}
  for name, k in zip(("embed", "head"), keys[-2:], strict=True):
    if name in architecture.head_tensors():
      params[name] = keep(jax.random.normal(k, (c.vocab_size, c.hidden_size)) * c.hidden_size**-0.5)
  params["layers"] = [
    keep({s.slot: subblocks.init(s, c, keys[2 * i + j]) for j, s in enumerate(block.subblocks)})
    for i, block in enumerate(architecture.blocks)
  ]
  return params
