"""The packed sets of a run, each a mix of sources at given shares of its rows.

A set's rows stand source by source, so that a source's own can be found again; only the set that blocks are distilled
on, which is read in order, is shuffled.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from puzzle_jax.data.documents import DocumentSource
from puzzle_jax.data.packing import PackedText, pack
from puzzle_jax.errors import PuzzleError
from puzzle_jax.tokenizer import Tokenizer


def rows_by_share(rows: int, shares: Sequence[float]) -> list[int]:
  """`rows` divided by shares (any positive numbers); what is left goes to the largest remainders."""
  exact = np.asarray(shares, np.float64) / np.sum(shares) * rows
  counts = np.floor(exact + 1e-9).astype(int)
  largest = np.argsort(counts - exact, kind="stable")[: rows - counts.sum()]
  counts[largest] += 1
  return counts.tolist()


@dataclasses.dataclass(frozen=True)
class MixedSet:
  """Rows of all sources, and how many are of each."""

  packed: PackedText
  rows_by_source: list[int]


def pack_sets(
  sources: Iterable[tuple[int, DocumentSource]],
  shares: Mapping[str, Sequence[float]],
  amounts: Mapping[str, Mapping[str, int]],
  tokenizer: Tokenizer,
  *,
  seq_len: int,
  seed: int,
  shuffled: Sequence[str] = (),
) -> dict[str, MixedSet]:
  """Packs the sets of a run.

  Args:
    sources: numbers and documents; each is packed before the next is asked for, so that one that takes long to make can
      come last, and is not made where another holds too little.
    shares: of each source, by its number, in the sets of a part.
    amounts: tokens of each set by the part of the documents that it is taken from, `train` or `heldout`. Sets of one
      part share no rows.
    tokenizer: the parent's.
    seq_len: tokens a row.
    seed: of the order of the documents.
    shuffled: sets whose rows are shuffled where they have several sources.

  Raises:
    PuzzleError: a source holds too little.
  """
  counts = {
    part: {name: rows_by_share(n // seq_len, shares[part]) for name, n in tokens.items()}
    for part, tokens in amounts.items()
  }
  asked = {name: rows for count in counts.values() for name, rows in count.items()}
  pieces: dict[str, dict[int, PackedText]] = {name: {} for name in asked}
  for i, source in sources:
    for part, count in counts.items():
      if not (total := sum(rows[i] for rows in count.values())):
        continue
      try:
        packed = pack(getattr(source, part), tokenizer, seq_len=seq_len, max_tokens=total * seq_len, seed=seed)
      except PuzzleError as e:
        raise PuzzleError(f"{part} part of {source.name!r}: {e}") from e
      start = 0
      for name, rows in count.items():
        pieces[name][i] = packed.rows(slice(start, start + rows[i]))
        start += rows[i]
  made = {}
  for name, rows_by_source in asked.items():
    parts = [piece for _, piece in sorted(pieces[name].items())]
    packed = PackedText(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    if name in shuffled and len(rows_by_source) > 1:
      packed = packed.rows(np.random.default_rng(seed).permutation(packed.num_rows))
    made[name] = MixedSet(packed, rows_by_source)
  return made
