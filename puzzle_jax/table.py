"""The block table: score and cost of every variant of every layer, all that the search reads (paper section 4).

A table may come from anywhere: scores from any metric (lower is better), costs from any engine. Its JSON form,
`puzzle-block-table/1`, is described in docs/search.md. Imports no JAX.

Sums that decide whether a limit is met are exact: every number stands for the shortest decimal that JSON writes for it
(0.1 is one tenth), and sums are fractions.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from puzzle_jax.errors import PuzzleError

FORMAT = "puzzle-block-table/1"
QUANTITIES = ("params", "memory_bytes", "kv_bytes_per_token", "prefill_s", "decode_s", "runtime_s")


def exact(value: float) -> Fraction:
  """The shortest decimal that stands for `value`, as a fraction: 0.1 gives 1/10."""
  return Fraction(repr(float(value)))


@dataclasses.dataclass(frozen=True)
class Scenario:
  """What each request of a batch is: tokens in, tokens out."""

  input_tokens: int
  output_tokens: int

  @property
  def tokens(self) -> int:
    return self.input_tokens + self.output_tokens


@dataclasses.dataclass(frozen=True)
class Variant:
  """A block that a layer may become; `weights` tells two trainings of one block apart ("decoupled", "coupled")."""

  attention: str
  ffn: str
  weights: str | None = None

  @property
  def block(self) -> str:
    """`attention/ffn`, as `arch.BlockSpec.parse` reads it."""
    return f"{self.attention}/{self.ffn}"

  def __str__(self) -> str:
    return f"{self.block} ({self.weights})" if self.weights else self.block


@dataclasses.dataclass(frozen=True)
class Costs:
  """Seconds that each block spends on a whole scenario at one batch; NaN where there is no measurement."""

  prefill_s: np.ndarray  # [L, J]
  decode_s: np.ndarray  # [L, J], all output tokens
  fixed_prefill_s: float = 0.0  # what no block owns: embedding, head, sampling, the engine's own work
  fixed_decode_s: float = 0.0


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
    return _Parser(data).table()

  @classmethod
  def read(cls, path: str | Path) -> "Table":
    """From a JSON file."""
    try:
      return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as e:
      raise PuzzleError(f"table {path} cannot be read ({e.strerror}); name a {FORMAT} file") from e
    except ValueError as e:
      if isinstance(e, PuzzleError):
        raise
      raise PuzzleError(f"table {path} is not JSON ({e}); name a {FORMAT} file") from e

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
        row |= {name: _plain(getattr(self, name)[i, j]) for name in _COLUMNS}
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
    return {
      **self.extra,
      "format": FORMAT,
      "scenarios": {name: dataclasses.asdict(s) for name, s in self.scenarios.items()},
      "fixed": {
        "params": _plain(self.fixed_params),
        "param_bytes": _plain(self.fixed_param_bytes),
        "costs": fixed_costs,
      },
      "layers": layers,
    }

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
        left = ", ".join(str(v) for v, ok in zip(variants, self.allowed[i], strict=False) if ok)
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
      known = [v.block for v, ok in zip(self.layers[layer], self.allowed[layer], strict=False) if ok]
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

  def figures(self, choice: Sequence[int], scenario: str, batch: int) -> Figures:
    """What the child that takes variant `choice[l]` in each layer l costs, exactly."""
    blocks = (self.block_figures(i, j, scenario, batch) for i, j in enumerate(choice))
    parts = [self.fixed_figures(scenario, batch), *blocks]
    return Figures(**{f.name: sum(getattr(p, f.name) for p in parts) for f in dataclasses.fields(Figures)})

  def weights(self, quantity: str, scenario: str, batch: int) -> np.ndarray:
    """What each variant adds to one of `QUANTITIES`, [L, J] (rounded; `figures` is exact)."""
    costs = self.costs[scenario][batch]
    if quantity == "memory_bytes":
      return self.param_bytes + batch * self.scenarios[scenario].tokens * self.kv_bytes_per_token
    if quantity == "runtime_s":
      return costs.prefill_s + costs.decode_s
    return getattr(costs if hasattr(costs, quantity) else self, quantity)

  def total_score(self, choice: Sequence[int]) -> Fraction:
    """The estimate of a child: the sum of its blocks' scores, exactly."""
    return sum(map(exact, self.score[np.arange(self.num_layers), np.asarray(choice)]), Fraction(0))


_COLUMNS = ("score", "score_stderr", "params", "param_bytes", "kv_bytes_per_token")
_VARIANT_KEYS = ("attention", "ffn", "weights", "parent", "costs", *_COLUMNS)


def _plain(value: float) -> float | int:
  return int(value) if float(value).is_integer() else float(value)


class _Parser:
  """Checks a table's JSON while it fills the arrays; every error says where."""

  def __init__(self, data: Mapping[str, Any]):
    self.data = self._object(data, "table")
    if data.get("format") != FORMAT:
      raise PuzzleError(f"table: format {data.get('format')!r} is not {FORMAT!r}")

  @staticmethod
  def _object(value: Any, where: str, known: Sequence[str] = ()) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
      raise PuzzleError(f"{where}: expected an object, found {value!r}")
    for key in value:
      if known and key not in known:
        raise PuzzleError(f"{where}: unknown key {key!r}; known: {', '.join(known)}")
    return value

  @staticmethod
  def _number(value: Any, where: str, *, signed: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
      raise PuzzleError(f"{where} is {value!r}, not a number")
    number = float(value)
    if not math.isfinite(number) or (number < 0 and not signed):
      raise PuzzleError(f"{where} is {value!r}; it must be finite" + ("" if signed else " and not negative"))
    if number != value:
      raise PuzzleError(f"{where} is {value!r}: too large to be held exactly")
    return number

  def _costs(self, value: Any, where: str) -> dict[tuple[str, int], tuple[float, float]]:
    """(scenario, batch) -> (prefill_s, decode_s)."""
    costs = {}
    for scenario, batches in self._object(value, f"{where}: costs").items():
      if scenario not in self.data["scenarios"]:
        known = ", ".join(self.data["scenarios"])
        raise PuzzleError(f"{where}: costs of scenario {scenario!r}, which the table does not describe; it has {known}")
      for batch, seconds in self._object(batches, f"{where}: costs of {scenario}").items():
        if not (batch.isascii() and batch.isdigit() and int(batch) > 0):
          raise PuzzleError(f"{where}: batch {batch!r} of scenario {scenario} is no positive whole number")
        here = f"{where}: scenario {scenario}, batch {batch}"
        keys = ("prefill_s", "decode_s")
        self._object(seconds, here, keys)
        for key in keys:
          if key not in seconds:
            raise PuzzleError(f"{here}: {key} is missing")
        prefill, decode = (self._number(seconds[key], f"{here}: {key}") for key in keys)
        costs[scenario, int(batch)] = (prefill, decode)
    return costs

  def _scenarios(self) -> dict[str, Scenario]:
    scenarios = {}
    for name, value in self._object(self.data.get("scenarios"), "table: scenarios").items():
      where, keys = f"scenario {name}", ("input_tokens", "output_tokens")
      self._object(value, where, keys)
      tokens = [value.get(key) for key in keys]
      if not all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in tokens) or not any(tokens):
        raise PuzzleError(f"{where}: input_tokens and output_tokens are {tokens}; expected whole numbers, not both 0")
      scenarios[name] = Scenario(*tokens)
    if not scenarios:
      raise PuzzleError("table: no scenarios; describe at least one with its input_tokens and output_tokens")
    return scenarios

  def _layers(self) -> list[list[Mapping[str, Any]]]:
    layers = self.data.get("layers")
    if not isinstance(layers, list) or not layers:
      raise PuzzleError("table: no layers; expected a list of objects with `variants`")
    for i, layer in enumerate(layers):
      variants = self._object(layer, f"layer {i}", ("variants",)).get("variants")
      if not isinstance(variants, list) or not variants:
        raise PuzzleError(f"layer {i} has no variants; every layer needs at least the parent's own block")
    return [layer["variants"] for layer in layers]

  def _variant(self, value: Any, where: str) -> Variant:
    self._object(value, where, _VARIANT_KEYS)
    for slot in ("attention", "ffn"):
      name = value.get(slot)
      if not isinstance(name, str) or not name or "/" in name:
        raise PuzzleError(f"{where}: {slot} is {name!r}; expected a name such as gqa8, w14336, linear or none")
    if not isinstance(value.get("weights"), str | None) or not isinstance(value.get("parent", False), bool):
      raise PuzzleError(f"{where}: `weights` must be a name and `parent` true or false")
    return Variant(value["attention"], value["ffn"], value.get("weights"))

  def table(self) -> Table:
    scenarios, rows = self._scenarios(), self._layers()
    shape = (len(rows), max(map(len, rows)))
    columns = {name: np.full(shape, np.nan) for name in _COLUMNS}
    seconds: dict[tuple[str, int], np.ndarray] = {}  # [2, L, J]: prefill, decode
    layers, parent = [], []
    for i, layer_rows in enumerate(rows):
      variants: list[Variant] = []
      for j, row in enumerate(layer_rows):
        variant = self._variant(row, f"layer {i}, variant {j}")
        where = f"layer {i}, variant {j} {variant}"
        if variant in variants:
          raise PuzzleError(
            f"{where}: the same name as variant {variants.index(variant)}; tell them apart by `weights`"
          )
        variants.append(variant)
        if "score" not in row:
          raise PuzzleError(f"{where}: score is missing; leave the variant out if it has none")
        for name, column in columns.items():
          column[i, j] = self._number(row.get(name, 0), f"{where}: {name}", signed=name == "score")
        for key, pair in self._costs(row.get("costs", {}), where).items():
          seconds.setdefault(key, np.full((2, *shape), np.nan))[:, i, j] = pair
      layers.append(tuple(variants))
      parents = [j for j, row in enumerate(layer_rows) if row.get("parent")]
      if len(parents) != 1:
        found = ", ".join(str(variants[j]) for j in parents) or "none"
        raise PuzzleError(f"layer {i}: exactly one variant must have `parent: true`; {found} has")
      parent.append(parents[0])

    fixed = self._object(self.data.get("fixed", {}), "fixed", ("params", "param_bytes", "costs"))
    fixed_costs = self._costs(fixed.get("costs", {}), "fixed")
    costs: dict[str, dict[int, Costs]] = {name: {} for name in scenarios}
    for scenario, batch in sorted(seconds):
      if fixed_costs and (scenario, batch) not in fixed_costs:
        raise PuzzleError(f"fixed: no costs for scenario {scenario}, batch {batch}, which variants have; add them")
      both = seconds[scenario, batch]
      costs[scenario][batch] = Costs(both[0], both[1], *fixed_costs.get((scenario, batch), (0.0, 0.0)))
    allowed = ~np.isnan(columns["score"])
    for array in (allowed, *columns.values(), *seconds.values()):
      array.setflags(write=False)
    return Table(
      scenarios=scenarios,
      layers=tuple(layers),
      parent=tuple(parent),
      costs=costs,
      allowed=allowed,
      fixed_params=self._number(fixed.get("params", 0), "fixed: params"),
      fixed_param_bytes=self._number(fixed.get("param_bytes", 0), "fixed: param_bytes"),
      extra={k: v for k, v in self.data.items() if k not in ("format", "scenarios", "fixed", "layers")},
      **columns,
    )
