"""The block library on disk: every layer's trained variants and what each loses (paper section 3).

`layer_07.safetensors` holds the weights as `attention.linear/linear`; `layer_07.json` the losses and training curves,
and how long training took.

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


def _state_file(layer: int, window: int, *, within: bool = False) -> str:
  return f"state/{'within_' if within else ''}window_{window}_layer_{layer:02d}.safetensors"


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

  # What the group of layers from `layer` on goes on from: after a window of training tokens, or, stopped, within it

  def put_state(self, layer: int, window: int, state: Mapping[str, np.ndarray], *, within: bool = False) -> None:
    """Stores it; after a window, what led there goes."""
    self.store.put_arrays(_state_file(layer, window, within=within), state)
    if not within:
      self.forget_states(layer, window)

  def has_state(self, layer: int, window: int, *, within: bool = False) -> bool:
    return _state_file(layer, window, within=within) in self.store

  def state(self, layer: int, window: int, *, within: bool = False) -> dict[str, np.ndarray]:
    return self.store.get_arrays(_state_file(layer, window, within=within))

  def forget_states(self, layer: int, window: int) -> None:
    """Deletes what led to the end of a window."""
    self.store.remove(_state_file(layer, window, within=True))
    if window:
      self.store.remove(_state_file(layer, window - 1))

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
    report = {"variants": variants, "entries": sorted(distilled.weights), "timing": distilled.timing}
    self.store.put_json(report_file, report)

  def report(self, layer: int) -> dict[str, Any]:
    """All that is recorded of a layer's variants: `finite`, `losses`, `curve`."""
    return self.store.get_json(_files(layer)[1])["variants"]

  def losses(self, layer: int) -> dict[str, dict[str, float]]:
    """Held-out losses by variant: `delta_init`, `delta_trained`, `paper_init`, `paper_trained`."""
    return {name: report["losses"] for name, report in self.report(layer).items()}

  def curves(self, layer: int) -> dict[str, list[float]]:
    """Training loss of each step, by variant."""
    return {name: report["curve"] for name, report in self.report(layer).items()}

  @property
  def timing(self) -> dict[str, float]:
    """Seconds of training of all layers: `trained_s`, and `waited_s` of them the device waited for batches."""
    found = [self.store.get_json(_files(layer)[1]).get("timing", {}) for layer in self.layers]
    return {name: sum(of.get(name, 0.0) for of in found) for name in ("trained_s", "waited_s")}

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
