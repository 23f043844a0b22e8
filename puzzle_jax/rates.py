"""How fast a chip computes a stage: measured where records say so, else by its data sheet, and labelled as such.

Records are those of `experiments.benchmarks.bld`: FLOP/s of a whole step of blockwise distillation.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puzzle_jax.chips import Chip
from puzzle_jax.store import read_json

_SIDES = {"block": "jax", "attention": "jax_attention"}  # by `BLDConfig.attention_target`


@dataclasses.dataclass(frozen=True)
class Rate:
  """FLOP/s of one device.

  Attributes:
    flops_per_s: that count.
    basis: "measured": this step on this chip; "scaled": the chip's peak at the share of it that the measured step
      reaches; "roofline": the peak itself, which no program reaches, so that times are lower bounds.
    source: for people.
  """

  flops_per_s: float
  basis: str
  source: str


@dataclasses.dataclass(frozen=True)
class Measured:
  """A step of blockwise distillation on a chip.

  Attributes:
    name: of the record.
    flops_per_s: of the step, by need.
    flops_per_token: that the step needs.
    compiled_ratio: bytes of the compiled step over those of the arithmetic; None where the record does not say.
  """

  name: str
  flops_per_s: float
  flops_per_token: float
  compiled_ratio: float | None


def measured(folder: Path, chip: Chip, *, attention_target: str, flops_per_token: float) -> Measured | None:
  """The record on this chip whose step is nearest in size; None where there is none.

  Args:
    folder: of the records.
    chip: whose.
    attention_target: of the distillation.
    flops_per_token: that the step in question needs.
  """
  found = []
  for path in sorted(folder.glob("bld_*.json")):
    record: Mapping[str, Any] = read_json(path)
    side = record.get(_SIDES[attention_target])
    if side is None or not _is(side["hardware"], chip):
      continue
    ratio = side["compiled_bytes"] / side["planned_bytes"] if side.get("compiled_bytes") else None
    found.append(Measured(path.name, side["flops_per_s"], side["needed_flops_per_token"], ratio))
  if not found:
    return None

  def distance(m: Measured) -> float:
    return max(m.flops_per_token / flops_per_token, flops_per_token / m.flops_per_token)

  return min(found, key=distance)


def _is(hardware: str, chip: Chip) -> bool:
  """Whether `jax_timing.hardware` means this chip: "1 x NVIDIA H100 80GB HBM3", "4 x TPU v5"."""
  kind = hardware.partition(" x ")[2]
  return kind == chip.name if chip.tpu else chip.name in kind.split()


def of_library(chip: Chip, found: Measured | None, *, dtype: str) -> Rate:
  """Of the steps of blockwise distillation, whose products are of `dtype`."""
  if found is not None and dtype == "bfloat16":
    return Rate(found.flops_per_s, "measured", f"{found.flops_per_s / 1e12:.0f} TFLOP/s, {found.name}")
  return of_products(chip, found, "bfloat16" if dtype == "bfloat16" else "highest")


def of_products(chip: Chip, found: Measured | None, precision: str) -> Rate:
  """Of any other stage's products, at one of `chips.PRECISIONS`."""
  peak = chip.flops_per_s[precision]
  if found is None:
    return Rate(peak, "roofline", f"{peak / 1e12:.0f} TFLOP/s in {precision}")
  share = found.flops_per_s / chip.flops_per_s["bfloat16"]
  return Rate(share * peak, "scaled", f"{share:.0%} of {peak / 1e12:.0f} TFLOP/s in {precision}")
