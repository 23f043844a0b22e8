"""What each subblock costs by difference: one least-squares fit over the seconds of whole models (imports no JAX)."""

import dataclasses
import statistics
from collections.abc import Sequence

import numpy as np
import scipy.optimize

from puzzle_jax.arch import BlockSpec, NoAttention, NoFFN, Subblock


def quiet_mean(seconds: Sequence[float]) -> float:
  """The mean of the faster half: what a machine with other work does when it is left alone."""
  return statistics.fmean(sorted(seconds)[: (len(seconds) + 1) // 2])


@dataclasses.dataclass(frozen=True)
class Fit:
  """Seconds as fixed + Σ over subblocks.

  Attributes:
    fixed: of no subblock.
    subblocks: of each, but no-ops.
    residuals: of each model, how far the sum is above what was measured, relatively.
  """

  fixed: float
  subblocks: dict[Subblock, float]
  residuals: tuple[float, ...]

  def of(self, subblock: Subblock) -> float:
    return self.subblocks.get(subblock, 0.0)


def fit(models: Sequence[Sequence[BlockSpec]], seconds: Sequence[float]) -> Fit:
  """The non-negative parts that explain the seconds of models, given by their layers, by least squares.

  Of seconds, not of shares: where they do not quite add up, what is as large as a child shall come out right.
  """
  counts = [[s for block in blocks for s in block.subblocks] for blocks in models]
  parts = sorted({s for c in counts for s in c if not isinstance(s, (NoAttention, NoFFN))}, key=lambda s: s.id)
  matrix = np.array([[1, *(c.count(s) for s in parts)] for c in counts], float)
  found, _ = scipy.optimize.nnls(matrix, np.array(seconds))
  measured = np.array(seconds)
  residuals = np.divide(matrix @ found - measured, measured, out=np.zeros(len(measured)), where=measured != 0).tolist()
  return Fit(float(found[0]), dict(zip(parts, found[1:].tolist(), strict=True)), tuple(residuals))
