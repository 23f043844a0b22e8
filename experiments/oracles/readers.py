"""One model file in several engines, all given the same token ids: logits and perplexity."""

import functools
import gzip
import importlib.metadata
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.special

from puzzle_jax.errors import PuzzleError
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.progress import Progress

ROW, LOGITS_ROWS = 512, 2


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
  model.load_state_dict(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})  # tied
  with torch.inference_mode():
    for row in rows:
      yield model(torch.from_numpy(row)[None]).logits[0].numpy()


def folder_logits(folder: Path, rows: np.ndarray, *, dtype: str) -> Iterator[np.ndarray]:
  """Of an export's directory in Transformers, by the modelling files that travel with it."""
  import torch
  from transformers import AutoModelForCausalLM

  model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=getattr(torch, dtype)).eval()
  with torch.inference_mode():
    for row in rows:
      yield model(torch.from_numpy(row)[None]).logits[0].float().numpy()


def llama(gguf: Path, **settings: Any) -> Any:
  """llama.cpp with a model."""
  import llama_cpp

  return llama_cpp.Llama(str(gguf), verbose=False, **settings)


def llamacpp_logits(gguf: Path, rows: np.ndarray) -> Iterator[np.ndarray]:
  """Of llama.cpp, each row in an empty cache."""
  model = llama(gguf, n_ctx=ROW, logits_all=True)
  for row in rows:
    model.reset()
    model.eval(row.tolist())
    yield model.scores


ENGINES = {"jax": jax_logits, "transformers": transformers_logits, "llamacpp": llamacpp_logits} | {
  f"transformers_{dtype}": functools.partial(folder_logits, dtype=dtype) for dtype in ("float32", "bfloat16")
}


class Reading(NamedTuple):
  """Of an engine: perplexity, logits [LOGITS_ROWS, T, V] of the first rows, wall time with opening and scoring."""

  perplexity: float
  logits: np.ndarray
  seconds: float


def read(name: str, gguf: Path, rows: np.ndarray) -> Reading:
  """Runs an engine; each row predicts all of its tokens but the first."""
  nats: list[float] = []
  first: list[np.ndarray] = []
  begin = time.perf_counter()
  with Progress().bar(name, total=len(rows), unit="row") as bar:
    for row, logits in zip(rows, ENGINES[name](gguf, rows), strict=True):
      log_p = scipy.special.log_softmax(logits[:-1].astype(np.float64), axis=1)
      nats.append(-np.mean(log_p[np.arange(ROW - 1), row[1:]]))
      if len(first) < LOGITS_ROWS:
        first.append(logits.copy())
      bar.update()
  return Reading(float(np.exp(np.mean(nats))), np.stack(first), time.perf_counter() - begin)


def installed(packages: Iterable[str]) -> dict[str, str]:
  """Versions of packages; raises PuzzleError for one that is not there."""
  try:
    return {package: importlib.metadata.version(package) for package in packages}
  except importlib.metadata.PackageNotFoundError as e:
    raise PuzzleError(f"{e.name} is not installed: run `pip install {e.name}`") from e


def read_text(path: Path) -> str:
  """A text file, compressed or not."""
  if not path.is_file():
    raise PuzzleError(f"--text={path} does not exist; give a .txt or .txt.gz file")
  return (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
