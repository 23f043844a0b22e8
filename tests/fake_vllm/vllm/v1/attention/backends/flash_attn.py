"""What the plugin changes."""

from typing import Any


class FlashAttentionMetadataBuilder:
  def __init__(self, kv_cache_spec: Any, model_kv_heads: int):
    self.num_heads_kv = model_kv_heads
