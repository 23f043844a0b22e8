"""The limits that a child must meet, and what each bounds (paper section 5). Imports no JAX.

Every limit is linear in the choice of blocks: it bounds a sum over the blocks from above. A throughput of at least T
is a run time of at most batch·tokens / T; a speedup of at least s is a run time of at most the parent's / s. Where a
phase has a floor, a run time is max(prefill, floor) + max(decode, floor): as linear as that, in a bound for each phase.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

from puzzle_jax.errors import PuzzleError
from puzzle_jax.search.decimals import exact, rounded
from puzzle_jax.search.table import Figures, Scenario, Table

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What a child must meet in each scenario; None: no such limit. Speedups and ratios compare with the parent."""

  max_memory_bytes: float | None = None  # weights, and KV cache of the whole batch at full length
  max_runtime_s: float | None = None  # prefill and decode of the whole batch
  min_throughput: float | None = None  # input + output tokens/s
  max_first_token_s: float | None = None  # prefill of the whole batch
  max_token_s: float | None = None  # decode of the whole batch, per output token
  max_params: float | None = None
  max_kv_bytes_per_token: float | None = None  # of all layers
  min_speedup: float | None = None  # throughput over the parent's at the same batch and scenario
  min_decode_speedup: float | None = None  # the parent's decode time over the child's
  max_memory_ratio: float | None = None
  max_params_ratio: float | None = None
  max_kv_ratio: float | None = None  # of max_kv_bytes_per_token
  max_first_token_ratio: float | None = None  # of max_first_token_s

  def tightened(self, margin: float) -> "Limits":
    """The same with every limit on time bettered by a share."""
    faster = dict.fromkeys(("min_throughput", "min_speedup", "min_decode_speedup"), 1 + margin)
    sooner = ("max_runtime_s", "max_first_token_s", "max_token_s", "max_first_token_ratio")
    factors = faster | dict.fromkeys(sooner, 1 / (1 + margin))
    changed = {name: getattr(self, name) * by for name, by in factors.items() if getattr(self, name) is not None}
    return dataclasses.replace(self, **changed)

  def __post_init__(self) -> None:
    for name, value in self.items():
      number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
      if not number or value < 0 or (value == 0 and name.startswith("min")):
        least = "at least 0" if name.startswith("max") else "above 0"
        raise PuzzleError(f"limit {name}={value!r} must be a finite number {least}; leave it out for no limit")

  def items(self) -> Iterator[tuple[str, float]]:
    """The limits that are set, by name."""
    return ((f.name, v) for f in dataclasses.fields(self) if (v := getattr(self, f.name)) is not None)


# Of each limit: the quantity of `Figures` that it bounds, and the unit of which a max_ limit is quantity / unit and a
# min_ limit unit / quantity. The unit depends on the scenario, the batch and the parent's figures.
_BOUNDED: dict[str, tuple[str, Callable[[Scenario, int, Figures], Fraction | int]]] = {
  "max_memory_bytes": ("memory_bytes", lambda s, b, p: 1),
  "max_runtime_s": ("runtime_s", lambda s, b, p: 1),
  "min_throughput": ("runtime_s", lambda s, b, p: b * s.tokens),
  "max_first_token_s": ("prefill_s", lambda s, b, p: 1),
  "max_token_s": ("decode_s", lambda s, b, p: s.output_tokens),
  "max_params": ("params", lambda s, b, p: 1),
  "max_kv_bytes_per_token": ("kv_bytes_per_token", lambda s, b, p: 1),
  "min_speedup": ("runtime_s", lambda s, b, p: p.runtime_s),
  "min_decode_speedup": ("decode_s", lambda s, b, p: p.decode_s),
  "max_memory_ratio": ("memory_bytes", lambda s, b, p: p.memory_bytes),
  "max_params_ratio": ("params", lambda s, b, p: p.params),
  "max_kv_ratio": ("kv_bytes_per_token", lambda s, b, p: p.kv_bytes_per_token),
  "max_first_token_ratio": ("prefill_s", lambda s, b, p: p.prefill_s),
}
_SAME_EVERYWHERE = ("params", "kv_bytes_per_token")  # quantities that do not depend on the scenario


@dataclasses.dataclass(frozen=True)
class Bound:
  """One limit in one scenario at one batch: a child's `quantity` may be at most `most`.

  Attributes:
    limit, scenario: which.
    quantity: of `Figures`, as the blocks add up to it.
    unit: of the limit (`_BOUNDED`).
    most: exactly.
    floor: that the quantity is not below whatever the blocks.
    beside: what the limit counts besides: the floor of the other phase.
  """

  limit: str
  scenario: str
  quantity: str
  unit: Fraction
  most: Fraction
  floor: Fraction = Fraction(0)
  beside: Fraction = Fraction(0)

  @property
  def is_max(self) -> bool:
    return self.limit.startswith("max")

  @property
  def rounding(self) -> float:
    """Relative error of `Table.weights`, which adds two numbers for some quantities."""
    return 2.0**-51 if self.quantity in ("runtime_s", "memory_bytes") else 0.0

  def value(self, amount: Fraction) -> Fraction:
    """An amount of the quantity in the limit's own unit."""
    whole = amount + self.beside
    top, bottom = (whole, self.unit) if self.is_max else (self.unit, whole)
    return top / bottom if bottom else Fraction(0)

  def say(self, amount: Fraction) -> str:
    """The limit as if it were set to `amount`, rounded to the side that `amount` meets."""
    value = rounded(self.value(amount), up=self.is_max, digits=9)
    if self.limit == "max_memory_bytes":
      value = math.ceil(self.value(amount))
      return f"{self.limit}={value} ({rounded(Fraction(value, GIB), up=True, digits=6)} GiB)"
    return f"{self.limit}={value}"


def bounds(table: Table, limits: Limits, *, scenarios: Sequence[str], batch: int) -> tuple[Bound, ...]:
  """What the limits allow in each of the scenarios at a batch."""
  found = []
  for scenario in scenarios:
    parent, floor = table.figures(table.parent, scenario, batch), table.floor(scenario, batch)
    floors = floor | {"runtime_s": sum(floor.values(), Fraction(0))}
    for limit, value in limits.items():
      quantity, unit_of = _BOUNDED[limit]
      if quantity in _SAME_EVERYWHERE and scenario != scenarios[0]:
        continue
      unit = Fraction(unit_of(table.scenarios[scenario], batch, parent))
      most = exact(value) * unit if limit.startswith("max") else unit / exact(value)
      found.append(Bound(limit, scenario, quantity, unit, most, floors.get(quantity, Fraction(0))))
      if quantity == "runtime_s":
        for phase, own in floor.items():
          if other := floors["runtime_s"] - own:
            found.append(Bound(limit, scenario, phase, unit, most - other, own, other))
  return tuple(found)
