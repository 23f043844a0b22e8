"""What JAX says comes next, in fp32, in a form that can be held against an engine where there is no JAX."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.model import decoder
from puzzle_jax.model.language_model import LanguageModel, cache_length, decode_step

_ROWS = 8  # at once: logits of whole rows are large


def spread_rows(ids: list[int], rows: int, length: int) -> np.ndarray:
  """Rows of consecutive tokens, evenly spread over a text."""
  step = len(ids) // rows
  return np.array([ids[i * step : i * step + length] for i in range(rows)])


def tokens(folder: Path, rows: np.ndarray, *, prompt: int) -> dict[str, Any]:
  """The likeliest tokens of a model's directory.

  Args:
    folder: an export or a child's.
    rows: token ids [R, T].
    prompt: how many of a row's tokens greedy decoding starts from.

  Returns:
    `forced`: [R, T - prompt], the likeliest tokens in place of the row's own behind the prompt; `greedy`: as many
    tokens of free decoding; `greedy_gaps`: at each, the best logit less the second best.
  """
  model = LanguageModel.open(folder)
  forced = np.concatenate(
    [model.logits(rows[i : i + _ROWS])[:, prompt - 1 : -1].argmax(-1) for i in range(0, len(rows), _ROWS)]
  )
  greedy, gaps = _greedy(model, rows[:, :prompt], rows.shape[1] - prompt)
  return {
    "forced": forced.tolist(),
    "greedy": greedy.tolist(),
    "greedy_gaps": gaps.tolist(),
    "jax": jax.__version__,
  }


def _greedy(model: LanguageModel, prompts: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
  """Tokens [R, steps], whatever they are: nothing ends a row; and the gaps between the two best logits."""
  rows, length = prompts.shape
  cache = decoder.empty_cache(model.architecture, batch=rows, length=cache_length(length + steps))
  tokens, positions = jnp.asarray(prompts, jnp.int32), jnp.broadcast_to(jnp.arange(length), (rows, length))
  last, found, gaps = jnp.full(rows, length - 1), [], []
  for i in range(steps):
    logits, cache = decode_step(model.architecture, model.params, tokens, positions, last, cache)
    best, token = jax.lax.top_k(logits, 2)
    found.append(token[:, 0])
    gaps.append(best[:, 0] - best[:, 1])
    tokens, positions, last = token[:, :1], jnp.full((rows, 1), length + i), jnp.zeros(rows, jnp.int32)
  return np.stack(found, 1), np.stack(gaps, 1)
