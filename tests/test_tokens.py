"""Parent and child token by token, and how notebooks show that."""

import numpy as np
import pytest
import scipy.special
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluation.tokens import compare_tokens
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.report import html
from puzzle_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
  """Words with their leading space, as SentencePiece has them; its decoder strips that of a text's first word."""
  vocab = {"<unk>": 0} | {f"▁w{i}": i for i in range(1, 66)} | {"▁a": 66}
  backend = tokenizers.Tokenizer(models.WordLevel(vocab, "<unk>"))
  backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
  return Tokenizer(backend, {"eos_token": "<unk>"}, None, frozenset({0}))


def test_compares_each_token(model, tokenizer: Tokenizer) -> None:
  parent, child = (LanguageModel(*model("gqa4/w32", "gqa2/w32", seed=seed), tokenizer) for seed in (0, 1))
  ids = [5, 9, 66, 1, 30]
  found = compare_tokens(parent, child, "w5 w9 a w1 w30")
  assert "".join(t.text for t in found) == " w9 a w1 w30"
  p, q = (scipy.special.softmax(m.logits(np.array([ids]))[0].astype(np.float64), axis=-1) for m in (parent, child))
  for t, (one, token) in enumerate(zip(found, ids[1:], strict=True)):
    assert one.kl == pytest.approx(scipy.special.rel_entr(p[t], q[t]).sum(), rel=1e-6)
    assert (one.parent, one.child) == pytest.approx((p[t, token], q[t, token]), rel=1e-6)
    assert one.disagree == (p[t].argmax() != q[t].argmax())
    assert one.parent_best.lstrip() == tokenizer.decode([int(p[t].argmax())])
  assert any(one.disagree for one in found)
  assert [one.kl for one in compare_tokens(parent, parent, "w5 w9")] == [0.0]
  with pytest.raises(PuzzleError, match="the text has 1 tokens; compare one of 2 to 256"):
    compare_tokens(parent, child, "w5")


def test_tables_show_the_spaces_of_tokens(model, tokenizer: Tokenizer) -> None:
  parent = LanguageModel(*model("gqa4/w32"), tokenizer)
  assert "&#39; w9&#39;" in html.table(compare_tokens(parent, parent, "w5 w9"))
