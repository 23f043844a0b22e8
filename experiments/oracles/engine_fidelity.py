"""Does vLLM compute what JAX computes? The parent, and a child with every kind of block that vLLM runs.

    python -m experiments.oracles.engine_fidelity --folder=fidelity --workdir=runs/quickstart --text=TEXT.txt.gz
    python -m experiments.oracles.engine_fidelity --folder=fidelity [--engine_path=SITE]

The first, where JAX is, puts the child together from a quickstart's library, exports both in bfloat16 and writes what
JAX says of the same weights in fp32; the second, where vLLM is, holds vLLM against that and imports no JAX. Of 64
prompts of 128 tokens of a text: the likeliest token at each of the 32 positions behind (teacher forcing: the text goes
on as it does), and 32 tokens of greedy decoding. Bars: vLLM takes at least 95 % of JAX's teacher-forced tokens; where
greedy decoding first differs, JAX's two best logits are at most 0.3 apart. Writes
experiments/results/engine_fidelity.json.
"""

import sys
from pathlib import Path

from absl import app, flags, logging

from experiments import RESULTS
from experiments.oracles import vllm_tokens
from experiments.oracles.vllm_tokens import PROMPT, PROMPTS, TOKENS
from puzzle_jax.errors import PuzzleError
from puzzle_jax.serving.vllm_process import VLLM
from puzzle_jax.store import write_json

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


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  folder = Path(_FOLDER.value)
  try:
    if _WORKDIR.value:
      write_references(folder, Path(_WORKDIR.value), Path(_TEXT.value))
      return
    record = vllm_tokens.measure(folder, VLLM(python=_PYTHON.value, path=_PATH.value))
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
