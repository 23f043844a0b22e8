"""Parents in GGUF, the format of llama.cpp, dequantised to float32; exported children (`deci`) are among them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from puzzle_jax.arch import Architecture, LinearAttention, RopeScaling
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import families, gguf_layout
from puzzle_jax.parents.gguf_layout import LINEAR_ATTENTION, OUTPUT, ROPE_DIVISORS, rope_divisors

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
_FLOATS = ("attention.layer_norm_rms_epsilon", "rope.freq_base")
_BY_LAYER = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")  # in `deci`


def _kinds(architecture: str, key: str) -> tuple[type, ...]:
  """The types that a value of `_KEYS` may have."""
  if key in _FLOATS:
    return (float, int)
  return (int, list) if architecture == "deci" and key in _BY_LAYER else (int,)


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
    self.fields: Mapping[str, gguf.ReaderField] = reader.fields
    self.name: str = self.metadata("general.name", str) or path.stem
    self.license: str | None = self.metadata("general.license", str)
    if (self.metadata("split.count", int) or 1) > 1:
      raise PuzzleError(f"{path} is one part of several; join them with `llama-gguf-split --merge`")
    self._tensors = {gguf_layout.checkpoint_name(t.name): t for t in reader.tensors}
    self._divisors = self._tensors.pop(ROPE_DIVISORS, None)
    self.architecture = self._read_architecture(path)
    for i, block in enumerate(self.architecture.blocks):
      if isinstance(block.attention, LinearAttention):
        layer = f"model.layers.{i}."
        if (matrix := self._tensors.pop(f"{layer}{OUTPUT}.weight", None)) is not None:  # else it is said to be missing
          self._tensors[f"{layer}{LINEAR_ATTENTION}.weight"] = matrix

  def metadata(self, key: str, *kinds: type) -> Any:
    """A metadata value, of one of the types if any are given; None where there is none."""
    try:
      value = self.fields[key].contents() if key in self.fields else None
    except ValueError as e:  # text that is not UTF-8
      raise PuzzleError(f"{self.files[0]}: {key} cannot be read ({e}); download it again") from e
    if value is not None and kinds and type(value) not in kinds:
      expected = " or ".join(kind.__name__ for kind in kinds)
      raise PuzzleError(f"{self.files[0]}: {key} is {str(value)[:100]!r}, not of type {expected}; download it again")
    return value

  def tokenizer_metadata(self) -> dict[str, Any]:
    """The metadata of the tokenizer, as `Tokenizer.from_gguf` takes it."""
    return {key: self.metadata(key) for key in self.fields if key.startswith("tokenizer.")}

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
    if gguf_layout.is_rotary(name):
      array = gguf_layout.deinterleave(array, self.architecture.config.head_dim)
    return array

  def _read_architecture(self, path: Path) -> Architecture:
    kind = self.metadata("general.architecture", str)
    known = {f.gguf: model_type for model_type, f in families.FAMILIES.items() if f.gguf}
    if kind not in known:
      raise PuzzleError(f"{path}: GGUF architecture {kind!r} is not supported; supported: {', '.join(known)}")
    for key, allowed in (("expert_count", 0), ("rope.scaling.type", "none")):
      if (value := self.metadata(f"{kind}.{key}")) not in (None, allowed):
        raise PuzzleError(f"{path}: {kind}.{key}={value!r} is not supported")
    config: dict[str, Any] = {"model_type": known[kind]}
    for key, name in _KEYS.items():
      if (value := self.metadata(f"{kind}.{key}", *_kinds(kind, key))) is not None:
        # Floats are stored in 32 bits: take the shortest decimal that rounds to them, 1e-05 for 9.999999747378752e-06.
        config[name] = float(str(np.float32(value))) if isinstance(value, float) else value
    shapes = self.shapes
    config["vocab_size"] = shapes.get("model.embed_tokens.weight", (0,))[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in shapes
    config["attention_bias"] = any(name.endswith(".q_proj.bias") for name in shapes)
    config |= self._rope_scaling(path, config) | (_block_configs(path, config) if kind == "deci" else {})
    try:
      architecture = families.read_config(config)
    except PuzzleError as e:
      raise PuzzleError(f"{path}, its metadata read as a config.json: {e}") from e
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
    wrong = f"{path}: {ROPE_DIVISORS} is not the scaling of Llama-3.x; use the original safetensors"
    if not (divisors.ndim == 1 and divisors.size and np.isfinite(divisors).all() and divisors.min() > 0):
      raise PuzzleError(wrong)
    scaling = RopeScaling(
      factor=float(divisors.max()), low_freq_factor=1.0, high_freq_factor=4.0, original_max_context=8192
    )
    if not np.allclose(divisors, rope_divisors(scaling, len(divisors), config.get("rope_theta", 1e4)), rtol=1e-4):
      raise PuzzleError(wrong)
    return {
      "rope_scaling": {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_context,
      }
    }


def _block_configs(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
  """What config.json says of the layers of llama.cpp's `deci`, where a linear attention has heads but no KV heads."""
  names = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
  if missing := [name for name in ("num_hidden_layers", *names) if name not in config]:
    raise PuzzleError(f"{path} lacks the metadata for {missing[0]!r}; convert it again with a recent llama.cpp")
  layers = config["num_hidden_layers"]
  if not 1 <= layers <= families.MOST_LAYERS:
    raise PuzzleError(f"{path}: num_hidden_layers={layers} is not a number from 1 to {families.MOST_LAYERS}")
  by_name = {name: config[name] if isinstance(config[name], list) else [config[name]] * layers for name in names}
  for name, values in by_name.items():
    if len(values) != layers or not all(type(value) is int and value >= 0 for value in values):
      raise PuzzleError(f"{path}: {name} is {str(values)[:100]}; {layers} whole numbers are needed, one a layer")
  heads = by_name["num_attention_heads"]
  blocks = []
  for i, (n, k, f) in enumerate(zip(*by_name.values(), strict=True)):
    if k and (n % k or n != max(heads)):
      raise PuzzleError(f"{path}: layer {i} has {n} query and {k} KV heads where others have {max(heads)} query heads")
    attention = {"no_op": n == 0, "replace_with_linear": n > 0 and k == 0, "n_heads_in_group": n // k if k else None}
    ffn = {"no_op": f == 0, "replace_with_linear": False, "intermediate_size": f}
    blocks.append({"attention": attention, "ffn": ffn})
  return {"num_attention_heads": max(heads), "block_configs": blocks}
