"""Writes the text of every config to tests/golden/, so that no value changes unseen: python -m experiments.golden

Run it when a config is meant to change, and read the difference before it is committed. tests/test_configs.py checks.
"""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

from absl import app

from puzzle_jax.config import RunConfig

_ROOT = Path(__file__).parent.parent
FOLDER = _ROOT / "tests" / "golden"


def texts() -> dict[str, str]:
  """By file name: each variant of each config as JSON, with the runs of its sweep."""
  found = {}
  for path in sorted((_ROOT / "configs").glob("*.py")):
    module = importlib.import_module(f"configs.{path.stem}")
    if not hasattr(module, "get_config"):
      continue
    takes_variant = bool(inspect.signature(module.get_config).parameters)
    variants = {v: module.get_config(v).to_dict() for v in module.VARIANTS} if takes_variant else {}
    variants = variants or {"": module.get_config().to_dict()}
    first, *others = ((name, RunConfig.from_dict(values).to_dict()) for name, values in variants.items())
    text: dict[str, Any] = {"variant": first[0], "config": first[1]}
    text["changes"] = {name: _changes(first[1], values) for name, values in others}
    if hasattr(module, "sweep"):
      text["sweep"] = []
      module.sweep(text["sweep"].append)
    found[f"{path.stem}.json"] = json.dumps(text, indent=1) + "\n"
  return found


def _changes(old: Any, new: Any, path: str = "") -> dict[str, Any]:
  """What a variant sets otherwise than the first, by dotted name."""
  if isinstance(old, dict) and isinstance(new, dict):
    found: dict[str, Any] = {}
    for key in sorted(old.keys() | new.keys()):
      found |= _changes(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return found
  return {} if old == new else {path: new}


def main(argv: list[str]) -> None:
  del argv
  FOLDER.mkdir(exist_ok=True)
  for old in FOLDER.glob("*.json"):
    old.unlink()
  for name, text in texts().items():
    (FOLDER / name).write_text(text)


if __name__ == "__main__":
  app.run(main)
