"""Text that the parent writes itself: for instruct parents without an open corpus, the data that fit best.

Documents are numbered, and number i is the same whatever else is asked for: its kind, prompt, temperature and random
numbers come from (seed, i). All devices of the process write at once, each its share. Kinds of prompts: `start`, the
bare start token; `text`, the first words of a paragraph of another source; `chat`, the chat template, whose user's turn
the parent writes first and then answers. Parts of so many documents are saved as they come; a killed run goes on with
the first part that is missing.
"""

import dataclasses
import itertools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax import store
from puzzle_jax.data import builders, documents
from puzzle_jax.data.documents import DocumentSource
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import decoder, generation
from puzzle_jax.model.generation import Request
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.progress import Progress
from puzzle_jax.tokenizer import Tokenizer

PARENT = "parent"
KINDS = ("start", "text", "chat")
_LEAST, _MOST = 4, 24  # words of a paragraph, and tokens of it that are given
_PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"  # where the user's words go in a template


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How the parent writes text (the source `parent`).

  Attributes:
    kinds: of prompts, in turn; `KINDS`, some of them several times where more of them are wanted. `chat` is left out
      where the parent has no chat template.
    temperatures: in turn.
    prompts: other sources, as in `DataConfig.source`, the paragraphs of whose documents `text` begins with; each is
      taken as often as the others.
    max_tokens: longest document.
    batch_rows: documents that a device writes at once.
    dtype: of weights, matrix products and KV cache.
  """

  kinds: tuple[str, ...] = KINDS
  temperatures: tuple[float, ...] = (0.7, 1.0)
  prompts: str = documents.STDLIB
  max_tokens: int = 512
  batch_rows: int = 32
  dtype: str = "float32"

  @property
  def sources(self) -> tuple[str, ...]:
    """Of `prompts`, one by one."""
    return documents.named(self.prompts)

  @property
  def part_documents(self) -> int:
    """Documents that are saved together: enough for the batch to be full most of the time."""
    return 8 * self.batch_rows

  def __post_init__(self) -> None:
    if not self.kinds or set(self.kinds) - set(KINDS):
      raise PuzzleError(f"data.sampling.kinds={self.kinds} must name some of {', '.join(KINDS)}")
    if not self.temperatures or min(self.temperatures) <= 0:
      raise PuzzleError(f"data.sampling.temperatures={self.temperatures} must be above 0: at 0 all texts are alike")
    if PARENT in self.sources or not all(self.sources):
      raise PuzzleError(
        f"data.sampling.prompts={self.prompts!r} must name texts that begin the parent's documents, separated by commas"
      )
    if self.max_tokens < 4 * _MOST:
      raise PuzzleError(f"data.sampling.max_tokens={self.max_tokens} must be at least {4 * _MOST}")
    if self.batch_rows < 1:
      raise PuzzleError(f"data.sampling.batch_rows={self.batch_rows} must be at least 1")
    if self.dtype not in ("float32", "bfloat16"):
      raise PuzzleError(f"data.sampling.dtype={self.dtype!r} is not one of float32, bfloat16")


class Sampler:
  """Writes documents by number.

  Args:
    model: the parent.
    config: how.
    texts: of each source, those whose paragraphs begin documents of the kind `text`.
    seed: of everything.
  """

  def __init__(self, model: LanguageModel, config: SamplingConfig, texts: Sequence[Sequence[str]], *, seed: int):
    self._architecture, self._tokenizer, self._config, self._seed = model.architecture, model.tokenizer, config, seed
    params = jax.tree.map(lambda w: w.astype(jnp.dtype(config.dtype)), model.params)
    self._params = {device: jax.device_put(params, device) for device in jax.local_devices()}
    self._texts = texts
    self._most = min(config.max_tokens, model.architecture.config.max_context)
    has_template = model.tokenizer.chat_template is not None
    self._kinds = [kind for kind in config.kinds if kind != "chat" or has_template]
    if not self._kinds:
      raise PuzzleError("data.sampling.kinds=('chat',), but the parent has no chat template; name another kind")
    bos = model.tokenizer.bos_id
    self._start = [model.tokenizer.eos_id if bos is None else bos]
    self._added = model.tokenizer.encode("")[:1] == self._start  # to every document, when it is read again

  def write(self, first: int, count: int) -> list[str]:
    """The documents `first`, `first` + 1, …; one of which nothing came is empty."""
    numbers = range(first, first + count)
    kinds = {i: self._kinds[i % len(self._kinds)] for i in numbers}
    prompts = {i: self._start if kind == "start" else self._words(i) for i, kind in kinds.items() if kind != "chat"}
    if chats := [i for i, kind in kinds.items() if kind == "chat"]:
      said = self._answers(dict.fromkeys(chats, self._chat_header()), turn=0, longest=self._most // 4)
      prompts |= {i: self._chat(words) for i, words in said.items() if words}
    texts = dict.fromkeys(numbers, "")
    for i, answer in self._answers(prompts, turn=1, longest=self._most).items():
      if answer:
        texts[i] = self._text([*([] if kinds[i] == "start" else prompts[i]), *answer])
    return list(texts.values())

  def _answers(self, prompts: Mapping[int, list[int]], *, turn: int, longest: int) -> dict[int, list[int]]:
    """What the parent says to prompts, by number of the document; both together have `_most` tokens at most."""
    temperatures = self._config.temperatures
    requests = {
      i: Request(
        tuple(prompt),
        min(longest, self._most - len(prompt)),
        temperature=temperatures[i // len(self._kinds) % len(temperatures)],
        seed=int(np.random.SeedSequence((self._seed, i, turn)).generate_state(1)[0] >> 1),
      )
      for i, prompt in prompts.items()
      if len(prompt) < self._most
    }
    stopped = threading.Event()

    def goes_on(index: int, answer: list[int]) -> bool:
      del index, answer
      if stopped.is_set():
        raise PuzzleError("another device's documents were given up")
      return False

    def share(k: int, device: jax.Device, params: decoder.Tree) -> dict[int, list[int]]:
      own = dict(itertools.islice(requests.items(), k, None, len(self._params)))
      with jax.default_device(device):
        answers = generation.generate(
          self._architecture,
          params,
          list(own.values()),
          stop_ids=self._tokenizer.stop_ids,
          batch_rows=self._config.batch_rows,
          dtype=jnp.dtype(self._config.dtype),
          ended=goes_on,
        )
      return dict(zip(own, answers, strict=True))

    found: dict[int, list[int]] = {}
    with ThreadPoolExecutor(len(self._params)) as pool:
      try:
        for part in pool.map(share, itertools.count(), self._params, self._params.values()):
          found |= part
      except BaseException:
        stopped.set()  # else the pool, and with it SIGTERM, would wait until all is written
        raise
    return found

  def _words(self, number: int) -> list[int]:
    """The first words of some paragraph."""
    rng = np.random.default_rng((self._seed, number))
    texts = self._texts[int(rng.integers(len(self._texts)))]
    text = texts[int(rng.integers(len(texts)))]
    paragraphs = [line.strip() for line in text.split("\n") if len(line.split()) >= _LEAST] or [text.strip()]
    words = self._tokenizer.encode(paragraphs[int(rng.integers(len(paragraphs)))], add_special=False)
    return self._start * self._added + words[: int(rng.integers(_LEAST, _MOST + 1))]

  def _chat_header(self) -> list[int]:
    """The template up to where the user's words go."""
    prompt = self._tokenizer.render_chat([{"role": "user", "content": _PLACE}])
    return self._tokenizer.encode(prompt.partition(_PLACE)[0], add_special=False)

  def _chat(self, words: list[int]) -> list[int]:
    """The prompt for the assistant's answer to what the user said."""
    message = {"role": "user", "content": self._tokenizer.decode(words, skip_special=True).strip()}
    return self._tokenizer.encode(self._tokenizer.render_chat([message]), add_special=False)

  def _text(self, ids: list[int]) -> str:
    """As it is stored: without a start token that the tokenizer adds, or half a character at a cut end."""
    text = self._tokenizer.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")
    return text.removeprefix(self._tokenizer.decode(self._start)) if self._added else text


def load(
  sampler: Callable[[], Sampler],
  tokenizer: Tokenizer,
  *,
  folder: Path,
  part_documents: int,
  train_tokens: int,
  heldout_tokens: int,
  heldout_fraction: float,
  progress: Progress,
) -> DocumentSource:
  """Has the parent write until both parts hold enough tokens, and prepares the texts as a dataset.

  Args:
    sampler: makes the writer, if there is anything to write.
    tokenizer: the parent's.
    folder: of parts and dataset, for this sampler alone: what is there already is not written again.
    part_documents: documents that are saved together.
    train_tokens: wanted in the part to learn from.
    heldout_tokens: wanted in the part to measure on.
    heldout_fraction: expected share of the documents to hold out.
    progress: for the bar.

  Raises:
    PuzzleError: the parent writes nothing new.
  """
  found = {True: 0, False: 0}  # tokens by whether they are held out
  seen: set[int] = set()
  parts: list[Path] = []
  writer: Sampler | None = None
  total = int(max(train_tokens / (1 - heldout_fraction), heldout_tokens / heldout_fraction))
  with progress.bar("parent's text", total=total, unit="token") as bar:
    while found[False] < train_tokens or found[True] < heldout_tokens:
      path = folder / f"part_{len(parts):05d}.jsonl"
      if not path.is_file():
        writer = writer or sampler()
        texts = [text for text in writer.write(len(parts) * part_documents, part_documents) if text.strip()]
        with store.replacing(path) as aside:
          aside.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
      parts.append(path)
      texts, before = list(builders.read_file(path, "text")), sum(found.values())
      for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        if (key := documents.key(text)) not in seen:
          seen.add(key)
          found[documents.is_heldout(key, heldout_fraction)] += len(ids) + (ids[-1:] != [tokenizer.eos_id])
      gained = sum(found.values()) - before
      bar.update(gained)
      if not gained:
        raise PuzzleError(
          f"the parent writes nothing new after {before:,} tokens; raise data.sampling.temperatures "
          "or data.sampling.max_tokens, or ask for fewer tokens"
        )
  builder = builders.TextFiles(data_dir=folder / str(len(parts)), paths=parts, text_field="text")
  return documents.split(PARENT, builders.read_prepared(builder, quiet=True), heldout_fraction=heldout_fraction)
