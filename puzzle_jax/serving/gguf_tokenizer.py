"""The tokenizer of a GGUF file: copied from the parent's, or made from the child's tokenizer.json.

llama.cpp holds the regular expressions that cut text, and a file names one set of them (`tokenizer.ggml.pre`). A
tokenizer.json spells its own out; only those that are known to be one of llama.cpp's sets can be named.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGUFValueType, TokenType

from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents.gguf import GGUFFile
from puzzle_jax.tokenizer import PRE_TOKENIZERS, Tokenizer

_ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


class Entry(NamedTuple):
  """A metadata value with the type that it has in the file."""

  key: str
  value: Any
  kind: GGUFValueType
  item_kind: GGUFValueType | None = None  # of an array

  @classmethod
  def of(cls, key: str, value: Any) -> "Entry":
    """With the type that llama.cpp's converter gives to Python's: unsigned for a number, signed in an array."""
    if isinstance(value, list):
      return cls(key, value, GGUFValueType.ARRAY, GGUFValueType.get_type(value[0]))
    unsigned = isinstance(value, int) and not isinstance(value, bool)
    return cls(key, value, GGUFValueType.UINT32 if unsigned else GGUFValueType.get_type(value))


def copied(parent: GGUFFile, vocab_size: int) -> list[Entry]:
  """Everything that a GGUF file says of its tokenizer, as it says it; raises PuzzleError for one of another size."""
  if (tokens := len(parent.fields["tokenizer.ggml.tokens"].contents())) != vocab_size:
    raise PuzzleError(
      f"the parent's tokenizer has {tokens} tokens, the child's embedding {vocab_size}: name its parent"
    )
  return [
    Entry(key, field.contents(), *field.types[:2])
    for key, field in parent.fields.items()
    if key.startswith("tokenizer.")
  ]


def derived(folder: Path, vocab_size: int) -> list[Entry]:
  """The metadata for a folder's tokenizer.json.

  Args:
    folder: with the tokenizer's files.
    vocab_size: rows of the embedding; tokens that the tokenizer lacks are filled up as unused ones.

  Raises:
    PuzzleError: llama.cpp has no such tokenizer, or the embedding has fewer rows than there are tokens.
  """
  tokenizer = Tokenizer.from_folder(folder)
  return list(_derived(tokenizer, _pre_tokenizer(tokenizer, folder), vocab_size))


def _derived(tokenizer: Tokenizer, pre: str, vocab_size: int) -> Iterator[Entry]:
  backend = tokenizer.backend
  vocabulary = {i: token for token, i in backend.get_vocab(with_added_tokens=True).items()}
  if max(vocabulary) >= vocab_size:
    raise PuzzleError(f"the tokenizer has token {max(vocabulary)}, the embedding {vocab_size} rows; they do not match")
  added = {i: token.special for i, token in backend.get_added_tokens_decoder().items()}

  def kind(i: int) -> TokenType:
    if i not in vocabulary:
      return TokenType.UNUSED
    if i not in added:
      return TokenType.NORMAL
    return TokenType.CONTROL if added[i] else TokenType.USER_DEFINED

  around = tokenizer.encode("")
  bos_first = around[:1] == [tokenizer.bos_id]
  merges = json.loads(backend.to_str())["model"]["merges"]
  values: dict[str, Any] = {
    "model": "gpt2",
    "pre": pre,
    "tokens": [vocabulary.get(i, f"[PAD{i}]") for i in range(vocab_size)],
    "token_type": [int(kind(i)) for i in range(vocab_size)],
    "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
    **{
      f"{role}_token_id": backend.token_to_id(tokenizer.special_tokens[name])
      for name, role in _ROLES.items()
      if name in tokenizer.special_tokens
    },
    "add_bos_token": bos_first,
    "add_eos_token": around[int(bos_first) :] == [tokenizer.eos_id],
  }
  for key, value in values.items():
    yield Entry.of(f"tokenizer.ggml.{key}", value)
  if tokenizer.chat_template is not None:
    yield Entry.of("tokenizer.chat_template", tokenizer.chat_template)


def _pre_tokenizer(tokenizer: Tokenizer, folder: Path) -> str:
  """llama.cpp's name for the way in which the tokenizer cuts text."""
  state = json.loads(tokenizer.backend.to_str())
  model = state["model"]
  reason = ""
  if model["type"] != "BPE" or model.get("byte_fallback"):
    reason = f"a {model['type']} model{' with byte fallback' if model.get('byte_fallback') else ''}"
  elif not model["merges"]:
    reason = "a BPE model without merges"
  elif state["normalizer"] is not None:
    reason = f"a normalizer of type {state['normalizer']['type']}"
  else:
    steps = _steps(state["pre_tokenizer"])
    for name, known in PRE_TOKENIZERS.items():
      same = steps == [_step(json.loads(step.__getstate__())) for step in known]
      if same and model["ignore_merges"] == (name == "llama-bpe"):
        return name
    reason = f"a way to cut text ({json.dumps(steps)}) that has no name there"
  raise PuzzleError(
    f"{folder}/tokenizer.json: {reason} cannot be written to a GGUF file; known: byte-level BPE cut as "
    f"{', '.join(PRE_TOKENIZERS)}. Export as hf and convert the folder with llama.cpp's convert_hf_to_gguf.py"
  )


def _steps(state: dict[str, Any] | None) -> list[dict[str, Any]]:
  if state is None:
    return []
  return [_step(s) for s in state["pretokenizers"]] if state["type"] == "Sequence" else [_step(state)]


def _step(state: dict[str, Any]) -> dict[str, Any]:
  """Without `trim_offsets`, which changes no token."""
  return {key: value for key, value in state.items() if key != "trim_offsets"}
