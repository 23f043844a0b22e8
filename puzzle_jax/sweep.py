"""A sweep: one config started with several overrides, what the runs share made once (`experiments.sweep`)."""

import dataclasses
import importlib.util
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle_jax.errors import PuzzleError
from puzzle_jax.pipeline import STAGES


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The commands of a sweep.

  Attributes:
    shared: makes what all runs have in common; empty where they have nothing.
    runs: one for each, by the name of its directory.
  """

  shared: list[str]
  runs: dict[str, list[str]]


def points(file: Path) -> list[dict[str, Any]]:
  """What each run of a config file's `sweep(add)` overrides.

  Raises:
    PuzzleError: the file has no sweep.
  """
  spec = importlib.util.spec_from_file_location("swept_config", file)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  if not hasattr(module, "sweep"):
    raise PuzzleError(f"{file} has no sweep(add); write one (see configs/smollm2_135m.py), or use experiments.run")
  found: list[dict[str, Any]] = []
  module.sweep(lambda overrides: found.append(dict(overrides)))
  return found


def shared_stages(found: Sequence[Mapping[str, Any]]) -> list[str]:
  """The stages that are the same in all runs, whatever they override."""
  sections = {key.partition(".")[0] for overrides in found for key in overrides}
  same: list[str] = []
  for stage in STAGES:
    if not sections & {"parent", *stage.config} and set(stage.inputs) <= set(same):
      same.append(stage.name)
  return same


def _options(overrides: Mapping[str, Any]) -> list[str]:
  return [f"--config.{key}={value}" for key, value in overrides.items()]


def _name(overrides: Mapping[str, Any]) -> str:
  values = (f"{key.rpartition('.')[2]}={value}" for key, value in overrides.items())
  return re.sub(r"[^\w.=,+-]", "_", ",".join(values))


def plan(command: Sequence[str], config: str, overrides: Mapping[str, Any], workdir: Path) -> Sweep:
  """The sweep of a config.

  Args:
    command: that runs one, such as `python -m experiments.run`.
    config: `FILE.py:VARIANT`.
    overrides: further ones, which hold for every run.
    workdir: where the runs' directories go.

  Raises:
    PuzzleError: the file has no sweep, or two of its runs are the same.
  """
  found = points(Path(config.partition(":")[0]))
  base = [*command, f"--config={config}", *_options(overrides)]
  same = shared_stages(found)
  shared = [*base, *_options(found[0]), f"--workdir={workdir}/shared", f"--stages={','.join(same)}"] if same else []
  runs: dict[str, list[str]] = {}
  for point in found:
    name = _name(point)
    if name in runs:
      raise PuzzleError(f"sweep of {config}: two runs are called {name!r}; make them differ in what they override")
    reuse = [f"--reuse={workdir}/shared"] if same else []
    runs[name] = [*base, *_options(point), f"--workdir={workdir}/{name}", *reuse]
  return Sweep(shared, runs)


def slurm_script(sweep: Sweep, *, name: str) -> str:
  """A bash script that submits the sweep and hands its own arguments to `sbatch`."""
  array = f'sbatch --job-name={shlex.quote(name)} --array=0-{len(sweep.runs) - 1} "$@"'
  lines = ["#!/bin/bash", "# Submits a sweep: bash THIS_SCRIPT [options of sbatch]", "set -euo pipefail"]
  if sweep.shared:
    wrapped = shlex.quote(shlex.join(sweep.shared))
    lines.append(f'shared=$(sbatch --parsable --job-name={shlex.quote(name)}-shared "$@" --wrap {wrapped})')
    array += ' --dependency="afterok:$shared"'
  cases = [f"  {i}) {shlex.join(command)} ;;" for i, command in enumerate(sweep.runs.values())]
  lines += [f"{array} <<'END'", "#!/bin/bash", 'case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac", "END"]
  return "\n".join(lines)
