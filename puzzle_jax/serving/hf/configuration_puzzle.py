"""Configuration of a Puzzle child in the nemotron-nas dialect, which several inference engines read.

This file travels with exported checkpoints and depends on Transformers alone.
"""

from types import SimpleNamespace
from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig


def _block(data: Any) -> Any:
  """Dicts become objects, since engines read `block.attention.no_op`; keys that are absent stay absent."""
  return SimpleNamespace(**{k: _block(v) for k, v in data.items()}) if isinstance(data, dict) else data


def _plain(block: Any) -> Any:
  """Inverse of `_block`."""
  return {k: _plain(v) for k, v in vars(block).items()} if isinstance(block, SimpleNamespace) else block


class PuzzleConfig(LlamaConfig):
  """Llama's configuration and `block_configs`, one entry a layer.

  `num_key_value_heads` and `intermediate_size` are the largest of any layer; what a layer has stands in its block.
  """

  model_type = "nemotron-nas"

  def __init__(self, block_configs: list[Any] | None = None, **kwargs: Any):
    self.block_configs = [_block(b) for b in block_configs or ()]
    super().__init__(**kwargs)

  def to_dict(self) -> dict[str, Any]:
    return super().to_dict() | {"block_configs": [_plain(b) for b in self.block_configs]}

  def num_kv_heads(self, layer: int) -> int:
    """KV heads of a layer with attention."""
    return self.num_attention_heads // self.block_configs[layer].attention.n_heads_in_group

  def ffn_width(self, layer: int) -> int:
    """Channels of a layer with an FFN: `ffn_mult` is read as engines do, rounded up to a multiple of 256."""
    ffn = self.block_configs[layer].ffn
    if getattr(ffn, "intermediate_size", None) is not None:
      return ffn.intermediate_size
    return -(-int(2 * ffn.ffn_mult * self.hidden_size / 3) // 256) * 256
