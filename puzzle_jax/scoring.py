"""Replace-1-block scores (paper section 4): one block of the intact parent replaced, measured on held-out tokens.

Each score starts at the replaced layer from the stored activations; the prefix is never recomputed. One program is
compiled for each subblock spec, one for the parent's block and one for the metrics, whatever the number of layers.
Scores are differences to the parent, lower is better, each with its standard error over sequences:

  kl        KL(parent ‖ child), nats a token
  lm_loss   negative log likelihood of the text, nats a token
  cosine    1 - cosine of the two models' hidden states in front of the LM head
  accuracy  share of a task's items that the parent answers rightly and the child does not, less the reverse

"composed" scores every attention × FFN pair; "subblocks" replaces one subblock at a time and adds up: cheaper. The
former contains the latter, so that a composed run also says how well the sums rank (`rank_correlation`).
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from puzzle_jax import activations, divergence
from puzzle_jax import mesh as mesh_lib
from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig, Subblock
from puzzle_jax.bld import Job
from puzzle_jax.data import PackedText, target_mask
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluation.tasks import Task
from puzzle_jax.model import decoder, subblocks
from puzzle_jax.space import LayerSpace, Space

if TYPE_CHECKING:
  from puzzle_jax.runs import Run

GRANULARITIES = ("composed", "subblocks")
METRICS = ("kl", "lm_loss", "cosine", "accuracy")
PRECISIONS = ("highest", "tensorfloat32")

Block = tuple[BlockSpec, Any]  # with its weights by slot


@dataclasses.dataclass(frozen=True)
class _Batch:
  """Some held-out rows: where their tokens stand, what the parent predicts there, and the true next tokens."""

  context: subblocks.Context
  reference: divergence.Reference
  targets_T: jax.Array


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def _residual(spec: Subblock, config: ModelConfig, params: Any, x_BTD: jax.Array, context: Any) -> jax.Array:
  return x_BTD + subblocks.apply(spec, config, params, x_BTD, context=context)[0]


@functools.partial(jax.jit, static_argnames="config")
def _measure(
  config: ModelConfig, head: Any, x_BTD: jax.Array, reference: divergence.Reference, targets_T: jax.Array
) -> dict[str, jax.Array]:
  """By metric, [B, T] of what the final norm reads; the log likelihood not yet a difference."""
  hidden_TD = decoder.final_norm(config, head, x_BTD).reshape(-1, config.hidden_size)
  kl_T, nll_T = divergence.kl_and_nll_to(reference, decoder.head_weights(head), hidden_TD, targets_T=targets_T)
  dots = [jnp.sum(a * b, axis=-1) for a, b in ((hidden_TD, reference.hidden_TD), (hidden_TD, hidden_TD))]
  norm_T = jnp.sqrt(dots[1] * jnp.sum(jnp.square(reference.hidden_TD), axis=-1))
  values = {"kl": kl_T, "lm_loss": nll_T, "cosine": 1 - dots[0] / norm_T}
  return {name: value.reshape(x_BTD.shape[:2]) for name, value in values.items()}


class Scorer:
  """Holds children of one parent against it, on one set of rows.

  Args:
    architecture: the parent's.
    params: its parameters, the "layers" form of `model.decoder`.
    packed: the rows.
    last_RTD: the stored input of the parent's final norm; None: computed.
    batch_rows: rows at once; of several devices, each takes as many as the others.
    precision: of fp32 matrix products on a GPU or TPU, one of `PRECISIONS`.
    task: what `packed` are the rows of, if they are a task's: then `accuracy` is the metric.
    mesh: the devices; None: one. Rows, whatever their number, are spread over all of them where each holds the whole
      parent, that is where the axis `model` is 1; else over the others, and weights are cut over `model`.
  """

  def __init__(
    self,
    architecture: Architecture,
    params: Mapping[str, Any],
    *,
    packed: PackedText,
    batch_rows: int,
    last_RTD: Any = None,
    precision: str = "highest",
    task: Task | None = None,
    mesh: Mesh | None = None,
  ):
    self._mesh = mesh or mesh_lib.build(mesh_lib.MeshConfig())
    self._row_axes = tuple(axis for axis in mesh_lib.AXES if axis != "model" or self._mesh.shape["model"] == 1)
    self._config = architecture.config
    self._head = mesh_lib.put(self._mesh, decoder.head_of(params), P())  # read by chunks
    layers = mesh_lib.shard_weights(self._mesh, params["layers"])
    self.parent: list[Block] = list(zip(architecture.blocks, layers, strict=True))
    self._parent_specs = set(architecture.blocks)
    self._packed, self._task, self._precision = packed, task, precision
    self._mask_RT = np.asarray(target_mask(packed.segment_ids), np.float64)
    at_once = batch_rows + -batch_rows % self._mesh.size
    self._rows = [slice(start, start + at_once) for start in range(0, packed.num_rows, at_once)]
    self._contexts = [self._input(activations.to_context(self._config, packed, rows)) for rows in self._rows]
    if last_RTD is None:
      *_, last_RTD = self.inputs(self.parent)
    last = self._inputs(last_RTD)
    self._batches: list[_Batch] = []
    with jax.default_matmul_precision(precision):
      for rows, context, x in zip(self._rows, self._contexts, last, strict=True):
        hidden = decoder.final_norm(self._config, self._head, self._put(x))
        reference = divergence.reference(decoder.head_weights(self._head), hidden.reshape(-1, hidden.shape[-1]))
        targets = self._put(np.roll(packed.tokens[rows], -1, axis=1)).reshape(-1)
        self._batches.append(_Batch(context, reference, targets))
    self._parent_nll_RT = self._finished(self._started(last, []))["lm_loss"]

  def _put(self, x: Any, axes: Sequence[str] = mesh_lib.AXES) -> Any:
    """Rows on some axes' devices: for the metrics on all, where the head is whole.

    Where devices do not divide them, the last row is there several times; `_fetched` leaves it out.
    """

    def padded(x: Any) -> Any:
      short = -len(x) % self._mesh.size
      return x[np.minimum(np.arange(len(x) + short), len(x) - 1)] if short else x

    return mesh_lib.put(self._mesh, jax.tree.map(padded, x), P(tuple(axes)))

  def _input(self, x: Any) -> Any:
    """Rows for blocks."""
    return self._put(x, self._row_axes)

  def _inputs(self, x_RTD: Any) -> list[jax.Array]:
    """All rows for blocks, by batch."""
    return [self._input(x_RTD[rows]) for rows in self._rows]

  def _embedded(self) -> list[jax.Array]:
    """What the first block reads, by batch."""
    tokens = [self._input(self._packed.tokens[rows]) for rows in self._rows]
    return [self._input(decoder.embed(self._head, tokens_BT)) for tokens_BT in tokens]

  def _fetched(self, by_batch: Sequence[jax.Array]) -> np.ndarray:
    """All rows on the host."""
    return np.concatenate(mesh_lib.fetch(by_batch))[: self._packed.num_rows]

  def _through(self, block: Block, x_BTD: jax.Array, context: subblocks.Context) -> jax.Array:
    """One program for the parent's blocks, which all suffixes are made of; variants are put together of subblocks."""
    spec, weights = block
    if spec in self._parent_specs:
      return decoder.compiled_block(spec, self._config, weights, x_BTD, context)[0]
    for subblock in spec.subblocks:
      x_BTD = _residual(subblock, self._config, weights[subblock.slot], x_BTD, context)
    return x_BTD

  def compile(self, blocks: Sequence[Block], x_RTD: Any) -> None:
    """Compiles the programs of some blocks and of the parent's side by side, by running them on the first rows.

    Args:
      blocks: with their weights.
      x_RTD: something that they can read.
    """
    if self._mesh.is_multi_process:  # which compile, as they run, in one order
      return
    context, x = self._contexts[0], self._input(x_RTD[self._rows[0]])
    whole = decoder.compiled_block
    programs: dict[Any, Any] = {spec: functools.partial(whole, spec, self._config, w) for spec, w in self.parent}
    for spec, weights in blocks:
      programs |= {s: functools.partial(_residual, s, self._config, weights[s.slot]) for s in spec.subblocks}

    def run(program: Any) -> None:
      with jax.default_matmul_precision(self._precision):  # of this thread
        jax.block_until_ready(program(x, context))

    with ThreadPoolExecutor() as pool:
      list(pool.map(run, programs.values()))

  def _started(self, inputs: Sequence[jax.Array], blocks: Sequence[Block]) -> list[dict[str, jax.Array]]:
    """By batch and metric, [B, T], behind a chain of blocks; not waited for."""
    found = []
    with jax.default_matmul_precision(self._precision):
      for batch, x in zip(self._batches, inputs, strict=True):
        for block in blocks:
          x = self._through(block, x, batch.context)
        found.append(_measure(self._config, self._head, self._put(x), batch.reference, batch.targets_T))
    return found

  def _finished(self, found: list[dict[str, jax.Array]]) -> dict[str, np.ndarray]:
    """By metric, [R, T], on the host."""
    return {name: self._fetched([f[name] for f in found]).astype(np.float64) for name in found[0]}

  def _scores(self, measured: dict[str, np.ndarray]) -> dict[str, float]:
    if self._task is not None:
      lost = self._task.correct(self._parent_nll_RT) - self._task.correct(measured["lm_loss"])
      rows = {"accuracy": (lost, np.ones_like(lost))}
    else:
      measured["lm_loss"] -= self._parent_nll_RT
      tokens = self._mask_RT.sum(1)
      rows = {name: ((value * self._mask_RT).sum(1), tokens) for name, value in measured.items()}
    result = {}
    for name, (sums, tokens) in rows.items():
      result[name], result[f"{name}_stderr"] = mean_and_error(sums, tokens)
    return result

  def score(
    self, layer: int, blocks: Iterable[Block], x_RTD: Any, *, model: Sequence[Block] | None = None
  ) -> Iterator[dict[str, float]]:
    """The scores of one block after the other in the parent, or in another model.

    While the host reads those of one, the device works on the next.

    Args:
      layer: where they stand.
      blocks: each with its weights by slot.
      x_RTD: the input of the layer on all rows.
      model: whose other blocks are kept; the parent when None.

    Yields:
      Each metric and its standard error, `<metric>_stderr`.
    """
    suffix = (self.parent if model is None else model)[layer + 1 :]
    inputs, started = self._inputs(x_RTD), None
    for spec, weights in blocks:
      own = mesh_lib.shard_weights(self._mesh, weights) if self._mesh.size > 1 else weights
      before, started = started, self._started(inputs, [(spec, own), *suffix])
      if before is not None:
        yield self._scores(self._finished(before))
    if started is not None:
      yield self._scores(self._finished(started))

  def whole(self, blocks: Sequence[Block]) -> dict[str, float]:
    """The same of a whole child; nothing is compiled for it but subblocks not seen before."""
    return self._scores(self._finished(self._started(self._embedded(), blocks)))

  def inputs(self, blocks: Sequence[Block]) -> Iterator[np.ndarray]:
    """What each layer of a child reads on all rows, [R, T, D], one after the other; last what the final norm reads."""
    inputs = self._embedded()
    yield self._fetched(inputs)
    for block in blocks:
      with jax.default_matmul_precision(self._precision):
        inputs = [self._through(block, x, context) for x, context in zip(inputs, self._contexts, strict=True)]
      yield self._fetched(inputs)


def scorer_of(run: "Run", params: Mapping[str, Any], *, task: bool = False) -> Scorer:
  """The scorer of a run's held-out rows, or of its task's; `params` are the parent's."""
  config, architecture = run.config.scores, run.parent.architecture
  name = "task" if task else "heldout"
  return Scorer(
    architecture,
    params,
    packed=run.task.packed if task and run.task else run.packed(name),
    last_RTD=activations.read(run.store("activations"), name, architecture.num_layers),
    batch_rows=config.batch_rows,
    precision=config.precision,
    task=run.task if task else None,
    mesh=run.mesh,
  )


def scorers_of(run: "Run", params: Mapping[str, Any]) -> dict[str, Scorer]:
  """By the name of their rows: the held-out text's, and the task's where the run has one."""
  scorers = {"heldout": scorer_of(run, params)}
  if run.task is not None:
    scorers["task"] = scorer_of(run, params, task=True)
  return scorers


def scores_by_all(
  scorers: Mapping[str, Scorer], layer: int, blocks: Collection[Block], inputs: Mapping[str, Any]
) -> Iterator[dict[str, float]]:
  """`Scorer.score` of several scorers, each on its own input, as one."""
  for found in zip(*(scorers[kind].score(layer, blocks, x) for kind, x in inputs.items()), strict=True):
    yield {name: value for scores in found for name, value in scores.items()}


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


Scores = Mapping[str, Mapping[str, float]]  # of a layer, by block name: metrics and standard errors


def compose(space: LayerSpace, scores: Scores, *, metric: str) -> dict[str, tuple[float, float]]:
  """Score and standard error of every block of a layer, by block name; the parent's own is 0.

  Where a pair was not scored itself, its subblocks' scores are summed.
  """
  result = {space.parent.name: (0.0, 0.0)}
  for block in space.blocks[1:]:
    parts = [block.name] if block.name in scores else [part.name for part in _parts(space, block)]
    if all(part in scores for part in parts):
      values = [scores[part][metric] for part in parts]
      result[block.name] = (sum(values), math.hypot(*(scores[part][f"{metric}_stderr"] for part in parts)))
  return result


def _parts(space: LayerSpace, block: BlockSpec) -> tuple[BlockSpec, BlockSpec]:
  """The parent's block with only the one, and only the other subblock of a block."""
  return BlockSpec(block.attention, space.parent.ffn), BlockSpec(space.parent.attention, block.ffn)


def rank_correlation(space: Space, scores: Sequence[Scores], *, metric: str) -> dict[str, float] | None:
  """How well the sums of subblocks' scores rank the blocks that were scored whole; None if none were.

  Returns:
    Spearman's coefficient `pooled` over all layers and the `median_of_layers`, over the `blocks` in which both
    subblocks are replaced.
  """
  pairs = []
  for layer, measured in zip(space.layers, scores, strict=True):
    single = {block.name: measured[block.name] for block in layer.single_replacements if block.name in measured}
    summed = compose(layer, single, metric=metric)
    both = [name for name in measured if name not in single and name in summed]
    pairs.append(np.array([(measured[name][metric], summed[name][0]) for name in both]).reshape(-1, 2))
  pooled = np.concatenate(pairs)
  if len(pooled) < 2:
    return None
  return {
    "pooled": float(scipy.stats.spearmanr(*pooled.T).statistic),
    "median_of_layers": float(np.median([scipy.stats.spearmanr(*p.T).statistic for p in pairs if len(p) > 1])),
    "blocks": len(pooled),
  }


def block_weights(
  space: LayerSpace, block: BlockSpec, parent: Mapping[str, Any], library: Mapping[str, Any], *, job: Job | None = None
) -> dict[str, Any]:
  """The weights of a block: the parent's own subblocks, or the library's variants; those of a pair with its `job`."""
  own = space.parent.subblocks
  names = {s: s.id if job is None else job.entry(s) for s in block.subblocks}
  return {s.slot: parent[s.slot] if s in own else library[names[s]] for s in block.subblocks}
