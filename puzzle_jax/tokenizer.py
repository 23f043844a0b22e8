"""The parent's tokenizer, which every child shares: from a Hugging Face folder, or rebuilt from a GGUF's metadata.

Text is cut exactly as the parent was trained on. Transformers' own conversion of GGUF files is not used: it drops
SmolLM's splitting of digits. tests/test_tokenizer.py holds the rebuilt ones against ids recorded from llama.cpp.
"""

import dataclasses
import functools
import hashlib
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from puzzle_jax import chat_template
from puzzle_jax.errors import PuzzleError
from puzzle_jax.json_input import read_object

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")

# Chat models end a turn with one of these, base models a document, whichever of them the files call `eos`.
_END_TOKENS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>")

# By `tokenizer.ggml.pre`, each verified against llama.cpp.
_GPT2 = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),)
_LLAMA3_PATTERN = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[str, tuple[pre_tokenizers.PreTokenizer, ...]] = {
  "gpt-2": _GPT2,
  "llama-bpe": (
    pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_PATTERN), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
  ),
  "smollm": (pre_tokenizers.Digits(individual_digits=True), *_GPT2),
}
_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_TEMPLATE = "tokenizer.chat_template"
_ADD_BOS, _ADD_EOS = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token"


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
  """Text to token ids and back.

  Attributes:
    backend: the tokenizer itself, special tokens and what surrounds a text (BOS, EOS) included.
    special_tokens: by role: `bos_token`, `eos_token`, `unk_token`, `pad_token`, those that there are.
    chat_template: Jinja source that `render_chat` uses, or None.
    stop_ids: the tokens that end a generation, EOS included.
  """

  backend: tokenizers.Tokenizer
  special_tokens: Mapping[str, str]
  chat_template: str | None
  stop_ids: frozenset[int]

  @property
  def vocab_size(self) -> int:
    """Tokens that there are; the model's embedding may have more rows."""
    return self.backend.get_vocab_size()

  @property
  def largest_id(self) -> int:
    return max(self.backend.get_vocab().values())

  @property
  def bos_id(self) -> int | None:
    bos = self.special_tokens.get("bos_token")
    return None if bos is None else self.backend.token_to_id(bos)

  @property
  def eos_id(self) -> int:
    return cast(int, self.backend.token_to_id(self.special_tokens["eos_token"]))

  @functools.cached_property
  def digest(self) -> str:
    """Hex SHA-256 of all that decides about ids, prompts and stops."""
    parts = [json.loads(self.backend.to_str()), dict(self.special_tokens), self.chat_template, sorted(self.stop_ids)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

  def encode(self, text: str, *, add_special: bool = True) -> list[int]:
    """Token ids of `text`. Special tokens spelled out in it become their ids.

    Args:
      text: any string.
      add_special: put BOS or EOS around it where the parent does. False for what `render_chat` returns.
    """
    return self.backend.encode(text, add_special_tokens=add_special).ids

  def encode_batch(self, texts: Sequence[str], *, add_special: bool = True) -> list[list[int]]:
    """`encode` of several texts, on all cores."""
    return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special)]

  def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
    """The text of `ids`. Bytes that are no UTF-8 become U+FFFD."""
    return self.backend.decode(list(ids), skip_special_tokens=skip_special)

  def render_chat(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
    """The prompt for a chat, to be encoded with `add_special=False`.

    Args:
      messages: dicts with `role` and `content`.
      add_generation_prompt: end with the header of the assistant's turn.

    Raises:
      PuzzleError: there is no template, or it rejects the messages.
    """
    if self.chat_template is None:
      raise PuzzleError("the parent's tokenizer has no chat template; give it plain text, or use an instruct parent")
    variables = {"messages": list(messages), "add_generation_prompt": add_generation_prompt, **self.special_tokens}
    return chat_template.render(self.chat_template, variables)

  def save(self, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, as `from_folder` and Transformers' AutoTokenizer read them."""
    around = self.encode("")
    bos_first = around[:1] == [self.bos_id]
    config: dict[str, Any] = {
      "tokenizer_class": "PreTrainedTokenizerFast",
      "clean_up_tokenization_spaces": False,
      "add_bos_token": bos_first,
      "add_eos_token": around[int(bos_first) :] == [self.eos_id],
      **self.special_tokens,
    }
    if self.chat_template is not None:
      config["chat_template"] = self.chat_template
    folder.mkdir(parents=True, exist_ok=True)
    self.backend.save(str(folder / "tokenizer.json"))
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

  @classmethod
  def from_folder(cls, folder: Path) -> "Tokenizer":
    """Reads a Hugging Face folder: tokenizer.json, and what there is of tokenizer_config.json,
    special_tokens_map.json, generation_config.json and chat_template.jinja.

    As in Transformers, tokenizer.json decides what goes around a text; an `add_bos_token` that it does not follow is
    refused, since older releases of Transformers did add that token.

    Raises:
      PuzzleError: no tokenizer.json, a file that cannot be read, no EOS token, or no BOS where one is announced.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
      raise PuzzleError(
        f"{folder} has no tokenizer.json; save it with a fast tokenizer (AutoTokenizer.save_pretrained)"
      )
    try:
      backend = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as e:
      if not _is_library_error(e):
        raise
      raise PuzzleError(f"{path} is no file of the tokenizers library ({e}); download it again") from e
    backend.no_truncation()
    backend.no_padding()
    config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    ends = _read_json(folder / "generation_config.json").get("eos_token_id") or []
    jinja = folder / "chat_template.jinja"
    try:
      special = {name: _content(config[name]) for name in _SPECIAL_NAMES if config.get(name)}
      ends = [operator.index(i) for i in (ends if isinstance(ends, list) else [ends])]
      if "eos_token" not in special and ends and (eos := backend.id_to_token(ends[0])):
        special["eos_token"] = eos
      template = jinja.read_text("utf-8") if jinja.is_file() else _default_template(config.get("chat_template"))
      tokenizer = cls._build(backend, special, template=template, ends=ends, source=str(folder))
    except (KeyError, OverflowError, TypeError, ValueError) as e:
      raise PuzzleError(
        f"{folder}: the tokenizer's files are not what Transformers writes ({e!r}); download them"
      ) from e
    if config.get("add_bos_token") and tokenizer.encode("")[:1] != [tokenizer.bos_id]:
      raise PuzzleError(
        f"{folder}: tokenizer_config.json says add_bos_token, and tokenizer.json puts no BOS before a text: the parent "
        "would not read what it was trained on; add it to the post_processor of tokenizer.json, or set add_bos_token "
        "to false"
      )
    return tokenizer

  @classmethod
  def from_gguf(cls, fields: Mapping[str, Any]) -> "Tokenizer":
    """Rebuilds a byte-level BPE tokenizer from the metadata of a GGUF file.

    Args:
      fields: contents by name: `{name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}`.

    Raises:
      PuzzleError: a kind of tokenizer that is not supported, or missing metadata.
    """

    def get(name: str) -> Any:
      try:
        return fields[f"tokenizer.ggml.{name}"]
      except KeyError:
        raise PuzzleError(f"the GGUF has no tokenizer.ggml.{name}; convert it again with a recent llama.cpp") from None

    model, pre = get("model"), fields.get("tokenizer.ggml.pre")
    if model != "gpt2" or not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
      raise PuzzleError(
        f"the GGUF's tokenizer (model {model!r}, pre {pre!r}) is not supported; supported: model 'gpt2' with pre "
        f"{', '.join(map(repr, PRE_TOKENIZERS))}. Use the parent's Hugging Face folder instead"
      )
    try:
      return cls._rebuilt(fields, get)
    except BaseException as e:
      if isinstance(e, PuzzleError) or not _is_library_error(e):
        raise
      raise PuzzleError(f"the GGUF's tokenizer is damaged ({e!r}); download the file again") from e

  @classmethod
  def _rebuilt(cls, fields: Mapping[str, Any], get: Callable[[str], Any]) -> "Tokenizer":
    tokens, types = get("tokens"), get("token_type")
    for name, expected in ((_TEMPLATE, str), (_ADD_BOS, bool), (_ADD_EOS, bool)):
      if not isinstance(fields.get(name), expected | None):
        raise PuzzleError(f"the GGUF's {name} is {fields[name]!r}, not of type {expected.__name__}; download it again")
    pre = fields["tokenizer.ggml.pre"]
    llama3 = pre == "llama-bpe"
    backend = tokenizers.Tokenizer(
      models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ", 1)) for merge in get("merges")],
        ignore_merges=llama3,
      )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(PRE_TOKENIZERS[pre]))
    backend.decoder = decoders.ByteLevel()
    added = [
      AddedToken(token, special=kind == _CONTROL, normalized=False)
      for token, kind in zip(tokens, types, strict=True)
      if kind in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(added)
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: _id(fields, role, len(tokens)) for name, role in roles.items()}
    special = {name: tokens[i] for name, i in ids.items() if i is not None}
    ends = [i for role in ("eot", "eom") if (i := _id(fields, role, len(tokens))) is not None]
    template = fields.get(_TEMPLATE)
    tokenizer = cls._build(backend, special, template=template, ends=ends, source="the GGUF")
    before = [special["bos_token"]] * bool("bos_token" in special and fields.get(_ADD_BOS, llama3))
    after = [special["eos_token"]] * bool(fields.get(_ADD_EOS, False))
    pairs = [(token, backend.token_to_id(token)) for token in {*before, *after}]
    backend.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=pairs)
    return tokenizer

  @classmethod
  def _build(
    cls,
    backend: tokenizers.Tokenizer,
    special: Mapping[str, str],
    *,
    template: str | None,
    ends: Sequence[int],
    source: str,
  ) -> "Tokenizer":
    """Checks the special tokens and gathers those that end a generation."""
    ids = {name: backend.token_to_id(token) for name, token in special.items()}
    for name in ("bos_token", "eos_token"):
      if name in special and ids[name] is None:
        raise PuzzleError(f"{source}: {name} {special[name]!r} is not in the tokenizer's vocabulary; correct its name")
    if "eos_token" not in special:
      raise PuzzleError(f"the tokenizer of {source} names no EOS token; set eos_token in its tokenizer_config.json")
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    stops = [ids["eos_token"], *ends, *(added[token] for token in _END_TOKENS if token in added)]
    kept = {name: token for name, token in special.items() if ids[name] is not None}
    return cls(backend, kept, template, frozenset(cast(list[int], stops)))


def _is_library_error(error: BaseException) -> bool:
  """The tokenizers library raises nothing narrower than Exception, and where its Rust panics, not even that."""
  return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _id(fields: Mapping[str, Any], role: str, size: int) -> int | None:
  """A special token of a GGUF file."""
  name = f"tokenizer.ggml.{role}_token_id"
  value = fields.get(name)
  if value is not None and not (type(value) is int and 0 <= value < size):
    raise PuzzleError(f"the GGUF's {name} is {value!r}, not a whole number below its {size} tokens; download it again")
  return value


def _read_json(path: Path) -> dict[str, Any]:
  return read_object(path, "download it again") if path.is_file() else {}


def _content(token: str | Mapping[str, Any]) -> str:
  return token if isinstance(token, str) else token["content"]


def _default_template(template: str | Sequence[Mapping[str, str]] | None) -> str | None:
  """A config holds one template, or several by name."""
  if template is None or isinstance(template, str):
    return template
  return {t["name"]: t["template"] for t in template}.get("default")
