"""Multiple-choice tasks from JSON lines: `{"context": …, "choices": [first, second, …], "answer": index}`.

A model answers with the choice to whose tokens it gives the highest log likelihood after the context, in all or a
character (`normalise`), as EleutherAI's lm-evaluation-harness does for `acc` and `acc_norm`. Items may also have a
target instead of choices, `{"context": …, "target": …}`: right is a model that would write it, taking the likeliest
token each time (LAMBADA). Scores of blocks take choices alone, packed into rows (`pack`); `answers` takes both.
"""

import dataclasses
import gzip
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from puzzle_jax.data import PackedText
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluation import likelihood
from puzzle_jax.evaluation.likelihood import Likelihood, Request
from puzzle_jax.json_input import parse
from puzzle_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Item:
  """A question; one with a single choice has that as its target."""

  context: str
  choices: tuple[str, ...]
  answer: int


def read_items(path: str | Path, *, limit: int | None = None, targets: bool = False) -> list[Item]:
  """The items of a .jsonl or .jsonl.gz file, the first `limit` of them; those with targets only where they may be.

  Raises:
    PuzzleError: no such file, or a line that is no item (named).
  """
  path, items = Path(path), list[Item]()
  opener = gzip.open if path.suffix == ".gz" else open
  try:
    with opener(path, "rt", encoding="utf-8") as lines:
      for number, line in enumerate(lines, start=1):
        if limit is not None and len(items) >= limit:
          break
        if line.strip():
          where = f"{path}, line {number}"
          items.append(_item(parse(line, where, "a task holds one object a line"), where, targets))
  except (OSError, EOFError, zlib.error, UnicodeDecodeError) as e:
    reason = getattr(e, "strerror", None) or e
    raise PuzzleError(f"task {path} cannot be read ({reason}); name a .jsonl or .jsonl.gz file") from e
  if not items:
    raise PuzzleError(f"task {path} holds no items")
  return items


def _item(data: object, where: str, targets: bool) -> Item:
  expected = 'expected {"context": text, "choices": [text, …], "answer": index}'
  if not isinstance(data, Mapping):
    raise PuzzleError(f"{where}: {expected}")
  if targets and isinstance(target := data.get("target"), str) and target and isinstance(data.get("context"), str):
    return Item(data["context"], (target,), 0)
  context, choices, answer = (data.get(key) for key in ("context", "choices", "answer"))
  texts = isinstance(choices, list) and len(choices) > 1 and all(isinstance(c, str) and c for c in choices)
  if not (isinstance(context, str) and texts and type(answer) is int and 0 <= answer < len(choices)):  # type: ignore[arg-type]
    raise PuzzleError(f"{where}: {expected}, with two choices or more; found {str(dict(data))[:200]}")
  return Item(context, tuple(choices), answer)  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Answers:
  """Of a model, per item True where right.

  Attributes:
    plain: by the log likelihood of the choices; by greedy decoding where there is a target.
    normalised: by the log likelihood a character; None where there are targets.
  """

  plain: np.ndarray
  normalised: np.ndarray | None


def requests(items: Sequence[Item], tokenizer: Tokenizer) -> list[Request]:
  """Every choice behind its context, item by item."""
  return likelihood.encode([(item.context, choice) for item in items for choice in item.choices], tokenizer)


def answers(items: Sequence[Item], found: Sequence[Likelihood]) -> Answers:
  """What a model answers, by its likelihoods of `requests`."""
  plain, normalised, start = np.zeros(len(items), bool), np.zeros(len(items), bool), 0
  for number, item in enumerate(items):
    here, start = found[start : start + len(item.choices)], start + len(item.choices)
    log_p = np.array([choice.log_p for choice in here])
    lengths = [max(len(choice.strip()), 1) for choice in item.choices]
    plain[number] = np.argmax(log_p) == item.answer if len(here) > 1 else here[0].greedy
    normalised[number] = np.argmax(log_p / lengths) == item.answer
  return Answers(plain, None if any(len(item.choices) == 1 for item in items) else normalised)


@dataclasses.dataclass(frozen=True)
class Task:
  """Items as packed rows.

  Attributes:
    packed: each choice behind its context is a segment.
    choice_RT: which choice, counted over all items, the target of a token belongs to; -1: to none.
    item_C: the item of each choice.
    right_C: whether it is the answer.
    length_C: what its log likelihood is divided by.
  """

  packed: PackedText
  choice_RT: np.ndarray
  item_C: np.ndarray
  right_C: np.ndarray
  length_C: np.ndarray

  def correct(self, nll_RT: np.ndarray) -> np.ndarray:
    """Per item 1.0 where the answer has the highest log likelihood, else 0.0.

    Args:
      nll_RT: a model's negative log likelihood of each token's target.
    """
    counts = self.choice_RT >= 0
    nll_C = np.bincount(self.choice_RT[counts], nll_RT[counts], minlength=len(self.item_C)) / self.length_C
    best = np.lexsort((np.arange(len(nll_C)), nll_C, self.item_C))  # by item, the likeliest choice first
    first = np.r_[True, np.diff(self.item_C[best]) > 0]
    return self.right_C[best[first]].astype(np.float64)

  def arrays(self) -> dict[str, np.ndarray]:
    """For a safetensors file."""
    fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "packed"}
    return fields | self.packed._asdict()

  @classmethod
  def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Task":
    """Inverse of `arrays`."""
    packed = PackedText(**{name: arrays[name] for name in PackedText._fields})
    return cls(packed, **{name: array for name, array in arrays.items() if name not in PackedText._fields})


def pack(items: Sequence[Item], tokenizer: Tokenizer, *, seq_len: int, normalise: bool = False) -> Task:
  """Tokenises items and packs their choices into rows, each whole.

  Args:
    items: questions.
    tokenizer: the parent's.
    seq_len: T.
    normalise: divide a choice's log likelihood by its number of characters.

  Raises:
    PuzzleError: a context and choice longer than a row.
  """
  texts = [item.context + choice for item in items for choice in item.choices]
  contexts = tokenizer.encode_batch([item.context for item in items])
  starts = [len(ids) for item, ids in zip(items, contexts, strict=True) for _ in item.choices]
  rows: list[list[tuple[int, list[int]]]] = [[]]
  room = seq_len
  for choice, ids in enumerate(tokenizer.encode_batch(texts)):
    if len(ids) > seq_len:
      raise PuzzleError(f"a task's item has {len(ids)} tokens, more than data.seq_len={seq_len}; raise it")
    if len(ids) > room:
      rows.append([])
      room = seq_len
    rows[-1].append((choice, ids))
    room -= len(ids)
  shape = (len(rows), seq_len)
  tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
  choices = np.full(shape, -1, np.int32)
  for row, parts in enumerate(rows):
    at = 0
    for segment, (choice, ids) in enumerate(parts, start=1):
      here = slice(at, at + len(ids))
      tokens[row, here], segments[row, here], positions[row, here] = ids, segment, np.arange(len(ids))
      # Tokens of text and context may part before the context's end where they merge across it.
      first = max(min(starts[choice], len(ids) - 1), 1)
      choices[row, at + first - 1 : at + len(ids) - 1] = choice
      at += len(ids)
  item = np.repeat(np.arange(len(items)), [len(i.choices) for i in items]).astype(np.int32)
  right = np.concatenate([np.arange(len(i.choices)) == i.answer for i in items])
  lengths = [float(len(c)) if normalise else 1.0 for i in items for c in i.choices]
  return Task(PackedText(tokens, segments, positions), choices, item, right, np.array(lengths))
