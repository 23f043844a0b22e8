"""Model families: how a parent's config.json becomes an `Architecture`. A new family is an entry of `FAMILIES`.

GGUF files carry the same facts under other names; `puzzle_jax.parents.gguf` translates them to config.json's keys, so
a family is described once. Whatever an `Architecture` cannot express is refused: a parent read almost right is wrong.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from puzzle_jax.arch import (
  GQA,
  Architecture,
  BlockSpec,
  LinearAttention,
  LinearFFN,
  ModelConfig,
  NoAttention,
  NoFFN,
  RopeScaling,
  Subblock,
  SwiGLU,
)
from puzzle_jax.errors import PuzzleError
from puzzle_jax.json_input import mapping, number

Config = Mapping[str, Any]
FFN_MULTIPLE = 256  # readers of the nemotron-nas dialect round FFN widths up to a multiple of it

_MOST_MULTIPLE = 1_000_000
MOST_LAYERS = 10_000  # the file is not trusted: each layer takes memory before any tensor is looked for


def _require(config: Config, key: str, *, of: str = "") -> int:
  value = config.get(key)
  if type(value) is not int or value < 1:
    raise PuzzleError(
      f"config.json: {of}{key} is {value!r}, a whole number from 1 is needed; the file is not one of a whole model"
    )
  return value


def _flag(config: Config, key: str, *, of: str = "") -> bool:
  """False where the key is absent or null."""
  value = config.get(key)
  if not isinstance(value, bool | None):
    raise PuzzleError(f"config.json: {of}{key} is {value!r}; it must be true or false: take the original model's file")
  return bool(value)


def _number(config: Config, key: str, default: float) -> float:
  value = config.get(key)
  return float(default) if value is None else number(value, f"config.json: {key}")


def _refuse(config: Config, key: str, allowed: tuple[Any, ...], why: str) -> None:
  value = config.get(key)
  if value is not None and value not in allowed:
    raise PuzzleError(f"config.json: {key}={value!r} is not supported: {why}")


def _rope(config: Config) -> tuple[float, RopeScaling | None]:
  """Transformers 5 writes `rope_parameters`; before, there were `rope_theta` and `rope_scaling`."""
  scaling = mapping(config.get("rope_parameters") or config.get("rope_scaling") or {}, "config.json: rotary scaling")
  theta = _number(scaling, "rope_theta", _number(config, "rope_theta", 10_000.0))
  kind = scaling.get("rope_type") or scaling.get("type") or "default"
  for source in (config, scaling):
    _refuse(source, "partial_rotary_factor", (1, 1.0), "rotary embeddings cover whole heads here")
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise PuzzleError(f"config.json: rotary scaling {kind!r} is not supported; supported: default, llama3")
  factors = ("factor", "low_freq_factor", "high_freq_factor")
  for name in factors:
    if name not in scaling:
      raise PuzzleError(f"config.json: rotary scaling llama3 lacks {name!r}; take the file from the original model")
  if scaling.get("original_max_position_embeddings") is None:
    context = _require(config, "max_position_embeddings")
  else:
    context = _require(scaling, "original_max_position_embeddings")
  factor, low, high = (number(scaling[name], f"config.json: {name}") for name in factors)
  return theta, RopeScaling(factor, low, high, context)


def _shared(config: Config) -> ModelConfig:
  """What Llama and its kin have in common (defaults: Transformers' LlamaConfig)."""
  _refuse(config, "hidden_act", ("silu", "swish"), "the FFN must be SwiGLU (hidden_act=silu)")
  if _flag(config, "mlp_bias"):
    raise PuzzleError("config.json: mlp_bias=True is not supported: biases in the FFN are not implemented")
  _refuse(config, "quantization_config", (), "take the model in bfloat16, float16 or float32")
  hidden, heads = _require(config, "hidden_size"), _require(config, "num_attention_heads")
  if config.get("head_dim") is None and hidden % heads:
    raise PuzzleError(f"config.json: head_dim is not given and {heads} heads do not divide hidden_size={hidden}")
  theta, scaling = _rope(config)
  bias = _flag(config, "attention_bias")
  return ModelConfig(
    vocab_size=_require(config, "vocab_size"),
    hidden_size=hidden,
    num_heads=heads,
    head_dim=hidden // heads if config.get("head_dim") is None else _require(config, "head_dim"),
    max_context=config.get("max_position_embeddings", 2048),
    rope_theta=theta,
    rope_scaling=scaling,
    norm_eps=_number(config, "rms_norm_eps", 1e-6),
    tie_embeddings=_flag(config, "tie_word_embeddings"),
    qkv_bias=bias,
    o_bias=bias,
  )


def _llama(config: Config) -> Architecture:
  shared = _shared(config)
  heads = "num_key_value_heads"
  kv_heads = shared.num_heads if config.get(heads) is None else _require(config, heads)
  block, layers = BlockSpec(GQA(kv_heads), SwiGLU(_require(config, "intermediate_size"))), "num_hidden_layers"
  if _require(config, layers) > MOST_LAYERS:
    raise PuzzleError(f"config.json: {layers}={config[layers]} is not a number from 1 to {MOST_LAYERS}")
  return Architecture(shared, (block,) * config[layers])


def _mistral(config: Config) -> Architecture:
  """Llama with MistralConfig's defaults, where no layer attends through a sliding window."""
  defaults = {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131_072}
  config = defaults | dict(config)
  window, context = config["sliding_window"], config["max_position_embeddings"]
  if window is not None and window < context:
    raise PuzzleError(
      f"config.json: sliding_window={window} with max_position_embeddings={context} is not supported; "
      f"set max_position_embeddings to {window} to use the model within its window"
    )
  return _llama(config | {"attention_bias": False, "mlp_bias": False})


def ffn_width(ffn: Config, hidden_size: int, *, of: str = "") -> int:
  """Width of a nemotron-nas FFN: exact `intermediate_size`, else `ffn_mult` with the readers' rounding."""
  if ffn.get("intermediate_size") is not None:
    return _require(ffn, "intermediate_size", of=of)
  multiple = number(ffn.get("ffn_mult"), f"config.json: {of}ffn_mult")
  if not 0 < multiple < _MOST_MULTIPLE:
    raise PuzzleError(f"config.json: {of}ffn_mult is {multiple}, not above 0 and below {_MOST_MULTIPLE}")
  return -(-int(2 * multiple * hidden_size / 3) // FFN_MULTIPLE) * FFN_MULTIPLE


def _attention(attention: Config, shared: ModelConfig, of: str) -> Subblock:
  if _flag(attention, "no_op", of=of):
    return NoAttention()
  if _flag(attention, "replace_with_linear", of=of):
    return LinearAttention()
  group = _require(attention, "n_heads_in_group", of=of)
  if shared.num_heads % group:
    raise PuzzleError(f"config.json: {of}n_heads_in_group={group} does not divide {shared.num_heads} query heads")
  return GQA(shared.num_heads // group)


def _ffn(ffn: Config, shared: ModelConfig, of: str) -> Subblock:
  if _flag(ffn, "no_op", of=of):
    return NoFFN()
  if _flag(ffn, "replace_with_linear", of=of):
    return LinearFFN()
  return SwiGLU(ffn_width(ffn, shared.hidden_size, of=of))


def _nemotron_nas(config: Config) -> Architecture:
  """Children of Puzzle, published ones and those that `puzzle_jax.serving.hf_export` writes: `block_configs`."""
  shared, blocks, listed = _shared(config), [], config.get("block_configs")
  if not isinstance(listed, list):
    raise PuzzleError(f"config.json: block_configs is {listed!r}, a list is needed: take the original model's file")
  for i, block in enumerate(listed):
    block = mapping(block, f"config.json: block_configs of layer {i}")
    attention, ffn = (mapping(block.get(slot), f"config.json: {slot} of layer {i}") for slot in ("attention", "ffn"))
    unknown = f"layer {i} uses a kind of subblock that is not implemented"
    for part, keys in (
      (block, ("parallel_blocks",)),
      (attention, ("window_length", "num_sink_tokens", "unshifted_sink", "sparsify", "mamba", "llama4")),
      (ffn, ("sparsify", "moe")),
    ):
      for key in keys:
        _refuse(part, key, (False,), unknown)
    _refuse(ffn, "gated", (True,), unknown)
    _refuse(ffn, "hidden_act", ("silu", "swish"), unknown)
    blocks.append(BlockSpec(_attention(attention, shared, f"layer {i}: "), _ffn(ffn, shared, f"layer {i}: ")))
  if len(blocks) != _require(config, "num_hidden_layers"):
    raise PuzzleError(f"config.json: {len(blocks)} block_configs for num_hidden_layers={config['num_hidden_layers']}")
  return Architecture(shared, tuple(blocks))


@dataclasses.dataclass(frozen=True)
class Family:
  """A model type of config.json.

  Attributes:
    read: config.json → architecture.
    gguf: `general.architecture` of its GGUF files, None if they are not read. Mistral's are of Llama's.
  """

  read: Callable[[Config], Architecture]
  gguf: str | None = None


FAMILIES = {
  "llama": Family(_llama, gguf="llama"),
  "mistral": Family(_mistral),
  "nemotron-nas": Family(_nemotron_nas, gguf="deci"),
}


def read_config(config: Config) -> Architecture:
  """The architecture that a config.json describes.

  Raises:
    PuzzleError: an unsupported family or feature, or missing keys.
  """
  model_type = config.get("model_type")
  if not isinstance(model_type, str) or model_type not in FAMILIES:
    raise PuzzleError(
      f"config.json: model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)} "
      "(docs/architecture.md says how to add a family)"
    )
  try:
    return FAMILIES[model_type].read(config)
  except PuzzleError:
    raise
  except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as e:
    raise PuzzleError(f"config.json of a {model_type} model: {e!r}; take the file from the original model") from e
