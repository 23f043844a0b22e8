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
    for variant in module.VARIANTS if takes_variant else ("",):
      config = module.get_config(variant) if variant else module.get_config()
      text: dict[str, Any] = {"config": RunConfig.from_dict(config.to_dict()).to_dict()}
      if hasattr(module, "sweep"):
        text["sweep"] = []
        module.sweep(text["sweep"].append)
      found[f"{path.stem}{'.' * bool(variant)}{variant}.json"] = json.dumps(text, indent=1) + "\n"
  return found


def main(argv: list[str]) -> None:
  del argv
  FOLDER.mkdir(exist_ok=True)
  for old in FOLDER.glob("*.json"):
    old.unlink()
  for name, text in texts().items():
    (FOLDER / name).write_text(text)


if __name__ == "__main__":
  app.run(main)
