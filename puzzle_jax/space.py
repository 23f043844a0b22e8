"""The search space: which subblocks each layer may have (paper section 1). Imports no JAX.

A layer's variants are its attention subblocks times its FFN subblocks; the parent's own come first.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from puzzle_jax import arch
from puzzle_jax.arch import Architecture, BlockSpec, Subblock
from puzzle_jax.errors import PuzzleError
from puzzle_jax.serving.engines import Engine, by_name, objection


@dataclasses.dataclass(frozen=True)
class LayerSpace:
  """The variants of one layer; index 0 of each is the parent's own subblock."""

  attention: tuple[Subblock, ...]
  ffn: tuple[Subblock, ...]

  @property
  def parent(self) -> BlockSpec:
    return BlockSpec(self.attention[0], self.ffn[0])

  @property
  def variants(self) -> tuple[Subblock, ...]:
    """Every subblock that is not the parent's, attention first."""
    return self.attention[1:] + self.ffn[1:]

  @property
  def blocks(self) -> tuple[BlockSpec, ...]:
    """All pairs; the parent's block first."""
    return tuple(BlockSpec(a, f) for a, f in itertools.product(self.attention, self.ffn))

  @property
  def single_replacements(self) -> tuple[BlockSpec, ...]:
    """The parent's block with one subblock replaced."""
    return tuple(b for b in self.blocks if (b.attention == self.attention[0]) != (b.ffn == self.ffn[0]))


@dataclasses.dataclass(frozen=True)
class Space:
  """The space of a whole model."""

  layers: tuple[LayerSpace, ...]

  @property
  def log10_children(self) -> float:
    return sum(math.log10(len(layer.blocks)) for layer in self.layers)

  def to_json(self) -> list[dict[str, list[str]]]:
    return [{"attention": [s.name for s in x.attention], "ffn": [s.name for s in x.ffn]} for x in self.layers]

  def __str__(self) -> str:
    per_layer = sorted({len(layer.blocks) for layer in self.layers})
    blocks = "/".join(map(str, per_layer))
    return f"{blocks} blocks a layer, {len(self.layers)} layers: 10^{self.log10_children:.0f} children"


def _attention(parent: Subblock, names: Sequence[str]) -> list[Subblock]:
  variants: list[Subblock] = []
  for name in names:
    if name == "gqa":  # every proper divisor of the parent's KV heads, so that heads merge in equal groups
      if isinstance(parent, arch.GQA):
        variants += [arch.GQA(k) for k in range(parent.kv_heads - 1, 0, -1) if parent.kv_heads % k == 0]
      continue
    variant = arch.parse_subblock("attention", name)
    if isinstance(variant, arch.GQA) and isinstance(parent, arch.GQA) and parent.kv_heads % variant.kv_heads:
      raise PuzzleError(
        f"space.attention: {name} does not divide the parent's {parent.kv_heads} KV heads; use `gqa` for all divisors"
      )
    variants.append(variant)
  return variants


def _ffn(parent: Subblock, choices: Sequence[str | float], multiple: int) -> list[Subblock]:
  variants: list[Subblock] = []
  for choice in choices:
    if not isinstance(choice, str):
      if not 0 < choice <= 1:
        raise PuzzleError(f"space.ffn: ratio {choice} is not in (0, 1]")
      if isinstance(parent, arch.SwiGLU):
        width = min(max(round(choice * parent.width / multiple), 1) * multiple, parent.width)
        variants.append(arch.SwiGLU(width))
      continue
    variants.append(arch.parse_subblock("ffn", choice))
  return variants


def build(
  parent: Architecture,
  *,
  attention: Sequence[str],
  ffn: Sequence[str | float],
  ffn_multiple: int,
  layers: Mapping[str, Mapping[str, Any]] | None = None,
  engine: str = "",
) -> Space:
  """The space around a parent.

  Args:
    parent: its architecture; its own subblocks are always part of the space.
    attention: `gqa` (all proper divisors of the parent's KV heads), `gqaK`, `linear`, `none`.
    ffn: ratios of the parent's width, or names (`w1024`, `linear`, `none`).
    ffn_multiple: widths from ratios are rounded to a multiple of it.
    layers: overrides for single layers, by index as a string: {"0": {"attention": [], "ffn": [0.5]}}.
    engine: of `serving.engines.ENGINES`: subblocks that it runs in no block of the layer are left out.

  Raises:
    PuzzleError: a name or ratio that does not fit the parent, or a layer that does not exist.
  """
  overrides = dict(layers or {})
  spaces = []
  for i, block in enumerate(parent.blocks):
    override = overrides.pop(str(i), {})
    if unknown := set(override) - {"attention", "ffn"}:
      raise PuzzleError(f"space.layers[{i}]: unknown keys {sorted(unknown)}; known: attention, ffn")
    a = _attention(block.attention, override.get("attention", attention))
    f = _ffn(block.ffn, override.get("ffn", ffn), ffn_multiple)
    for variant in (*a, *f):
      variant.tensors(parent.config)  # checks that it fits the model
      own = block.ffn if variant.slot == "ffn" else block.attention
      if variant.num_params(parent.config) > own.num_params(parent.config):
        raise PuzzleError(f"space: {variant.name} is larger than the parent's {own.name} in layer {i}; remove it")
    whole = LayerSpace(_unique(block.attention, a), _unique(block.ffn, f))
    spaces.append(_that_runs(by_name(engine), i, whole) if engine else whole)
  if overrides:
    raise PuzzleError(f"space.layers: no layers {sorted(overrides)}; the parent has 0 to {parent.num_layers - 1}")
  return Space(tuple(spaces))


def _that_runs(engine: Engine, layer: int, space: LayerSpace) -> LayerSpace:
  """The subblocks with which the engine runs some block; the parent's stay whatever it runs."""
  able = {s for block in space.blocks if not objection(engine, layer, block.name) for s in block.subblocks}
  attention, ffn = (
    tuple(s for s in subblocks if s == subblocks[0] or s in able) for subblocks in (space.attention, space.ffn)
  )
  return LayerSpace(attention, ffn)


def _unique(parent: Subblock, variants: Sequence[Subblock]) -> tuple[Subblock, ...]:
  return tuple(dict.fromkeys([parent, *variants]))
