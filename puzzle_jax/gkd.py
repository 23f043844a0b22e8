"""Global knowledge distillation (paper section 6): the assembled child trained end to end against the parent.

loss = cosine + KL (default): the sum over layers of 1 − cos(h_child, h_parent) of the hidden states, and
KL(parent ‖ child) of the next-token distributions; the LM loss is left out on purpose. The parent runs online, outside
the gradient.
The child that comes out is the last one, a moving average of the steps', or the one that was best on held-out rows.
Checkpoints (orbax) hold weights, optimiser state, loss history and the data iterator, so that a killed run goes on to
the same child.
"""

import dataclasses
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from puzzle_jax import data, distributed, divergence, preemption
from puzzle_jax import mesh as mesh_lib
from puzzle_jax.arch import Architecture
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import decoder
from puzzle_jax.progress import Progress
from puzzle_jax.store import CorruptFileError, file_digests, read_json, write_json
from puzzle_jax.windows import ATTENTION

PARENTS = ("sharded", "whole")
METRICS = ("loss", "kl", "cosine", "lm", "gradient_norm")


@dataclasses.dataclass(frozen=True)
class GKDConfig:
  """How the child is trained.

  Attributes:
    steps: optimiser steps; 0 leaves the child as it is assembled.
    batch_rows: packed rows a step.
    learning_rate: peak of warm-up and cosine.
    warmup_steps: of the learning rate.
    weight_decay: AdamW's.
    clip_norm: of the whole gradient.
    cosine_weight, kl_weight, lm_weight: the mix of losses.
    ema: decay of the moving average of the weights (less in the first steps), which then is the child; 0: none.
    eval_steps: steps between measurements of the KL on held-out rows, after which the best child is kept; 0: none, and
      the last one is.
    checkpoint_steps: steps between checkpoints.
    dtype: of the matrix products; weights and losses are fp32.
    attention: "exact" keeps the documents of a row apart, "fast" does not, as flash attention needs it; in both models.
    parent: "sharded" over the mesh as the child is, or "whole" on every device: faster where it fits.
    remat: recompute the inside of each block in the backward pass: less memory for a third more work.
    seed: of the order of rows.
  """

  steps: int = 100
  batch_rows: int = 2
  learning_rate: float = 2e-4
  warmup_steps: int = 10
  weight_decay: float = 0.0
  clip_norm: float = 1.0
  cosine_weight: float = 1.0
  kl_weight: float = 1.0
  lm_weight: float = 0.0
  ema: float = 0.0
  eval_steps: int = 0
  checkpoint_steps: int = 50
  dtype: str = "float32"
  attention: str = "exact"
  parent: str = dataclasses.field(default="sharded", metadata={"result": False})
  remat: bool = True
  seed: int = 0

  def __post_init__(self) -> None:
    for name, known in (("dtype", ("float32", "bfloat16")), ("attention", ATTENTION), ("parent", PARENTS)):
      if getattr(self, name) not in known:
        raise PuzzleError(f"gkd.{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
    if self.steps < 0 or self.batch_rows < 1 or self.learning_rate <= 0 or self.checkpoint_steps < 1:
      raise PuzzleError(f"gkd: steps >= 0, batch_rows, checkpoint_steps >= 1, learning_rate > 0 needed; got {self}")
    if not 0 <= self.ema < 1 or self.eval_steps < 0:
      raise PuzzleError(
        f"gkd: 0 <= ema < 1 and eval_steps >= 0 needed; got ema={self.ema}, eval_steps={self.eval_steps}"
      )
    if min(self.cosine_weight, self.kl_weight, self.lm_weight) < 0 or not (
      self.cosine_weight + self.kl_weight + self.lm_weight
    ):
      raise PuzzleError("gkd: the loss weights must not be negative, and one of them must be above 0")

  def optimizer(self) -> optax.GradientTransformation:
    warmup = min(self.warmup_steps, self.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, max(self.steps, 1))
    return optax.chain(
      optax.clip_by_global_norm(self.clip_norm), optax.adamw(schedule, b2=0.95, weight_decay=self.weight_decay)
    )


@flax.struct.dataclass
class State:
  """What a checkpoint holds.

  Attributes:
    params: the child's, fp32.
    optimizer: optax's state.
    step: done so far.
    history: [steps, len(METRICS)] fp32.
    heldout_kl: [steps] fp32, nats a token; NaN where it was not measured.
    ema: the moving average of `params`; empty without.
    best: the child with the lowest `heldout_kl` so far; empty without.
  """

  params: Any
  optimizer: Any
  step: jax.Array
  history: jax.Array
  heldout_kl: jax.Array
  ema: Any
  best: Any

  @classmethod
  def first(cls, params: Any, config: GKDConfig) -> "State":
    """Before any step; copies `params`, since a step donates its input."""

    def copied(wanted: bool) -> Any:
      return jax.tree.map(jnp.copy, params) if wanted else {}

    return cls(
      copied(True),
      config.optimizer().init(params),
      jnp.zeros((), jnp.int32),
      jnp.zeros((config.steps, len(METRICS))),
      jnp.full(config.steps, jnp.nan),
      copied(config.ema > 0),
      copied(config.eval_steps > 0),
    )

  def mapped(self, of_weights: Callable[[Any], Any], of_figures: Callable[[Any], Any]) -> "State":
    """Something done to what is as large as the weights, something else to the few figures beside it."""
    figures = {name: of_figures(getattr(self, name)) for name in ("step", "history", "heldout_kl")}
    large = {f.name: of_weights(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in figures}
    return State(**large, **figures)

  def on(self, mesh: Mesh) -> "State":
    """Laid over the devices of a mesh."""
    return self.mapped(lambda tree: mesh_lib.shard_state(mesh, tree), lambda x: mesh_lib.put(mesh, x, P()))

  def child(self, config: GKDConfig) -> Any:
    """The parameters that would come out now, were they not measured."""
    return self.ema if config.ema else self.params


def _forward(
  architecture: Architecture, params: Any, batch: data.PackedText, config: GKDConfig, mesh: Mesh | None
) -> decoder.Output:
  exact = config.attention == "exact"
  return decoder.apply(
    architecture,
    params,
    batch.tokens,
    positions_BT=batch.positions if exact else None,
    segments_BT=batch.segment_ids if exact else None,
    dtype=jnp.dtype(config.dtype),
    remat=config.remat,  # the quickstart peaks at 6.2 GiB with it, at 8.4 without
    rows=mesh_lib.rows_on(mesh, batch.num_rows),
  )


def losses(
  child: tuple[Architecture, Any],
  parent: tuple[Architecture, Any],
  batch: data.PackedText,
  config: GKDConfig,
  mesh: Mesh | None = None,
) -> dict[str, jax.Array]:
  """Mean KL, LM loss (nats a token) and the summed cosine distance of the hidden states.

  With a mesh, rows lie on it as `on_mesh` has them, through all blocks: weights go to rows, not rows to weights.
  """
  out = _forward(*child, batch, config, mesh)
  teacher = jax.lax.stop_gradient(_forward(*parent, batch, config, mesh))
  mask_T = data.target_mask(batch.segment_ids).reshape(-1)
  count = jnp.maximum(jnp.sum(mask_T), 1)
  targets_T = jnp.roll(batch.tokens, -1, axis=1).reshape(-1)

  def hidden_and_head(out: decoder.Output, params: Any) -> tuple[jax.Array, jax.Array]:
    """Of each device its own tokens, and the vocabulary over `model`: gathered once, not a chunk."""
    hidden_TD, head_VD = out.hidden_BTD.reshape(len(targets_T), -1), decoder.head_weights(params)
    if mesh is None:
      return hidden_TD, head_VD
    rows, vocabulary = mesh_lib.rows_spec(mesh, batch.num_rows), mesh_lib.vocabulary_spec(mesh, len(head_VD))
    return mesh_lib.laid(mesh, hidden_TD, rows), mesh_lib.laid(mesh, head_VD, vocabulary)

  kl_T, nll_T = divergence.kl_and_nll(
    hidden_and_head(out, child[1]),
    hidden_and_head(teacher, jax.lax.stop_gradient(parent[1])),
    targets_T,
    shards=1 if mesh is None else mesh_lib.row_shards(mesh, batch.num_rows),
  )
  a, b = out.layers_LBTD.astype(jnp.float32), teacher.layers_LBTD.astype(jnp.float32)
  norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  cosine_LBT = jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-12)
  real_BT = batch.segment_ids > 0
  distance = jnp.sum((1 - cosine_LBT) * real_BT[None]) / jnp.maximum(jnp.sum(real_BT), 1)
  return {"kl": jnp.sum(kl_T * mask_T) / count, "lm": jnp.sum(nll_T * mask_T) / count, "cosine": distance}


@functools.partial(jax.jit, static_argnames=("child", "parent", "config", "mesh"), donate_argnames="state")
def train_step(
  state: State,
  batch: data.PackedText,
  parent_params: Any,
  *,
  child: Architecture,
  parent: Architecture,
  config: GKDConfig,
  mesh: Mesh | None = None,
) -> State:
  """One AdamW step; its metrics go into the history. The state stays as it lies on the mesh."""

  def total(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    parts = losses((child, params), (parent, parent_params), batch, config, mesh)
    loss = config.cosine_weight * parts["cosine"] + config.kl_weight * parts["kl"] + config.lm_weight * parts["lm"]
    return loss, parts

  (loss, parts), gradient = jax.value_and_grad(total, has_aux=True)(state.params)
  updates, optimizer = config.optimizer().update(gradient, state.optimizer, state.params)
  metrics = parts | {"loss": loss, "gradient_norm": optax.tree.norm(gradient)}
  row = jnp.stack([metrics[name] for name in METRICS])
  params = optax.apply_updates(state.params, updates)
  decay = jnp.minimum(config.ema, (1 + state.step) / (10 + state.step))
  state = dataclasses.replace(
    state,
    params=params,
    optimizer=optimizer,
    step=state.step + 1,
    history=state.history.at[state.step].set(row),
    ema=jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state.ema, params) if config.ema else {},
  )
  return state if mesh is None else state.mapped(lambda tree: mesh_lib.keep_sharded(mesh, tree), lambda x: x)


@functools.partial(jax.jit, static_argnames=("child", "parent", "config", "mesh"))
def _kl(
  params: Any,
  batch: data.PackedText,
  parent_params: Any,
  *,
  child: Architecture,
  parent: Architecture,
  config: GKDConfig,
  mesh: Mesh,
) -> jax.Array:
  return losses((child, params), (parent, parent_params), batch, config, mesh)["kl"]


def measured(
  state: State,
  heldout: data.PackedText,
  parent_params: Any,
  *,
  child: Architecture,
  parent: Architecture,
  config: GKDConfig,
  mesh: Mesh,
) -> State:
  """The state with the KL of its child on held-out rows noted, and that child kept if it is the best so far."""
  params, total, tokens = state.child(config), 0.0, 0
  kl = functools.partial(_kl, child=child, parent=parent, config=config, mesh=mesh)
  for start in range(0, heldout.num_rows, config.batch_rows):
    batch = heldout.rows(slice(start, start + config.batch_rows))
    count = int(np.sum(data.target_mask(batch.segment_ids)))
    total += count * float(kl(params, on_mesh(mesh, batch), parent_params))
    tokens += count
  before = np.asarray(state.heldout_kl)
  is_best = total / tokens < np.min(before, where=~np.isnan(before), initial=np.inf)
  return dataclasses.replace(
    state,
    heldout_kl=state.heldout_kl.at[state.step - 1].set(total / tokens),
    best=jax.tree.map(jnp.copy, params) if is_best else state.best,
  )


def on_mesh(mesh: Mesh, batch: data.PackedText) -> data.PackedText:
  """A batch, its rows over `data`."""
  return mesh_lib.put(mesh, batch, mesh_lib.rows_spec(mesh, batch.num_rows))


def train(
  child: tuple[Architecture, Any],
  parent: tuple[Architecture, Any],
  packed: data.PackedText,
  *,
  config: GKDConfig,
  heldout: data.PackedText,
  folder: Path,
  progress: Progress,
  mesh: Mesh | None = None,
  log: Callable[[int, Mapping[str, float]], None] = lambda step, metrics: None,
) -> tuple[Any, list[dict[str, float]]]:
  """Trains the child and returns its parameters and the metrics of each step, `heldout_kl` where it was measured.

  Args:
    child: architecture and "layers" parameters.
    parent: the same of the parent.
    packed: training rows.
    config: how.
    heldout: rows for `config.eval_steps`.
    folder: for checkpoints; a run that finds some goes on from the last.
    progress: for the bar.
    mesh: the devices; None: one.
    log: gets each step's number, from 1, and its metrics.

  Raises:
    PuzzleError: the loss is not finite; names the step and keeps the last good checkpoint.
  """
  if config.steps == 0:
    return child[1], []
  mesh = mesh or mesh_lib.one_device()
  parent_params = decoder.stacked(*parent)
  if config.parent == "sharded":
    parent_params = mesh_lib.shard_state(mesh, parent_params)
  else:
    parent_params = mesh_lib.put(mesh, parent_params, P())
  state = State.first(decoder.stacked(*child), config).on(mesh)
  iterator = data.batches(packed, batch_size=config.batch_rows, seed=config.seed)
  distributed.by_first(lambda: _drop_damaged(folder, progress))
  with ocp.training.Checkpointer(
    folder.absolute(),
    save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(config.checkpoint_steps),
    preservation_policy=ocp.training.preservation_policies.LatestN(1),
    cleanup_tmp_directories=True,
  ) as checkpoints:
    if checkpoints.latest is not None:
      state = checkpoints.load(abstract_state=jax.tree.map(ocp.arrays.to_shape_dtype_struct, state))
      iterator.set_state(checkpoints.metadata().custom_metadata["iterator"])
      progress.say(f"gkd: resumed after step {int(state.step)}")
    bar = progress.bar("gkd", total=config.steps, unit="step", done=int(state.step))
    with bar, preemption.deferred() as preempted:
      for step in range(int(state.step), config.steps):
        batch = on_mesh(mesh, next(iterator))
        state = train_step(state, batch, parent_params, child=child[0], parent=parent[0], config=config, mesh=mesh)
        metrics = dict(zip(METRICS, np.asarray(state.history[step]).tolist(), strict=True))
        if config.eval_steps and ((step + 1) % config.eval_steps == 0 or step + 1 == config.steps):
          state = measured(state, heldout, parent_params, child=child[0], parent=parent[0], config=config, mesh=mesh)
          metrics["heldout_kl"] = float(state.heldout_kl[step])
        log(step + 1, metrics)
        if not np.isfinite(metrics["loss"]):
          raise PuzzleError(
            f"gkd: the loss of step {step + 1} is {metrics['loss']}; the last good checkpoint is kept in {folder}; "
            f"lower gkd.learning_rate ({config.learning_rate}) and start again"
          )
        bar.set_postfix_str(f"loss {metrics['loss']:.3f}, KL {metrics['kl']:.3f}", refresh=False)
        bar.update()
        stop = preempted()
        if step + 1 < config.steps or stop:
          custom = {"iterator": iterator.get_state()}
          if checkpoints.save(step + 1, state, custom_metadata=custom, force=stop):
            distributed.by_first(functools.partial(_note_checksums, folder, str(step + 1)))
        if stop:
          break
  rows = [dict(zip(METRICS, row, strict=True)) for row in np.asarray(state.history, np.float64).tolist()]
  for row, kl in zip(rows, np.asarray(state.heldout_kl, np.float64).tolist(), strict=True):
    row |= {} if np.isnan(kl) else {"heldout_kl": kl}
  trained = mesh_lib.gathered(state.best if config.eval_steps else state.child(config))
  return decoder.unstacked(child[0], trained), rows


def forget_checkpoints(folder: Path) -> None:
  """Deletes the checkpoints of a finished or superseded training."""

  def forget() -> None:
    shutil.rmtree(folder, ignore_errors=True)
    _checksums(folder).unlink(missing_ok=True)

  distributed.by_first(forget)


def _note_checksums(folder: Path, step: str) -> None:
  write_json(_checksums(folder), {step: file_digests(folder / step)})


def _checksums(folder: Path) -> Path:
  """Of the last checkpoint's files, by its step."""
  return folder.with_name(f"{folder.name}.json")


def _drop_damaged(folder: Path, progress: Progress) -> None:
  """Deletes checkpoints that are not as they were written: orbax itself would use a changed array."""
  try:
    known = read_json(_checksums(folder)) if _checksums(folder).exists() else {}
  except CorruptFileError:
    known = {}
  for checkpoint in folder.glob("[0-9]*"):
    if file_digests(checkpoint) != known.get(checkpoint.name):
      progress.say(f"gkd: the checkpoint {checkpoint} is damaged or was not finished; its steps are done again")
      shutil.rmtree(checkpoint)
