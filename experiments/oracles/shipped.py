"""A flagship child's exported directory on a CPU: is what was measured what is shipped?

    pip install llama-cpp-python
    python -m experiments.oracles.shipped --child=CHILD --text=wikitext2_valid.txt.gz

CHILD is a copy of a run's `export/hf`; nothing else of the run is needed. The perplexity of its bfloat16 weights on the
text's first 8,192 tokens: in JAX and in Transformers in fp32, in Transformers in bfloat16, and in llama.cpp as an F16
file. Bars: Transformers in fp32 within 1e-4 of JAX's, llama.cpp's within 0.5 %, no token cut otherwise. Where
experiments/results/flagship.json has the child, its perplexity (within 1 %; the run's weights were fp32) and KL on the
whole text are taken again as the run's evaluation took them, in half an hour on two cores. Writes
experiments/results/flagship_shipped.json.
"""

import datetime
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from configs import flagship
from experiments import RESULTS
from experiments.oracles.readers import ROW, installed, llama, read, read_text
from puzzle_jax import data
from puzzle_jax.config import RunConfig
from puzzle_jax.costs import jax_timing
from puzzle_jax.data import builders
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluation import quality
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.parents import EMBEDDED, open_parent
from puzzle_jax.runs import versions
from puzzle_jax.serving.export import export
from puzzle_jax.store import file_digest, read_json, temporary_folder, write_json

_CHILD = flags.DEFINE_string("child", None, "A copy of a run's export/hf.", required=True)
_TEXT = flags.DEFINE_string("text", None, "A .txt or .txt.gz file that the run was evaluated on.", required=True)
ROWS = 16
BARS = {"transformers": 1e-4, "llamacpp": 5e-3, "as_evaluated": 1e-2}
JAX, TRANSFORMERS, LLAMACPP = "JAX, fp32", "Transformers, fp32", "llama.cpp, F16"
RECORD = RESULTS / "flagship_shipped.json"


def measure(child: Path, text: Path) -> dict[str, Any]:
  """The record; its `missed` names the bars that are missed."""
  packages = versions() | installed(("gguf", "llama-cpp-python", "torch", "transformers"))
  words, shipped = read_text(text), open_parent(str(child))
  ids = shipped.tokenizer().encode(words)
  if len(ids) < ROWS * ROW:
    raise PuzzleError(f"--text={text} holds {len(ids):,} tokens; give a text of at least {ROWS * ROW:,}")
  rows = np.array(ids[: ROWS * ROW]).reshape(-1, ROW)
  perplexity = {JAX: read("jax", child, rows).perplexity}
  perplexity[TRANSFORMERS] = read("transformers_float32", child, rows).perplexity
  perplexity["Transformers, bf16"] = read("transformers_bfloat16", child, rows).perplexity
  with temporary_folder() as folder:
    file = Path(folder) / "child.gguf"
    export(child, file, engine="llama_cpp", parent=EMBEDDED)
    perplexity[LLAMACPP] = read("llamacpp", file, rows).perplexity
    theirs = llama(file, vocab_only=True).tokenize(words.encode(), add_bos=False, special=True)
  again = as_evaluated(child, text, [block.name for block in shipped.architecture.blocks])
  off = {
    "transformers": perplexity[TRANSFORMERS] / perplexity[JAX] - 1,
    "llamacpp": perplexity[LLAMACPP] / perplexity[JAX] - 1,
  }
  if again:
    off["as_evaluated"] = again["shipped"]["perplexity"] / again["measured"]["perplexity"] - 1
  different = sum(a != b for a, b in itertools.zip_longest(ids, theirs))
  return {
    "command": f"python -m experiments.oracles.shipped --child={child.name} --text={text.name}",
    "date": datetime.date.today().isoformat(),
    "hardware": jax_timing.hardware(),
    "versions": packages,
    "text": {"name": text.name, "sha256": file_digest(text)},
    "weights": {file.name: file_digest(file) for file in sorted(child.glob("*.safetensors"))},
    "tokens": ROWS * ROW,
    "perplexity": perplexity,
    "token_ids_that_differ": different,
    "as_evaluated": again,
    "bars": BARS,
    "missed": [name for name, value in off.items() if abs(value) > BARS[name]] + ["token ids"] * bool(different),
  }


def as_evaluated(child: Path, text: Path, blocks: list[str]) -> dict[str, Any] | None:
  """Perplexity and KL of the shipped child as the run's evaluation takes them at its shortest context, and what that
  measured; None where the flagship's record has no such child or text."""
  record = read_json(path) if (path := RESULTS / "flagship.json").is_file() else {"children": []}
  found = (one for run in record["children"] if run["blocks"] == blocks for one in run.get("texts", ()))
  measured = min((one for one in found if one["text"] == text.name), key=lambda one: one["context"], default=None)
  if measured is None:
    return None
  config, context = RunConfig.from_dict(flagship.get_config().to_dict()).data, measured["context"]
  models = [LanguageModel.open(source) for source in (child, EMBEDDED)]
  rows = data.pack(
    list(builders.read_file(text, config.text_field)),
    models[0].tokenizer,
    seq_len=context,
    max_tokens=measured["rows"] * context,
    seed=config.seed,
  )
  ours, parents = ((model.architecture, model.params) for model in models)
  again = quality.compare(ours, parents, rows, batch_rows=4)
  if again["tokens"] != measured["tokens"]:
    raise PuzzleError(f"the run was evaluated on {measured['tokens']:,} tokens of {text.name}, here are others")
  both = {"shipped": again, "measured": measured}
  kept = {side: {key: values[key] for key in ("perplexity", "kl")} for side, values in both.items()}
  return {"context": context, "tokens": again["tokens"]} | kept


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  try:
    record = measure(Path(_CHILD.value), Path(_TEXT.value))
  except PuzzleError as e:
    sys.exit(f"error: {e}")
  write_json(RECORD, record)
  for reader, value in record["perplexity"].items():
    print(f"{reader:<20} {value:.4f}")
  sys.exit(f"error: missed bars: {', '.join(record['missed'])}" if record["missed"] else 0)


if __name__ == "__main__":
  app.run(main)
