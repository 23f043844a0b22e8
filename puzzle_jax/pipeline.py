"""The stages of a run in order, what each depends on, and the driver (docs/architecture.md has the picture).

A stage reads files of earlier stages and writes its own. It is done when its folder was finished for the same key: the
config sections that it reads, the content of its inputs, the parent, and its version. So a killed run does only what is
missing, and a changed config redoes exactly the stages that depend on the change.
"""

import dataclasses
import difflib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from puzzle_jax import stages
from puzzle_jax.config import RunConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.runs import Run, versions
from puzzle_jax.store import CorruptFileError, StageStore, write_json


@dataclasses.dataclass(frozen=True)
class Stage:
  """A step of the pipeline.

  Attributes:
    name: also of its folder.
    make: fills the folder.
    config: sections of the config that it reads.
    inputs: stages whose files it reads.
    times_too: whether it depends on what inputs hold under `timing` as well.
    check: refuses, once the stage is done, what later stages could not make good.
    version: raised when the code changes what it makes.
  """

  name: str
  make: Callable[[Run, StageStore], None]
  config: tuple[str, ...]
  inputs: tuple[str, ...]
  times_too: bool = False
  check: Callable[[Run], None] | None = None
  version: int = 1

  def key(self, run: Run) -> dict[str, Any]:
    config = run.config.to_dict()
    key = {
      "version": self.version,
      "parent": run.parent.digest,
      "config": {section: config[section] for section in self.config},
      "inputs": {name: run.store(name).content(times_too=self.times_too) for name in self.inputs},
    }
    return json.loads(json.dumps(key))  # as a manifest gives it back: tuples are lists


STAGES = (
  Stage("data", stages.make_data, ("data",), ()),
  Stage("costs", stages.make_costs, ("costs", "space"), (), check=stages.check_target),
  Stage("activations", stages.make_activations, ("activations",), ("data",)),
  Stage("library", stages.make_library, ("bld", "space"), ("data", "activations")),
  Stage("scores", stages.make_scores, ("scores", "space"), ("data", "activations", "library")),
  Stage(
    "search",
    stages.make_search,
    ("search", "scores", "space"),
    ("data", "activations", "library", "scores", "costs"),
    version=2,
  ),
  Stage("child", stages.make_child, ("space",), ("library", "search")),
  Stage("gkd", stages.make_gkd, ("gkd",), ("data", "child")),
  Stage("evaluation", stages.make_evaluation, ("evaluation", "costs"), ("data", "child", "gkd", "search")),
  Stage("export", stages.make_export, ("export", "search"), ("gkd", "evaluation"), version=2),
  Stage(
    "report",
    stages.make_report,
    ("name",),
    ("costs", "library", "scores", "search", "gkd", "evaluation"),
    times_too=True,
  ),
)


def _changes(old: Any, new: Any, path: str = "") -> list[str]:
  """What differs between two keys, one phrase each."""
  if isinstance(old, dict) and isinstance(new, dict):
    found = []
    for key in sorted(set(old) | set(new)):
      found += _changes(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return found
  if old == new:
    return []
  if path.startswith("inputs."):
    return [f"{path.partition('.')[2]} is new"]
  return [f"{path.removeprefix('config.')} {old!r} -> {new!r}"]


def _status(stage: Stage, run: Run, store: StageStore) -> str | None:
  """Why a stage has to run, or None when it is done."""
  if store.key is None:
    return "not made yet"
  if changes := _changes(store.key, stage.key(run)):
    return "; ".join(changes)
  if missing := store.missing():
    return f"files are gone: {', '.join(missing)}"
  return None if store.done else "unfinished"


def _selected(names: Sequence[str]) -> list[Stage]:
  known = [s.name for s in STAGES]
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f"did you mean {near[0]}? " if near else ""
      raise PuzzleError(f"unknown stage {name!r}; {hint}known: {', '.join(known)}")
  return [s for s in STAGES if not names or s.name in names]


def _space_needed(run: Run) -> int:
  """Bytes that a whole run writes, roughly: activations, library, three copies of the child and two checkpoints."""
  config, parent = run.config, run.parent.architecture
  width = {"float32": 4, "bfloat16": 2}[config.activations.dtype]
  tokens = config.data.train_tokens * width + config.data.heldout_tokens * 4
  stored = tokens * parent.config.hidden_size * (parent.num_layers + 1)
  variants = sum(s.num_params(parent.config) for layer in run.space.layers for s in layer.variants) * 4
  return stored + variants + parent.num_params() * (4 + 4 + 2 + 2 * 12)


def _check_identity(run: Run) -> None:
  """Refuses a work directory that belongs to another parent: nothing in it could be used."""
  for stage in STAGES:
    key = run.store(stage.name).key
    if key is not None and key["parent"] != run.parent.digest:
      raise PuzzleError(
        f"work directory {run.workdir.root} belongs to another parent than {run.config.parent}; "
        "choose another --workdir, or delete it"
      )


def run(
  config: RunConfig | dict[str, Any],
  workdir: str | os.PathLike[str],
  *,
  stages: Sequence[str] = (),
  quiet: bool = False,
) -> Run:
  """Runs the pipeline, or what is missing of it.

  Args:
    config: a `RunConfig`, or nested mappings of one.
    workdir: the run's directory; started again there, it goes on.
    stages: names of `STAGES` to run; all when empty.
    quiet: no progress bars or messages.

  Returns:
    The run: `child` and `parent_model` generate text, `library`, `scores`, `table` and `summary` are its results.

  Raises:
    PuzzleError: bad input, before work starts; or a stage that cannot go on.
  """
  config = config if isinstance(config, RunConfig) else RunConfig.from_dict(config)
  this = Run(config, workdir, quiet=quiet)
  wanted = _selected(stages)
  if config.costs.table and not Path(config.costs.table).is_file():
    raise PuzzleError(f"costs.table={config.costs.table!r} is no file; leave it empty to time costs here")
  this.parent.validate()
  this.progress.say(f"parent {this.parent.name}; space: {this.space}")
  with this.workdir.lock():
    _check_identity(this)
    if any(_status(s, this, this.store(s.name)) for s in wanted):
      this.workdir.require_space(_space_needed(this) - sum(this.store(s.name).size for s in STAGES))
    write_json(this.workdir.root / "config.json", config.to_dict())
    for attempt in range(3):
      try:
        _run_stages(this, wanted)
        break
      except CorruptFileError as e:
        if attempt == 2:
          raise
        this.progress.say(f"{e}; repairing")
  return this


def _run_stages(run: Run, wanted: Sequence[Stage]) -> None:
  for stage in wanted:
    for name in stage.inputs:
      if not run.store(name).done:
        raise PuzzleError(f"stage {stage.name} needs {name}, which is not done; add it to --stages, or run all stages")
    store = run.store(stage.name)
    reason = _status(stage, run, store)
    if reason is None:
      run.progress.say(f"{stage.name}: done")
    else:
      _make(stage, run, store, reason)
    if stage.check is not None:
      stage.check(run)


def _make(stage: Stage, run: Run, store: StageStore, reason: str) -> None:
  run.progress.say(f"{stage.name}: {reason}" if store.key is not None else f"{stage.name}: starts")
  begin = time.perf_counter()
  store.begin(stage.key(run))
  stage.make(run, store)
  store.finish({"versions": versions(), "timing": {"seconds": time.perf_counter() - begin}})
  jax.clear_caches()  # compiled programs of one stage are of no use to the next, and take memory
