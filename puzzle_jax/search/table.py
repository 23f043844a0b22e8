"""The block table: score and cost of every variant of every layer, all that the search reads (paper section 4).

A table may come from anywhere: scores from any metric (lower is better), costs from any engine. Its JSON form is
described in docs/search.md. Sums that decide whether a limit is met are exact. Imports no JAX.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from puzzle_jax.errors import PuzzleError
from puzzle_jax.json_input import read_object
from puzzle_jax.search.decimals import exact
from puzzle_jax.search.table_json import COLUMNS, FORMAT, Costs, Parser, Scenario, Variant

__all__ = ["FORMAT", "Costs", "Figures", "Scenario", "Table", "Variant"]


@dataclasses.dataclass(frozen=True)
class Figures:
  """What a child costs in one scenario at one batch, exactly."""

  params: Fraction
  memory_bytes: Fraction
  kv_bytes_per_token: Fraction
  prefill_s: Fraction
  decode_s: Fraction

  @property
  def runtime_s(self) -> Fraction:
    return self.prefill_s + self.decode_s


@dataclasses.dataclass(frozen=True)
class Table:
  """Scores and costs of L layers of up to J variants; arrays are [L, J], NaN where a layer has fewer variants."""

  scenarios: Mapping[str, Scenario]
  layers: tuple[tuple[Variant, ...], ...]
  parent: tuple[int, ...]  # the index of each layer's own block
  score: np.ndarray  # nats (or any unit) above the parent
  score_stderr: np.ndarray
  params: np.ndarray
  param_bytes: np.ndarray
  kv_bytes_per_token: np.ndarray
  costs: Mapping[str, Mapping[int, Costs]]  # by scenario and batch
  allowed: np.ndarray  # [L, J] bool: what the search may choose
  fixed_params: float = 0.0
  fixed_param_bytes: float = 0.0
  extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # other keys of the file, kept as they are

  @property
  def num_layers(self) -> int:
    return len(self.layers)

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> "Table":
    """Reads and checks a table.

    Raises:
      PuzzleError: whatever is missing, negative, not finite, double or unknown, named with layer and variant.
    """
    return cls(**Parser(data).fields())

  @classmethod
  def read(cls, path: str | Path) -> "Table":
    """From a JSON file."""
    try:
      data = read_object(Path(path), f"name a {FORMAT} file")
    except OSError as e:
      raise PuzzleError(f"table {path} cannot be read ({e.strerror}); name a {FORMAT} file") from e
    return cls.from_json(data)

  def to_json(self) -> dict[str, Any]:
    """The whole table, whatever `restrict` left of it: inverse of `from_json`."""
    layers = []
    for i, variants in enumerate(self.layers):
      rows = []
      for j, variant in enumerate(variants):
        row: dict[str, Any] = {"attention": variant.attention, "ffn": variant.ffn}
        if variant.weights is not None:
          row["weights"] = variant.weights
        if j == self.parent[i]:
          row["parent"] = True
        row |= {name: _plain(getattr(self, name)[i, j]) for name in COLUMNS}
        row["costs"] = {
          scenario: {
            str(batch): {"prefill_s": float(c.prefill_s[i, j]), "decode_s": float(c.decode_s[i, j])}
            for batch, c in batches.items()
            if not math.isnan(c.prefill_s[i, j])
          }
          for scenario, batches in self.costs.items()
        }
        rows.append(row)
      layers.append({"variants": rows})
    fixed_costs = {
      scenario: {
        str(batch): {"prefill_s": c.fixed_prefill_s, "decode_s": c.fixed_decode_s} for batch, c in batches.items()
      }
      for scenario, batches in self.costs.items()
    }
    floor = {
      scenario: {
        str(batch): {"prefill_s": c.floor_prefill_s, "decode_s": c.floor_decode_s}
        for batch, c in batches.items()
        if c.floor_prefill_s or c.floor_decode_s
      }
      for scenario, batches in self.costs.items()
    }
    return {
      **self.extra,
      **({"floor": floor} if any(floor.values()) else {}),
      "format": FORMAT,
      "scenarios": {name: dataclasses.asdict(s) for name, s in self.scenarios.items()},
      "fixed": {
        "params": _plain(self.fixed_params),
        "param_bytes": _plain(self.fixed_param_bytes),
        "costs": fixed_costs,
      },
      "layers": layers,
    }

  def choices(self, layer: int) -> list[Variant]:
    """The variants of a layer that the search may choose."""
    return [v for v, allowed in zip(self.layers[layer], self.allowed[layer], strict=False) if allowed]

  def restrict(self, allow: Callable[[int, Variant], bool]) -> "Table":
    """The table with fewer variants to choose from: those for which `allow(layer, variant)` holds.

    Indices keep their meaning, and the parent's figures stay known even where its own block is not allowed.

    Raises:
      PuzzleError: a layer has nothing left.
    """
    allowed = self.allowed.copy()
    for i, variants in enumerate(self.layers):
      for j, variant in enumerate(variants):
        allowed[i, j] &= allow(i, variant)
      if not allowed[i].any():
        left = ", ".join(map(str, self.choices(i)))
        raise PuzzleError(f"layer {i}: the restriction leaves no variant of {left}; allow one of them")
    return dataclasses.replace(self, allowed=allowed)

  def freeze(self, blocks: Mapping[int, str]) -> "Table":
    """The table with the named layers held to `attention/ffn` (whichever weights it has there).

    Raises:
      PuzzleError: no such layer, or no such block in it.
    """
    for layer, block in blocks.items():
      if not 0 <= layer < self.num_layers:
        raise PuzzleError(f"freeze {layer}:{block}: there are layers 0 to {self.num_layers - 1}")
      known = [v.block for v in self.choices(layer)]
      if block not in known:
        known_names = ", ".join(dict.fromkeys(known))
        raise PuzzleError(f"freeze {layer}:{block}: layer {layer} has no such variant to choose; it has {known_names}")
    return self.restrict(lambda layer, variant: layer not in blocks or variant.block == blocks[layer])

  def batches(self, scenarios: Sequence[str]) -> tuple[int, ...]:
    """The batches at which the parent and every allowed variant have costs in all of `scenarios`, ascending.

    Raises:
      PuzzleError: there is none; names a variant that lacks one.
    """
    shared = set.intersection(*(set(self.costs[s]) for s in scenarios))
    batches = tuple(b for b in sorted(shared) if not any(self._unmeasured(s, b).any() for s in scenarios))
    if not batches:
      where = "; ".join(self.missing_cost(s, b) for s in scenarios for b in sorted(self.costs[s])) or "no costs at all"
      raise PuzzleError(f"the table has no batch that every variant has a cost for ({where}); measure one for all")
    return batches

  def missing_cost(self, scenario: str, batch: int) -> str:
    """Says which variant has no cost at a batch; empty when all have."""
    if batch not in self.costs[scenario]:
      return f"nothing has a cost at batch {batch} in scenario {scenario}"
    missing = np.argwhere(self._unmeasured(scenario, batch))
    if not len(missing):
      return ""
    i, j = missing[0]
    return f"layer {i}, {self.layers[i][j]} has no cost at batch {batch} in scenario {scenario}"

  def _unmeasured(self, scenario: str, batch: int) -> np.ndarray:
    needed = self.allowed.copy()
    needed[np.arange(self.num_layers), self.parent] = True
    return needed & np.isnan(self.costs[scenario][batch].prefill_s)

  def block_figures(self, layer: int, variant: int, scenario: str, batch: int) -> Figures:
    """What one block adds, exactly."""
    at, costs = (layer, variant), self.costs[scenario][batch]
    kv = exact(self.kv_bytes_per_token[at])
    return Figures(
      params=exact(self.params[at]),
      memory_bytes=exact(self.param_bytes[at]) + batch * self.scenarios[scenario].tokens * kv,
      kv_bytes_per_token=kv,
      prefill_s=exact(costs.prefill_s[at]),
      decode_s=exact(costs.decode_s[at]),
    )

  def fixed_figures(self, scenario: str, batch: int) -> Figures:
    """What no block owns, exactly."""
    costs = self.costs[scenario][batch]
    return Figures(
      params=exact(self.fixed_params),
      memory_bytes=exact(self.fixed_param_bytes),
      kv_bytes_per_token=Fraction(0),
      prefill_s=exact(costs.fixed_prefill_s),
      decode_s=exact(costs.fixed_decode_s),
    )

  def sums(self, choice: Sequence[int], scenario: str, batch: int) -> Figures:
    """What the blocks of the child that takes variant `choice[l]` in each layer l add up to, exactly."""
    blocks = (self.block_figures(i, j, scenario, batch) for i, j in enumerate(choice))
    parts = [self.fixed_figures(scenario, batch), *blocks]
    return Figures(**{f.name: sum(getattr(p, f.name) for p in parts) for f in dataclasses.fields(Figures)})

  def floor(self, scenario: str, batch: int) -> dict[str, Fraction]:
    """Seconds of each phase that no child is below."""
    costs = self.costs[scenario][batch]
    return {"prefill_s": exact(costs.floor_prefill_s), "decode_s": exact(costs.floor_decode_s)}

  def figures(self, choice: Sequence[int], scenario: str, batch: int) -> Figures:
    """What a child costs, exactly: its sums, no phase below the floor."""
    sums, floor = self.sums(choice, scenario, batch), self.floor(scenario, batch)
    return dataclasses.replace(sums, **{phase: max(getattr(sums, phase), least) for phase, least in floor.items()})

  def weights(self, quantity: str, scenario: str, batch: int) -> np.ndarray:
    """What each variant adds to a quantity of `Figures`, [L, J] (rounded; `figures` is exact)."""
    costs = self.costs[scenario][batch]
    if quantity == "memory_bytes":
      return self.param_bytes + batch * self.scenarios[scenario].tokens * self.kv_bytes_per_token
    if quantity == "runtime_s":
      return costs.prefill_s + costs.decode_s
    return getattr(costs if hasattr(costs, quantity) else self, quantity)

  def total_score(self, choice: Sequence[int]) -> Fraction:
    """The estimate of a child: the sum of its blocks' scores, exactly."""
    return sum(map(exact, self.score[np.arange(self.num_layers), np.asarray(choice)]), Fraction(0))


def _plain(value: float) -> float | int:
  return int(value) if float(value).is_integer() else float(value)
