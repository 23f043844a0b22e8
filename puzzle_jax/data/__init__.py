"""Text for distillation and scoring: documents, split, packed to rows, in batches (paper section 3 on data)."""

from puzzle_jax.data.documents import DocumentSource, load_documents
from puzzle_jax.data.loader import Rows, batches
from puzzle_jax.data.packing import Batch, PackedText, pack, relaid, target_mask
from puzzle_jax.data.sets import MixedSet, pack_sets

__all__ = [
  "Batch",
  "DocumentSource",
  "MixedSet",
  "PackedText",
  "Rows",
  "batches",
  "load_documents",
  "pack",
  "pack_sets",
  "relaid",
  "target_mask",
]
