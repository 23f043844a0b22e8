"""Global knowledge distillation (paper section 6): the assembled child trained end to end against the parent.

loss = cosine + KL (default): the sum over layers of 1 − cos(h_child, h_parent) of the hidden states, and
KL(parent ‖ child) of the next-token distributions; the LM loss is left out on purpose. The parent runs online, outside
the gradient, or its `answers` were kept. `gkd_config` says how, `gkd_losses` what is minimised, `gkd_guard` watches.
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

from puzzle_jax import answers, data, distributed, preemption
from puzzle_jax import mesh as mesh_lib
from puzzle_jax.arch import Architecture
from puzzle_jax.errors import PuzzleError
from puzzle_jax.gkd_config import GKDConfig
from puzzle_jax.gkd_guard import WINDOW, Watch, drop_damaged, forget_checkpoints, note_checksums
from puzzle_jax.gkd_losses import Batch, losses
from puzzle_jax.model import decoder
from puzzle_jax.progress import Progress

METRICS = ("loss", "kl", "cosine", "lm", "gradient_norm")


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
  def first(cls, params: Any, config: GKDConfig, mesh: Mesh | None = None) -> "State":
    """Before any step; copies `params`, since a step donates its input. On a mesh each device makes its own share."""

    def made(params: Any) -> "State":
      def copied(wanted: bool) -> Any:
        return jax.tree.map(jnp.copy, params) if wanted else {}

      state = cls(
        copied(True),
        config.optimizer().init(params),
        jnp.zeros((), jnp.int32),
        jnp.zeros((config.steps, len(METRICS))),
        jnp.full(config.steps, jnp.nan),
        copied(config.ema > 0),
        copied(config.eval_steps > 0),
      )
      return state if mesh is None else state.kept(mesh)

    return jax.jit(made)(params)

  def mapped(self, of_weights: Callable[[Any], Any], of_figures: Callable[[Any], Any]) -> "State":
    """Something done to what is as large as the weights, something else to the few figures beside it."""
    figures = {name: of_figures(getattr(self, name)) for name in ("step", "history", "heldout_kl")}
    large = {f.name: of_weights(getattr(self, f.name)) for f in dataclasses.fields(self) if f.name not in figures}
    return State(**large, **figures)

  def kept(self, mesh: Mesh) -> "State":
    """Within a compiled program: laid over the devices of a mesh."""
    return self.mapped(lambda tree: mesh_lib.keep_sharded(mesh, tree), lambda x: mesh_lib.laid(mesh, x, P()))

  def child(self, config: GKDConfig) -> Any:
    """The parameters that would come out now, were they not measured."""
    return self.ema if config.ema else self.params


@functools.partial(jax.jit, static_argnames=("child", "parent", "config", "mesh"), donate_argnames="state")
def train_step(
  state: State,
  batch: Batch,
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
    return parts["loss"], parts

  (_, parts), gradient = jax.value_and_grad(total, has_aux=True)(state.params)
  updates, optimizer = config.optimizer().update(gradient, state.optimizer, state.params)
  metrics = parts | {"gradient_norm": optax.tree.norm(gradient)}
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
  return state if mesh is None else state.kept(mesh)


@functools.partial(jax.jit, static_argnames=("child", "parent", "config", "mesh"))
def _losses(
  params: Any,
  batch: Batch,
  parent_params: Any,
  *,
  child: Architecture,
  parent: Architecture,
  config: GKDConfig,
  mesh: Mesh,
) -> dict[str, jax.Array]:
  return losses((child, params), (parent, parent_params), batch, config, mesh)


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
  """The state with the KL of its child on held-out rows noted, and that child kept if it is the best so far.

  Whatever the loss's temperature and top-k are, this is the KL itself.
  """
  params, total, tokens = state.child(config), 0.0, 0
  config = dataclasses.replace(config, teacher="online", kl_temperature=1.0, kl_top_k=0)
  found = functools.partial(_losses, child=child, parent=parent, config=config, mesh=mesh)
  for start in range(0, heldout.num_rows, config.batch_rows):
    batch = heldout.rows(slice(start, start + config.batch_rows))
    count = int(np.sum(data.target_mask(batch.segment_ids)))
    total += count * float(found(params, on_mesh(mesh, batch), parent_params)["kl"])
    tokens += count
  before = np.asarray(state.heldout_kl)
  is_best = total / tokens < np.min(before, where=~np.isnan(before), initial=np.inf)
  return dataclasses.replace(
    state,
    heldout_kl=state.heldout_kl.at[state.step - 1].set(total / tokens),
    best=jax.tree.map(jnp.copy, params) if is_best else state.best,
  )


def on_mesh(mesh: Mesh, batch: Batch) -> Any:
  """A batch, its rows over `data`."""
  rows = len(jax.tree.leaves(batch)[0])
  return mesh_lib.put(mesh, batch, mesh_lib.rows_spec(mesh, rows))


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
  keep: Callable[[Any, list[dict[str, float]]], None] = lambda params, history: None,
) -> tuple[Any, list[dict[str, float]]]:
  """Trains the child. No device ever holds more than its share of the two, and one layer or embedding on its way.

  Args:
    child: architecture and "layers" parameters. NumPy's go from the host to where they lie on the mesh; the layers may
      be an iterator, which is read once.
    parent: the same of the parent.
    packed: training rows.
    config: how.
    heldout: rows for `config.eval_steps`.
    folder: for checkpoints, and beside it the parent's answers; a run that finds some goes on from the last.
    progress: for the bar.
    mesh: the devices; None: one.
    log: gets each step's number, from 1, and its metrics.
    keep: gets what is returned, while SIGTERM waits.

  Returns:
    The child's "layers" parameters in NumPy, as given where there are no steps; the metrics of each step, `heldout_kl`
    where it was measured.

  Raises:
    PuzzleError: the loss or its gradient is not finite, or it diverges (`gkd_guard.Watch`); names the step and keeps
      the last good checkpoint.
  """
  if config.steps == 0:
    keep(child[1], [])
    return child[1], []
  if config.start == "random":
    child = (child[0], decoder.init(child[0], jax.random.key(config.seed), keep=jax.device_get))
  mesh = mesh or mesh_lib.one_device()
  parent_params: Any = decoder.stacked(*parent)
  if config.parent == "sharded":
    parent_params = mesh_lib.shard_state(mesh, parent_params)
  else:
    parent_params = mesh_lib.put(mesh, parent_params, P())
  rows: data.Rows[Batch] = packed
  if config.teacher == "cached":
    asked = (parent[0], parent_params)
    rows = answers.keep(asked, packed, config=config, folder=_answers(folder), mesh=mesh, progress=progress)
    if not config.eval_steps:
      parent_params = None
  state = State.first(mesh_lib.shard_state(mesh, decoder.stacked(*child)), config, mesh)
  iterator = data.batches(rows, batch_size=config.batch_rows, seed=config.seed)
  distributed.by_first(lambda: drop_damaged(folder, progress))
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
    watch = Watch(config.divergence, config.warmup_steps, np.asarray(state.history[: int(state.step), 0]).tolist())
    bar = progress.bar("gkd", total=config.steps, unit="step", done=int(state.step))
    with bar, preemption.deferred() as preempted:
      for step in range(int(state.step), config.steps):
        batch = on_mesh(mesh, next(iterator))
        state = train_step(state, batch, parent_params, child=child[0], parent=parent[0], config=config, mesh=mesh)
        metrics = dict(zip(METRICS, np.asarray(state.history[step]).tolist(), strict=True))
        if config.eval_steps and ((step + 1) % config.eval_steps == 0 or step + 1 == config.steps):
          state = measured(state, heldout, parent_params, child=child[0], parent=parent[0], config=config, mesh=mesh)
          metrics["heldout_kl"] = float(state.heldout_kl[step])
        metrics = {name: value for name, value in metrics.items() if name != "cosine" or rows is packed}
        log(step + 1, metrics)
        watch.note(metrics["loss"])
        if fault := _fault(step + 1, metrics, watch):
          last = checkpoints.latest
          kept = f"the last good checkpoint, of step {last.step}, is kept in {folder}" if last else "no checkpoint yet"
          raise PuzzleError(f"gkd: {fault}; {kept}; lower gkd.learning_rate ({config.learning_rate}) and start again")
        bar.set_postfix_str(f"loss {metrics['loss']:.3f}, KL {metrics['kl']:.3f}", refresh=False)
        bar.update()
        stop = preempted()
        if stop or (step + 1 < config.steps and checkpoints.should_save(step + 1)):
          # The loss above is that of the weights before the step: these may be spoilt by it.
          models = {"child": child[0], "parent": parent[0]}
          own = _losses(state.params, batch, parent_params, **models, config=config, mesh=mesh)["loss"]
          custom = {"iterator": iterator.get_state()}
          if watch.is_good(float(own)) and checkpoints.save(step + 1, state, custom_metadata=custom, force=stop):
            distributed.by_first(functools.partial(note_checksums, folder, str(step + 1)))
        if stop:
          break
      else:
        table = np.column_stack([np.asarray(x, np.float64) for x in (state.history, state.heldout_kl)])
        history = [_measured(row) for row in table.tolist()]
        trained = _on_host(child[0], state.best if config.eval_steps else state.child(config))
        keep(trained, history)
  return trained, history


@jax.jit
def _layer(run: Any, i: int) -> Any:
  return jax.tree.map(lambda x: x[i], run)


def _on_host(architecture: Architecture, params: Any) -> Any:
  """The "layers" form in NumPy, one layer after the other."""
  layers = [
    mesh_lib.fetch(_layer(run, i))
    for (_, length), run in zip(architecture.runs(), params["runs"], strict=True)
    for i in range(length)
  ]
  return mesh_lib.fetch({k: v for k, v in params.items() if k != "runs"}) | {"layers": layers}


def _measured(row: list[float]) -> dict[str, float]:
  """A step's metrics by name, without those that were not measured."""
  return {name: value for name, value in zip((*METRICS, "heldout_kl"), row, strict=True) if not np.isnan(value)}


def _fault(step: int, metrics: Mapping[str, float], watch: Watch) -> str:
  """Why the training must end here, or nothing."""
  for name, what in (("loss", "the loss"), ("gradient_norm", "the gradient's norm")):
    if not np.isfinite(metrics[name]):
      return f"{what} of step {step} is {metrics[name]}"
  if watch.diverged:
    now = f"{watch.median:.4g} up to step {step} (median of {WINDOW})"
    return f"the loss diverges: {now}, {watch.best:.4g} at its best"
  return ""


def _answers(folder: Path) -> Path:
  return folder.with_name("answers")


def forget(folder: Path) -> None:
  """Deletes the checkpoints and the parent's answers of a finished or superseded training."""
  forget_checkpoints(folder)
  distributed.by_first(lambda: shutil.rmtree(_answers(folder), ignore_errors=True))
