"""Studies whose arms change one base config each (configs/block_library.py, configs/ablations.py): what they share."""

import copy
import datetime
import json
from pathlib import Path
from typing import Any

import ml_collections

from puzzle_jax.config import RunConfig
from puzzle_jax.costs import jax_timing
from puzzle_jax.errors import PuzzleError
from puzzle_jax.runs import versions
from puzzle_jax.store import read_json


def with_changes(
  arm: ml_collections.ConfigDict, base: ml_collections.ConfigDict, changed: ml_collections.ConfigDict
) -> RunConfig:
  """An arm's config with the fields that were given for all arms, but for those that are the arm's own.

  Args:
    arm: its config.
    base: the study's base.
    changed: the same after `--change`.
  """
  values = copy.deepcopy(arm)

  def update(section: Any, old: Any, new: Any) -> None:
    for key, value in new.items():
      if isinstance(value, dict):
        update(section[key], old[key], value)
      elif section[key] == old[key]:
        section[key] = value

  update(values, base.to_dict(), changed.to_dict())
  return RunConfig.from_dict(values.to_dict())


def opened(path: Path, header: dict[str, Any]) -> dict[str, Any]:
  """The record that a study goes on with: what is there, or as it begins.

  Raises:
    PuzzleError: it is of another base config.
  """
  new = json.loads(json.dumps(header))
  record = read_json(path) if path.exists() else new
  then, now = (RunConfig.from_dict(each["config"]) for each in (record, new))  # newer fields have their defaults
  if then != now:
    raise PuzzleError(f"{path} is of another base config; name another --record, or delete it")
  return record


def header(study: str, root: Path, base: RunConfig) -> dict[str, Any]:
  """What a study's record begins with: when, where and how it was made."""
  return {
    "command": f"python -m experiments.{study} --workdir=runs/{root.name}",
    "date": datetime.date.today().isoformat(),
    "hardware": jax_timing.hardware(),
    "versions": versions(),
    "config": base.to_dict(),
  }
