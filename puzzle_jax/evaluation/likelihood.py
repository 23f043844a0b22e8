"""How likely a model finds given continuations, many at once, in rows of like length (buckets)."""

import collections
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from puzzle_jax import divergence
from puzzle_jax import mesh as mesh_lib
from puzzle_jax.arch import Architecture, ModelConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import decoder
from puzzle_jax.tokenizer import Tokenizer

_SHORTEST = 32  # bucket


@dataclasses.dataclass(frozen=True)
class Request:
  """A continuation behind its context.

  Attributes:
    ids: tokens of both.
    start: where the continuation begins, at least 1.
  """

  ids: tuple[int, ...]
  start: int


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """Of a continuation.

  Attributes:
    log_p: natural logarithm of its probability after the context.
    greedy: whether each of its tokens is the likeliest.
  """

  log_p: float
  greedy: bool


def start_id(tokenizer: Tokenizer) -> int:
  """What a text without a context comes behind: BOS, or EOS where there is none."""
  return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def encode(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[Request]:
  """Contexts and their continuations as tokens, as EleutherAI's lm-evaluation-harness makes them.

  Spaces at a context's end go to the continuation; both are tokenised as one text. Where tokens merge across the
  context's end, at least the last one counts.
  """
  contexts = tokenizer.encode_batch([context.rstrip() for context, _ in pairs])
  texts = tokenizer.encode_batch([context + continuation for context, continuation in pairs])
  bare = tokenizer.encode_batch([continuation for _, continuation in pairs], add_special=False)
  start = start_id(tokenizer)
  found = []
  for (context, _), before, whole, alone in zip(pairs, contexts, texts, bare, strict=True):
    if context.strip():
      found.append(Request(tuple(whole), max(min(len(before), len(whole) - 1), 1)))
    else:
      found.append(Request((*([] if alone[:1] == [start] else [start]), *alone), 1))
  return found


@functools.partial(jax.jit, static_argnames="config")
def _tokens(
  config: ModelConfig, head: decoder.Tree, last_BTD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Log likelihood of each target, and whether it is the likeliest token; [B, T]."""
  hidden_ND = decoder.final_norm(config, head, last_BTD).reshape(-1, config.hidden_size)
  nll_N, greedy_N = divergence.nll_and_greedy(hidden_ND, decoder.head_weights(head), targets_BT.reshape(-1))
  return -nll_N.reshape(targets_BT.shape), greedy_N.reshape(targets_BT.shape)


def bucket(length: int, longest: int) -> int:
  """The row length that a request of so many tokens is computed in: a power of two, so that programs are few."""
  return min(max(1 << (length - 1).bit_length(), _SHORTEST), longest)


def score(
  architecture: Architecture, params: decoder.Tree, requests: Sequence[Request], *, batch_tokens: int
) -> Iterator[tuple[int, Likelihood]]:
  """Yields requests' indices and likelihoods, the longest first.

  Args:
    architecture: of the model.
    params: its parameters, the "layers" form, on one device or a mesh.
    requests: in any order.
    batch_tokens: on the device at once (more where one row has more).

  Raises:
    PuzzleError: a request longer than the model's context, its last token aside.
  """
  limit, mesh = architecture.config.max_context, mesh_lib.mesh_of(params)
  head = decoder.head_of(params)
  by_length = collections.defaultdict[int, list[int]](list)
  for index, request in enumerate(requests):
    if not 1 <= request.start < len(request.ids) <= limit + 1:
      raise PuzzleError(
        f"a context of {request.start} and a continuation of {len(request.ids) - request.start} tokens: both take at "
        f"least one, and together at most the context of {limit}, the last token aside"
      )
    by_length[bucket(len(request.ids) - 1, limit)].append(index)
  for length, indices in sorted(by_length.items(), reverse=True):
    rows = max(batch_tokens // length, 1)
    for first in range(0, len(indices), rows):
      here = indices[first : first + rows]
      inputs_BT, targets_BT = np.zeros((2, rows, length), np.int32)
      for row, index in enumerate(here):
        ids = requests[index].ids
        inputs_BT[row, : len(ids) - 1], targets_BT[row, : len(ids) - 1] = ids[:-1], ids[1:]
      last_BTD, _ = decoder.apply_by_block(architecture, params, inputs_BT, rows=mesh_lib.rows_on(mesh, rows))
      log_p_BT, greedy_BT = mesh_lib.fetch(_tokens(architecture.config, head, last_BTD, targets_BT))
      for row, index in enumerate(here):
        counts = slice(requests[index].start - 1, len(requests[index].ids) - 1)
        total = float(log_p_BT[row, counts].astype(np.float64).sum())
        yield index, Likelihood(total, bool(greedy_BT[row, counts].all()))


def score_all(model: tuple[Architecture, Any], requests: Sequence[Request], *, batch_tokens: int) -> list[Likelihood]:
  """`score`, in the order of the requests."""
  found = dict(score(*model, requests, batch_tokens=batch_tokens))
  return [found[index] for index in range(len(requests))]
