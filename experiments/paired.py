"""Two ways to make a child held against each other on the same text, row by row: which differences are real."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Difference:
  """In nats a token, with its 95 % interval."""

  mean: float
  low: float
  high: float

  @property
  def is_real(self) -> bool:
    """Whether the interval leaves 0 out."""
    return not self.low <= 0 <= self.high


class SeedNoise(NamedTuple):
  """How a child's mean differs from one seed to the next: variance, and its degrees of freedom (0: not known)."""

  variance: float
  freedom: int


def seed_noise(arms: Sequence[np.ndarray], tokens_R: np.ndarray) -> SeedNoise:
  """Pooled over all arms with several seeds.

  Args:
    arms: each the sums over rows of its children, [seeds, R].
    tokens_R: of each row.
  """
  means = [arm.sum(axis=1) / tokens_R.sum() for arm in arms if len(arm) > 1]
  squares = sum(float(np.sum((m - m.mean()) ** 2)) for m in means)
  freedom = sum(len(m) - 1 for m in means)
  return SeedNoise(squares / max(freedom, 1), freedom)


def difference(
  arm_SR: np.ndarray, against_SR: np.ndarray, tokens_R: np.ndarray, *, noise: SeedNoise | None = None
) -> Difference:
  """What an arm's children lose more than those that it is held against.

  A bootstrap draws rows again, the same for both, and on top of that moves each side's mean as another seed might: by
  Student's distribution, since that noise is known from few seeds. Where it is known from none, there is no interval.

  Args:
    arm_SR: sums over rows, by seed.
    against_SR: the same of the other; perhaps of other seeds.
    tokens_R: of each row.
    noise: of one child's mean from seed to seed; None: seeds do not matter.
  """
  rng = np.random.default_rng(0)
  change_R = arm_SR.mean(axis=0) - against_SR.mean(axis=0)
  mean, rows = float(change_R.sum() / tokens_R.sum()), len(tokens_R)
  if noise is not None and not noise.freedom:
    return Difference(mean, -np.inf, np.inf)
  drawn_SR = rng.multinomial(rows, np.full(rows, 1 / rows), size=_RESAMPLES)
  means = drawn_SR @ change_R / (drawn_SR @ tokens_R)
  if noise is not None:
    scale = np.sqrt(noise.variance * (1 / len(arm_SR) + 1 / len(against_SR)))
    means += scale * rng.standard_t(noise.freedom, size=_RESAMPLES)
  low, high = np.quantile(means, [0.025, 0.975])
  return Difference(mean, float(low), float(high))
