"""The only description of a model: a `ModelConfig` and one `BlockSpec` a layer (imports no JAX).

Everything else (parameters, costs, checkpoints, the search space, reports) is derived from an `Architecture`.
A block is an attention and a feed-forward (FFN) subblock, each on its own pre-norm and residual (paper section 1):

    x = x + attention(norm(x));  x = x + ffn(norm(x))

A subblock kind declares its weights once, in `tensors`; parameter counts, FLOPs, initialisers, checkpoints and
shape checks follow from that. Weight matrices are [out, in], the layout of the checkpoints and the faster one for
decoding on CPUs. To add a kind: docs/architecture.md.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from puzzle_jax.errors import PuzzleError

FORMAT = "puzzle-architecture/1"
NUMBER = "([1-9][0-9]{0,9})"  # in a subblock's name


def _whole(where: str, **values: Any) -> None:
  for name, value in values.items():
    if type(value) is not int or not 1 <= value < 2**31:
      raise PuzzleError(f"{where}: {name}={value!r} must be a whole number from 1 to 2^31 - 1")


def _positive(where: str, **values: Any) -> None:
  for name, value in values.items():
    if type(value) not in (int, float) or not 0 < value < math.inf:
      raise PuzzleError(f"{where}: {name}={value!r} must be a number above 0")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama-3.x rescaling of the rotary frequencies (`rope_type: llama3` in config.json)."""

  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_max_context: int

  def __post_init__(self) -> None:
    factors = {name: getattr(self, name) for name in ("factor", "low_freq_factor", "high_freq_factor")}
    _positive("rotary scaling llama3", **factors)
    _whole("rotary scaling llama3", original_max_context=self.original_max_context)
    if self.low_freq_factor >= self.high_freq_factor:
      raise PuzzleError(
        f"rotary scaling llama3: low_freq_factor={self.low_freq_factor} must be below "
        f"high_freq_factor={self.high_freq_factor}"
      )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """What all layers of a parent and its children share."""

  vocab_size: int
  hidden_size: int
  num_heads: int  # query heads
  head_dim: int
  max_context: int  # tokens
  rope_theta: float = 10_000.0
  rope_scaling: RopeScaling | None = None
  norm_eps: float = 1e-5
  tie_embeddings: bool = False
  qkv_bias: bool = False
  o_bias: bool = False

  def __post_init__(self) -> None:
    sizes = ("vocab_size", "hidden_size", "num_heads", "head_dim", "max_context")
    _whole("model config", **{name: getattr(self, name) for name in sizes})
    _positive("model config", rope_theta=self.rope_theta, norm_eps=self.norm_eps)
    if not isinstance(self.rope_scaling, RopeScaling | None):
      raise PuzzleError(f"model config: rope_scaling={self.rope_scaling!r} must hold the factors of llama3, or be null")
    for name in ("tie_embeddings", "qkv_bias", "o_bias"):
      if not isinstance(getattr(self, name), bool):
        raise PuzzleError(f"model config: {name}={getattr(self, name)!r} must be true or false")
    if self.head_dim % 2:
      raise PuzzleError(f"model config: head_dim={self.head_dim} must be even for rotary embeddings")

  @property
  def q_size(self) -> int:
    """Width of all query heads together, N·H."""
    return self.num_heads * self.head_dim


class Tensor(NamedTuple):
  """A weight: its shape and its name in a checkpoint, relative to the layer."""

  shape: tuple[int, ...]
  checkpoint_name: str


@dataclasses.dataclass(frozen=True)
class Subblock:
  """Base of all subblock kinds. `slot` is "attention" or "ffn"; `name` is unique in its slot."""

  slot: ClassVar[str]
  pattern: ClassVar[str]  # regular expression of the short name; its groups are the integer fields
  output: ClassVar[str | None]  # the weight of the last, linear map; None: the subblock computes nothing

  @property
  def name(self) -> str:
    """Short name for people, tables and files, such as `gqa8` or `w14336`."""
    raise NotImplementedError

  @property
  def id(self) -> str:
    """Unique in a block: `attention.gqa8`, `ffn.linear`."""
    return f"{self.slot}.{self.name}"

  def tensors(self, config: ModelConfig) -> dict[str, Tensor]:
    """The weights by parameter name; empty for a no-op."""
    raise NotImplementedError

  def num_params(self, config: ModelConfig) -> int:
    return sum(math.prod(t.shape) for t in self.tensors(config).values())

  def kv_bytes_per_token(self, config: ModelConfig, *, bytes_per_value: int = 2) -> int:
    """Bytes of KV cache that one token occupies in this subblock."""
    del config, bytes_per_value
    return 0

  def flops_per_token(self, config: ModelConfig, *, context: int = 0) -> int:
    """Matmul FLOPs of the forward pass for one token that attends to `context` tokens."""
    del context
    return 2 * sum(math.prod(t.shape) for t in self.tensors(config).values() if len(t.shape) == 2)


_NORMS = {"attention": "input_layernorm.weight", "ffn": "post_attention_layernorm.weight"}


@dataclasses.dataclass(frozen=True)
class GQA(Subblock):
  """Grouped-query attention with `kv_heads` key/value heads (N of them: MHA; one: MQA)."""

  kv_heads: int
  slot: ClassVar[str] = "attention"
  pattern: ClassVar[str] = f"gqa{NUMBER}"
  output: ClassVar[str | None] = "o"

  @property
  def name(self) -> str:
    return f"gqa{self.kv_heads}"

  def tensors(self, config: ModelConfig) -> dict[str, Tensor]:
    if self.kv_heads < 1 or config.num_heads % self.kv_heads:
      raise PuzzleError(f"{self.name}: {self.kv_heads} KV heads do not divide {config.num_heads} query heads")
    d, q, kv = config.hidden_size, config.q_size, self.kv_heads * config.head_dim
    shapes = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
    tensors = {"norm": Tensor((d,), _NORMS[self.slot])}
    for name, shape in shapes.items():
      tensors[name] = Tensor(shape, f"self_attn.{name}_proj.weight")
      if config.o_bias if name == "o" else config.qkv_bias:
        tensors[f"{name}_bias"] = Tensor(shape[:1], f"self_attn.{name}_proj.bias")
    return tensors

  def kv_bytes_per_token(self, config: ModelConfig, *, bytes_per_value: int = 2) -> int:
    return 2 * self.kv_heads * config.head_dim * bytes_per_value

  def flops_per_token(self, config: ModelConfig, *, context: int = 0) -> int:
    return super().flops_per_token(config) + 4 * config.q_size * context


@dataclasses.dataclass(frozen=True)
class SwiGLU(Subblock):
  """The gated FFN down(silu(gate(x)) · up(x)) of width `width`."""

  width: int
  slot: ClassVar[str] = "ffn"
  pattern: ClassVar[str] = f"w{NUMBER}"
  output: ClassVar[str | None] = "down"

  @property
  def name(self) -> str:
    return f"w{self.width}"

  def tensors(self, config: ModelConfig) -> dict[str, Tensor]:
    if self.width < 1:
      raise PuzzleError(f"{self.name}: an FFN needs at least one channel; use `none` for no FFN")
    d, f = config.hidden_size, self.width
    return {
      "norm": Tensor((d,), _NORMS[self.slot]),
      "gate": Tensor((f, d), "mlp.gate_proj.weight"),
      "up": Tensor((f, d), "mlp.up_proj.weight"),
      "down": Tensor((d, f), "mlp.down_proj.weight"),
    }


@dataclasses.dataclass(frozen=True)
class _Linear(Subblock):
  """One matrix in place of a subblock: x + W·norm(x) (paper section 1)."""

  pattern: ClassVar[str] = "linear"
  output: ClassVar[str | None] = "linear"
  _checkpoint_name: ClassVar[str]

  @property
  def name(self) -> str:
    return "linear"

  def tensors(self, config: ModelConfig) -> dict[str, Tensor]:
    d = config.hidden_size
    return {"norm": Tensor((d,), _NORMS[self.slot]), "linear": Tensor((d, d), self._checkpoint_name)}


class LinearAttention(_Linear):
  slot = "attention"
  _checkpoint_name = "self_attn.linear_attn.weight"


class LinearFFN(_Linear):
  slot = "ffn"
  _checkpoint_name = "mlp.linear_mlp.weight"


@dataclasses.dataclass(frozen=True)
class _NoOp(Subblock):
  """Nothing: the residual alone."""

  pattern: ClassVar[str] = "none"
  output: ClassVar[str | None] = None

  @property
  def name(self) -> str:
    return "none"

  def tensors(self, config: ModelConfig) -> dict[str, Tensor]:
    del config
    return {}


class NoAttention(_NoOp):
  slot = "attention"


class NoFFN(_NoOp):
  slot = "ffn"


KINDS: tuple[type[Subblock], ...] = (GQA, LinearAttention, NoAttention, SwiGLU, LinearFFN, NoFFN)


def parse_subblock(slot: str, name: str) -> Subblock:
  """The subblock that a short name stands for, e.g. ("attention", "gqa8"); each has one name: no `gqa08`."""
  for kind in KINDS:
    if kind.slot == slot and (match := re.fullmatch(kind.pattern, name)):
      return kind(*map(int, match.groups()))
  known = ", ".join(kind.pattern.replace(NUMBER, "N") for kind in KINDS if kind.slot == slot)
  raise PuzzleError(f"{name!r} is no {slot} subblock; known: {known} (N from 1, without zeros before it)")


@dataclasses.dataclass(frozen=True)
class BlockSpec:
  """One layer: an attention and an FFN subblock."""

  attention: Subblock
  ffn: Subblock

  def __post_init__(self) -> None:
    for slot in ("attention", "ffn"):
      if getattr(self, slot).slot != slot:
        raise PuzzleError(f"block: {getattr(self, slot)} is no {slot} subblock")

  @property
  def name(self) -> str:
    return f"{self.attention.name}/{self.ffn.name}"

  @classmethod
  def parse(cls, name: str) -> "BlockSpec":
    """From `attention/ffn`, such as `gqa8/w14336`."""
    attention, slash, ffn = name.partition("/")
    if not slash:
      raise PuzzleError(f"block {name!r} is not of the form attention/ffn, such as gqa8/w14336 or none/linear")
    return cls(parse_subblock("attention", attention), parse_subblock("ffn", ffn))

  @property
  def subblocks(self) -> tuple[Subblock, Subblock]:
    return (self.attention, self.ffn)

  def num_params(self, config: ModelConfig) -> int:
    return sum(s.num_params(config) for s in self.subblocks)

  def kv_bytes_per_token(self, config: ModelConfig, *, bytes_per_value: int = 2) -> int:
    return sum(s.kv_bytes_per_token(config, bytes_per_value=bytes_per_value) for s in self.subblocks)

  def flops_per_token(self, config: ModelConfig, *, context: int = 0) -> int:
    return sum(s.flops_per_token(config, context=context) for s in self.subblocks)


@dataclasses.dataclass(frozen=True)
class Architecture:
  """A whole model: the shared config and one block a layer."""

  config: ModelConfig
  blocks: tuple[BlockSpec, ...]

  @property
  def num_layers(self) -> int:
    return len(self.blocks)

  def head_tensors(self) -> dict[str, Tensor]:
    """The weights that belong to no layer, by parameter name (full checkpoint names)."""
    c = self.config
    tensors = {
      "embed": Tensor((c.vocab_size, c.hidden_size), "model.embed_tokens.weight"),
      "norm": Tensor((c.hidden_size,), "model.norm.weight"),
    }
    if not c.tie_embeddings:
      tensors["head"] = Tensor((c.vocab_size, c.hidden_size), "lm_head.weight")
    return tensors

  def checkpoint_shapes(self) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a checkpoint, by full name."""
    shapes = {t.checkpoint_name: t.shape for t in self.head_tensors().values()}
    for i, block in enumerate(self.blocks):
      for subblock in block.subblocks:
        for tensor in subblock.tensors(self.config).values():
          shapes[f"model.layers.{i}.{tensor.checkpoint_name}"] = tensor.shape
    return shapes

  def num_params(self) -> int:
    """Parameters; tied embeddings count once."""
    return sum(math.prod(shape) for shape in self.checkpoint_shapes().values())

  def kv_bytes_per_token(self, *, bytes_per_value: int = 2) -> int:
    return sum(b.kv_bytes_per_token(self.config, bytes_per_value=bytes_per_value) for b in self.blocks)

  def flops_per_token(self, *, context: int = 0) -> int:
    """Forward matmul FLOPs a token, LM head included."""
    head = 2 * self.config.vocab_size * self.config.hidden_size
    return head + sum(b.flops_per_token(self.config, context=context) for b in self.blocks)

  def runs(self) -> tuple[tuple[BlockSpec, int], ...]:
    """Neighbouring layers of equal spec, with their number: what a scan can go over."""
    return tuple((spec, len(list(group))) for spec, group in itertools.groupby(self.blocks))

  def to_json(self) -> dict[str, Any]:
    return {
      "format": FORMAT,
      "config": dataclasses.asdict(self.config),
      "blocks": [{"attention": b.attention.name, "ffn": b.ffn.name} for b in self.blocks],
    }

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> "Architecture":
    """Inverse of `to_json`.

    Raises:
      PuzzleError: another format, or unknown keys or subblock names.
    """
    if data.get("format") != FORMAT:
      raise PuzzleError(f"architecture format {data.get('format')!r} is not {FORMAT!r}")
    try:
      config = dict(data["config"])
      if isinstance(config.get("rope_scaling"), Mapping):
        config["rope_scaling"] = RopeScaling(**config["rope_scaling"])
      blocks = [BlockSpec.parse(f"{b['attention']}/{b['ffn']}") for b in data["blocks"]]
      return cls(ModelConfig(**config), tuple(blocks))
    except PuzzleError as e:
      raise PuzzleError(f"architecture: {e}") from e
    except (AttributeError, KeyError, TypeError, ValueError) as e:
      raise PuzzleError(f"architecture: {e!r}; expected what Architecture.to_json writes") from e

  def __str__(self) -> str:
    return json.dumps(self.to_json())
