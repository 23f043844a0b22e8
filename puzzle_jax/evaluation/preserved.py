"""What a child preserves of its parent's accuracy on tasks (paper section 7: 98.4 %), and how sure that is."""

import dataclasses
from collections.abc import Sequence

import numpy as np

_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Preserved:
  """Accuracies, 0 to 1, and the child's over the parent's.

  Attributes:
    parent, child: mean over tasks of the share of right answers.
    ratio: child over parent; None where the parent's is 0.
    low, high: its 95 % interval; None where a resample of the parent's is 0.
  """

  parent: float
  child: float
  ratio: float | None
  low: float | None
  high: float | None


def preserved(tasks: Sequence[tuple[np.ndarray, np.ndarray]], *, seed: int = 0) -> Preserved:
  """Compares parent and child on the same items.

  The interval is a bootstrap's over items, in pairs and within each task: drawing items again with replacement is
  drawing from the four outcomes that a pair of answers can have. Tasks count alike.

  Args:
    tasks: the parent's and the child's answers of each task, True where right.
    seed: of the bootstrap.
  """
  rng = np.random.default_rng(seed)
  means, resampled = np.zeros(2), np.zeros((2, _RESAMPLES))
  for parent, child in tasks:
    items = len(parent)
    outcomes = np.bincount(2 * parent.astype(int) + child.astype(int), minlength=4)
    drawn_S4 = rng.multinomial(items, outcomes / items, size=_RESAMPLES)
    for model, right in enumerate(((2, 3), (1, 3))):
      means[model] += outcomes[list(right)].sum() / items / len(tasks)
      resampled[model] += drawn_S4[:, right].sum(axis=1) / items / len(tasks)
  ratio = float(means[1] / means[0]) if means[0] else None
  low, high = np.quantile(resampled[1] / resampled[0], [0.025, 0.975]) if resampled[0].all() else (None, None)
  return Preserved(
    float(means[0]), float(means[1]), ratio, None if low is None else float(low), None if high is None else float(high)
  )
