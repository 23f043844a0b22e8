"""Many continuations at once against one at a time, and the draws against the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tiny_parent import byte_tokenizer
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import generation
from puzzle_jax.model.generation import Request, generate
from puzzle_jax.model.language_model import LanguageModel

draw = jax.jit(generation.draw)
STOPS = frozenset({*range(0, 257, 16)})


@pytest.fixture(scope="module")
def speaker(model):
  return model("gqa2/w48", "none/linear", vocab_size=257)


@pytest.fixture(scope="module")
def requests():
  rng = np.random.default_rng(0)

  def request(i):
    prompt = rng.integers(0, 257, rng.integers(1, 30))
    return Request(tuple(prompt.tolist()), int(rng.integers(2, 40)), temperature=(0.0, 0.7, 1.0)[i % 3], seed=i)

  return [request(i) for i in range(14)]


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_draws_follow_the_distribution(temperature):
  """On an even grid of random numbers each token comes up as often as it is likely, to one grid step or two."""
  logits = 3 * np.random.default_rng(0).standard_normal(1300).astype(np.float32)  # three blocks, the last one padded
  grid = (np.arange(4096) + 0.5) / 4096
  rows = jnp.broadcast_to(logits, (4096, 1300))
  tokens = draw(rows, jnp.full(4096, temperature), jnp.asarray(grid, jnp.float32))
  p = np.exp(logits.astype(np.float64) / temperature)
  counts = np.bincount(tokens, minlength=1300)
  np.testing.assert_allclose(counts, 4096 * p / p.sum(), atol=1.5)
  assert np.all(np.diff(tokens) >= 0)


def test_draws_at_the_ends_and_at_temperature_0():
  logits = np.full((3, 700), -np.inf, np.float32)
  logits[:, [5, 600]] = 1.0, 2.0
  tokens = draw(jnp.asarray(logits), jnp.array([1.0, 1.0, 0.0]), jnp.array([0.0, 0.9999999, 0.0]))
  assert tokens.tolist() == [5, 600, 600]


def test_greedy_answers_are_those_of_the_plain_loop(speaker):
  architecture, params = speaker
  alone = LanguageModel(architecture, params, byte_tokenizer())  # stops at 0
  prompts = [(7, 8, 9), (1,), tuple(range(1, 30)), (4,) * 12]
  answers = generate(architecture, params, [Request(p, 20) for p in prompts], stop_ids={0}, batch_rows=4)
  assert answers == [alone.generate_ids(p, max_new_tokens=20) for p in prompts]


@pytest.fixture(scope="module")
def endless(speaker, requests):
  """No answer ends before its limit."""
  return generate(*speaker, requests, stop_ids=(), batch_rows=4)


def test_answers_go_on_to_the_limit_or_a_stop(speaker, requests, endless):
  assert [len(answer) for answer in endless] == [request.max_new_tokens for request in requests]
  ended = generate(*speaker, requests, stop_ids=STOPS, batch_rows=4)
  for long, short in zip(endless, ended, strict=True):
    stops = [i for i, token in enumerate(long) if token in STOPS]
    assert short == (long[: stops[0]] if stops else long)
  assert 3 < sum(len(a) < len(b) for a, b in zip(ended, endless, strict=True)) < len(requests)


def test_answers_do_not_depend_on_company(speaker, requests, endless):
  assert generate(*speaker, requests[::-2], stop_ids=(), batch_rows=4) == endless[::-2]


def test_seeds_give_other_answers(speaker):
  answers = generate(*speaker, [Request((1, 2), 16, 1.0, seed) for seed in range(6)], stop_ids=(), batch_rows=4)
  assert len(set(map(tuple, answers))) == 6


def test_what_is_enough_ends_a_row(speaker):
  asked = []

  def ended(index, answer):
    asked.append((index, len(answer)))
    return index == 1

  answers = generate(*speaker, [Request((i + 1,), 60) for i in range(5)], stop_ids=(), batch_rows=4, ended=ended)
  assert [len(answer) for answer in answers] == [60, 16, 60, 60, 60]
  assert (1, 16) in asked


def test_like_lengths_share_a_cache_that_fits_them(speaker, monkeypatch):
  runs = []

  def noted(architecture, params, requests, queue, answers, *, batch, length, **rest):
    runs.append(([len(requests[i].prompt) for i in queue], batch, length))

  monkeypatch.setattr(generation, "_run", noted)
  sizes = [(3, 20), (100, 60), (90, 38), (91, 38), (60, 2)]
  generate(*speaker, [Request((5,) * p, n) for p, n in sizes], stop_ids=(), batch_rows=64)
  assert runs == [([100, 91], 2, 256), ([90, 60, 3], 4, 128)]


@pytest.mark.parametrize(
  "request_", [Request((), 3), Request((1,), 0), Request((1,) * 200, 57)], ids=["empty", "nothing", "too long"]
)
def test_refuses(speaker, request_):
  with pytest.raises(PuzzleError, match="at most the context of 256"):
    generate(*speaker, [request_], stop_ids=STOPS, batch_rows=2)
