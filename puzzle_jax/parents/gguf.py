"""Parents in GGUF, the format of llama.cpp, dequantised to float32.

llama.cpp's converter stores the rows of W_q and W_k of Llama-type models in an interleaved rotary order, which is
undone here, and the Llama-3 scaling of the rotary frequencies as a tensor of divisors.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from puzzle_jax.arch import Architecture, RopeScaling
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import families

# config.json's keys for GGUF's, which stand behind the name of the architecture.
_KEYS = {
  "block_count": "num_hidden_layers",
  "context_length": "max_position_embeddings",
  "embedding_length": "hidden_size",
  "feed_forward_length": "intermediate_size",
  "attention.head_count": "num_attention_heads",
  "attention.head_count_kv": "num_key_value_heads",
  "attention.key_length": "head_dim",
  "attention.layer_norm_rms_epsilon": "rms_norm_eps",
  "rope.freq_base": "rope_theta",
}
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
_ROPE_DIVISORS = "rope_freqs.weight"


class _Reader(gguf.GGUFReader):
  """Never reads beyond the file's end: the library would go on through whatever length a damaged file names."""

  def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
    end = int(offset) + np.dtype(dtype).itemsize * int(count)
    if not 0 <= offset <= end <= len(self.data):
      raise ValueError(f"it ends at byte {len(self.data)} and names something at {end}")
    return super()._get(offset, dtype, count, override_order)


class GGUFFile:
  """The tensors and the metadata of a GGUF file; tensors go by their checkpoint names.

  Raises:
    PuzzleError: no GGUF file, a truncated one, or one part of several.
  """

  def __init__(self, path: Path):
    self.files = [path]
    try:
      reader = _Reader(path)
    except FileNotFoundError:
      raise PuzzleError(f"{path} does not exist; give the path of a GGUF file") from None
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError) as e:
      raise PuzzleError(f"{path} is truncated or no GGUF file ({e}); download it again") from e
    self._fields = reader.fields
    self.name = str(self.metadata("general.name") or path.stem)
    self.license = self.metadata("general.license")
    if (self.metadata("split.count") or 1) > 1:
      raise PuzzleError(f"{path} is one part of several; join them with `llama-gguf-split --merge`")
    self._tensors = {_checkpoint_name(t.name): t for t in reader.tensors}
    self._divisors = self._tensors.pop(_ROPE_DIVISORS, None)
    self.architecture = self._read_architecture(path)

  def metadata(self, key: str) -> Any:
    """A metadata value, None where there is none."""
    try:
      return self._fields[key].contents() if key in self._fields else None
    except ValueError as e:  # text that is not UTF-8
      raise PuzzleError(f"{self.files[0]}: {key} cannot be read ({e}); download it again") from e

  def tokenizer_metadata(self) -> dict[str, Any]:
    """The metadata of the tokenizer, as `Tokenizer.from_gguf` takes it."""
    return {key: self.metadata(key) for key in self._fields if key.startswith("tokenizer.")}

  @property
  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

  def read(self, name: str) -> np.ndarray:
    """A tensor in float32, its rotary rows in the order of Hugging Face."""
    tensor = self._tensors[name]
    try:
      array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    except NotImplementedError as e:
      raise PuzzleError(f"{self.files[0]}: tensor {tensor.name}: {e}; take a file of another quantisation") from e
    if ".q_proj." in name or ".k_proj." in name:
      array = _deinterleave(array, self.architecture.config.head_dim)
    return array

  def _read_architecture(self, path: Path) -> Architecture:
    kind = self.metadata("general.architecture")
    known = {f.gguf: model_type for model_type, f in families.FAMILIES.items() if f.gguf}
    if kind not in known:
      raise PuzzleError(f"{path}: GGUF architecture {kind!r} is not supported; supported: {', '.join(known)}")
    for key, allowed in (("expert_count", 0), ("rope.scaling.type", "none")):
      if (value := self.metadata(f"{kind}.{key}")) not in (None, allowed):
        raise PuzzleError(f"{path}: {kind}.{key}={value!r} is not supported")
    config: dict[str, Any] = {"model_type": known[kind]}
    for key, name in _KEYS.items():
      if (value := self.metadata(f"{kind}.{key}")) is not None:
        # Floats are stored in 32 bits: take the shortest decimal that rounds to them, 1e-05 for 9.999999747378752e-06.
        config[name] = float(str(np.float32(value))) if isinstance(value, float) else value
    shapes = self.shapes
    config["vocab_size"] = shapes.get("model.embed_tokens.weight", (0,))[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in shapes
    config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in shapes
    architecture = families.read_config(config | self._rope_scaling(path, config))
    head_dim = architecture.config.head_dim
    for key in ("attention.value_length", "rope.dimension_count"):
      if (value := self.metadata(f"{kind}.{key}")) not in (None, head_dim):
        raise PuzzleError(f"{path}: {kind}.{key}={value} differs from the head size {head_dim}; that is not supported")
    return architecture

  def _rope_scaling(self, path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama-3.x's scaling, recovered from its divisors; the file holds no other trace of it."""
    if self._divisors is None:
      return {}
    divisors = np.asarray(self._divisors.data, np.float32)
    scaling = RopeScaling(
      factor=float(divisors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_max_context=8192
    )
    if not np.allclose(divisors, _rope_divisors(scaling, len(divisors), config.get("rope_theta", 1e4)), rtol=1e-4):
      raise PuzzleError(f"{path}: {_ROPE_DIVISORS} is not the scaling of Llama-3.x; use the original safetensors")
    return {
      "rope_scaling": {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_context,
      }
    }


def _checkpoint_name(name: str) -> str:
  """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; an unknown name stays."""
  stem, _, kind = name.rpartition(".")
  if stem.startswith("blk.") and stem.count(".") > 1:
    _, layer, part = stem.split(".", 2)
    return f"model.layers.{layer}.{_LAYER.get(part, part)}.{kind}"
  return f"{_HEAD.get(stem, stem)}.{kind}"


def _deinterleave(rows: np.ndarray, head_dim: int) -> np.ndarray:
  """Rows (x0, y0, x1, y1, …) of each head → (x0, x1, …, y0, y1, …)."""
  return rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _rope_divisors(scaling: RopeScaling, num: int, theta: float) -> np.ndarray:
  """What Llama-3.x divides each of the `num` rotary frequencies by."""
  wavelengths = 2 * math.pi * theta ** (np.arange(num) / num)
  ramp = (scaling.original_max_context / wavelengths - scaling.low_freq_factor) / (
    scaling.high_freq_factor - scaling.low_freq_factor
  )
  smooth = np.clip(ramp, 0.0, 1.0)
  return 1.0 / ((1.0 - smooth) / scaling.factor + smooth)
