"""What each stage of a run needs, by arithmetic: FLOPs of its matrix products, bytes on each device and on disk.

Nothing is measured here. A device's bytes are weights, optimiser states and stored rows in fp32, with a batch's
largest arrays, as the config's mesh divides them; what a compiled program needs besides comes on top. The child is
counted as large as the parent.
"""

import dataclasses
import math
from collections.abc import Mapping

from puzzle_jax import answers, bld, flops, memory
from puzzle_jax.arch import Architecture, BlockSpec, NoAttention, NoFFN, Subblock
from puzzle_jax.config import RunConfig
from puzzle_jax.data.sampling import PARENT
from puzzle_jax.mesh import MeshConfig
from puzzle_jax.scoring import blocks_to_score
from puzzle_jax.space import LayerSpace, Space

_FP32 = 4
_WIDTHS = {"float32": 4, "bfloat16": 2, "float8": 1}
STATE_COPIES = 5  # of every variant between windows: weights, first and best ones, AdamW's two moments
_TOKEN_BYTES = 12  # token, segment and position of a packed row
_TEXT_BYTES = 12  # of a written token as text, in the parts and in the dataset


@dataclasses.dataclass(frozen=True)
class Need:
  """Of one stage.

  Attributes:
    flops: of matrix products.
    memory_bytes: at once on each device.
    disk_bytes: at once in its folder, checkpoints included.
  """

  flops: float = 0.0
  memory_bytes: float = 0.0
  disk_bytes: float = 0.0


def needs(config: RunConfig, parent: Architecture, space: Space) -> Mapping[str, Need]:
  """By stage; a stage that is not there needs next to nothing."""
  data, model, mesh = config.data, parent.config, config.mesh
  context = data.seq_len // 2
  window = min(data.train_tokens, config.activations.window_tokens or data.train_tokens)
  params = parent.num_params() * _FP32
  head = params - sum(b.num_params(model) for b in parent.blocks) * _FP32
  layer = max(b.num_params(model) for b in parent.blocks) * _FP32
  variants = [sum(s.num_params(model) for s in x.variants) * _FP32 for x in space.layers]
  forward = parent.flops_per_token(context=context)
  layers = [b.flops_per_token(model, context=context) for b in parent.blocks]
  block = parent.blocks[0]

  stored = data.heldout_tokens * _FP32 * model.hidden_size * (parent.num_layers + 1)
  rolling = rolling_bytes(config, parent, window_tokens=window, layers=config.bld.layers)
  windows = math.ceil(data.train_tokens / window)
  side_by_side = dataclasses.replace(config.bld, layers=math.ceil(config.bld.layers / mesh.layer))
  bld_rows = math.ceil(config.bld.batch_rows / mesh.data)
  trained = max(
    memory.need(x.parent, bld.decoupled(x), model, side_by_side, rows=bld_rows, tokens=data.seq_len).total
    for x in set(space.layers)
  )
  gkd_batch = config.gkd.batch_rows * data.seq_len
  cached = bool(config.gkd.steps) and config.gkd.teacher == "cached"
  evaluation = config.evaluation
  return {
    "data": _data(config, parent),
    "costs": Need() if config.costs.table else _costs(config, parent, space),
    "activations": Need(
      data.heldout_tokens * sum(layers),
      layer + batch_bytes(block, parent, math.ceil(config.activations.batch_rows / mesh.data), data.seq_len),
      stored,
    ),
    "library": Need(
      data.train_tokens * sum(layers) + sum(_distillation(config, parent, x) for x in space.layers),
      trained + rolling * (config.activations.tier != "disk") / mesh.data,
      sum(variants) * (1 + STATE_COPIES * (windows > 1)) + rolling * (config.activations.tier == "disk"),
    ),
    "scores": Need(
      _scores(config, parent, space),
      scoring_bytes(config, parent, space, mesh),
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
      # The parent forward; the child forward, perhaps again in the backward pass, and twice that backward.
      config.gkd.steps * gkd_batch * (3 + config.gkd.remat) * forward
      + (data.gkd_tokens if cached else config.gkd.steps * gkd_batch) * forward,
      gkd_bytes(config, parent, MeshConfig()),
      params
      + 2 * (3 + bool(config.gkd.ema) + bool(config.gkd.eval_steps)) * params * bool(config.gkd.steps)
      + data.gkd_tokens * answers.bytes_per_token(model.vocab_size, config.gkd.kl_top_k) * cached,
    ),
    "evaluation": Need(
      (4 + 2 * _texts(config)) * data.eval_tokens * forward  # of tasks, nothing is known before they are read
      + evaluation.timed * 2 * (config.costs.timing.rounds + 2) * _scenario(config, max(config.costs.batches), forward)
      + 2 * len(evaluation.prompts) * evaluation.max_new_tokens * forward,
      evaluation_bytes(config, parent, mesh),
    ),
    "export": Need(0, 0, params * _WIDTHS[config.export.dtype] / _FP32),
    "report": Need(disk_bytes=6e6),
  }


def rolling_bytes(config: RunConfig, parent: Architecture, *, window_tokens: int, layers: int) -> int:
  """Of the training activations of a window: what layers side by side read, and what the next one does."""
  return window_tokens * _WIDTHS[config.activations.dtype] * parent.config.hidden_size * (layers + 1)


def batch_bytes(block: BlockSpec, parent: Architecture, rows: int, tokens: int, *, attention: str = "exact") -> int:
  """Of what a block's matrix products put out for a batch, and of attention's scores, which "fast" does not keep."""
  widths = sum(shape[0] for s in block.subblocks for _, shape in _matrices(s, parent))
  scores = 0 if attention == "fast" else scores_bytes(block, parent, rows, tokens)
  return rows * tokens * widths * _FP32 + scores


def scores_bytes(block: BlockSpec, parent: Architecture, rows: int, tokens: int) -> int:
  """Of attention's scores, all at once, in fp32."""
  model = parent.config
  return rows * model.num_heads * bool(block.kv_bytes_per_token(model)) * tokens**2 * _FP32


def scoring_bytes(config: RunConfig, parent: Architecture, space: Space, mesh: MeshConfig) -> float:
  """On each device in scoring: blocks cut over model, a layer's input of all rows over the rest; the head whole, with
  what it is held against.
  """
  data, model = config.data, parent.config
  blocks = sum(b.num_params(model) for b in parent.blocks)
  head = parent.num_params() - blocks
  variants = max(sum(s.num_params(model) for s in x.variants) for x in space.layers)
  shards = mesh.data * mesh.layer
  rows = math.ceil(config.scores.batch_rows / shards)
  stored = data.heldout_tokens * model.hidden_size * (1 / shards + 2 / mesh.devices)
  inside = batch_bytes(parent.blocks[0], parent, rows, data.seq_len)
  return _FP32 * (head + (blocks + variants) / mesh.model + stored) + inside / mesh.model


def evaluation_bytes(config: RunConfig, parent: Architecture, mesh: MeshConfig) -> float:
  """On each device in the evaluation: parent and child and their two KV caches each, cut over model, rows over data."""
  evaluation, costs, model = config.evaluation, config.costs, parent.config
  tokens = max(costs.batches) * (costs.input_tokens + costs.output_tokens)
  caches = evaluation.timed * 4 * tokens * parent.kv_bytes_per_token(bytes_per_value=_FP32)
  inside = max(
    batch_bytes(parent.blocks[0], parent, math.ceil(evaluation.batch_rows / mesh.data), config.data.seq_len),
    max(evaluation.contexts, default=0) ** 2 * model.num_heads * _FP32,  # attention's scores of one row
  )
  return (2 * parent.num_params() * _FP32 + caches + inside) / mesh.model


def gkd_bytes(config: RunConfig, parent: Architecture, mesh: MeshConfig) -> float:
  """On each device in global distillation: weights cut over data and model, rows over data, heads over model."""
  gkd, seq_len = config.gkd, config.data.seq_len
  params, rows = parent.num_params() * _FP32, math.ceil(gkd.batch_rows / mesh.data)
  # Parent and child, each in two forms; gradients, AdamW's two, the update.
  states = (8 + bool(gkd.ema) + bool(gkd.eval_steps)) * params / (mesh.data * mesh.model)
  stream = rows * seq_len * parent.config.hidden_size * _FP32
  block = parent.blocks[0]
  inside = batch_bytes(block, parent, rows, seq_len, attention=gkd.attention) / mesh.model
  products = batch_bytes(block, parent, rows, seq_len, attention="fast") / mesh.model * _WIDTHS[gkd.dtype] / _FP32
  kept = 0 if gkd.remat else parent.num_layers * products
  outputs = stream * (1 + _WIDTHS[gkd.dtype] / _FP32) * parent.num_layers  # of child and parent
  return states + outputs + inside + kept


def _texts(config: RunConfig) -> int:
  """How often `eval_tokens` are read besides the run's own comparison."""
  evaluation = config.evaluation
  if not evaluation.texts and not evaluation.contexts and len(config.data.sources) == 1:
    return 0
  return max(len(evaluation.contexts), 1) * (1 + len(evaluation.texts))


def _data(config: RunConfig, parent: Architecture) -> Need:
  """The packed sets; where the parent writes text, also its weights and KV cache and what writing takes."""
  data, sampling = config.data, config.data.sampling
  parts = {"train": data.train_tokens + data.gkd_tokens, "heldout": data.heldout_tokens + data.eval_tokens}
  tokens = sum(parts.values())
  if PARENT not in data.sources:
    return Need(disk_bytes=tokens * _TOKEN_BYTES)
  written = sum(parts[part] * shares[data.sources.index(PARENT)] for part, shares in data.shares_by_part.items())
  width = _WIDTHS[sampling.dtype]
  cache = parent.kv_bytes_per_token(bytes_per_value=width) * min(sampling.max_tokens, parent.config.max_context)
  return Need(
    written * parent.flops_per_token(context=sampling.max_tokens // 2),
    parent.num_params() * (_FP32 + width) + sampling.batch_rows * cache,
    tokens * _TOKEN_BYTES + written * _TEXT_BYTES,
  )


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
