"""Does vLLM compute what JAX computes? The parent, and a child with every kind of block that vLLM runs.

    python -m experiments.oracles.engine_fidelity --folder=fidelity --workdir=runs/quickstart --text=wikitext2.txt.gz
    python -m experiments.oracles.engine_fidelity --folder=fidelity [--engine_path=SITE]

The first, where JAX is, puts the child together from a quickstart's library, exports both in bfloat16 and writes what
JAX says of the same weights in fp32; the second, where vLLM is, holds vLLM against that and imports no JAX. Of 64
prompts of 64 tokens of a text: the likeliest token at each of the 32 positions behind (teacher forcing: the text goes
on as it does), and 32 tokens of greedy decoding. Bars: vLLM takes at least 95 % of JAX's teacher-forced tokens; where
greedy decoding first differs, JAX's two best logits are at most 0.3 apart. Writes
experiments/results/engine_fidelity.json.
"""

import datetime
import sys
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from experiments import RESULTS
from puzzle_jax.errors import PuzzleError
from puzzle_jax.progress import Progress
from puzzle_jax.serving import vllm_process
from puzzle_jax.serving.vllm_process import VLLM, Point
from puzzle_jax.store import read_json, write_json

PROMPTS, PROMPT, TOKENS = 64, 64, 32
BARS = {"teacher_forced_agreement": 0.95, "gap_at_first_difference": 0.3}
_FOLDER = flags.DEFINE_string("folder", None, "Of exports and JAX's tokens.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", "", "A finished quickstart: writes the folder; else vLLM is held against it.")
_TEXT = flags.DEFINE_string("text", "", "A .txt or .txt.gz file, with --workdir.")
_PYTHON = flags.DEFINE_string("engine_python", sys.executable, "The Python of the environment that has vLLM.")
_PATH = flags.DEFINE_string("engine_path", "", "A folder of packages that holds vLLM, if not of that environment.")


def write_references(folder: Path, workdir: Path, text: Path) -> None:
  """Exports, and JAX's tokens of both."""
  import puzzle_jax
  from experiments.oracles import jax_tokens, mixed_children, readers
  from puzzle_jax.serving.hf_export import export_hf

  run, words = puzzle_jax.open_run(workdir), readers.read_text(text)
  ids = run.tokenizer.encode(words)
  if len(ids) < PROMPTS * (PROMPT + TOKENS):
    raise PuzzleError(f"--text={text} holds {len(ids):,} tokens; {PROMPTS * (PROMPT + TOKENS):,} are needed")
  rows = jax_tokens.spread_rows(ids, PROMPTS, PROMPT + TOKENS)
  for name, changed in {"parent": {}, "child": mixed_children.VLLM}.items():
    made, out = folder / name, folder / "exports" / name
    made.parent.mkdir(parents=True, exist_ok=True)
    mixed_children.write_child(run, changed, made)
    export_hf(made, out, engine="vllm")
    found = jax_tokens.tokens(out, rows, prompt=PROMPT)
    write_json(folder / f"{name}.json", {"rows": rows.tolist(), "text": text.name, "blocks": changed} | found)


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


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  folder = Path(_FOLDER.value)
  try:
    if _WORKDIR.value:
      write_references(folder, Path(_WORKDIR.value), Path(_TEXT.value))
      return
    record = measure(folder, VLLM(python=_PYTHON.value, path=_PATH.value))
  except PuzzleError as e:
    sys.exit(f"error: {e}")
  write_json(RESULTS / "engine_fidelity.json", record)
  for name, model in record["models"].items():
    print(
      f"{name}: {model['teacher_forced_agreement']:.2%} of teacher-forced tokens agree; {model['prompts_that_differ']} "
      f"of {PROMPTS} greedy answers differ, at a gap of at most {model['gap_at_first_difference']:.3f}"
    )
  sys.exit(f"error: missed bars: {', '.join(record['missed'])}" if record["missed"] else 0)


if __name__ == "__main__":
  app.run(main)
