"""Continuations of many prompts at once: a KV cache of a few rows, each refilled as soon as its answer has ended.

The device runs `_STEPS` decoding steps in one program; in between the host hands out rows. What a request gets depends
on its own prompt, temperature and seed, not on what it shares the batch with (to the rounding of matrix products).
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.arch import Architecture
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import decoder
from puzzle_jax.model.language_model import cache_length, decode_step, prompt_length

_STEPS = 16  # on the device between two looks of the host
_GROUPS = 8  # of the batch's rows: so many prompts are read at once, always the same number, for few programs
_BLOCK = 512  # tokens of the vocabulary that are summed before one of them is drawn


@dataclasses.dataclass(frozen=True)
class Request:
  """What to continue.

  Attributes:
    prompt: token ids, at least one.
    max_new_tokens: longest answer.
    temperature: 0 takes the likeliest token.
    seed: of the sampling.
  """

  prompt: tuple[int, ...]
  max_new_tokens: int
  temperature: float = 0.0
  seed: int = 0


@flax.struct.dataclass
class _Rows:
  """What the device knows of the batch's rows.

  Attributes:
    cache: KV cache.
    token: drawn, and neither read by the model nor given out yet.
    position: of that token.
    last: position behind which the row must not go.
    temperature, key: of the row's request.
    active: whether the row has more to say.
  """

  cache: list[Any]
  token: jax.Array
  position: jax.Array
  last: jax.Array
  temperature: jax.Array
  key: jax.Array
  active: jax.Array


def draw(logits_BV: jax.Array, temperature_B: jax.Array, uniform_B: jax.Array) -> jax.Array:
  """A token a row: the likeliest at temperature 0, else the one at which the cumulated probability passes `uniform_B`.

  One random number a row, and two short cumulated sums: first over blocks of the vocabulary, then within one.
  """
  scaled = logits_BV / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
  p = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))
  blocks = jnp.pad(p, ((0, 0), (0, -p.shape[1] % _BLOCK))).reshape(p.shape[0], -1, _BLOCK)
  ends = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
  wanted = uniform_B * ends[:, -1]
  block = jnp.argmax(ends > wanted[:, None], axis=-1)[:, None]
  within = jnp.take_along_axis(blocks, block[..., None], axis=1)[:, 0]
  before = jnp.take_along_axis(ends, block, axis=1) - jnp.sum(within, axis=-1, keepdims=True)
  passed = jnp.cumsum(within, axis=-1) > wanted[:, None] - before
  # Where rounding lets no sum pass, the block's likeliest token is taken.
  token = jnp.where(jnp.any(passed, axis=-1), jnp.argmax(passed & (within > 0), axis=-1), jnp.argmax(within, axis=-1))
  sampled = block[:, 0] * _BLOCK + token
  return jnp.where(temperature_B > 0, sampled, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


def _next(logits_BV: jax.Array, temperature_B: jax.Array, key_B: jax.Array, position_B: jax.Array) -> jax.Array:
  """The tokens at `position_B`; a request draws the same number at the same position whatever row it has."""
  uniform_B = jax.vmap(lambda key, position: jax.random.uniform(jax.random.fold_in(key, position)))(key_B, position_B)
  return draw(logits_BV, temperature_B, uniform_B)


@functools.partial(jax.jit, static_argnames=("architecture", "dtype"), donate_argnames="rows")
def _admit(
  architecture: Architecture,
  params: decoder.Tree,
  rows: _Rows,
  prompts_NT: jax.Array,
  length_N: jax.Array,
  row_N: jax.Array,
  last_N: jax.Array,
  temperature_N: jax.Array,
  seed_N: jax.Array,
  *,
  stop_ids: jax.Array,
  dtype: Any,
) -> _Rows:
  """Reads prompts into rows of the batch and draws their first tokens; a row number past the end drops its prompt."""
  count, width = prompts_NT.shape
  fresh = decoder.empty_cache(architecture, batch=count, length=width, dtype=dtype)
  positions = jnp.broadcast_to(jnp.arange(width), (count, width))
  logits, fresh = decode_step(architecture, params, prompts_NT, positions, length_N - 1, fresh, dtype=dtype)
  cache = jax.tree.map(lambda old, new: old.at[row_N, :, :width].set(new, mode="drop"), rows.cache, fresh)
  key_N = jax.vmap(jax.random.key)(seed_N)
  token_N = _next(logits, temperature_N, key_N, length_N)

  def put(old: jax.Array, new: jax.Array) -> jax.Array:
    return old.at[row_N].set(new, mode="drop")

  return _Rows(
    cache=cache,
    token=put(rows.token, token_N),
    position=put(rows.position, length_N),
    last=put(rows.last, last_N),
    temperature=put(rows.temperature, temperature_N),
    key=put(rows.key, key_N),
    active=put(rows.active, ~jnp.isin(token_N, stop_ids)),
  )


@functools.partial(jax.jit, static_argnames=("architecture", "dtype"), donate_argnames="rows")
def _decode(
  architecture: Architecture, params: decoder.Tree, rows: _Rows, *, stop_ids: jax.Array, dtype: Any
) -> tuple[_Rows, jax.Array]:
  """`_STEPS` steps; gives out tokens [_STEPS, B], -1 where a row has ended."""

  def step(rows: _Rows, _: None) -> tuple[_Rows, jax.Array]:
    given = jnp.where(rows.active, rows.token, -1)
    logits, cache = decode_step(
      architecture,
      params,
      rows.token[:, None],
      rows.position[:, None],
      jnp.zeros_like(rows.token),
      rows.cache,
      dtype=dtype,
    )
    position = rows.position + 1
    token = _next(logits, rows.temperature, rows.key, position)
    active = rows.active & (position <= rows.last) & ~jnp.isin(token, stop_ids)
    # An ended row stays where it is: it must not write past its cache.
    position = jnp.where(active, position, rows.position)
    return dataclasses.replace(rows, cache=cache, token=token, position=position, active=active), given

  return jax.lax.scan(step, rows, length=_STEPS)


def _rounded(count: int) -> int:
  """Up to a power of two, so that few programs are compiled."""
  return 1 << (count - 1).bit_length()


def generate(
  architecture: Architecture,
  params: decoder.Tree,
  requests: Sequence[Request],
  *,
  stop_ids: Collection[int],
  batch_rows: int,
  dtype: Any = jnp.float32,
  ended: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
  """The answers to requests, each up to its limit or a stop id (not included).

  Args:
    architecture: of the model.
    params: its parameters, the "layers" form, in `dtype`.
    requests: in any order; those of like length share a batch.
    stop_ids: tokens that end an answer.
    batch_rows: rows of the KV cache.
    dtype: of the matrix products and the KV cache.
    ended: given a request's index and its answer so far, whether that is enough; asked every few tokens.

  Raises:
    PuzzleError: an empty prompt, or prompt and answer longer than the model's context.
  """
  limit = architecture.config.max_context
  for request in requests:
    if not request.prompt or request.max_new_tokens < 1 or len(request.prompt) + request.max_new_tokens > limit:
      raise PuzzleError(
        f"a prompt of {len(request.prompt)} and an answer of {request.max_new_tokens} tokens: both take at least one, "
        f"and together at most the context of {limit}"
      )
  by_length = collections.defaultdict[int, list[int]](list)
  for index, r in enumerate(requests):
    by_length[_rounded(cache_length(len(r.prompt) + r.max_new_tokens))].append(index)
  answers: list[list[int]] = [[] for _ in requests]
  for length, indices in sorted(by_length.items(), reverse=True):
    queue = collections.deque(sorted(indices, key=lambda i: -len(requests[i].prompt)))
    _run(
      architecture,
      params,
      requests,
      queue,
      answers,
      stop_ids=np.array(sorted(stop_ids) or [-1], np.int32),
      batch=min(batch_rows, _rounded(len(queue))),
      length=length,
      dtype=dtype,
      ended=ended,
    )
  return answers


def _run(
  architecture: Architecture,
  params: decoder.Tree,
  requests: Sequence[Request],
  queue: collections.deque[int],
  answers: list[list[int]],
  *,
  stop_ids: np.ndarray,
  batch: int,
  length: int,
  dtype: Any,
  ended: Callable[[int, list[int]], bool] | None,
) -> None:
  """Answers the requests of a queue, all of which fit a cache of `length` slots."""
  rows = _Rows(
    cache=decoder.empty_cache(architecture, batch=batch, length=length, dtype=dtype),
    token=jnp.zeros(batch, jnp.int32),
    position=jnp.zeros(batch, jnp.int32),
    last=jnp.zeros(batch, jnp.int32),
    temperature=jnp.zeros(batch),
    key=jax.random.split(jax.random.key(0), batch),
    active=jnp.zeros(batch, bool),
  )
  holders: dict[int, int] = {}  # by row, the request that it serves
  group = max(batch // _GROUPS, 1)
  while queue or holders:
    free = [row for row in range(batch) if row not in holders]
    while queue and len(free) >= group:
      admitted = [(free.pop(), queue.popleft()) for _ in range(min(group, len(queue)))]
      holders |= admitted
      prompts = _padded(requests, admitted, group=group, nowhere=batch)
      rows = _admit(architecture, params, rows, *prompts, stop_ids=stop_ids, dtype=dtype)
    rows, given = _decode(architecture, params, rows, stop_ids=stop_ids, dtype=dtype)
    tokens, active = jax.device_get((given, rows.active))
    for row, index in list(holders.items()):
      answers[index] += tokens[tokens[:, row] >= 0, row].tolist()
      if not active[row] or (ended is not None and ended(index, answers[index])):
        del holders[row]


def _padded(
  requests: Sequence[Request], admitted: list[tuple[int, int]], *, group: int, nowhere: int
) -> tuple[np.ndarray, ...]:
  """Prompts, lengths, rows, last positions, temperatures and seeds; what fills up the group goes to row `nowhere`."""
  width = _rounded(prompt_length(max(len(requests[index].prompt) for _, index in admitted)))
  prompts, length, row, last, seed = np.zeros((group, width), np.int32), *np.zeros((4, group), np.int32)
  temperature = np.zeros(group, np.float32)
  length[:], row[:] = 1, nowhere
  for i, (own, index) in enumerate(admitted):
    r = requests[index]
    prompts[i, : len(r.prompt)] = r.prompt
    length[i], row[i], last[i] = len(r.prompt), own, len(r.prompt) + r.max_new_tokens - 1
    temperature[i], seed[i] = r.temperature, r.seed
  return prompts, length, row, last, temperature, seed
