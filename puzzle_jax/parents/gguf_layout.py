"""How GGUF, the format of llama.cpp, lays a model out: names of tensors, order of rotary rows, Llama-3's divisors.

llama.cpp's converter stores the rows of W_q and W_k of Llama-type models in an interleaved rotary order, and the
Llama-3 scaling of the rotary frequencies as a tensor of divisors. Read by `parents.gguf`, written by
`serving.gguf_export`.
"""

import math

import numpy as np

from puzzle_jax.arch import RopeScaling

ROPE_DIVISORS = "rope_freqs.weight"
_HEAD = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
LINEAR_ATTENTION, OUTPUT = "self_attn.linear_attn", "self_attn.o_proj"  # both are `attn_output` there
_HEAD_BACK = {v: k for k, v in _HEAD.items()}
_LAYER_BACK = {v: k for k, v in _LAYER.items()} | {LINEAR_ATTENTION: "attn_output"}


def checkpoint_name(name: str) -> str:
  """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; an unknown name stays."""
  stem, _, kind = name.rpartition(".")
  if stem.startswith("blk.") and stem.count(".") > 1:
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{_LAYER.get(part, part)}.{kind}"
  return f"{_HEAD.get(stem, stem)}.{kind}"


def gguf_name(name: str) -> str:
  """`model.layers.3.self_attn.q_proj.weight` → `blk.3.attn_q.weight`."""
  stem, _, kind = name.rpartition(".")
  if stem in _HEAD_BACK:
    return f"{_HEAD_BACK[stem]}.{kind}"
  _, _, layer, part = stem.split(".", 3)
  return f"blk.{layer}.{_LAYER_BACK[part]}.{kind}"


def is_rotary(name: str) -> bool:
  """Whether the rows of a tensor, by its checkpoint name, are in rotary order."""
  return ".q_proj." in name or ".k_proj." in name


def interleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
  """Rows (x0, x1, …, y0, y1, …) of each head → (x0, y0, x1, y1, …)."""
  return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def deinterleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
  """Rows (x0, y0, x1, y1, …) of each head → (x0, x1, …, y0, y1, …)."""
  return rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def rope_divisors(scaling: RopeScaling, num: int, theta: float) -> np.ndarray:
  """What Llama-3.x divides each of the `num` rotary frequencies by."""
  wavelengths = 2 * math.pi * theta ** (np.arange(num) / num)
  ramp = (scaling.original_max_context / wavelengths - scaling.low_freq_factor) / (
    scaling.high_freq_factor - scaling.low_freq_factor
  )
  smooth = np.clip(ramp, 0.0, 1.0)
  return 1.0 / ((1.0 - smooth) / scaling.factor + smooth)
