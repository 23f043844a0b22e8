"""The built-in PyTorch engine: any architecture of this project, prefill and decoding with a static cache.

Needs nothing but torch, never JAX. Q, K and V are one matrix, gate and up another. On a GPU the memory-bound pieces
between matrix products (residual and norm, rotary and cache write, SwiGLU) are compiled, each once for all layers, and
a decode step is one CUDA graph from token ids to token ids; how far rows are is read on the device, so that the same
graph serves every context. On a CPU the same step function runs as it is.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from puzzle_jax.arch import GQA, Architecture, ModelConfig, Subblock, SwiGLU
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import Parent
from puzzle_jax.serving import torch_attention

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_PREFILL_TOKENS = 16_384  # in one pass; longer batches go row by row

Part = dict[str, torch.Tensor]  # a subblock's weights as they are run
Layer = Mapping[str, Part]  # by slot


def device() -> torch.device:
  return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gpu() -> str:
  """The GPU that is used, as cost tables name it; empty without one."""
  return f"1 x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""


def fused(subblock: Subblock, weights: Mapping[str, torch.Tensor]) -> Part:
  """A subblock's weights with those matrices joined that read the same input."""
  joined: dict[type[Subblock], dict[str, tuple[str, ...]]] = {
    GQA: {"qkv": ("q", "k", "v"), "qkv_bias": ("q_bias", "k_bias", "v_bias")},
    SwiGLU: {"gate_up": ("gate", "up")},
  }
  part = dict(weights)
  for name, members in joined.get(type(subblock), {}).items():
    if members[0] in part:
      part[name] = torch.cat([part.pop(member) for member in members])
  return part


class RandomWeights:
  """Random weights of an architecture's shapes; layers of one model do not share memory, models share layers."""

  def __init__(self, parent: Architecture, *, dtype: str, seed: int = 0):
    self._config, self._dtype, self._device = parent.config, DTYPES[dtype], device()
    self._rng = torch.Generator(self._device).manual_seed(seed)
    self._head = {name: self._draw(t.shape) for name, t in parent.head_tensors().items()}
    self._made = dict[tuple[Subblock, int], Part]()

  def _draw(self, shape: tuple[int, ...]) -> torch.Tensor:
    drawn = torch.empty(shape, dtype=self._dtype, device=self._device)
    return drawn.normal_(0, 0.02, generator=self._rng)

  def _part(self, subblock: Subblock, layer: int) -> Part:
    if (subblock, layer) not in self._made:
      drawn = {name: self._draw(t.shape) for name, t in subblock.tensors(self._config).items()}
      self._made[subblock, layer] = fused(subblock, drawn)
    return self._made[subblock, layer]

  def model(self, architecture: Architecture) -> "Model":
    blocks = enumerate(architecture.blocks)
    return Model(architecture, [{s.slot: self._part(s, i) for s in b.subblocks} for i, b in blocks], self._head)


def load(parent: Parent, *, dtype: str) -> "Model":
  """A model of any format that `open_parent` reads, on the device at hand."""

  def tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(array, np.float32)).to(device(), DTYPES[dtype])

  layers = []
  for i, block in enumerate(parent.architecture.blocks):
    read = parent.layer(i)
    layers.append({s.slot: fused(s, {k: tensor(a) for k, a in read.get(s.slot, {}).items()}) for s in block.subblocks})
  return Model(parent.architecture, layers, {k: tensor(a) for k, a in parent.head().items()})


def add_norm(
  x: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
  """The residual stream with what the last subblock adds, and its norm."""
  x = x if delta is None else x + delta
  wide = x.float()
  return x, (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
  gate, up = gate_up.chunk(2, -1)
  return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
  """Rotary embedding of [..., heads, H] by tables [..., 1, H / 2]."""
  first, second = x.float().chunk(2, -1)
  return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def store_rotated(
  qkv: torch.Tensor,
  cos: torch.Tensor,
  sin: torch.Tensor,
  k_BKSH: torch.Tensor,
  v_BKSH: torch.Tensor,
  at_B: torch.Tensor,
) -> torch.Tensor:
  """Writes one token's keys and values to each row's slot `at_B`; returns its rotated queries [B, N, H]."""
  batch, kv_heads, _, size = k_BKSH.shape
  parts = qkv.view(batch, -1, size)
  heads = parts.shape[1] - 2 * kv_heads
  turned = rotate(parts[:, : heads + kv_heads], cos[:, None], sin[:, None])
  rows = torch.arange(batch, device=qkv.device)
  k_BKSH[rows, :, at_B] = turned[:, heads:]
  v_BKSH[rows, :, at_B] = parts[:, heads + kv_heads :]
  return turned[:, :heads].contiguous()


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
  """For a GPU: PyTorch compiles it for the first shapes that come, and once more for those that vary."""
  torch._dynamo.config.recompile_limit = 64  # batches of one, tokens of prompts, FFNs of many widths
  return torch.compile(function)


def rope_tables(config: ModelConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
  """Cosines and sines [length, H / 2] in fp32."""
  f = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
  if (s := config.rope_scaling) is not None:
    ramp = s.original_max_context * f / (2 * math.pi) - s.low_freq_factor
    share = (ramp / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    f = (1 - share) * f / s.factor + share * f
  angles = torch.arange(length, dtype=torch.float64)[:, None] * f
  return angles.cos().float(), angles.sin().float()


@dataclasses.dataclass(frozen=True)
class Model:
  """Weights on the device.

  Attributes:
    architecture: whose they are.
    layers: of each, by slot.
    head: `embed`, `norm`, and `head` unless that is the embedding.
  """

  architecture: Architecture
  layers: Sequence[Layer]
  head: Part

  @property
  def device(self) -> torch.device:
    return self.head["embed"].device

  def hidden(
    self, tokens: torch.Tensor, attend: Callable[[int, GQA, torch.Tensor], torch.Tensor]
  ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Residual stream [R, D] of tokens [R], and what the last subblock still adds; `attend` makes QKV's attention."""
    op = _compiled if self.device.type == "cuda" else lambda function: function
    eps = self.architecture.config.norm_eps
    x, delta = F.embedding(tokens, self.head["embed"]), None
    for i, (block, layer) in enumerate(zip(self.architecture.blocks, self.layers, strict=True)):
      for s in block.subblocks:
        if s.output is None:
          continue
        w = layer[s.slot]
        x, y = op(add_norm)(x, delta, w["norm"], eps)
        if isinstance(s, GQA):
          y = attend(i, s, F.linear(y, w["qkv"], w.get("qkv_bias")))
          delta = F.linear(y, w["o"], w.get("o_bias"))
        elif isinstance(s, SwiGLU):
          delta = F.linear(op(silu_mul)(F.linear(y, w["gate_up"])), w["down"])
        else:
          delta = F.linear(y, w["linear"])
    return x, delta

  def logits(self, x: torch.Tensor, delta: torch.Tensor | None) -> torch.Tensor:
    op = _compiled if self.device.type == "cuda" else lambda function: function
    y = op(add_norm)(x, delta, self.head["norm"], self.architecture.config.norm_eps)[1]
    return F.linear(y, self.head.get("head", self.head["embed"]))


class Cache:
  """Static KV caches for `batch` rows of `length` tokens; models of one shape can share them, one after the other."""

  def __init__(self, config: ModelConfig, layers: Sequence[int], *, batch: int, length: int, dtype: torch.dtype):
    """`layers`: KV heads of each, the most of all models that will use it; 0: none."""
    self.batch, self.length, self._size = batch, length, config.head_dim
    sizes = [heads * batch * length * config.head_dim for heads in layers]
    # Keys and values lie apart: what writes both is compiled, and must not take them for one array.
    self._flat = [tuple(torch.zeros(n, dtype=dtype, device=device()) for _ in "kv") for n in sizes]
    self.cos, self.sin = (table.to(device()) for table in rope_tables(config, length))

  def of(self, layer: int, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, K, S, H]."""
    shape = (self.batch, kv_heads, self.length, self._size)
    k, v = (flat[: math.prod(shape)].view(shape) for flat in self._flat[layer])
    return k, v


def kv_heads(architecture: Architecture) -> list[int]:
  """Of each layer; 0 without a KV cache."""
  return [b.attention.kv_heads if isinstance(b.attention, GQA) else 0 for b in architecture.blocks]


class Session:
  """A model that answers a batch of equally long requests, greedily.

  Attributes:
    tokens: [B], the last of each row; can be overwritten between calls.
    at: [B], the cache slot of the token that comes next.
    logits: [B, V] of the last call.
  """

  @torch.no_grad()
  def __init__(self, model: Model, cache: Cache):
    config, batch = model.architecture.config, cache.batch
    self._model, self._cache, self._size = model, cache, config.head_dim
    self.tokens = torch.zeros(batch, dtype=torch.int64, device=model.device)
    self.at = torch.zeros(batch, dtype=torch.int64, device=model.device)
    self.logits = torch.zeros(batch, config.vocab_size, dtype=model.head["embed"].dtype, device=model.device)
    self._graph: torch.cuda.CUDAGraph | None = None
    self._processors = 0
    if model.device.type == "cuda":
      self._processors = torch.cuda.get_device_properties(model.device).multi_processor_count

  @torch.no_grad()
  def prefill(self, prompts_BT: torch.Tensor) -> None:
    """Reads prompts of one length and takes the first token of each answer."""
    batch, length = prompts_BT.shape
    if batch != self._cache.batch or length >= self._cache.length:
      raise PuzzleError(f"prompts {batch} x {length} do not fit a cache of {self._cache.batch} x {self._cache.length}")
    rows = max(1, _PREFILL_TOKENS // length)
    for first in range(0, batch, rows):
      part = prompts_BT[first : first + rows]
      x, delta = self._model.hidden(part.reshape(-1), functools.partial(self._attend_prompt, first, length))
      ends = torch.arange(length - 1, len(x), length, device=x.device)
      self.logits[first : first + rows] = self._model.logits(x[ends], None if delta is None else delta[ends])
    self.tokens.copy_(self.logits.argmax(-1))
    self.at.fill_(length)

  def _attend_prompt(self, first: int, length: int, layer: int, s: GQA, qkv: torch.Tensor) -> torch.Tensor:
    qkv = qkv.view(-1, length, qkv.shape[-1] // self._size, self._size)
    batch = len(qkv)
    heads = qkv.shape[2] - 2 * s.kv_heads
    op = _compiled if qkv.is_cuda else lambda function: function
    cos, sin = (table[:length, None] for table in (self._cache.cos, self._cache.sin))
    turned = op(rotate)(qkv[:, :, : heads + s.kv_heads], cos, sin).transpose(1, 2)
    q, k, v = turned[:, :heads], turned[:, heads:], qkv[:, :, heads + s.kv_heads :].transpose(1, 2)
    for kept, new in zip(self._cache.of(layer, s.kv_heads), (k, v), strict=True):
      kept[first : first + batch, :, :length] = new
    grouped = heads != s.kv_heads
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2).reshape(batch * length, -1)

  def _step(self) -> None:
    """One token a row; what a CUDA graph holds."""
    cos, sin, length = self._cache.cos[self.at], self._cache.sin[self.at], self.at + 1

    def attend(layer: int, s: GQA, qkv: torch.Tensor) -> torch.Tensor:
      k, v = self._cache.of(layer, s.kv_heads)
      op = _compiled if qkv.is_cuda else lambda function: function
      q = op(store_rotated)(qkv, cos, sin, k, v, self.at)
      if qkv.is_cuda and torch_attention.has_kernel(self._size):
        splits = torch_attention.splits_of(self._cache.batch, s.kv_heads, self._cache.length, self._processors)
        y = torch_attention.flash_decode(q, k, v, length, splits)
      else:
        y = torch_attention.masked_decode(q, k, v, length)
      return y.reshape(self._cache.batch, -1)

    self.logits.copy_(self._model.logits(*self._model.hidden(self.tokens, attend)))
    self.tokens.copy_(self.logits.argmax(-1))
    self.at.add_(1)

  @torch.no_grad()
  def capture(self) -> None:
    """On a GPU: the step as a CUDA graph, after calls that compile its pieces; overwrites `tokens` and `at`."""
    if self._model.device.type != "cuda" or self._graph is not None:
      return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
      for _ in range(2):
        self.at.zero_()
        self._step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      self._step()
    self._graph = graph

  @torch.no_grad()
  def decode(self, steps: int) -> None:
    """So many tokens more for each row; there must be room."""
    for _ in range(steps):
      if self._graph is not None:
        self._graph.replay()
      else:
        self._step()


def wait() -> None:
  """Until the device has done what it was given."""
  if torch.cuda.is_available():
    torch.cuda.synchronize()
