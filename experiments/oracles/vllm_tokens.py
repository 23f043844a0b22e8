"""What vLLM says comes next, held against what JAX said (`jax_tokens`); imports no JAX."""

import datetime
from pathlib import Path
from typing import Any

from puzzle_jax.errors import PuzzleError
from puzzle_jax.progress import Progress
from puzzle_jax.serving import vllm_process
from puzzle_jax.serving.vllm_process import VLLM, Point
from puzzle_jax.store import read_json

PROMPTS, PROMPT, TOKENS = 64, 128, 32
BARS = {"teacher_forced_agreement": 0.95, "gap_at_first_difference": 0.3}


def questions(reference: dict[str, Any]) -> tuple[Point, Point]:
  """What vLLM is asked: the next token of every beginning of the rows, and greedy continuations."""
  beginnings = [row[: PROMPT + i] for row in reference["rows"] for i in range(TOKENS)]
  prompts = [row[:PROMPT] for row in reference["rows"]]
  return (
    {"kind": "continue", "prompts": beginnings, "output": 1},
    {"kind": "continue", "prompts": prompts, "output": TOKENS},
  )


def compared(reference: dict[str, Any], forced: list[list[int]], greedy: list[list[int]]) -> dict[str, Any]:
  """vLLM's tokens against JAX's."""
  expected = [token for row in reference["forced"] for token in row]
  agreed = sum(token == ours for (token,), ours in zip(forced, expected, strict=True))
  gaps = []
  for theirs, ours, gap in zip(greedy, reference["greedy"], reference["greedy_gaps"], strict=True):
    differs = [a != b for a, b in zip(theirs, ours, strict=True)]
    if any(differs):
      gaps.append(gap[differs.index(True)])
  return {
    "teacher_forced_agreement": agreed / len(expected),
    "teacher_forced_tokens": len(expected),
    "prompts": len(greedy),
    "prompts_that_differ": len(gaps),
    "gap_at_first_difference": max(gaps, default=0.0),
    "gaps_at_first_differences": sorted(gaps, reverse=True),
  }


def measure(folder: Path, engine: VLLM) -> dict[str, Any]:
  """The record; its `missed` names the bars that are missed."""
  models: dict[str, Any] = {}
  with Progress().bar("vLLM", total=4, unit="question") as bar:
    for name in ("parent", "child"):
      if not (folder / f"{name}.json").is_file():
        raise PuzzleError(f"{folder} has no {name}.json; write it first, with --workdir and --text")
      reference, exported = read_json(folder / f"{name}.json"), folder / "exports" / name
      asked = questions(reference)
      vocab = read_json(exported / "config.json")["vocab_size"]
      settings = engine.settings(exported, max_length=PROMPT + TOKENS, batches=(PROMPTS,), dummy=False)
      place = folder / "vllm" / name
      found = vllm_process.measure(engine, settings, asked, vocab_size=vocab, folder=place, tick=bar.update)
      blocks = {k: reference[k] for k in ("blocks", "text", "jax")}
      models[name] = blocks | compared(reference, *map(found.tokens, asked)) | {"engine": found.engine}
  missed = [
    f"{name}: {bar}"
    for name, model in models.items()
    for bar, limit in BARS.items()
    if (model[bar] < limit if bar == "teacher_forced_agreement" else model[bar] > limit)
  ]
  return {
    "command": "python -m experiments.oracles.engine_fidelity --folder=fidelity",
    "date": datetime.date.today().isoformat(),
    "hardware": models["child"]["engine"]["hardware"],
    "versions": {"vllm": models["child"]["engine"]["version"], "jax": models["child"]["jax"]},
    "prompts": {"number": PROMPTS, "tokens": PROMPT, "behind": TOKENS},
    "models": models,
    "bars": BARS,
    "missed": missed,
  }
