"""Batches of packed rows for training: seeded, endless, and resumable to the batch."""

from typing import Protocol, TypeVar

import grain
import numpy as np

from puzzle_jax.errors import PuzzleError

_Batch_co = TypeVar("_Batch_co", covariant=True)


class Rows(Protocol[_Batch_co]):
  """What batches can be made of, such as `PackedText`."""

  @property
  def num_rows(self) -> int: ...

  def rows(self, index: np.ndarray, /) -> _Batch_co:
    """Some of the rows."""


def batches(
  packed: Rows[_Batch_co], *, batch_size: int, seed: int, num_epochs: int | None = None
) -> grain.DatasetIterator[_Batch_co]:
  """An iterator over batches of rows [batch_size, T], each epoch in an order of its own.

  Its `get_state()` says where it is, as plain data; `set_state` of another iterator of the same arguments goes there.
  A batch may hold the end of one epoch and the start of the next; rows that fill no batch after the last are left out.

  Args:
    packed: the rows; they stay where they are.
    batch_size: B.
    seed: of the order.
    num_epochs: None for no end.

  Raises:
    PuzzleError: fewer rows than a batch.
  """
  if packed.num_rows < batch_size:
    raise PuzzleError(f"batch_size={batch_size} is more than the {packed.num_rows} rows there are; take a smaller one")
  order = grain.MapDataset.range(packed.num_rows).shuffle(seed).repeat(num_epochs)
  rows = order.batch(batch_size, drop_remainder=True).map(packed.rows)
  in_this_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # indexing is all there is to do
  return iter(rows.to_iter_dataset(in_this_thread))
