"""A Puzzle child for Transformers: Llama with another attention and FFN subblock in every layer.

This file travels with exported checkpoints and depends on PyTorch and Transformers alone. A subblock is a part of
Llama, one matrix, or nothing:

    x = x + attention(norm(x));  x = x + ffn(norm(x))

Matrices of the layers may be of 8-bit floats, in the layout of NVIDIA's ModelOpt, which Transformers itself does not
read.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
  LlamaAttention,
  LlamaForCausalLM,
  LlamaMLP,
  LlamaModel,
  LlamaPreTrainedModel,
  LlamaRMSNorm,
  LlamaRotaryEmbedding,
)

from .configuration_puzzle import PuzzleConfig

_FP8, _FP8_MAX = torch.float8_e4m3fn, 448.0


class FP8Linear(nn.Module):
  """A matrix of 8-bit floats times inputs that are rounded to 8 bits, computed exactly, as engines do.

  Weights have one scale, and inputs a fixed one; or each output channel and each token have their own.
  """

  def __init__(self, linear: nn.Linear, *, per_channel: bool):
    super().__init__()
    self.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=_FP8), requires_grad=False)
    shape = (linear.out_features,) if per_channel else ()
    self.weight_scale = nn.Parameter(torch.ones(shape, dtype=torch.float32), requires_grad=False)
    self.input_scale = None
    if not per_channel:
      self.input_scale = nn.Parameter(torch.ones((), dtype=torch.float32), requires_grad=False)
    self.bias = linear.bias

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    if self.input_scale is None:
      scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / _FP8_MAX
    else:
      scale = self.input_scale
    rounded = (x.float() / scale).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8).to(x.dtype)
    y = nn.functional.linear(rounded, self.weight.to(x.dtype)).float() * scale * self.weight_scale
    return y.to(x.dtype) if self.bias is None else y.to(x.dtype) + self.bias


def _quantise(layer: nn.Module, config: PuzzleConfig) -> None:
  """Puts 8-bit matrices in place of a layer's, where the configuration says that the checkpoint has them."""
  quantisation = getattr(config, "quantization_config", None)
  if not isinstance(quantisation, dict) or quantisation.get("quant_method") != "modelopt":
    return
  algorithms = {"FP8": False, "FP8_PER_CHANNEL_PER_TOKEN": True}
  if quantisation["quant_algo"] not in algorithms:
    raise ValueError(f"quantisation {quantisation['quant_algo']} is not supported; known: {', '.join(algorithms)}")
  for module in list(layer.modules()):
    for name, child in list(module.named_children()):
      if isinstance(child, nn.Linear):
        setattr(module, name, FP8Linear(child, per_channel=algorithms[quantisation["quant_algo"]]))


class LinearAttention(nn.Module):
  """One matrix in place of attention; it sees one token at a time and caches nothing."""

  def __init__(self, config: PuzzleConfig):
    super().__init__()
    self.linear_attn = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

  def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
    del kwargs
    return self.linear_attn(hidden_states), None


class LinearMLP(nn.Module):
  """One matrix in place of the FFN."""

  def __init__(self, config: PuzzleConfig):
    super().__init__()
    self.linear_mlp = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

  def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
    return self.linear_mlp(hidden_states)


def _attention(config: PuzzleConfig, layer: int) -> nn.Module:
  if config.block_configs[layer].attention.replace_with_linear:
    return LinearAttention(config)
  llama = copy.copy(config)
  llama.num_key_value_heads = config.num_kv_heads(layer)
  # The KV cache counts layers with attention only: its length is asked of its first layer, which must not be empty.
  cached = [b.attention.no_op or b.attention.replace_with_linear for b in config.block_configs[:layer]].count(False)
  attention = LlamaAttention(llama, cached)
  attention.config = config  # shared with the model, where the attention implementation can be changed
  return attention


def _mlp(config: PuzzleConfig, layer: int) -> nn.Module:
  if config.block_configs[layer].ffn.replace_with_linear:
    return LinearMLP(config)
  llama = copy.copy(config)
  llama.intermediate_size = config.ffn_width(layer)
  return LlamaMLP(llama)


class PuzzleDecoderLayer(GradientCheckpointingLayer):
  """One block. A subblock that is a no-op has neither weights nor a norm."""

  def __init__(self, config: PuzzleConfig, layer: int):
    super().__init__()
    block = config.block_configs[layer]
    self.self_attn = self.mlp = None
    if not block.attention.no_op:
      self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
      self.self_attn = _attention(config, layer)
    if not block.ffn.no_op:
      self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
      self.mlp = _mlp(config, layer)
    _quantise(self, config)

  def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    if self.self_attn is not None:
      hidden_states = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
    if self.mlp is not None:
      hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
    return hidden_states


class PuzzlePreTrainedModel(LlamaPreTrainedModel):
  config: PuzzleConfig
  config_class = PuzzleConfig
  _no_split_modules = ["PuzzleDecoderLayer"]  # noqa: RUF012 (Transformers' own declaration)
  _can_record_outputs = {"hidden_states": PuzzleDecoderLayer, "attentions": LlamaAttention}  # noqa: RUF012


class PuzzleModel(PuzzlePreTrainedModel, LlamaModel):
  """Llama's forward pass over a list of unequal layers."""

  def __init__(self, config: PuzzleConfig):
    super(LlamaModel, self).__init__(config)  # past LlamaModel's own, which would build equal layers
    self.padding_idx = config.pad_token_id
    self.vocab_size = config.vocab_size
    self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
    self.layers = nn.ModuleList([PuzzleDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
    self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    self.rotary_emb = LlamaRotaryEmbedding(config)
    self.gradient_checkpointing = False
    self.post_init()


class DeciLMForCausalLM(PuzzlePreTrainedModel, LlamaForCausalLM):
  """The language model, under the name by which engines know the dialect."""

  def __init__(self, config: PuzzleConfig):
    super(LlamaForCausalLM, self).__init__(config)
    self.model = PuzzleModel(config)
    self.vocab_size = config.vocab_size
    self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    self.post_init()
