"""What each stage of a run needs, by arithmetic: FLOPs of its matrix products, bytes on the device and on disk.

Nothing is measured here. The device's bytes are weights, optimiser states and stored rows in fp32, with a batch's
largest arrays; what a compiled program needs besides comes on top. The child is counted as large as the parent.
"""

import dataclasses
import math
from collections.abc import Mapping

from puzzle_jax import bld, flops, memory
from puzzle_jax.arch import Architecture, BlockSpec, NoAttention, NoFFN, Subblock
from puzzle_jax.config import RunConfig
from puzzle_jax.scoring import blocks_to_score
from puzzle_jax.space import LayerSpace, Space

_FP32 = 4
_WIDTHS = {"float32": 4, "bfloat16": 2, "float8": 1}
_TOKEN_BYTES = 12  # token, segment and position of a packed row


@dataclasses.dataclass(frozen=True)
class Need:
  """Of one stage.

  Attributes:
    flops: of matrix products.
    memory_bytes: at once on the device.
    disk_bytes: at once in its folder, checkpoints included.
  """

  flops: float = 0.0
  memory_bytes: float = 0.0
  disk_bytes: float = 0.0


def needs(config: RunConfig, parent: Architecture, space: Space) -> Mapping[str, Need]:
  """By stage; a stage that is not there needs next to nothing."""
  data, model = config.data, parent.config
  tokens, context = data.train_tokens + data.heldout_tokens, data.seq_len // 2
  window = min(data.train_tokens, config.activations.window_tokens or data.train_tokens)
  params = parent.num_params() * _FP32
  head = params - sum(b.num_params(model) for b in parent.blocks) * _FP32
  layer = max(b.num_params(model) for b in parent.blocks) * _FP32
  variants = [sum(s.num_params(model) for s in x.variants) * _FP32 for x in space.layers]
  forward = parent.flops_per_token(context=context)
  layers = [b.flops_per_token(model, context=context) for b in parent.blocks]
  row = model.hidden_size * data.seq_len * _FP32

  def batch(rows: int, *specs: Subblock) -> float:
    """Bytes of what the matrix products of some subblocks put out for a batch, and of the attention's scores."""
    widths = sum(shape[0] for s in specs for _, shape in _matrices(s, parent))
    heads = sum(model.num_heads for s in specs if s.slot == "attention" and s.kv_bytes_per_token(model))
    return rows * data.seq_len * (widths + heads * data.seq_len) * _FP32

  stored = data.heldout_tokens * _FP32 * model.hidden_size * (parent.num_layers + 1)
  rolling = window * _WIDTHS[config.activations.dtype] * model.hidden_size * (config.bld.layers + 1)
  trained = max(
    memory.need(x.parent, bld.decoupled(x), model, config.bld, rows=config.bld.batch_rows, tokens=data.seq_len).total
    for x in space.layers
  )
  gkd_batch = config.gkd.batch_rows * data.seq_len
  evaluation = config.evaluation
  return {
    "data": Need(disk_bytes=(tokens + data.gkd_tokens + data.eval_tokens) * _TOKEN_BYTES),
    "costs": Need() if config.costs.table else _costs(config, parent, space),
    "activations": Need(
      data.heldout_tokens * sum(layers),
      layer + batch(config.activations.batch_rows, *parent.blocks[0].subblocks),
      stored,
    ),
    "library": Need(
      data.train_tokens * sum(layers) + sum(_distillation(config, parent, x) for x in space.layers),
      trained + rolling * (config.activations.tier != "disk"),
      sum(variants) + rolling * (config.activations.tier == "disk"),
    ),
    "scores": Need(
      _scores(config, parent, space), params + max(variants) + 2 * data.heldout_tokens / data.seq_len * row
    ),
    "search": Need(
      config.search.refine_rounds * _scores(config, parent, space),
      (params + sum(variants)) * bool(config.search.refine_rounds),
    ),
    "coupled": Need(
      0,  # how many pairs is known after the search
      trained * config.coupled.wanted,
      sum(variants) * config.coupled.wanted,
    ),
    "child": Need(0, head + layer, params),
    "gkd": Need(
      # The parent forward; the child forward, again in the backward pass, and twice that backward.
      config.gkd.steps * gkd_batch * 5 * forward,
      8 * params  # parent and child, each in two forms; gradients, AdamW's two, the update
      + config.gkd.batch_rows * row * 4 * parent.num_layers
      + batch(config.gkd.batch_rows, *parent.blocks[0].subblocks),
      params + 2 * 3 * params * bool(config.gkd.steps),
    ),
    "evaluation": Need(
      4 * data.eval_tokens * forward
      + 2 * (config.costs.timing.rounds + 2) * _scenario(config, max(config.costs.batches), forward)
      + 2 * len(evaluation.prompts) * evaluation.max_new_tokens * forward,
      4 * params + batch(evaluation.batch_rows, *parent.blocks[0].subblocks),
    ),
    "export": Need(0, 0, params * _WIDTHS[config.export.dtype] / _FP32),
    "report": Need(disk_bytes=6e6),
  }


def _matrices(subblock: Subblock, parent: Architecture) -> list[tuple[str, tuple[int, ...]]]:
  return [(name, t.shape) for name, t in subblock.tensors(parent.config).items() if len(t.shape) == 2]


def _scenario(config: RunConfig, batch: int, per_token: float) -> float:
  """FLOPs of one timing: prefill, and as many decode steps as are timed."""
  return batch * (config.costs.input_tokens + config.costs.timing.decode_steps) * per_token


def _costs(config: RunConfig, parent: Architecture, space: Space) -> Need:
  """Models of equal layers, one for each subblock and three more (`costs.jax_timing`)."""
  base, model, depth = parent.blocks[0], parent.config, config.costs.timing.layers
  subblocks = {s for layer in space.layers for s in (*layer.attention, *layer.ffn)}
  specs = {BlockSpec(NoAttention(), base.ffn), BlockSpec(base.attention, NoFFN())}
  specs |= {dataclasses.replace(base, **{s.slot: s}) for s in subblocks}
  tokens = config.costs.input_tokens + config.costs.output_tokens
  head = parent.flops_per_token() - sum(b.flops_per_token(model) for b in parent.blocks)
  total = sum(head + depth * s.flops_per_token(model, context=tokens) for s in specs)
  rounds = config.costs.timing.rounds + 2
  cache = (
    max(config.costs.batches) * tokens * depth * sum(s.kv_bytes_per_token(model, bytes_per_value=4) for s in specs)
  )
  weights = (sum(s.num_params(model) for s in subblocks) * depth + 2 * model.vocab_size * model.hidden_size) * _FP32
  return Need(sum(rounds * _scenario(config, b, total) for b in config.costs.batches), weights + 2 * cache, 1e5)


def _distillation(config: RunConfig, parent: Architecture, space: LayerSpace) -> float:
  """FLOPs of a layer's library: training, both evaluations, and the least-squares start."""
  data, context = config.data, config.data.seq_len // 2
  steps = config.bld.steps * config.bld.batch_rows * data.seq_len
  total: float = steps * flops.decoupled_step(space, parent.config, context=context)
  forward = sum(
    s.flops_per_token(parent.config, context=context)
    + (space.ffn[0].flops_per_token(parent.config) if s.slot == "attention" else 0)
    for s in space.variants
  )
  total += 2 * data.heldout_tokens * forward
  if config.bld.least_squares:
    inner = [shape[1] for s in space.variants for name, shape in _matrices(s, parent) if name == s.output]
    gram = sum(2 * e * (e + parent.config.hidden_size) for e in inner)
    total += (min(data.train_tokens, config.bld.fit_tokens) + data.heldout_tokens) * (forward + gram)
    total += 6 * sum(e**3 / 3 + 2 * e**2 * parent.config.hidden_size for e in inner)  # six ridges
  return total


def _scores(config: RunConfig, parent: Architecture, space: Space) -> float:
  """FLOPs of replace-1-block: each block, and the parent's layers behind it."""
  model, context = parent.config, config.data.seq_len // 2
  behind = parent.flops_per_token(context=context)
  total = 0.0
  for own, layer in zip(parent.blocks, space.layers, strict=True):
    behind -= own.flops_per_token(model, context=context)
    for block in blocks_to_score(layer, config.scores.granularity):
      total += behind + block.flops_per_token(model, context=context)
  tokens = config.data.heldout_tokens + config.data.seq_len * math.ceil(config.data.task_items / 4) * bool(
    config.data.task
  )
  return total * tokens
