"""EleutherAI's lm-evaluation-harness on parents and children (the extra `lm-eval`): any of its tasks runs here.

    lm_eval.simple_evaluate(model=harness.HarnessModel(run.child), tasks=["arc_easy"])

Tokens are what the harness's own Hugging Face backend makes of the exported checkpoint: in fp32 both judge alike.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluation import likelihood
from puzzle_jax.model import generation
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.progress import Progress

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts


class HarnessModel(TemplateLM):
  """A model as the harness asks it.

  Args:
    model: parent or child, fp32.
    batch_tokens: read at once for likelihoods, in rows of like length.
    batch_rows: answers that are written at once.
    max_gen_toks: longest answer where a task does not say.
    seed: of answers that are drawn.
    quiet: no progress bars.
  """

  def __init__(
    self,
    model: LanguageModel,
    *,
    batch_tokens: int = 4096,
    batch_rows: int = 16,
    max_gen_toks: int = 256,
    seed: int = 0,
    quiet: bool = False,
  ):
    super().__init__()
    if min(batch_tokens, batch_rows, max_gen_toks) < 1:
      raise PuzzleError(
        f"batch_tokens={batch_tokens}, batch_rows={batch_rows} and max_gen_toks={max_gen_toks}: each 1 up"
      )
    self.model, self.tokenizer = model, model.tokenizer
    self._batch_tokens, self._batch_rows, self._max_gen_toks, self._seed = batch_tokens, batch_rows, max_gen_toks, seed
    self._progress = Progress(quiet=quiet)

  @property
  def eot_token_id(self) -> int:
    """What ends a text."""
    return self.model.tokenizer.eos_id

  @property
  def prefix_token_id(self) -> int:
    """What a text without a context comes behind."""
    return likelihood.start_id(self.model.tokenizer)

  @property
  def max_length(self) -> int:
    """The model's context, in tokens."""
    return self.model.architecture.config.max_context

  @property
  def tokenizer_name(self) -> str:
    """For the harness's cache of requests."""
    return f"puzzle_jax-{self.model.tokenizer.digest}"

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
    """Tokens of a text; one that begins with the start token gets no other unless asked for."""
    del kwargs
    if add_special_tokens is None:
      add_special_tokens = not string.startswith(self.model.tokenizer.decode([self.prefix_token_id]))
    return self.model.tokenizer.encode(string, add_special=add_special_tokens)

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """The prompt of a chat, by the parent's template."""
    return self.model.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)

  def _loglikelihood_tokens(
    self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
  ) -> list[tuple[float, bool]]:
    """Of continuations; what of a context does not fit is left out at its beginning."""
    del kwargs
    wanted = []
    for _, context, continuation in requests:
      if len(continuation) > self.max_length:
        raise PuzzleError(f"a continuation of {len(continuation)} tokens is longer than the context, {self.max_length}")
      ids = (*context, *continuation)[-(self.max_length + 1) :]
      wanted.append(likelihood.Request(ids, len(ids) - len(continuation)))
    model, found = self.model, [(0.0, False)] * len(wanted)
    progress = Progress(quiet=True) if disable_tqdm else self._progress
    with progress.bar("likelihoods", total=len(wanted), unit="request") as bar:
      for index, one in likelihood.score(model.architecture, model.params, wanted, batch_tokens=self._batch_tokens):
        found[index] = (one.log_p, one.greedy)
        if requests[index][0] is not None:
          self.cache_hook.add_partial("loglikelihood", requests[index][0], found[index])
        bar.update()
    return found

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
    """Of whole texts, in windows of the context's length that share one token."""
    windows: list[tuple[Any, list[int], list[int]]] = []
    counts = []
    for (text,) in (request.args for request in requests):
      found = utils.get_rolling_token_windows(
        self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
      )
      here = [(None, *utils.make_disjoint_window(window)) for window in found]
      windows += here
      counts.append(len(here))
    values, totals = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)), []
    for request, count in zip(requests, counts, strict=True):
      totals.append(sum(next(values)[0] for _ in range(count)))
      self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
    return totals

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """Answers up to the first of a request's stop texts; what of a prompt does not fit is left out at its beginning."""
    del disable_tqdm
    wanted, stops, tokenizer = [], [], self.model.tokenizer
    for prompt, options in (request.args for request in requests):
      longest = self._limit(options)
      ids = self.tok_encode(prompt)[-(self.max_length - longest) :]
      seed = int.from_bytes(hashlib.sha256(f"{self._seed} {prompt}".encode()).digest()[:3])
      wanted.append(generation.Request(tuple(ids), longest, temperature=_temperature(options), seed=seed))
      until = options.get("until") or []
      stops.append([stop for stop in ([until] if isinstance(until, str) else until) if stop])

    def has_stop(index: int, answer: list[int]) -> bool:
      text = tokenizer.decode(answer, skip_special=True) if stops[index] else ""
      return any(stop in text for stop in stops[index])

    answers = generation.generate(
      self.model.architecture,
      self.model.params,
      wanted,
      stop_ids=tokenizer.stop_ids,
      batch_rows=self._batch_rows,
      ended=has_stop,
    )
    texts = [_cut(tokenizer.decode(ids, skip_special=True), stop) for ids, stop in zip(answers, stops, strict=True)]
    for request, text in zip(requests, texts, strict=True):
      self.cache_hook.add_partial("generate_until", request.args, text)
    return texts

  def _limit(self, options: Mapping[str, Any]) -> int:
    longest = next((int(options[name]) for name in _LIMITS if options.get(name) is not None), self._max_gen_toks)
    if not 0 < longest < self.max_length:
      raise PuzzleError(f"max_gen_toks={longest} must be at least 1 and leave room in the context of {self.max_length}")
    return longest


def _temperature(options: Mapping[str, Any]) -> float:
  """0 is greedy."""
  temperature = float(options.get("temperature") or 0.0)
  if not options.get("do_sample", temperature > 0):
    temperature = 0.0
  unknown = {"num_beams": 1} | ({"top_p": 1.0, "top_k": 0} if temperature else {})
  for name, neutral in unknown.items():
    if options.get(name) not in (None, neutral):
      raise PuzzleError(f"the task asks for {name}={options[name]}, which is not there; run it with {name}={neutral}")
  return temperature


def _cut(text: str, stops: Sequence[str]) -> str:
  for stop in stops:
    text = text.partition(stop)[0]
  return text
