"""What engines share in measuring subblocks by difference between whole models: the models, and what follows of them.

Timed are models as deep as asked for whose layers, but for the first and the last, are one variant beside the parent's
other subblock (engines want attention in the first layer, some an FFN in the last), one whose inner layers are empty,
and one of half the depth. Where the host's work of a step hides what a fast model saves (`beside_base`), every variant
comes between two of the parent's own layers instead, and the shallower model has two thirds of the layers: none is
faster than that.
Imports no JAX.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from puzzle_jax import checkpoint
from puzzle_jax.arch import Architecture, BlockSpec, NoAttention, NoFFN, Subblock, SwiGLU, Tensor
from puzzle_jax.costs import Seconds
from puzzle_jax.costs.differences import fit
from puzzle_jax.errors import PuzzleError
from puzzle_jax.serving import engines
from puzzle_jax.space import Space
from puzzle_jax.tokenizer import Tokenizer

PHASES = ("prefill_s", "decode_s")
HOST_SHARE = 0.7  # a model that takes less than 1 / 0.7 of what an all but empty one takes waits for the host


def share(least: float, whole: float) -> float:
  """How much of `whole` seconds are `least`; all, where there are none."""
  return least / whole if whole else 1.0


def subblocks_of(space: Space) -> list[Subblock]:
  """All of a space, by name."""
  return sorted({s for layer in space.layers for s in (*layer.attention, *layer.ffn)}, key=lambda s: s.id)


def timed_models(
  parent: Architecture, subblocks: Collection[Subblock], *, layers: int, engine: str, beside_base: bool = False
) -> dict[str, Architecture]:
  """What is timed, the parent's own block first, the same in a shallower model second, an all but empty model third.

  Raises:
    PuzzleError: the engine does not run a subblock.
  """
  base = max(set(parent.blocks), key=lambda b: (parent.blocks.count(b), b.name))
  shallow = layers - layers // 3 if beside_base else layers // 2
  found = {f"{base.name} x {depth}": dataclasses.replace(parent, blocks=(base,) * depth) for depth in (layers, shallow)}
  # Where a child may lack its FFN, what an attention takes alone must be known, not its sum with an FFN's.
  alone = [NoAttention()] if any(isinstance(s, NoFFN) for s in subblocks) else []
  ordered = sorted({*subblocks, *alone}, key=lambda s: s.id)
  specs = [dataclasses.replace(base, **{s.slot: s}) for s in ordered if not isinstance(s, NoFFN)]
  nothing = BlockSpec(NoAttention(), NoFFN())
  for spec in (nothing, *(spec for spec in specs if spec != base)):
    mixed = beside_base and spec != nothing
    blocks = (base, spec, base) * (layers // 3) if mixed else (base, *[spec] * (layers - 2), base)
    if refused := engines.rejections(engines.by_name(engine), [b.name for b in blocks]):
      raise PuzzleError(f"{'; '.join(refused)}; take a space that it runs: --config.space.engine={engine}")
    found[f"{spec.name} x {blocks.count(spec)}"] = dataclasses.replace(parent, blocks=blocks)
  return found


def spread_widths(subblocks: Collection[Subblock], parent: Architecture, number: int) -> list[Subblock]:
  """The subblocks with so many FFN widths of theirs (0: all): the parent's, the ends, and even steps between."""
  own = {b.ffn for b in parent.blocks}
  widths = sorted({s.width for s in subblocks if isinstance(s, SwiGLU)})
  if number and len(widths) > number:
    steps = np.linspace(widths[0], widths[-1], max(number, 2))
    widths = sorted({min(widths, key=lambda w: abs(w - step)) for step in steps})
  return [s for s in subblocks if not isinstance(s, SwiGLU) or s.width in widths or s in own]


def write_random(folder: Path, architecture: Architecture, tokenizer: Tokenizer) -> None:
  """A child's directory of random weights; equal subblocks have equal ones."""
  rng, drawn = np.random.default_rng(0), dict[Subblock, dict[str, np.ndarray]]()

  def arrays(shapes: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: rng.standard_normal(t.shape, np.float32) * np.float32(0.02) for name, t in shapes.items()}

  for block in architecture.blocks:
    for s in block.subblocks:
      if s not in drawn:
        drawn[s] = arrays(s.tensors(architecture.config))
  layers = ({s.slot: drawn[s] for s in block.subblocks} for block in architecture.blocks)
  checkpoint.write_checkpoint(folder, architecture, arrays(architecture.head_tensors()), layers, tokenizer=tokenizer)


@dataclasses.dataclass(frozen=True)
class Differences:
  """What one scenario at one batch costs.

  Attributes:
    subblocks: by id.
    fixed: of no subblock.
    residuals: by model and phase, how far the sum is above what was measured, relatively.
    interpolation: of each FFN width between two measured ones by phase, how far a line between its neighbours is above
      it, relatively: what leaving it out would have cost.
  """

  subblocks: dict[str, Seconds]
  fixed: Seconds
  residuals: dict[str, Seconds]
  interpolation: dict[str, Seconds]


def differences(
  models: Mapping[str, Architecture], seconds: Mapping[str, Mapping[str, float]], subblocks: Collection[Subblock]
) -> Differences:
  """Splits seconds of whole models, by model and phase, over subblocks; FFNs of other widths are interpolated."""
  fits = {
    phase: fit([a.blocks for a in models.values()], [seconds[name][phase] for name in models]) for phase in PHASES
  }
  timed = {s for a in models.values() for b in a.blocks for s in b.subblocks}
  widths = sorted((s for s in timed if isinstance(s, SwiGLU)), key=lambda s: s.width)

  def cost(s: Subblock, phase: str, known: Sequence[SwiGLU]) -> float:
    if s in known or not isinstance(s, SwiGLU):
      return fits[phase].of(s)
    return float(np.interp(s.width, [w.width for w in known], [fits[phase].of(w) for w in known]))

  def left_out(s: SwiGLU, phase: str) -> float:
    own = fits[phase].of(s)
    return cost(s, phase, [w for w in widths if w != s]) / own - 1 if own else math.inf

  return Differences(
    subblocks={s.id: {phase: cost(s, phase, widths) for phase in PHASES} for s in subblocks},
    fixed={phase: fits[phase].fixed for phase in PHASES},
    residuals={name: {phase: fits[phase].residuals[i] for phase in PHASES} for i, name in enumerate(models)},
    interpolation={s.id: {p: e for p in PHASES if (e := left_out(s, p)) < math.inf} for s in widths[1:-1]},
  )


def cost_tables(
  found: Mapping[str, Mapping[str, Differences]],
) -> tuple[dict[str, dict[str, dict[str, Seconds]]], dict[str, dict[str, Seconds]]]:
  """`CostTable.subblocks` and `.fixed` of what was found by scenario and batch."""
  subblocks: dict[str, Any] = {}
  for scenario, batches in found.items():
    for batch, parts in batches.items():
      for name, seconds in parts.subblocks.items():
        subblocks.setdefault(name, {}).setdefault(scenario, {})[batch] = seconds
  return subblocks, {s: {batch: parts.fixed for batch, parts in b.items()} for s, b in found.items()}
