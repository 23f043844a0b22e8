"""The block table's JSON form, `puzzle-block-table/1` (docs/search.md): its parts, and the parser. Imports no JAX."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from puzzle_jax.errors import PuzzleError
from puzzle_jax.json_input import costs_of, mapping, number

FORMAT = "puzzle-block-table/1"
COLUMNS = ("score", "score_stderr", "params", "param_bytes", "kv_bytes_per_token")
_VARIANT_KEYS = ("attention", "ffn", "weights", "parent", "costs", *COLUMNS)


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
  floor_prefill_s: float = 0.0  # what the engine's host takes whatever the blocks: no child takes less
  floor_decode_s: float = 0.0


class Parser:
  """Checks a table's JSON while it fills the arrays; every error says where."""

  def __init__(self, data: Mapping[str, Any]):
    self.data = mapping(data, "table")
    if data.get("format") != FORMAT:
      raise PuzzleError(f"table: format {data.get('format')!r} is not {FORMAT!r}")

  def _scenarios(self) -> dict[str, Scenario]:
    scenarios = {}
    for name, value in mapping(self.data.get("scenarios"), "table: scenarios").items():
      where, keys = f"scenario {name}", ("input_tokens", "output_tokens")
      mapping(value, where, keys)
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
      variants = mapping(layer, f"layer {i}", ("variants",)).get("variants")
      if not isinstance(variants, list) or not variants:
        raise PuzzleError(f"layer {i} has no variants; every layer needs at least the parent's own block")
    return [layer["variants"] for layer in layers]

  def _variant(self, value: Any, where: str) -> Variant:
    mapping(value, where, _VARIANT_KEYS)
    for slot in ("attention", "ffn"):
      name = value.get(slot)
      if not isinstance(name, str) or not name or "/" in name:
        raise PuzzleError(f"{where}: {slot} is {name!r}; expected a name such as gqa8, w14336, linear or none")
    if not isinstance(value.get("weights"), str | None) or not isinstance(value.get("parent", False), bool):
      raise PuzzleError(f"{where}: `weights` must be a name and `parent` true or false")
    return Variant(value["attention"], value["ffn"], value.get("weights"))

  def fields(self) -> dict[str, Any]:
    """The arguments of `table.Table`."""
    scenarios, rows = self._scenarios(), self._layers()
    shape = (len(rows), max(map(len, rows)))
    columns = {name: np.full(shape, np.nan) for name in COLUMNS}
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
          column[i, j] = number(row.get(name, 0), f"{where}: {name}", signed=name == "score")
        for key, pair in costs_of(row.get("costs", {}), where, scenarios).items():
          seconds.setdefault(key, np.full((2, *shape), np.nan))[:, i, j] = pair
      layers.append(tuple(variants))
      parents = [j for j, row in enumerate(layer_rows) if row.get("parent")]
      if len(parents) != 1:
        found = ", ".join(str(variants[j]) for j in parents) or "none"
        raise PuzzleError(f"layer {i}: exactly one variant must have `parent: true`; {found} has")
      parent.append(parents[0])

    fixed = mapping(self.data.get("fixed", {}), "fixed", ("params", "param_bytes", "costs"))
    fixed_costs = costs_of(fixed.get("costs", {}), "fixed", scenarios)
    floors = costs_of(self.data.get("floor", {}), "floor", scenarios)
    costs: dict[str, dict[int, Costs]] = {name: {} for name in scenarios}
    for scenario, batch in sorted(seconds):
      if fixed_costs and (scenario, batch) not in fixed_costs:
        raise PuzzleError(f"fixed: no costs for scenario {scenario}, batch {batch}, which variants have; add them")
      both = seconds[scenario, batch]
      once = (table.get((scenario, batch), (0.0, 0.0)) for table in (fixed_costs, floors))
      costs[scenario][batch] = Costs(both[0], both[1], *itertools.chain(*once))
    allowed = ~np.isnan(columns["score"])
    for array in (allowed, *columns.values(), *seconds.values()):
      array.setflags(write=False)
    return dict(
      scenarios=scenarios,
      layers=tuple(layers),
      parent=tuple(parent),
      costs=costs,
      allowed=allowed,
      fixed_params=number(fixed.get("params", 0), "fixed: params"),
      fixed_param_bytes=number(fixed.get("param_bytes", 0), "fixed: param_bytes"),
      extra={k: v for k, v in self.data.items() if k not in ("format", "scenarios", "fixed", "floor", "layers")},
      **columns,
    )
