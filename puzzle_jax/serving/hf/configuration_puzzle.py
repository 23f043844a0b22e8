"""Configuration of a Puzzle child in the nemotron-nas dialect, which several inference engines read.

This file travels with exported checkpoints and depends on Transformers alone. Engines read `block.attention.no_op`, ask
whether `ffn_mult` is there (vLLM), or take the blocks apart with `dataclasses.asdict` (TensorRT-LLM's engine builder).
"""

import dataclasses
from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig


@dataclasses.dataclass
class AttentionConfig:
  """A layer's attention; the fields after `replace_with_linear` are for kinds that a Puzzle child does not have."""

  n_heads_in_group: int | None = None  # query heads per KV head
  no_op: bool = False
  replace_with_linear: bool = False
  sparsify: Any = None
  window_length: int | None = None
  num_sink_tokens: int | None = None
  unshifted_sink: bool = False
  use_prefill_window_in_sink_attention: bool = False


@dataclasses.dataclass
class FFNConfig:
  """A layer's FFN; its width is `ffn_mult` · 2/3 · hidden size, rounded up to a multiple of 256."""

  ffn_mult: float | None = None
  no_op: bool = False
  replace_with_linear: bool = False
  sparsify: Any = None


@dataclasses.dataclass
class ExactFFNConfig:
  """An FFN of a width that is no multiple of 256: vLLM reads it where there is no `ffn_mult`."""

  intermediate_size: int
  no_op: bool = False
  replace_with_linear: bool = False
  sparsify: Any = None


@dataclasses.dataclass
class BlockConfig:
  """A layer."""

  attention: AttentionConfig
  ffn: FFNConfig | ExactFFNConfig


def _block(data: Any) -> BlockConfig:
  if isinstance(data, BlockConfig):
    return data
  ffn = ExactFFNConfig if "intermediate_size" in data["ffn"] else FFNConfig
  return BlockConfig(AttentionConfig(**data["attention"]), ffn(**data["ffn"]))


class PuzzleConfig(LlamaConfig):
  """Llama's configuration and `block_configs`, one entry a layer.

  `num_key_value_heads` and `intermediate_size` are the largest of any layer; what a layer has stands in its block.
  """

  model_type = "nemotron-nas"

  def __init__(self, block_configs: list[Any] | None = None, **kwargs: Any):
    self.block_configs = [_block(b) for b in block_configs or ()]
    super().__init__(**kwargs)

  def to_dict(self) -> dict[str, Any]:
    return super().to_dict() | {"block_configs": [dataclasses.asdict(b) for b in self.block_configs]}

  def num_kv_heads(self, layer: int) -> int:
    """KV heads of a layer with attention."""
    group = self.block_configs[layer].attention.n_heads_in_group
    assert group is not None, f"layer {layer} has no attention"
    return self.num_attention_heads // group

  def ffn_width(self, layer: int) -> int:
    """Channels of a layer with an FFN: `ffn_mult` is read as engines do, rounded up to a multiple of 256."""
    ffn = self.block_configs[layer].ffn
    if isinstance(ffn, ExactFFNConfig):
      return ffn.intermediate_size
    assert ffn.ffn_mult is not None, f"layer {layer} has no FFN"
    return -(-int(2 * ffn.ffn_mult * self.hidden_size / 3) // 256) * 256
