"""Documents to rows of fixed length, with the boundaries that attention must respect.

The convention: a document is what the parent's tokenizer makes of it (BOS included where the parent has one) and ends
with EOS. Documents are laid end to end and cut into rows; a document that is cut goes on in the next row as a segment
of its own. So rows are full and no token attends across a row or a document. Positions start at 0 in each segment.
"""

from collections.abc import Sequence
from typing import NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.errors import PuzzleError
from puzzle_jax.tokenizer import Tokenizer

_CHUNK = 256  # documents that are tokenised together


class PackedText(NamedTuple):
  """Rows of tokens: a whole set or a batch of it, a pytree either way.

  Attributes:
    tokens: int32 [B, T].
    segment_ids: int32 [B, T]; 1, 2, … by document within the row, 0 for padding.
    positions: int32 [B, T]; from 0 in each segment.
  """

  tokens: np.ndarray
  segment_ids: np.ndarray
  positions: np.ndarray

  @property
  def num_rows(self) -> int:
    return self.tokens.shape[0]

  @property
  def num_tokens(self) -> int:
    """Tokens without padding."""
    return int(np.count_nonzero(self.segment_ids))

  def rows(self, index: np.ndarray | slice) -> "PackedText":
    """Some of the rows."""
    return PackedText(*(array[index] for array in self))


Batch = PackedText  # a name for some rows of a set


def target_mask(segment_ids: jax.Array | np.ndarray) -> jax.Array:
  """Where the next token is a target: bool [B, T], True at t if t + 1 is in the same segment.

  Args:
    segment_ids: int32 [B, T].
  """
  here, after = segment_ids[:, :-1], segment_ids[:, 1:]
  return jnp.pad((here == after) & (here > 0), [(0, 0), (0, 1)])


def pack(
  documents: Sequence[str],
  tokenizer: Tokenizer,
  *,
  seq_len: int,
  max_tokens: int | None = None,
  fewer: bool = False,
  seed: int = 0,
) -> PackedText:
  """Tokenises documents in a random order and packs them.

  Args:
    documents: texts, read only as far as they are needed.
    tokenizer: the parent's.
    seq_len: T, tokens a row.
    max_tokens: size of the result, rounded down to whole rows, all of them full. None: everything, the last row padded.
    fewer: take the whole rows that there are, perhaps none, where the documents hold fewer than `max_tokens`.
    seed: of the order of the documents.

  Raises:
    PuzzleError: the documents hold fewer than `max_tokens` tokens, or `max_tokens` is less than a row.
  """
  if seq_len < 2:
    raise PuzzleError(f"seq_len={seq_len} must be at least 2: a token and its target")
  if max_tokens is not None and max_tokens < seq_len:
    raise PuzzleError(f"max_tokens={max_tokens} is less than one row of seq_len={seq_len}; ask for more tokens")
  wanted = None if max_tokens is None else max_tokens // seq_len * seq_len
  ids = [np.zeros(0, np.int32)]
  total = 0
  order = grain.MapDataset.range(len(documents)).shuffle(seed)
  for start in range(0, len(documents), _CHUNK):
    texts = [documents[order[i]] for i in range(start, min(start + _CHUNK, len(documents)))]
    for document in tokenizer.encode_batch(texts):
      if document[-1:] != [tokenizer.eos_id]:
        document.append(tokenizer.eos_id)
      ids.append(np.array(document, np.int32))
      total += len(document)
    if wanted is not None and total >= wanted:
      break
  if wanted is not None and total < wanted:
    if fewer:
      return _lay_out(ids, seq_len, total // seq_len * seq_len, pad_id=tokenizer.eos_id)
    raise PuzzleError(
      f"{wanted:,} tokens are asked for and the {len(documents):,} documents hold {total:,}; ask for fewer "
      "(data.train_tokens + data.gkd_tokens, held out: data.heldout_tokens + data.eval_tokens) or name more text"
    )
  if not total:
    raise PuzzleError("there are no documents to pack; name a source that holds some")
  return _lay_out(ids, seq_len, total if wanted is None else wanted, pad_id=tokenizer.eos_id)


def relaid(packed: PackedText, *, seq_len: int, eos_id: int) -> PackedText:
  """The same tokens, in the same order, as rows of another length; what fills no row is left out.

  Args:
    packed: full rows of one source, as `pack` makes them.
    seq_len: T of the result.
    eos_id: ends documents: behind it a row begins with a new one, else it goes on with that of the row before.
  """
  stream, starts = packed.tokens.reshape(-1), packed.positions.reshape(-1) == 0
  rows = np.arange(packed.tokens.shape[1], len(stream), packed.tokens.shape[1])
  starts[rows] = stream[rows - 1] == eos_id
  documents = np.split(stream, np.flatnonzero(starts)[1:])
  return _lay_out(documents, seq_len, len(stream) // seq_len * seq_len, pad_id=eos_id)


def _lay_out(documents: Sequence[np.ndarray], seq_len: int, num_tokens: int, *, pad_id: int) -> PackedText:
  """The first `num_tokens` tokens of the documents as rows."""
  num_rows = -(-num_tokens // seq_len)
  tokens = np.full(num_rows * seq_len, pad_id, np.int32)
  tokens[:num_tokens] = np.concatenate(documents)[:num_tokens]
  starts = np.zeros((num_rows, seq_len), bool)
  starts[:, 0] = True
  ends = np.cumsum([len(d) for d in documents])
  starts.reshape(-1)[ends[ends < num_tokens]] = True
  column = np.arange(seq_len, dtype=np.int32)
  segment_ids = np.cumsum(starts, axis=1, dtype=np.int32)
  positions = column - np.maximum.accumulate(np.where(starts, column, 0), axis=1)
  for array in (segment_ids, positions):
    array.reshape(-1)[num_tokens:] = 0
  return PackedText(tokens.reshape(num_rows, seq_len), segment_ids, positions.astype(np.int32))
