"""The block library on disk: every layer's trained variants and what each loses (paper section 3).

`layer_07.safetensors` holds the weights as `attention.linear/linear`; `layer_07.json` the losses and training curves.

    library = Library.open("RUN/library")
    library.losses(7)["ffn.w768"]["delta_trained"]
    weights = library.load(7, "ffn.w768")
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from puzzle_jax.distil import Distilled
from puzzle_jax.errors import PuzzleError
from puzzle_jax.store import StageStore


def _files(layer: int) -> tuple[str, str]:
  return f"layer_{layer:02d}.safetensors", f"layer_{layer:02d}.json"


def _state_file(layer: int, window: int) -> str:
  return f"state/window_{window}_layer_{layer:02d}.safetensors"


@dataclasses.dataclass(frozen=True)
class Library:
  """A finished or growing block library."""

  store: StageStore

  @classmethod
  def open(cls, folder: str | os.PathLike[str]) -> "Library":
    """Opens the `library` folder of a run.

    Raises:
      PuzzleError: there is none.
    """
    store = StageStore(Path(folder))
    if not store.names:
      raise PuzzleError(f"{folder} holds no block library; run the stage `library` first, or name RUN/library")
    return cls(store)

  def __contains__(self, layer: int) -> bool:
    return all(name in self.store for name in _files(layer))

  @property
  def layers(self) -> list[int]:
    found = (re.fullmatch(r"layer_(\d+)\.json", name) for name in self.store.names)
    return sorted(int(match[1]) for match in found if match)

  # What layers go on from when training tokens come in several windows

  def put_state(self, layer: int, window: int, state: Mapping[str, np.ndarray]) -> None:
    """Stores what the group of layers from `layer` on goes on from after a window."""
    self.store.put_arrays(_state_file(layer, window), state)
    if window:
      self.store.remove(_state_file(layer, window - 1))

  def has_state(self, layer: int, window: int) -> bool:
    return _state_file(layer, window) in self.store

  def state(self, layer: int, window: int) -> dict[str, np.ndarray]:
    return self.store.get_arrays(_state_file(layer, window))

  def forget_state(self, layer: int, window: int) -> None:
    self.store.remove(_state_file(layer, window))

  def put(self, layer: int, distilled: Distilled) -> None:
    """Stores a layer; a variant whose loss is not finite is marked, and never offered to the search."""
    arrays = {f"{name}/{k}": w for name, weights in distilled.weights.items() for k, w in weights.items()}
    variants = {}
    for name, losses in distilled.losses.items():
      finite = all(math.isfinite(x) for x in losses.values())
      own = [w for entry, w in distilled.weights.items() if entry == name or entry.endswith(f"@{name}")]
      finite &= all(np.isfinite(w).all() for weights in own for w in weights.values())
      curve = distilled.curve.get(name, [])
      variants[name] = {
        "finite": finite,
        "losses": {k: x if math.isfinite(x) else None for k, x in losses.items()},
        "curve": [x if math.isfinite(x) else None for x in curve],
      }
    weights_file, report_file = _files(layer)
    self.store.put_arrays(weights_file, arrays)
    self.store.put_json(report_file, {"variants": variants, "entries": sorted(distilled.weights)})

  def report(self, layer: int) -> dict[str, Any]:
    """All that is recorded of a layer's variants: `finite`, `losses`, `curve`."""
    return self.store.get_json(_files(layer)[1])["variants"]

  def losses(self, layer: int) -> dict[str, dict[str, float]]:
    """Held-out losses by variant: `delta_init`, `delta_trained`, `paper_init`, `paper_trained`."""
    return {name: report["losses"] for name, report in self.report(layer).items()}

  def curves(self, layer: int) -> dict[str, list[float]]:
    """Training loss of each step, by variant."""
    return {name: report["curve"] for name, report in self.report(layer).items()}

  def usable(self, layer: int) -> set[str]:
    """The variants that may be offered to the search."""
    return {name for name, report in self.report(layer).items() if report["finite"]}

  def load_layer(self, layer: int) -> dict[str, dict[str, np.ndarray]]:
    """All variants' weights, fp32, by `Job.entry`; a no-op's are empty."""
    weights_file, report_file = _files(layer)
    weights: dict[str, dict[str, np.ndarray]] = {name: {} for name in self.store.get_json(report_file)["entries"]}
    for key, array in self.store.get_arrays(weights_file).items():
      name, _, weight = key.rpartition("/")
      weights[name][weight] = array
    return weights

  def load(self, layer: int, variant: str) -> dict[str, np.ndarray]:
    """One variant's weights.

    Raises:
      PuzzleError: the layer has no such variant (names those it has).
    """
    weights = self.load_layer(layer)
    if variant not in weights:
      raise PuzzleError(f"layer {layer} has no variant {variant!r}; it has {', '.join(sorted(weights))}")
    return weights[variant]
