"""Text for distillation and scoring: documents, split, packed to rows, in batches (paper section 3 on data)."""

from puzzle_jax.data.documents import DocumentSource, load_documents
from puzzle_jax.data.loader import batches
from puzzle_jax.data.packing import Batch, PackedText, pack, target_mask

__all__ = ["Batch", "DocumentSource", "PackedText", "batches", "load_documents", "pack", "target_mask"]
