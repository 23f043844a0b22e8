"""Parent and child on one text, token by token: where they disagree, and by how much."""

import dataclasses

import numpy as np
import scipy.special

from puzzle_jax.errors import PuzzleError
from puzzle_jax.model.language_model import LanguageModel


@dataclasses.dataclass(frozen=True)
class TokenComparison:
  """What both models predicted where `text` stands.

  Attributes:
    text: the token that stands there.
    kl: KL(parent ‖ child) of the predictions, nats.
    parent: the probability that the parent gave to the token,
    child: and that the child gave.
    parent_best: the parent's likeliest token there,
    child_best: and the child's.
  """

  text: str
  kl: float
  parent: float
  child: float
  parent_best: str
  child_best: str

  @property
  def disagree(self) -> bool:
    """Greedy decoding would differ here."""
    return self.parent_best != self.child_best


def compare_tokens(parent: LanguageModel, child: LanguageModel, text: str) -> list[TokenComparison]:
  """Every token of a text but its first, which nothing predicts.

  Raises:
    PuzzleError: the text has fewer than two tokens, or more than the models' context; the vocabularies differ.
  """
  ids = parent.tokenizer.encode(text)
  limit, sizes = parent.architecture.config.max_context, [m.architecture.config.vocab_size for m in (parent, child)]
  if not 2 <= len(ids) <= limit:
    raise PuzzleError(f"the text has {len(ids)} tokens; compare one of 2 to {limit}")
  if sizes[0] != sizes[1]:
    raise PuzzleError(
      f"vocabularies of {sizes[0]} and {sizes[1]} tokens cannot be compared; name a child of the parent"
    )
  tokens_1T = np.asarray([ids], np.int32)
  p, q = (scipy.special.log_softmax(m.logits(tokens_1T)[0, :-1].astype(np.float64), axis=-1) for m in (parent, child))
  kl_T = np.sum(np.exp(p) * (p - q), axis=-1)

  # Decoded behind another token: decoders of SentencePiece strip the space before a text's first.
  before = parent.tokenizer.encode("a", add_special=False)
  start = len(parent.tokenizer.decode(before))

  def word(token: int) -> str:
    return parent.tokenizer.decode([*before, int(token)])[start:]

  return [
    TokenComparison(
      text=word(token),
      kl=float(kl_T[t]),
      parent=float(np.exp(p[t, token])),
      child=float(np.exp(q[t, token])),
      parent_best=word(p[t].argmax()),
      child_best=word(q[t].argmax()),
    )
    for t, token in enumerate(ids[1:])
  ]
