"""Replace-1-block scores against whole models run naively, and the arithmetic on top of them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from puzzle_jax import activations, arch, divergence, mesh, scoring
from puzzle_jax.arch import Architecture, BlockSpec
from puzzle_jax.data import PackedText, target_mask
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluation import tasks
from puzzle_jax.model import decoder
from puzzle_jax.space import LayerSpace, Space
from puzzle_jax.store import StageStore

PARENT = ("gqa2/w48", "gqa2/w48", "gqa4/w16", "gqa2/w48")  # three runs
apply = jax.jit(decoder.apply, static_argnums=0)


@pytest.fixture(scope="module")
def parent(model) -> tuple[Architecture, Any]:
  return model(*PARENT)


@pytest.fixture(scope="module")
def stored(parent, packed, quiet, tmp_path_factory) -> list[np.ndarray]:
  """The input of each layer and of the final norm, as the pipeline stores them."""
  architecture, params = parent
  store = StageStore(tmp_path_factory.mktemp("activations"))
  store.begin({})
  head = {k: np.asarray(v) for k, v in params.items() if k != "layers"}
  reader: Any = SimpleNamespace(architecture=architecture, head=lambda: head, layer=lambda i: params["layers"][i])
  activations.write(store, reader, {"heldout": packed}, mesh.build(mesh.MeshConfig()), batch_rows=8, progress=quiet)
  return [activations.read(store, "heldout", i) for i in range(architecture.num_layers + 1)]


@pytest.fixture(scope="module")
def scorer(parent, packed, stored) -> scoring.Scorer:
  return scoring.Scorer(*parent, packed=packed, last_RTD=stored[-1], batch_rows=4)


def naive(parent: tuple[Architecture, Any], child: tuple[Architecture, Any], packed: PackedText) -> dict[str, float]:
  """The metrics from whole models and log_softmax over the whole vocabulary."""

  def run(architecture: Architecture, params: Any) -> tuple[np.ndarray, np.ndarray]:
    out = apply(architecture, params, packed.tokens, positions_BT=packed.positions, segments_BT=packed.segment_ids)
    log_probs = jax.nn.log_softmax(decoder.logits(params, out.hidden_BTD))
    return np.asarray(log_probs, np.float64), np.asarray(out.hidden_BTD, np.float64)

  (log_p, hidden_p), (log_q, hidden_q) = run(*parent), run(*child)
  cosine = np.sum(hidden_p * hidden_q, -1) / np.linalg.norm(hidden_p, axis=-1) / np.linalg.norm(hidden_q, axis=-1)
  rows, columns = np.nonzero(np.asarray(target_mask(packed.segment_ids)))
  log_p, log_q, targets = log_p[rows, columns], log_q[rows, columns], packed.tokens[rows, columns + 1]
  tokens = np.arange(len(targets))
  return {
    "kl": np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)),
    "lm_loss": np.mean(log_p[tokens, targets] - log_q[tokens, targets]),
    "cosine": np.mean(1 - cosine[rows, columns]),
  }


@pytest.mark.parametrize("layer, block", [(0, "gqa2/linear"), (1, "none/none"), (2, "linear/w8"), (3, "gqa1/w48")])
def test_a_score_is_that_of_the_whole_child(model, parent, scorer, stored, packed, layer, block):
  params = parent[1]
  blocks = (*PARENT[:layer], block, *PARENT[layer + 1 :])
  child, other = model(*blocks, seed=1)
  weights = other["layers"][layer]
  layers = [*params["layers"][:layer], weights, *params["layers"][layer + 1 :]]
  expected = naive(parent, (child, params | {"layers": layers}), packed)
  (found,) = scorer.score(layer, [(BlockSpec.parse(block), weights)], stored[layer])
  assert expected["kl"] > 0.05
  assert found.keys() == {name + end for name in expected for end in ("", "_stderr")}
  for metric, value in expected.items():
    assert found[metric] == pytest.approx(value, abs=1e-5)


def test_a_whole_child_and_a_block_in_it(model, parent, scorer, packed):
  """Two blocks replaced at once, and one of them replaced in the child that has the other."""
  params, blocks = parent[1], list(scorer.parent)
  new = {1: "none/w8", 3: "linear/w48"}
  for layer, block in new.items():
    blocks[layer] = (BlockSpec.parse(block), model(block, seed=layer)[1]["layers"][0])
  child, _ = model(*(spec.name for spec, _ in blocks))
  expected = naive(parent, (child, params | {"layers": [weights for _, weights in blocks]}), packed)
  inputs = list(scorer.inputs(blocks))
  assert len(inputs) == 5
  for found in (scorer.whole(blocks), *scorer.score(1, [blocks[1]], inputs[1], model=blocks)):
    for metric, value in expected.items():
      assert found[metric] == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize("layer", range(4))
def test_the_parent_s_own_block_scores_0(parent, scorer, stored, layer):
  """To the rounding of one program against another: an ulp of the log normaliser, some 5 nats, is 5e-7."""
  architecture, params = parent
  (found,) = scorer.score(layer, [(architecture.blocks[layer], params["layers"][layer])], stored[layer])
  assert max(abs(value) for value in found.values()) < 5e-7


def test_equal_hidden_states_have_kl_0_exactly():
  rng = np.random.default_rng(0)
  head, hidden = jnp.asarray(rng.standard_normal((50, 8), np.float32)), jnp.asarray(rng.standard_normal((9, 8)) * 3)
  kl, _ = divergence.kl_and_nll_to(divergence.reference(head, hidden), head, hidden, targets_T=jnp.zeros(9, int))
  np.testing.assert_array_equal(kl, np.zeros(9))


def test_on_a_gpu_tensorfloat32_logits_are_products_in_fp16(monkeypatch):
  rng = np.random.default_rng(0)
  head, p, q = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((300, 64), (9, 64), (9, 64)))

  def kl(q: jax.Array) -> jax.Array:
    divergence.reference.clear_cache()
    return divergence.kl_and_nll_to(divergence.reference(head, p), head, q, targets_T=jnp.zeros(9, int))[0]

  exact = kl(q)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  np.testing.assert_array_equal(kl(q), exact)
  with jax.default_matmul_precision("tensorfloat32"):
    assert "f16[9,300]" not in (program := str(jax.make_jaxpr(divergence.log_normaliser)(head, q)))
    assert "f16[9,64]" in program
    np.testing.assert_allclose(kl(q), exact, rtol=1e-3)
    np.testing.assert_array_equal(kl(p), np.zeros(9))


@pytest.mark.parametrize("vocabulary, chunk, tokens", [(50, 8192, 7), (50, 25, 7), (53, 16, 8)])
def test_streamed_kl_is_naive_kl(monkeypatch, vocabulary, chunk, tokens):
  """One head through `Reference`, by chunks of the vocabulary; two heads by chunks of tokens, or of their parts."""
  monkeypatch.setattr(divergence, "VOCABULARY_CHUNK", chunk)
  monkeypatch.setattr(divergence, "token_chunk", lambda: 5)
  divergence.reference.clear_cache()
  rng = np.random.default_rng(0)
  normal: Callable[..., np.ndarray] = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
  head, p, targets = normal(vocabulary, 8), normal(tokens, 8), np.arange(tokens)
  other, q = head + 0.3 * normal(vocabulary, 8), p + 0.3 * normal(tokens, 8)

  def expected(head_q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    log_p, log_q = (scipy.special.log_softmax(h.astype(float) @ w.T, axis=1) for h, w in ((p, head), (q, head_q)))
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=1), -log_q[targets, targets]

  reference = divergence.reference(head, p)
  one = divergence.kl_and_nll_to(reference, head, jnp.asarray(q), targets_T=targets)
  two = divergence.kl_and_nll((q, other), (p, head), jnp.asarray(targets))
  spread = divergence.kl_and_nll((q, other), (p, head), jnp.asarray(targets), shards=2 - tokens % 2)
  for found, (kl, nll) in ((one, expected(head)), (two, expected(other)), (spread, expected(other))):
    np.testing.assert_allclose(found[0], kl, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[1], nll, rtol=0, atol=1e-5)


def test_one_program_a_subblock_a_parent_s_block_and_the_metrics(model, parent, scorer, stored):
  scoring._residual.clear_cache()
  decoder.compiled_block.clear_cache()
  scoring._measure.clear_cache()
  blocks = [(BlockSpec.parse(block), model(block)[1]["layers"][0]) for block in ("gqa2/w8", "none/w48")]
  for layer in range(4):
    assert len(list(scorer.score(layer, blocks, stored[layer]))) == 2
  specs = {s for block in ("gqa2/w8", "none/w48") for s in BlockSpec.parse(block).subblocks}
  sizes = [f._cache_size() for f in (scoring._residual, decoder.compiled_block, scoring._measure)]
  assert sizes == [len(specs), len(set(PARENT)), 1]


class Letters:
  """A tokenizer of one token a character."""

  def encode(self, text: str) -> list[int]:
    return [ord(c) % 67 for c in text]

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    return [self.encode(text) for text in texts]


def test_accuracy_is_what_items_lose(model, parent):
  """Against whole models, one choice after the other."""
  tokenizer: Any = Letters()
  items = [tasks.Item("the sea is", (" blue", " a tree", " wet and wide"), i % 3) for i in range(4)]
  items += [tasks.Item("one and one", (" is two", " is nine"), 0), tasks.Item("", ("alpha", "beta gamma"), 1)]
  for normalise in (False, True):
    task = tasks.pack(items, tokenizer, seq_len=48, normalise=normalise)
    child, other = model("gqa2/w48", "gqa2/linear", "gqa4/w16", "gqa2/w48", seed=1)
    layers = [*parent[1]["layers"][:1], other["layers"][1], *parent[1]["layers"][2:]]

    def correct(architecture: Architecture, params: Any, normalise: bool = normalise) -> np.ndarray:
      right = []
      for item in items:
        found = []
        for choice in item.choices:
          ids, start = tokenizer.encode(item.context + choice), max(len(tokenizer.encode(item.context)), 1)
          logits = decoder.logits(params, apply(architecture, params, np.array([ids])).hidden_BTD)[0]
          log_p = np.asarray(jax.nn.log_softmax(logits))
          total = sum(log_p[t - 1, ids[t]] for t in range(start, len(ids)))
          found.append(total / (len(choice) if normalise else 1))
        right.append(float(np.argmax(found) == item.answer))
      return np.array(right)

    lost = correct(*parent) - correct(child, parent[1] | {"layers": layers})
    blocks = list(zip(parent[0].blocks, parent[1]["layers"], strict=True))
    scorer = scoring.Scorer(*parent, packed=task.packed, batch_rows=2, task=task)
    blocks[1] = (child.blocks[1], layers[1])
    found = scorer.whole(blocks)
    assert found == {"accuracy": lost.mean(), "accuracy_stderr": pytest.approx(lost.std(ddof=1) / len(items) ** 0.5)}
    assert scorer.whole(scorer.parent)["accuracy"] == 0


def test_tasks_refuse_what_is_no_item(tmp_path):
  path = tmp_path / "task.jsonl"
  with pytest.raises(PuzzleError, match=r"task .*task.jsonl cannot be read"):
    tasks.read_items(path)
  good = '{"context": "a", "choices": ["b", "c"], "answer": 1}\n'
  for bad in (
    '{"context": "a", "choices": ["b", "c"], "answer": 2}',
    '{"context": "a", "choices": ["b"], "answer": 0}',
    "[1]",
  ):
    path.write_text(good + bad)
    with pytest.raises(PuzzleError, match=r"task\.jsonl, line 2: expected"):
      tasks.read_items(path)
  for bad, message in (("{", "is not JSON"), ("[" * 100_000, "is JSON of more than 100 levels")):
    path.write_text(good + bad)
    with pytest.raises(PuzzleError, match=rf"task\.jsonl, line 2 {message}.*one object a line"):
      tasks.read_items(path)
  path.write_bytes(good.encode() + b"\xff")
  with pytest.raises(PuzzleError, match=r"task .*task\.jsonl cannot be read .*codec"):
    tasks.read_items(path)
  path.write_text(good * 3)
  assert tasks.read_items(path, limit=2) == [tasks.Item("a", ("b", "c"), 1)] * 2


# Arithmetic


def test_standard_error_is_the_bootstrap_s():
  rng = np.random.default_rng(0)
  tokens = rng.integers(5, 40, 60).astype(float)
  sums = tokens * (0.3 + 0.1 * rng.standard_normal(60))
  mean, error = scoring.mean_and_error(sums, tokens)
  assert mean == pytest.approx(sums.sum() / tokens.sum())
  draws = rng.integers(0, 60, (20_000, 60))
  means = sums[draws].sum(axis=1) / tokens[draws].sum(axis=1)
  assert error == pytest.approx(np.std(means), rel=0.05)


def test_standard_error_of_equal_rows_is_the_textbook_s():
  values = np.random.default_rng(0).standard_normal(12)
  mean, error = scoring.mean_and_error(8 * values, np.full(12, 8.0))
  assert (mean, error) == pytest.approx((np.mean(values), np.std(values, ddof=1) / np.sqrt(12)))
  assert scoring.mean_and_error(np.array([3.0]), np.array([2.0])) == (1.5, 0.0)


SPACE = LayerSpace((arch.GQA(2), arch.NoAttention()), (arch.SwiGLU(48), arch.SwiGLU(8), arch.NoFFN()))


def test_rank_correlation_of_sums():
  """Two layers whose pairs rank as their sums do, but for one swap in the second."""
  space = LayerSpace((arch.GQA(2), arch.GQA(1)), (arch.SwiGLU(48), arch.SwiGLU(8), arch.NoFFN(), arch.LinearFFN()))
  singles = {"gqa1/w48": 0.1, "gqa2/w8": 0.1, "gqa2/none": 0.2, "gqa2/linear": 0.3}
  pairs = ("gqa1/w8", "gqa1/none", "gqa1/linear")
  layers = [singles | dict(zip(pairs, values, strict=True)) for values in ((0.1, 0.2, 0.3), (0.2, 0.1, 0.3))]
  scores = [{name: entry(value, 0.1) for name, value in layer.items()} for layer in layers]
  found = scoring.rank_correlation(Space((space, space)), scores, metric="kl")
  assert found["blocks"] == 6
  assert found["median_of_layers"] == pytest.approx((1 + 0.5) / 2)
  assert 0.5 < found["pooled"] < 1
  only = [{name: s for name, s in layer.items() if name in singles} for layer in scores]
  assert scoring.rank_correlation(Space((space, space)), only, metric="kl") is None


def entry(value: float, error: float) -> dict[str, float]:
  return {"kl": value, "kl_stderr": error, "lm_loss": -value, "lm_loss_stderr": 2 * error}


def test_pairs_that_were_not_scored_are_sums_of_subblocks():
  scores = {"none/w48": entry(0.3, 0.03), "gqa2/w8": entry(0.1, 0.04), "none/none": entry(0.5, 0.01)}
  composed = scoring.compose(SPACE, scores, metric="kl")
  assert composed == {
    "gqa2/w48": (0.0, 0.0),
    "gqa2/w8": (0.1, 0.04),
    "none/w48": (0.3, 0.03),
    "none/w8": (pytest.approx(0.4), pytest.approx(0.05)),
    "none/none": (0.5, 0.01),  # measured; gqa2/none was not, and is left out
  }
  assert scoring.compose(SPACE, scores, metric="lm_loss")["none/w8"] == pytest.approx((-0.4, 0.1))


def test_blocks_to_score_are_enough_to_compose_all():
  for granularity, number in (("composed", 5), ("subblocks", 3)):
    blocks = scoring.blocks_to_score(SPACE, granularity)
    assert len(blocks) == number
    scores = {block.name: entry(1.0, 0.1) for block in blocks}
    assert scoring.compose(SPACE, scores, metric="kl").keys() == {block.name for block in SPACE.blocks}
  with pytest.raises(PuzzleError, match="granularity='all' is not one of composed, subblocks"):
    scoring.blocks_to_score(SPACE, "all")


def test_block_weights_are_the_parent_s_or_the_library_s():
  library = {"attention.none": {}, "ffn.w8": {"up": 1}}
  found = scoring.block_weights(SPACE, BlockSpec.parse("gqa2/w8"), {"attention": {"q": 2}, "ffn": {"up": 3}}, library)
  assert found == {"attention": {"q": 2}, "ffn": {"up": 1}}
