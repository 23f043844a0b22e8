"""A model ready to use: architecture, parameters and tokenizer together."""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from puzzle_jax import mesh as mesh_lib
from puzzle_jax.arch import Architecture, ModelConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import decoder
from puzzle_jax.parents import Parent, open_parent
from puzzle_jax.tokenizer import Tokenizer

# Prompts and caches are rounded up to these numbers of tokens, so that few programs are compiled.
_PROMPT_STEP, _CACHE_STEP = 32, 128


def prompt_length(tokens: int) -> int:
  """Tokens that a prompt is padded to."""
  return tokens + -tokens % _PROMPT_STEP


def cache_length(tokens: int) -> int:
  """Cache slots for a prompt and its answer."""
  return tokens + -tokens % _CACHE_STEP


@functools.partial(jax.jit, static_argnames=("architecture", "dtype", "mesh"), donate_argnames="cache")
def decode_step(
  architecture: Architecture,
  params: decoder.Tree,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  last_B: jax.Array,
  cache: list[Any],
  *,
  dtype: Any = jnp.float32,
  mesh: Mesh | None = None,
) -> tuple[jax.Array, list[Any]]:
  """Logits [B, V] after column `last_B` of the tokens, and the cache with all of them: prefill and decoding alike.

  Columns behind `last_B` are padding: later steps overwrite their slots before anything attends to them. With a mesh,
  the cache stays on it as `empty_cache` lays it.
  """
  out = decoder.apply(architecture, params, tokens_BT, positions_BT=positions_BT, cache=cache, dtype=dtype)
  assert out.cache is not None
  hidden_B1D = jnp.take_along_axis(out.hidden_BTD, last_B[:, None, None], axis=1)
  logits = decoder.logits(params, hidden_B1D)[:, 0]
  return logits if mesh is None else mesh_lib.laid(mesh, logits, P()), _on_mesh(out.cache, mesh)


def _on_mesh(cache: list[Any], mesh: Mesh | None) -> list[Any]:
  """The cache as `empty_cache` lays it."""
  if mesh is None:
    return cache
  return jax.tree.map(lambda x: mesh_lib.laid(mesh, x, mesh_lib.cache_spec(mesh, x.shape)), cache)


def _next(
  architecture: Architecture,
  params: decoder.Tree,
  tokens_BT: np.ndarray,
  positions_BT: np.ndarray,
  last_B: np.ndarray,
  cache: list[Any],
  mesh: Mesh | None,
) -> tuple[jax.Array, list[Any]]:
  """`decode_step` by `decoder.apply_by_block`: answers are too short to compile a program of the whole model for."""
  x_BTD, cache = decoder.apply_by_block(architecture, params, tokens_BT, positions_BT=positions_BT, cache=cache)
  head = decoder.head_of(params)
  logits = _logits(architecture.config, head, x_BTD[np.arange(len(last_B)), last_B][:, None])[:, 0]
  return logits, _on_mesh(cache, mesh)


def empty_cache(architecture: Architecture, mesh: Mesh | None, *, batch: int, length: int) -> list[Any]:
  """`decoder.empty_cache`, on a mesh if there is one: its heads along `model`."""
  cache = decoder.empty_cache(architecture, batch=batch, length=length)
  if mesh is None:
    return cache
  return jax.tree.map(lambda x: mesh_lib.put(mesh, x, mesh_lib.cache_spec(mesh, x.shape)), cache)


@jax.jit
def _sample(logits_BV: jax.Array, temperature: float, key: jax.Array) -> jax.Array:
  drawn = jax.random.categorical(key, logits_BV / jnp.maximum(temperature, 1e-6))
  return jnp.where(temperature > 0, drawn, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


def to_device(params: Mapping[str, Any], *, dtype: Any = jnp.float32) -> decoder.Tree:
  """Parameters as JAX arrays of `dtype`."""
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), dict(params))


@dataclasses.dataclass(frozen=True)
class LanguageModel:
  """A parent or a child.

  Attributes:
    architecture: the description.
    params: the "layers" form of `model.decoder`.
    tokenizer: of the parent.
  """

  architecture: Architecture
  params: decoder.Tree
  tokenizer: Tokenizer

  @classmethod
  def open(
    cls, source: str | os.PathLike[str], *, dtype: Any = jnp.float32, mesh: Mesh | None = None
  ) -> "LanguageModel":
    """Opens all that `--config.parent` takes: a Hugging Face directory or id, a GGUF file, a child's directory."""
    parent = open_parent(os.fspath(source))
    return cls.of(parent, parent.tokenizer(), dtype=dtype, mesh=mesh)

  @classmethod
  def of(
    cls, parent: Parent, tokenizer: Tokenizer, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
  ) -> "LanguageModel":
    """On one device, or layer by layer on those of a mesh (`mesh.shard_weights`)."""
    layers = range(parent.architecture.num_layers)
    if mesh is None or mesh.size == 1:
      params = to_device(parent.head() | {"layers": [parent.layer(i) for i in layers]}, dtype=dtype)
    else:
      params = mesh_lib.shard_weights(mesh, parent.head(dtype))
      params["layers"] = [mesh_lib.shard_weights(mesh, parent.layer(i, dtype)) for i in layers]
    return cls(parent.architecture, params, tokenizer)

  def generate_ids(
    self, prompt: Sequence[int], *, max_new_tokens: int, temperature: float = 0.0, seed: int = 0
  ) -> list[int]:
    """The continuation of a prompt, up to `max_new_tokens` ids or a stop id (not included).

    Raises:
      PuzzleError: an empty prompt, or prompt and answer longer than the model's context.
    """
    total, limit = len(prompt) + max_new_tokens, self.architecture.config.max_context
    if not prompt or total > limit:
      raise PuzzleError(
        f"prompt of {len(prompt)} and answer of {max_new_tokens} tokens must have 1 to {limit} together"
      )
    padding = prompt_length(len(prompt)) - len(prompt)
    mesh = mesh_lib.mesh_of(self.params)
    cache = empty_cache(self.architecture, mesh, batch=1, length=cache_length(total))
    tokens = np.array([[*prompt, *[0] * padding]], np.int32)
    positions = np.arange(len(prompt) + padding, dtype=np.int32)[None]
    last = np.array([len(prompt) - 1], np.int32)
    key = jax.random.key(seed)
    answer: list[int] = []
    while len(answer) < max_new_tokens:
      logits, cache = _next(self.architecture, self.params, tokens, positions, last, cache, mesh)
      token = np.asarray(_sample(mesh_lib.gathered(logits), temperature, jax.random.fold_in(key, len(answer))))
      if int(token[0]) in self.tokenizer.stop_ids:
        break
      answer.append(int(token[0]))
      tokens, last = token[:, None], np.zeros(1, np.int32)
      positions = np.array([[len(prompt) + len(answer) - 1]], np.int32)
    return answer

  def generate(self, prompt: str, *, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 0) -> str:
    """The text that follows `prompt`; temperature 0 is greedy."""
    ids = self.tokenizer.encode(prompt)
    answer = self.generate_ids(ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return self.tokenizer.decode(answer)

  def chat(
    self,
    messages: str | Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
  ) -> str:
    """The assistant's answer, through the parent's chat template; a string is one user message."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]
    ids = self.tokenizer.encode(self.tokenizer.render_chat(turns), add_special=False)
    answer = self.generate_ids(ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    return self.tokenizer.decode(answer)

  def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
    """Next-token logits [B, T, V], fp32."""
    x_BTD, _ = decoder.apply_by_block(self.architecture, self.params, tokens_BT)
    return np.asarray(_logits(self.architecture.config, decoder.head_of(self.params), x_BTD))


@functools.partial(jax.jit, static_argnames="config")
def _logits(config: ModelConfig, head: decoder.Tree, last_BTD: jax.Array) -> jax.Array:
  """Of what the last block gives."""
  return decoder.logits(head, decoder.final_norm(config, head, last_BTD))
