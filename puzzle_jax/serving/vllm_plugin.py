"""A plugin for vLLM, which finds it by its entry point: KV heads that differ by layer on Hopper GPUs. Needs vLLM alone.

FlashAttention 3 is given a schedule for all layers of one KV-cache kind, which vLLM (0.25.1) makes for the KV heads of
the model's first attention. With fewer of them a later layer would attend to a part of the prompt only. Here the
schedule is made for the layers' own.
"""

from typing import Any


def register() -> None:
  """Called by vLLM in each of its processes; once more does no harm."""
  from vllm.v1.attention.backends import flash_attn  # type: ignore[import-not-found, unused-ignore]

  builder = flash_attn.FlashAttentionMetadataBuilder
  first = builder.__init__
  if getattr(first, "of_the_layers_own", False):
    return

  def init(self: Any, kv_cache_spec: Any, *args: Any, **options: Any) -> None:
    first(self, kv_cache_spec, *args, **options)
    self.num_heads_kv = kv_cache_spec.num_kv_heads

  init.of_the_layers_own = True  # type: ignore[attr-defined]
  builder.__init__ = init
