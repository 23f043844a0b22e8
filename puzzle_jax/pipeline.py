"""The stages of a run in order, what each depends on, and the driver (docs/architecture.md has the picture).

A stage reads files of earlier stages and writes its own. It is done when its folder was finished for the same key: the
config sections that it reads, the content of its inputs, the parent, and its version. So a killed run does only what is
missing, and a changed config redoes exactly the stages that depend on the change.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from puzzle_jax import distributed, preflight, stages
from puzzle_jax.config import RunConfig
from puzzle_jax.costs import jax_timing
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluation import suite
from puzzle_jax.metrics import WandbRun
from puzzle_jax.needs import needs
from puzzle_jax.runs import Run, launch_record, versions
from puzzle_jax.store import CleanedFileError, CorruptFileError, StageStore, Workdir, file_digest, write_json

_HOPELESS = 2  # times the memory there is: by this much the arithmetic of `needs` is not wrong


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
    files: those outside of the work directory that it reads.
    memory: fields of the config that its memory grows with.
    together: made by all processes of a run, on one mesh; the others are made by process 0.
    version: raised when the code changes what it makes.
  """

  name: str
  make: Callable[[Run, StageStore], None]
  config: tuple[str, ...]
  inputs: tuple[str, ...]
  times_too: bool = False
  check: Callable[[Run], None] | None = None
  files: Callable[[RunConfig], Sequence[Path]] = lambda config: ()
  memory: tuple[str, ...] = ()
  together: bool = False
  version: int = 1

  def key(self, run: Run) -> dict[str, Any]:
    config = run.config.results()
    key: dict[str, Any] = {
      "version": self.version,
      "parent": run.parent.digest,
      "config": {section: config[section] for section in self.config},
      "inputs": {name: run.store(name).content(times_too=self.times_too) for name in self.inputs},
    }
    if files := self.files(run.config):
      key["files"] = [(path.name, file_digest(path)) for path in files]
    return json.loads(json.dumps(key))  # as a manifest gives it back: tuples are lists


STAGES = (
  Stage("data", stages.make_data, ("data",), (), memory=("data.sampling.batch_rows",)),
  Stage("costs", stages.make_costs, ("costs", "space"), (), check=stages.check_target, memory=("costs.batches",)),
  Stage(
    "activations",
    stages.make_activations,
    (),
    ("data",),
    memory=("activations.batch_rows", "data.seq_len"),
    together=True,
    version=2,
  ),
  Stage(
    "library",
    stages.make_library,
    ("bld", "space", "activations"),
    ("data", "activations"),
    memory=("bld.batch_rows", "bld.memory_gib", "activations.window_tokens"),
    together=True,
    version=2,
  ),
  Stage(
    "scores",
    stages.make_scores,
    ("scores", "space"),
    ("data", "activations", "library"),
    memory=("scores.batch_rows", "data.heldout_tokens"),
    together=True,
  ),
  Stage(
    "search",
    stages.make_search,
    ("search", "scores", "space"),
    ("data", "activations", "library", "scores", "costs"),
    memory=("search.refine_rounds",),
    together=True,
    version=2,
  ),
  Stage(
    "coupled",
    stages.make_coupled,
    ("coupled", "search", "scores", "space", "activations"),
    ("data", "activations", "library", "search"),
    memory=("coupled.bld.batch_rows", "coupled.bld.memory_gib"),
    together=True,
  ),
  Stage("child", stages.make_child, ("space",), ("library", "search", "coupled"), version=2),
  Stage(
    "gkd",
    stages.make_gkd,
    ("gkd",),
    ("data", "child"),
    memory=("gkd.batch_rows", "data.seq_len"),
    together=True,
  ),
  Stage(
    "evaluation",
    stages.make_evaluation,
    ("evaluation", "costs"),
    ("data", "child", "gkd", "search", "coupled"),
    files=lambda config: suite.files(config.evaluation),
    memory=("evaluation.batch_rows",),
    together=True,
    version=2,
  ),
  Stage("export", stages.make_export, ("export", "search"), ("gkd", "evaluation"), version=2),
  Stage(
    "report",
    stages.make_report,
    tuple(f.name for f in dataclasses.fields(RunConfig) if f.name != "parent"),  # it shows the whole config
    ("costs", "library", "scores", "search", "coupled", "gkd", "evaluation"),
    times_too=True,
    version=2,
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


def status(stage: Stage, run: Run, store: StageStore) -> str | None:
  """Why a stage has to run, or None when it is done."""
  if store.key is None:
    return "not made yet"
  if changes := _changes(store.key, stage.key(run)):
    return "; ".join(changes)
  if missing := store.missing():
    return f"files are gone: {', '.join(missing)}"
  return None if store.done else "unfinished"


def selected(names: Sequence[str]) -> list[Stage]:
  known = [s.name for s in STAGES]
  for name in names:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f"did you mean {near[0]}? " if near else ""
      raise PuzzleError(f"unknown stage {name!r}; {hint}known: {', '.join(known)}")
  return [s for s in STAGES if not names or s.name in names]


def check_identity(run: Run) -> None:
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
  reuse: str | os.PathLike[str] | None = None,
  wandb: str = "",
  quiet: bool = False,
) -> Run:
  """Runs the pipeline, or what is missing of it.

  Args:
    config: a `RunConfig`, or nested mappings of one.
    workdir: the run's directory; started again there, it goes on.
    stages: names of `STAGES` to run; all when empty.
    reuse: another run's directory; its finished stages are taken over where this run would make the same.
    wandb: project at Weights & Biases to which the metrics go, too; none when empty.
    quiet: no progress bars or messages.

  Returns:
    The run: `child` and `parent_model` generate text, `library`, `scores`, `table` and `summary` are its results.

  Raises:
    PuzzleError: bad input, before work starts; or a stage that cannot go on.
  """
  config = config if isinstance(config, RunConfig) else RunConfig.from_dict(config)
  this = Run(config, workdir, quiet=quiet)
  wanted = selected(stages)
  preflight.check(this)
  if reuse is not None and not (Path(reuse) / "config.json").is_file():
    raise PuzzleError(f"reuse={os.fspath(reuse)!r} is no run's directory: it has no config.json")
  this.progress.say(f"parent {this.parent.name}; space: {this.space}")
  with contextlib.ExitStack() as held:

    def begin() -> None:
      held.enter_context(this.workdir.lock())
      check_identity(this)
      if todo := [s for s in wanted if status(s, this, this.store(s.name))]:
        preflight.check_mesh(this, [s.name for s in todo if s.together])
        _check_resources(this, todo)
      write_json(this.workdir.root / "config.json", config.to_dict())
      this.workdir.append("launches.jsonl", launch_record(wanted=[s.name for s in wanted]))
      if wandb:
        this.wandb = held.enter_context(WandbRun(wandb, workdir=this.workdir.root, config=config.to_dict()))

    distributed.by_first(begin)
    _repairing(this, lambda: _run_stages(this, wanted, None if reuse is None else Workdir(reuse)))
  return this


def _check_resources(run: Run, todo: Sequence[Stage]) -> None:
  """Refuses what disk or memory have no room for; what may just not fit is warned of."""
  if all(run.store(stage.name).key is None for stage in STAGES):
    run.parent.validate()  # once a work directory: reading all of a large parent takes minutes
  need = needs(run.config, run.parent.architecture, run.space)
  run.workdir.require_space(
    round(sum(n.disk_bytes for n in need.values())) - sum(run.store(s.name).size for s in STAGES)
  )
  have = preflight.memory_bytes()
  for stage in todo:
    wanted = need[stage.name].memory_bytes if stage.name in need else 0
    if wanted > have:
      message = (
        f"{stage.name} needs about {wanted / 2**30:.1f} GiB of memory by arithmetic, {jax_timing.hardware()} has "
        f"{have / 2**30:.1f}; {_remedy(stage, run)}"
      )
      if wanted > _HOPELESS * have:
        raise PuzzleError(message)
      run.progress.say(f"warning: {message}")


def _repairing(run: Run, work: Callable[[], None]) -> None:
  """Starts again where a file turns out to be damaged, or to be needed after `experiments.clean` removed it."""
  seen: set[str] = set()
  while True:
    try:
      return work()
    except CleanedFileError as e:
      run.progress.say(f"{e.folder.name}: needed again after experiments.clean")
      StageStore(e.folder).forget_cleaned()
    except CorruptFileError as e:
      if str(e) in seen:
        raise
      seen.add(str(e))
      run.progress.say(f"{e}; repairing")


def _run_stages(run: Run, wanted: Sequence[Stage], reuse: Workdir | None) -> None:
  for stage in wanted:
    for name in stage.inputs:
      if not run.store(name).done:
        raise PuzzleError(f"stage {stage.name} needs {name}, which is not done; add it to --stages, or run all stages")
    store, key = run.store(stage.name), stage.key(run)
    reason = distributed.by_first(functools.partial(status, stage, run, store))
    other = reuse.stage(stage.name) if reuse and reason else None
    if reason is None:
      run.progress.say(f"{stage.name}: done")
    elif other and other.done and other.key == key and not other.missing():
      run.progress.say(f"{stage.name}: taken from {other.root}")
      store.adopt(other)
    elif stage.together:
      _make(stage, run, store, reason)
    else:
      distributed.by_first(functools.partial(_make, stage, run, store, reason))
    if stage.check is not None:
      stage.check(run)


def _make(stage: Stage, run: Run, store: StageStore, reason: str) -> None:
  run.progress.say(f"{stage.name}: {reason}" if store.key is not None else f"{stage.name}: starts")
  begin, key = time.perf_counter(), stage.key(run)
  resumed = store.key == key
  store.begin(key)
  try:
    stage.make(run, store)
  except (MemoryError, jax.errors.JaxRuntimeError) as e:
    if isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e):
      raise _out_of_memory(stage, run, e) from e
    raise
  need = needs(run.config, run.parent.architecture, run.space).get(stage.name)
  store.finish(
    {
      "versions": versions(),
      "hardware": jax_timing.hardware(),
      "flops": need.flops if need else 0,
      "resumed": resumed,  # the seconds are those of the last start alone
      "timing": {"seconds": time.perf_counter() - begin, "finished": time.strftime("%F %T")},
    }
  )
  jax.clear_caches()  # compiled programs of one stage are of no use to the next, and take memory


def _out_of_memory(stage: Stage, run: Run, error: Exception) -> PuzzleError:
  return PuzzleError(
    f"{stage.name}: out of memory on {jax_timing.hardware()} ({str(error).partition(chr(10))[0][:160]}); "
    f"{_remedy(stage, run)} and start again: what is finished is kept"
  )


def _remedy(stage: Stage, run: Run) -> str:
  """Which values to lower where memory is short."""
  fields = []
  for name in stage.memory:
    value: Any = run.config
    for part in name.split("."):
      value = getattr(value, part)
    fields.append(f"{name} ({value})")
  return f"lower {' or '.join(fields)}" if fields else "use a machine with more memory"
