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

Config = Mapping[str, Any]
FFN_MULTIPLE = 256  # readers of the nemotron-nas dialect round FFN widths up to a multiple of it

_MOST_LAYERS = 10_000  # the file is not trusted: each layer takes memory before any tensor is looked for


def _require(config: Config, key: str) -> int:
  value = config.get(key)
  if not isinstance(value, int) or isinstance(value, bool):
    raise PuzzleError(f"config.json: {key} is {value!r}, an integer is needed; the file is not one of a whole model")
  return value


def _refuse(config: Config, key: str, allowed: tuple[Any, ...], why: str) -> None:
  value = config.get(key)
  if value is not None and value not in allowed:
    raise PuzzleError(f"config.json: {key}={value!r} is not supported: {why}")


def _rope(config: Config) -> tuple[float, RopeScaling | None]:
  """Transformers 5 writes `rope_parameters`; before, there were `rope_theta` and `rope_scaling`."""
  scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
  theta = float(scaling.get("rope_theta") or config.get("rope_theta") or 10_000.0)
  kind = scaling.get("rope_type") or scaling.get("type") or "default"
  for source in (config, scaling):
    _refuse(source, "partial_rotary_factor", (1, 1.0), "rotary embeddings cover whole heads here")
  if kind == "default":
    return theta, None
  if kind != "llama3":
    raise PuzzleError(f"config.json: rotary scaling {kind!r} is not supported; supported: default, llama3")
  try:
    return theta, RopeScaling(
      factor=float(scaling["factor"]),
      low_freq_factor=float(scaling["low_freq_factor"]),
      high_freq_factor=float(scaling["high_freq_factor"]),
      original_max_context=int(
        scaling.get("original_max_position_embeddings") or _require(config, "max_position_embeddings")
      ),
    )
  except KeyError as e:
    raise PuzzleError(f"config.json: rotary scaling llama3 lacks {e}; take the file from the original model") from e


def _shared(config: Config) -> ModelConfig:
  """What Llama and its kin have in common (defaults: Transformers' LlamaConfig)."""
  _refuse(config, "hidden_act", ("silu", "swish"), "the FFN must be SwiGLU (hidden_act=silu)")
  _refuse(config, "mlp_bias", (False,), "biases in the FFN are not implemented")
  _refuse(config, "quantization_config", (), "take the model in bfloat16, float16 or float32")
  hidden, heads = _require(config, "hidden_size"), _require(config, "num_attention_heads")
  if config.get("head_dim") is None and hidden % heads:
    raise PuzzleError(f"config.json: head_dim is not given and {heads} heads do not divide hidden_size={hidden}")
  theta, scaling = _rope(config)
  bias = bool(config.get("attention_bias", False))
  return ModelConfig(
    vocab_size=_require(config, "vocab_size"),
    hidden_size=hidden,
    num_heads=heads,
    head_dim=config.get("head_dim") or hidden // heads,
    max_context=config.get("max_position_embeddings", 2048),
    rope_theta=theta,
    rope_scaling=scaling,
    norm_eps=float(config.get("rms_norm_eps", 1e-6)),
    tie_embeddings=bool(config.get("tie_word_embeddings", False)),
    qkv_bias=bias,
    o_bias=bias,
  )


def _llama(config: Config) -> Architecture:
  shared = _shared(config)
  kv_heads = _require(config, "num_key_value_heads") if config.get("num_key_value_heads") else shared.num_heads
  block, layers = BlockSpec(GQA(kv_heads), SwiGLU(_require(config, "intermediate_size"))), "num_hidden_layers"
  if not 0 < _require(config, layers) <= _MOST_LAYERS:
    raise PuzzleError(f"config.json: {layers}={config[layers]} is not a number from 1 to {_MOST_LAYERS}")
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


def ffn_width(ffn: Config, hidden_size: int) -> int:
  """Width of a nemotron-nas FFN: exact `intermediate_size`, else `ffn_mult` with the readers' rounding."""
  if ffn.get("intermediate_size") is not None:
    return int(ffn["intermediate_size"])
  return -(-int(2 * ffn["ffn_mult"] * hidden_size / 3) // FFN_MULTIPLE) * FFN_MULTIPLE


def _nemotron_nas(config: Config) -> Architecture:
  """Children of Puzzle, published ones and those that `puzzle_jax.serving.hf_export` writes: `block_configs`."""
  shared, blocks = _shared(config), []
  for i, block in enumerate(config.get("block_configs") or ()):
    attention, ffn = block["attention"], block["ffn"]
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
    attention_spec: Subblock
    if attention["no_op"]:
      attention_spec = NoAttention()
    elif attention.get("replace_with_linear"):
      attention_spec = LinearAttention()
    else:
      attention_spec = GQA(shared.num_heads // attention["n_heads_in_group"])
    ffn_spec: Subblock
    if ffn["no_op"]:
      ffn_spec = NoFFN()
    elif ffn.get("replace_with_linear"):
      ffn_spec = LinearFFN()
    else:
      ffn_spec = SwiGLU(ffn_width(ffn, shared.hidden_size))
    blocks.append(BlockSpec(attention_spec, ffn_spec))
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
  except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as e:
    raise PuzzleError(f"config.json of a {model_type} model: {e!r}; take the file from the original model") from e
