"""The loop of blockwise local distillation (paper section 3): first weights, steps, held-out losses, the best kept.

`Distillation` holds some neighbouring layers of one shape. What is not being trained lies in the machine's memory; on
the device are the parent's blocks, one group of variants with their optimiser states, and batches.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from puzzle_jax import bld, least_squares, memory, surgery, targets
from puzzle_jax.activations import Batch
from puzzle_jax.arch import BlockSpec, ModelConfig
from puzzle_jax.bld import LOSSES, BLDConfig, Job, JobWeights
from puzzle_jax.mesh import fetch, place_layers, shapes_of_layers
from puzzle_jax.space import LayerSpace
from puzzle_jax.targets import Weights

Batches = Callable[[], Iterable[Batch]]


@dataclasses.dataclass(frozen=True)
class Distilled:
  """A layer's trained variants.

  Attributes:
    weights: by entry (`Job.entry`), fp32.
    losses: by job: held-out loss at the first weights and after training, in both normalisations.
    curve: by job: the training loss of each step.
    timing: seconds of training (`trained_s`), those of them that the device waited for batches (`waited_s`); of layers
      side by side, each has its share.
  """

  weights: dict[str, dict[str, np.ndarray]]
  losses: dict[str, dict[str, float]]
  curve: dict[str, list[float]]
  timing: dict[str, float] = dataclasses.field(default_factory=dict)


def first_weights(
  space: LayerSpace,
  config: ModelConfig,
  parent: Mapping[str, Mapping[str, np.ndarray]],
  *,
  settings: BLDConfig,
  statistics: Mapping[str, np.ndarray],
  train: Batches,
  heldout: Batches,
) -> dict[str, dict[str, np.ndarray]]:
  """Every variant of a layer made of the parent's subblocks, fitted by least squares if the settings say so.

  Args:
    space: of the layer.
    config: of the model.
    parent: the layer's weights by slot, fp32.
    settings: how.
    statistics: mean magnitude of what each subblock's last matrix multiplies, by slot.
    train: batches of the layer's input to fit on, x [B, T, D].
    heldout: batches that choose the ridge.
  """
  variants: dict[str, Any] = {}
  for spec in space.variants:
    variants[spec.id] = surgery.initial(
      spec,
      space.attention[0] if spec.slot == "attention" else space.ffn[0],
      parent[spec.slot],
      config=config,
      channel_mean=statistics[spec.slot],
      method=settings.init,
      seed=settings.seed,
    )
  if settings.least_squares:
    on_device = jax.tree.map(jnp.asarray, dict(parent))
    median = targets.scale_of(space.parent, config, on_device, heldout()).median
    variants = least_squares.fit(space, config, on_device, variants, train=train(), heldout=heldout(), median=median)
  return jax.tree.map(np.asarray, variants)


def _stack(trees: Sequence[Any]) -> Any:
  return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _never() -> bool:
  return False


@dataclasses.dataclass
class _Progress:
  """Of one job: what a later window goes on from, and the best so far. Arrays are NumPy's, [G, …].

  `in_window`: steps done in this window, and evaluations in a row that found nothing better. `state`, `best` and
  `best_losses` come with the first training.
  """

  weights: Weights
  first: Weights
  losses: dict[str, np.ndarray]  # by kind, at the first weights
  curve: np.ndarray  # [steps, G]
  in_window: np.ndarray
  state: Any = None
  best: Any = None
  best_losses: Any = None


class Distillation:
  """Distils the variants of some layers of one shape.

  Args:
    spec: the parent's block in each of the layers.
    config: of the model.
    parents: the layers' weights by slot.
    mesh: the devices.
    jobs: what to distil.
    settings: how.
    heldout: batches of held-out tokens, x [G, B, T, D].
    first: first weights of the jobs by layer: by job, by slot.
    state: `state()` to go on from; then `first` is not needed.
    within: whether that state was taken within this window, not at the end of the one before.
  """

  def __init__(
    self,
    spec: BlockSpec,
    config: ModelConfig,
    parents: Sequence[Mapping[str, Mapping[str, np.ndarray]]],
    mesh: Mesh,
    *,
    jobs: tuple[Job, ...],
    settings: BLDConfig,
    heldout: Batches,
    first: Sequence[JobWeights] = (),
    state: Mapping[str, np.ndarray] | None = None,
    within: bool = False,
  ):
    self.spec, self._config, self._settings, self._jobs = spec, config, settings, jobs
    self._heldout = heldout
    self._layers = len(parents)
    self._mesh = mesh
    self._parent = place_layers(mesh, _stack([_fp32(p) for p in parents]))
    scales = [
      targets.scale_of(spec, config, jax.tree.map(lambda w, g=g: w[g], self._parent), (b.layer(g) for b in heldout()))
      for g in range(self._layers)
    ]
    median, mean = (np.array([getattr(s, name) for s in scales], np.float32) for name in ("median", "mean"))
    self._scale = place_layers(mesh, (median, mean))
    self._at = self._start(_stack([_plain(layer) for layer in first])) if state is None else self._restored(state)
    if not within:
      for k in self._at.values():
        k.in_window = np.zeros(2, np.int32)
    self.trained_s, self.waited_s = (state or {}).get("seconds", np.zeros(2)).tolist()

  def _start(self, first: JobWeights) -> dict[str, _Progress]:
    losses = self._evaluate(self._jobs, place_layers(self._mesh, first))
    none = np.zeros((0, self._layers), np.float32)
    return {
      job.name: _Progress(first[job.name], first[job.name], losses[job.name], none, np.zeros(2, np.int32))
      for job in self._jobs
    }

  @property
  def trainable(self) -> tuple[Job, ...]:
    """The jobs in which anything is trained: all but no-ops."""
    split = bld.split({name: k.weights for name, k in self._at.items()})
    return tuple(job for job in self._jobs if job.name in split)

  def _evaluate(self, jobs: tuple[Job, ...], weights: JobWeights) -> dict[str, dict[str, np.ndarray]]:
    """Mean of both losses over the held-out batches, [G] each, by job."""
    weights = {j.name: weights[j.name] for j in jobs}
    found = [
      bld.evaluate_batch(self.spec, jobs, self._config, self._parent, weights, batch, self._scale)
      for batch in self._heldout()
    ]
    fetched = fetch(found)
    return jax.tree.map(lambda *values: np.mean(np.stack(values), axis=0, dtype=np.float64), *fetched)

  def steps_done(self, group: tuple[Job, ...]) -> int:
    """In this window."""
    return int(self._at[group[0].name].in_window[0])

  def compile(self, step: "memory.Step", batch: Batch) -> None:
    """Compiles a group's step before anything of the group is on the device; `batch` is one of those to come."""
    trained = bld.split({job.name: self._at[job.name].weights for job in step.jobs})
    states = jax.eval_shape(lambda weights: bld.init_states(self._settings, weights), trained)
    trained, states = shapes_of_layers(self._mesh, (trained, states))
    step.compile(self._parent, trained, states, batch, self._scale)

  def train(
    self, group: tuple[Job, ...], batches: Iterator[Batch], step: "memory.Step", *, stop: Callable[[], bool] = _never
  ) -> None:
    """Trains a group of jobs on one window's batches, or those of them that it has not seen.

    Args:
      group: some of `trainable`.
      batches: one a step.
      step: the group's compiled step.
      stop: asked after each step whether to leave the rest for another time.
    """
    settings = self._settings
    kept = {j.name: self._at[j.name] for j in group}
    done, without_gain = self._at[group[0].name].in_window.tolist()
    trained = place_layers(self._mesh, bld.split({name: k.weights for name, k in kept.items()}))
    states = {name: k.state for name, k in kept.items() if k.state is not None}
    states = place_layers(self._mesh, states or fetch(bld.init_states(settings, trained)))
    curve: list[dict[str, jax.Array]] = []
    begin = time.perf_counter()
    while not stop() and not (settings.patience and without_gain >= settings.patience):
      asked = time.perf_counter()
      batch = next(batches, None)
      if batch is None:
        break
      if not curve or _idle(curve[-1]):  # the device had nothing to do
        self.waited_s += time.perf_counter() - asked
      trained, states, losses = step(self._parent, trained, states, batch, self._scale)
      curve.append(losses)  # fetched after the loop: the device does not wait
      if settings.eval_steps and (done + len(curve)) % settings.eval_steps == 0:
        without_gain = 0 if self._keep_best(group, trained) else without_gain + 1
    jax.block_until_ready(trained)
    self.trained_s += time.perf_counter() - begin
    if not stop():
      self._keep_best(group, trained)
    fetched = fetch(curve)
    for name, weights in fetch(self._whole(trained)).items():
      k = kept[name]
      k.weights, k.state = weights, fetch(states[name])
      k.in_window = np.array([done + len(curve), without_gain], np.int32)
      k.curve = np.concatenate([k.curve, np.array([losses[name] for losses in fetched]).reshape(-1, self._layers)])

  def _whole(self, trained: JobWeights) -> JobWeights:
    return {name: bld.with_norms(weights, self._parent) for name, weights in trained.items()}

  def _keep_best(self, group: tuple[Job, ...], trained: JobWeights) -> bool:
    """Keeps the weights of the layers and jobs whose held-out loss is the lowest yet; whether there are any."""
    whole, gained = self._whole(trained), False
    for name, losses in self._evaluate(group, whole).items():
      k, loss = self._at[name], losses[self._settings.loss]
      if k.best_losses is None:
        k.best, k.best_losses = fetch(whole[name]), losses
        gained = True
        continue
      old = k.best_losses[self._settings.loss]
      better = (loss < old) | (np.isfinite(loss) & ~np.isfinite(old))
      if better.any():
        gained = True

        def chosen(new: np.ndarray, old: np.ndarray, better: np.ndarray = better) -> np.ndarray:
          return np.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        k.best = jax.tree.map(chosen, fetch(whole[name]), k.best)
        k.best_losses = {kind: chosen(losses[kind], k.best_losses[kind]) for kind in LOSSES}
    return gained

  def finish(self) -> list[Distilled]:
    """Each layer's best weights: the first ones where training made them worse on held-out tokens."""
    result = []
    for g in range(self._layers):
      weights: dict[str, dict[str, np.ndarray]] = {}
      report: dict[str, dict[str, float]] = {}
      curve: dict[str, list[float]] = {}
      for job in self._jobs:
        k = self._at[job.name]
        after = k.losses if k.best_losses is None else k.best_losses
        better = after[self._settings.loss][g] < k.losses[self._settings.loss][g]  # also False if it is not finite
        best = k.best if better and k.best is not None else k.first
        for subblock in job.subblocks:
          weights[job.entry(subblock)] = {name: w[g] for name, w in best[subblock.slot].items()}
        report[job.name] = {f"{kind}_init": float(k.losses[kind][g]) for kind in LOSSES}
        report[job.name] |= {f"{kind}_trained": float(after[kind][g]) for kind in LOSSES}
        if len(k.curve):
          curve[job.name] = k.curve[:, g].tolist()
      timing = {"trained_s": self.trained_s / self._layers, "waited_s": self.waited_s / self._layers}
      result.append(Distilled(weights, report, curve, timing))
    return result

  # What a later window goes on from

  def state(self) -> dict[str, np.ndarray]:
    """All that another `Distillation` needs to go on, as named arrays."""
    seconds = np.array([self.trained_s, self.waited_s])
    return _flat({name: vars(k) for name, k in self._at.items()}) | {"seconds": seconds}

  def _restored(self, state: Mapping[str, np.ndarray]) -> dict[str, _Progress]:
    template = {}
    for job in self._jobs:
      weights = {s.slot: {k: np.zeros(0) for k in s.tensors(self._config)} for s in job.subblocks}
      losses = dict.fromkeys(LOSSES, np.zeros(0))
      k = _Progress(weights, weights, losses, np.zeros(0), np.zeros(0))
      if trained := bld.split({job.name: weights}):
        shapes = {slot: {name: np.zeros((1,)) for name in p} for slot, p in trained[job.name].items()}
        k.state = bld.init_states(self._settings, {job.name: shapes})[job.name]
        k.best, k.best_losses = weights, losses
      # What had not begun when the state was taken is not in it.
      there = {name: _flat({job.name: {name: value}}).keys() <= state.keys() for name, value in vars(k).items()}
      template[job.name] = {name: value if there[name] else None for name, value in vars(k).items()}
    leaves = [state[name] for name in _flat(template)]
    whole = jax.tree.unflatten(jax.tree.structure(template), leaves)
    return {name: _Progress(**k) for name, k in whole.items()}


def _flat(tree: Any) -> dict[str, np.ndarray]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _plain(weights: JobWeights) -> JobWeights:
  return {name: {slot: dict(p) for slot, p in v.items()} for name, v in weights.items()}


def _fp32(weights: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, np.ndarray]]:
  return {slot: {k: np.asarray(w, np.float32) for k, w in p.items()} for slot, p in weights.items()}


def _idle(losses: Mapping[str, Any]) -> bool:
  """Whether the step that makes them is over."""
  return all(loss.is_ready() for loss in losses.values())
