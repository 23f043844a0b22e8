"""A whole library (paper section 3): every turn of `rolling.turns` distils the variants of some layers."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from puzzle_jax import activations, distributed, memory, preemption, rolling
from puzzle_jax.activations import Batch
from puzzle_jax.bld import BLDConfig, Job, JobWeights
from puzzle_jax.distil import Distillation, Distilled, first_weights
from puzzle_jax.library import Library
from puzzle_jax.mesh import of_first
from puzzle_jax.rolling import Turn
from puzzle_jax.runs import Run

JobsOf = Callable[[int], tuple[Job, ...]]  # of a layer
FirstOf = Callable[[int], JobWeights]


def layer_groups(shapes: Sequence[Any], *, at_most: int) -> list[range]:
  """Neighbouring layers of one shape, at most so many at a time."""
  groups: list[range] = []
  for _, equal in itertools.groupby(range(len(shapes)), key=lambda layer: shapes[layer]):
    layers = list(equal)
    groups += [range(i, min(i + at_most, layers[-1] + 1)) for i in layers[::at_most]]
  return groups


def order(batches: int, *, steps: int, seed: tuple[int, ...]) -> list[int]:
  """The batch of each step: every one once, in an order of its own, before any comes again."""
  rng = np.random.default_rng(seed)
  chosen: list[int] = []
  while len(chosen) < steps:
    chosen += rng.permutation(batches).tolist()
  return chosen[:steps]


class Builder:
  """Fills a library with the jobs of every layer.

  Args:
    run: whose parent, space, tokens and held-out activations are used.
    library: to fill; goes on where it ends.
    settings: of the distillation.
    jobs: of a layer.
    first: first weights of a layer's jobs; None: its variants are made of the parent's subblocks.
  """

  def __init__(self, run: Run, library: Library, *, settings: BLDConfig, jobs: JobsOf, first: FirstOf | None = None):
    self._run, self._library, self._settings, self._jobs, self._first = run, library, settings, jobs, first
    self._config = run.parent.architecture.config
    self._heldout_rows = run.packed("heldout")
    self._steps: dict[tuple[tuple[Job, ...], int], list[memory.Step]] = {}

  def build(self) -> None:
    """Distils what is missing."""
    run, library, settings = self._run, self._library, self._settings
    shapes = [(layer.parent, self._jobs(i)) for i, layer in enumerate(run.space.layers)]
    groups = [layers for layers in layer_groups(shapes, at_most=settings.layers) if shapes[layers[0]][1]]
    for layer, (_, jobs) in enumerate(shapes):
      if not jobs and layer not in library:
        library.put(layer, Distilled({}, {}, {}))
    parts = rolling.cut(run.packed("train"), run.config.activations.window_tokens, settings.batch_rows)
    stops = [settings.steps * i // len(parts) for i in range(len(parts) + 1)]

    def done(index: int, layers: range) -> bool:
      later = range(index, len(parts))
      return all(layer in library for layer in layers) or any(library.has_state(layers[0], i) for i in later)

    with run.progress.bar("library", total=len(groups) * len(parts), unit="turn") as bar:
      bar.update(sum(done(i, layers) for i in range(len(parts)) for layers in groups))
      for turn in rolling.turns(
        run.parent,
        groups,
        parts,
        run.config.activations,
        run.mesh,
        rows=settings.batch_rows,
        dtype=settings.dtype,
        folder=run.config.activations.location or str(library.store.root / "activations"),
        key=f"{run.parent.digest} {run.store('data').content()}",
        done=done,
        progress=run.progress,
      ):
        distillation = self._begin(turn)
        with preemption.deferred() as preempted:
          self._train(turn, distillation, steps=stops[turn.index + 1] - stops[turn.index], stop=preempted)
          if preempted():
            library.put_state(turn.layers[0], turn.index, distillation.state(), within=True)
          elif turn.index + 1 < len(parts):
            library.put_state(turn.layers[0], turn.index, distillation.state())
          else:
            self._put(turn, distillation)
        bar.update()
    if trained_s := (timing := library.timing)["trained_s"]:
      share = timing["waited_s"] / trained_s
      run.progress.say(f"library: {trained_s:.0f} s of training; the device waited {share:.1%} of them for batches")

  def _heldout(self, layers: Sequence[int]) -> Callable[[], Iterator[Batch]]:
    inputs = [activations.read(self._run.store("activations"), "heldout", layer) for layer in layers]
    rows = self._settings.batch_rows
    return lambda: activations.batches(self._config, self._heldout_rows, inputs, self._run.mesh, batch_rows=rows)

  def _begin(self, turn: Turn) -> Distillation:
    parents = [self._run.parent.layer(layer, np.float32) for layer in turn.layers]
    jobs = self._jobs(turn.layers[0])
    first: list[JobWeights] = []
    state = None
    if within := self._library.has_state(turn.layers[0], turn.index, within=True):
      state = self._library.state(turn.layers[0], turn.index, within=True)
    elif turn.index:
      state = self._library.state(turn.layers[0], turn.index - 1)
    if state is None and self._first is not None:
      first = [self._first(layer) for layer in turn.layers]
    elif state is None:
      first = [self._of_the_parent(turn, g, parents[g], jobs) for g in range(len(turn.layers))]
    return Distillation(
      self._run.parent.architecture.blocks[turn.layers[0]],
      self._config,
      parents,
      self._run.mesh,
      jobs=jobs,
      settings=self._settings,
      heldout=self._heldout(turn.layers),
      first=first,
      state=state,
      within=within,
    )

  def _of_the_parent(
    self, turn: Turn, g: int, parent: Mapping[str, Mapping[str, np.ndarray]], jobs: tuple[Job, ...]
  ) -> JobWeights:
    settings, layer, shape = self._settings, turn.layers[g], turn.window.shape
    fitted = range(max(1, min(shape.shards, settings.fit_tokens // (shape.rows * shape.tokens))))
    held_out = self._heldout([layer])
    made = first_weights(
      self._run.space.layers[layer],
      self._config,
      parent,
      settings=settings,
      statistics=turn.statistics[g],
      train=lambda: (batch.layer(0) for batch in turn.window.batches([layer], fitted)),
      heldout=lambda: (batch.layer(0) for batch in held_out()),
    )
    variants = of_first(made)
    return {job.name: {s.slot: variants[s.id] for s in job.subblocks} for job in jobs}

  def _train(self, turn: Turn, distillation: Distillation, *, steps: int, stop: Callable[[], bool]) -> None:
    if not steps or not distillation.trainable:
      return
    batches = order(turn.window.shape.shards, steps=steps, seed=(self._settings.seed, turn.index))
    key = (distillation.trainable, len(turn.layers))  # the shapes that a step is compiled for
    if key not in self._steps:
      self._steps[key] = self._compiled(turn, distillation)
    for step in self._steps[key]:
      done = distillation.steps_done(step.jobs)
      distillation.train(step.jobs, turn.window.batches(turn.layers, batches[done:]), step, stop=stop)
      if stop():
        break

  def _compiled(self, turn: Turn, distillation: Distillation) -> list[memory.Step]:
    """The steps of a turn's groups; says what they take on the device before the first one is done."""
    shape, settings, say = turn.window.shape, self._settings, self._run.progress.say
    jobs = distillation.trainable
    plan = distributed.by_first(
      lambda: memory.Plan.of(distillation.spec, jobs, self._config, settings, rows=shape.rows, tokens=shape.tokens)
    )
    say(f"library: {plan}")
    steps = [memory.Step(distillation.spec, group, self._config, settings) for group in plan.groups]
    batch = next(turn.window.batches(turn.layers, [0]))
    for step in steps:
      distillation.compile(step, batch)
    if sizes := [step.compiled_bytes for step in steps if step.compiled_bytes is not None]:
      say(f"library: a step takes {', '.join(f'{size / 2**30:.2f}' for size in sizes)} GiB as compiled")
    return steps

  def _put(self, turn: Turn, distillation: Distillation) -> None:
    for layer, distilled in zip(turn.layers, distillation.finish(), strict=True):
      self._run.metrics(self._library.store.root.name, f"layer_{layer:02d}").record(distilled.curve)
      self._library.put(layer, distilled)
      for job in sorted(set(distilled.losses) - self._library.usable(layer)):
        self._run.progress.say(f"library: layer {layer} {job}: loss not finite; it is left out of the search")
    self._library.forget_states(turn.layers[0], turn.index)
