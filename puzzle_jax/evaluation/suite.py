"""What parent and child are held against each other on besides the run's held-out rows: texts at several context
lengths, and tasks."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from puzzle_jax import data
from puzzle_jax.data import builders, documents
from puzzle_jax.evaluation import likelihood, quality, tasks
from puzzle_jax.evaluation.preserved import Preserved, preserved
from puzzle_jax.store import file_digest

if TYPE_CHECKING:
  from puzzle_jax.config import EvaluationConfig
  from puzzle_jax.runs import Run


def task_name(path: str) -> str:
  """Of a task's file: `arc_easy` of `tasks/arc_easy.jsonl.gz`."""
  return Path(path).name.partition(".")[0]


def files(config: "EvaluationConfig") -> list[Path]:
  """The files that the evaluation reads.

  Raises:
    PuzzleError: a text is no file.
  """
  return [file for text in config.texts for file in documents.find_files(text)] + [Path(task) for task in config.tasks]


def texts(run: "Run") -> Iterator[tuple[str, Callable[[int], data.PackedText]]]:
  """By name, how each text is made into rows of a length: held-out rows of the run's own sources, then other files."""
  config, tokenizer, packed, start = run.config, run.tokenizer, run.packed("eval"), 0

  def relaid(rows: data.PackedText, length: int) -> data.PackedText:
    return data.relaid(rows, seq_len=length, eos_id=tokenizer.eos_id)

  def read(texts: list[str], length: int) -> data.PackedText:
    tokens = config.data.eval_tokens
    return data.pack(texts, tokenizer, seq_len=length, max_tokens=tokens, fewer=True, seed=config.data.seed)

  for source in run.store("data").get_json("data.json")["sources"]:
    rows = packed.rows(slice(start, start + source["rows"]["eval"]))
    start += rows.num_rows
    yield Path(source["name"]).name, functools.partial(relaid, rows)
  for pattern in config.evaluation.texts:
    found = documents.find_files(pattern)
    lines = [text for file in found for text in builders.read_file(file, config.data.text_field)]
    yield Path(pattern).name, functools.partial(read, lines)


def compare_texts(run: "Run", child: quality.Model, parent: quality.Model) -> list[dict[str, Any]]:
  """`quality.compare` of each text at each context length; nothing where there is only what the run measures anyway.

  A document shorter than a row has only itself for context.
  """
  config, own = run.config, run.config.data.seq_len
  lengths = config.evaluation.contexts or (own,)
  if lengths == (own,) and not config.evaluation.texts and len(config.data.sources) == 1:
    return []
  found = []
  for name, rows_of in texts(run):
    for length in sorted(set(lengths)):
      packed = rows_of(length)
      if packed.num_rows:
        rows = max(config.evaluation.batch_rows * own // length, 1)
        compared = quality.compare(child, parent, packed, batch_rows=rows)
        found.append({"text": name, "context": length, "rows": packed.num_rows} | compared)
      else:
        run.progress.say(f"evaluation: {name} has no row of {length} tokens to measure on")
  return found


@dataclasses.dataclass(frozen=True)
class TaskResults:
  """Of parent and child on all tasks.

  Attributes:
    tasks: by name the file's SHA-256, the number of items, and what is `preserved` of the accuracy and, where there
      are choices, of the accuracy by likelihood a character, `normalised`.
    mean: the same of the accuracy on all tasks, each of the same weight; None without tasks.
    answers: by `TASK.MODEL` and `TASK.MODEL.normalised`, bool [items].
  """

  tasks: Mapping[str, dict[str, Any]]
  mean: Preserved | None
  answers: Mapping[str, np.ndarray]

  def to_json(self) -> dict[str, Any]:
    """Without the single answers."""
    return {"tasks": dict(self.tasks), "mean": dataclasses.asdict(self.mean)} if self.mean else {"tasks": {}}


def compare_tasks(run: "Run", child: quality.Model, parent: quality.Model) -> TaskResults:
  """Answers of both models to the config's tasks, and what the child preserves."""
  config, found, answers, pairs = run.config.evaluation, {}, {}, []
  for path in config.tasks:
    name, items = task_name(path), tasks.read_items(path, limit=config.task_items or None, targets=True)
    requests, both = tasks.requests(items, run.tokenizer), []
    for model, of in (("parent", parent), ("child", child)):
      with run.progress.bar(f"{name}, {model}", total=len(requests), unit="choice") as bar:
        likelihoods: list[Any] = [None] * len(requests)
        for index, one in likelihood.score(*of, requests, batch_tokens=config.batch_rows * run.config.data.seq_len):
          likelihoods[index] = one
          bar.update()
      both.append(tasks.answers(items, likelihoods))
      answers[f"{name}.{model}"] = both[-1].plain
      if both[-1].normalised is not None:
        answers[f"{name}.{model}.normalised"] = both[-1].normalised
    pairs.append((both[0].plain, both[1].plain))
    found[name] = {"sha256": file_digest(Path(path)), "items": len(items)}
    found[name]["preserved"] = dataclasses.asdict(preserved(pairs[-1:]))
    if both[0].normalised is not None and both[1].normalised is not None:
      pair = (both[0].normalised, both[1].normalised)
      found[name]["normalised"] = dataclasses.asdict(preserved([pair]))
  return TaskResults(found, preserved(pairs) if pairs else None, answers)
