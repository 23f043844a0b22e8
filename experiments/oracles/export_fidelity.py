"""Exported children in the engines that shall run them: do they compute what JAX computes, and how fast on a CPU?

    pip install llama-cpp-python
    python -m experiments.oracles.export_fidelity --workdir=runs/quickstart --text=wikitext2_valid.txt.gz

Two children of SmolLM2 are put together from the quickstart's library and mean-pooled KV heads: one with every kind of
block for Transformers, one with what llama.cpp runs. Bars: Transformers' fp32 logits equal JAX's to 1e-4 of the
largest; in bf16 JAX's error (against fp32 on the same weights) is at most 1.25 times Transformers' own; llama.cpp's
perplexity is within 0.5 % of JAX's on the same tokens. Beside it: what 8-bit floats cost, and speed and size of the
quickstart's child in llama.cpp against the parent's own Q4_1 file. Writes experiments/results/export_fidelity.json.
"""

import datetime
import itertools
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.special
from absl import app, flags, logging

from experiments import RESULTS
from experiments.oracles.mixed_children import CHANGED, write_child
from experiments.oracles.readers import LOGITS_ROWS, ROW, installed, llama, read, read_text
from puzzle_jax import open_run
from puzzle_jax.costs import jax_timing
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import decoder
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.progress import Progress
from puzzle_jax.runs import versions
from puzzle_jax.serving.export import export
from puzzle_jax.serving.gguf_export import export_gguf
from puzzle_jax.serving.hf_export import export_hf
from puzzle_jax.store import file_digest, temporary_folder, write_json

PERPLEXITY_ROWS, SPEED_ROWS = 16, 8
THREADS, ROUNDS, FASTEST, PROMPT, ANSWER = 2, 11, 3, 64, 192
BARS = {"fp32": 1e-4, "bf16": 1.25, "perplexity": 5e-3}
TYPES = ("F16", "Q8_0", "Q4_0", "Q4_1")
_WORKDIR = flags.DEFINE_string("workdir", None, "A finished quickstart.", required=True)
_TEXT = flags.DEFINE_string("text", None, "A .txt or .txt.gz file; its first 8,192 tokens count.", required=True)
RECORD = RESULTS / "export_fidelity.json"


def jax_logits(source: Path, rows: np.ndarray, *, dtype: Any) -> np.ndarray:
  """Next-token logits [R, T, V] of a model's directory, in fp32."""
  model = LanguageModel.open(source, dtype=dtype)
  hidden = decoder.apply(model.architecture, model.params, rows, dtype=dtype).hidden_BTD
  return np.asarray(decoder.logits(model.params, hidden))


def transformers_logits(folder: Path, rows: np.ndarray, *, dtype: str) -> np.ndarray:
  """The same by the modelling files that travel with an export."""
  import torch
  from transformers import AutoModelForCausalLM

  model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=getattr(torch, dtype)).eval()
  with torch.inference_mode():
    return model(torch.from_numpy(rows)).logits.float().numpy()


def _relative(found: np.ndarray, reference: np.ndarray) -> float:
  return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


def against_transformers(child: Path, scratch: Path, rows: np.ndarray) -> dict[str, Any]:
  """The exports in fp32 and bf16, each in Transformers and, as parents, in JAX; the reference for bf16 is fp32."""
  for dtype in ("float32", "bfloat16"):
    export_hf(child, scratch / dtype, dtype=dtype)
  ours = jax_logits(scratch / "float32", rows, dtype=jnp.float32)
  theirs = transformers_logits(scratch / "float32", rows, dtype="float32")
  exact = jax_logits(scratch / "bfloat16", rows, dtype=jnp.float32)
  bf16 = {
    "jax": _relative(jax_logits(scratch / "bfloat16", rows, dtype=jnp.bfloat16), exact),
    "transformers": _relative(transformers_logits(scratch / "bfloat16", rows, dtype="bfloat16"), exact),
  }
  return {
    "fp32_max_abs_difference": float(np.abs(ours - theirs).max()),
    "fp32_max_abs_logit": float(np.abs(ours).max()),
    "fp32_relative_difference": _relative(theirs, ours),
    "round_trip_max_abs_difference": float(np.abs(ours - jax_logits(child, rows, dtype=jnp.float32)).max()),
    "bf16_relative_error": bf16,
    "bf16_ratio": bf16["jax"] / bf16["transformers"],
  }


def against_llamacpp(child: Path, scratch: Path, rows: np.ndarray) -> dict[str, Any]:
  """Perplexity of each type of file in llama.cpp, and in JAX of the child and of the same file."""
  found: dict[str, Any] = {"jax": read("jax", child, rows).perplexity, "types": {}}
  for dtype in TYPES:
    file = scratch / f"mixed.{dtype}.gguf"
    export_gguf(child, file, dtype=dtype)
    theirs, ours = read("llamacpp", file, rows).perplexity, read("jax", file, rows).perplexity
    found["types"][dtype] = {
      "llamacpp": theirs,
      "jax_of_the_file": ours,
      "to_the_child": theirs / found["jax"] - 1,
      "to_the_file": theirs / ours - 1,
      "bytes": file.stat().st_size,
    }
  return found


def fp8(workdir: Path, scratch: Path, rows: np.ndarray) -> dict[str, dict[str, float]]:
  """Perplexity and KL that 8-bit floats cost the quickstart's child, against its own bf16 export, all in bf16."""
  found, reference = {}, None
  for dtype in ("bfloat16", "float8_channel", "float8_tensor"):
    folder = scratch / f"quickstart.{dtype}"
    export(workdir, folder, dtype=dtype)
    log_p = scipy.special.log_softmax(transformers_logits(folder, rows, dtype="bfloat16"), axis=-1)
    reference = log_p if reference is None else reference
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    next_token = np.take_along_axis(log_p[:, :-1], rows[:, 1:, None], axis=-1)
    kl = float((np.exp(reference) * (reference - log_p)).sum(-1).mean())
    found[dtype] = {"perplexity": float(np.exp(-next_token.mean())), "kl": kl, "bytes": size}
  return found


def speed(files: Mapping[str, Path]) -> dict[str, Any]:
  """Prefill and decoding at batch 1 in llama.cpp, the models in turn, so that all meet the same disturbances.

  On a machine with other work, most rounds are two to five times as slow as the fastest few, which agree to some per
  cent: those are compared, and only their ratios count.
  """
  settings = {"n_ctx": PROMPT + ANSWER, "n_threads": THREADS, "n_threads_batch": THREADS, "flash_attn": True}
  models = {name: llama(file, **settings) for name, file in files.items()}
  seconds: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
  with Progress().bar("speed", total=ROUNDS + 1, unit="round") as bar:
    for i in range(ROUNDS + 1):
      for name, model in models.items():
        model.reset()
        begin = time.perf_counter()
        model.eval(list(range(1000, 1000 + PROMPT)))
        middle = time.perf_counter()
        for token in range(ANSWER):
          model.eval([2000 + token])
        if i:  # the first round warms up
          seconds[name]["prefill"].append(middle - begin)
          seconds[name]["decode"].append(time.perf_counter() - middle)
      bar.update()
  return compared({name: {"bytes": file.stat().st_size, "seconds": seconds[name]} for name, file in files.items()})


def compared(models: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
  """The models with how many times as fast as the first they are, each by its fastest rounds."""

  def quiet(model: Mapping[str, Any], kind: str) -> float:
    return statistics.fmean(sorted(model["seconds"][kind])[:FASTEST])

  first = next(iter(models.values()))
  return {
    name: model | {f"{kind}_speedup": quiet(first, kind) / quiet(model, kind) for kind in ("prefill", "decode")}
    for name, model in models.items()
  }


def measure(workdir: Path, text: Path) -> dict[str, Any]:
  """The record; its `missed` names the bars that are missed."""
  packages = versions() | installed(("gguf", "llama-cpp-python", "numpy", "torch", "transformers"))
  run, words = open_run(workdir), read_text(text)
  ids = run.tokenizer.encode(words)
  if len(ids) < PERPLEXITY_ROWS * ROW:
    raise PuzzleError(f"--text={text} holds {len(ids):,} tokens; give a text of at least {PERPLEXITY_ROWS * ROW:,}")
  rows = np.array(ids[: PERPLEXITY_ROWS * ROW]).reshape(-1, ROW)
  with temporary_folder() as folder:
    scratch = Path(folder)
    for child, changed in CHANGED.items():
      write_child(run, changed, scratch / child)
    transformers = against_transformers(scratch / "every kind", scratch, rows[:LOGITS_ROWS])
    llamacpp = against_llamacpp(scratch / "llama.cpp's", scratch, rows)
    theirs = llama(scratch / "mixed.F16.gguf", vocab_only=True).tokenize(words.encode(), add_bos=False, special=True)
    llamacpp["token_ids_that_differ"] = sum(a != b for a, b in itertools.zip_longest(ids, theirs))
    eight_bits = fp8(workdir, scratch, rows[:LOGITS_ROWS])
    files: dict[str, Path] = {"parent Q4_1 (its own file)": run.parent.path}
    for model, dtype in (("parent", "Q4_0"), ("child", "Q4_1"), ("child", "Q4_0"), ("child", "Q8_0")):
      file = files[f"{model} {dtype}"] = scratch / f"{model}.{dtype}.gguf"
      export(workdir if model == "child" else scratch / "parent", file, format="gguf", dtype=dtype)
    load = round(os.getloadavg()[1], 1)  # of 5 minutes: others may be at work here
    speeds = speed(files)
    for name, file in files.items():
      speeds[name]["perplexity"] = read("llamacpp", file, rows[:SPEED_ROWS]).perplexity
  held = {
    "fp32 logits": transformers["fp32_max_abs_difference"] / transformers["fp32_max_abs_logit"] <= BARS["fp32"],
    "bf16 logits": transformers["bf16_ratio"] <= BARS["bf16"],
    "token ids in llama.cpp": llamacpp["token_ids_that_differ"] == 0,
    "perplexity of F16 in llama.cpp": abs(llamacpp["types"]["F16"]["to_the_child"]) <= BARS["perplexity"],
  }
  return {
    "command": f"python -m experiments.oracles.export_fidelity --workdir={workdir.name} --text={text.name}",
    "date": datetime.date.today().isoformat(),
    "hardware": jax_timing.hardware(),
    "versions": packages,
    "text": {"name": text.name, "sha256": file_digest(text), "tokens_a_row": ROW},
    "rows": {"logits": LOGITS_ROWS, "perplexity": PERPLEXITY_ROWS, "speed": SPEED_ROWS},
    "children": {name: changed for name, changed in CHANGED.items() if changed},
    "transformers": transformers,
    "llamacpp": llamacpp,
    "fp8": eight_bits,
    "speed": {
      "load_average": load,
      "threads": THREADS,
      "rounds": ROUNDS,
      "fastest": FASTEST,
      "prompt": PROMPT,
      "answer": ANSWER,
      "models": speeds,
    },
    "bars": BARS,
    "missed": [name for name, met in held.items() if not met],
  }


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  try:
    record = measure(Path(_WORKDIR.value), Path(_TEXT.value))
  except PuzzleError as e:
    sys.exit(f"error: {e}")
  write_json(RECORD, record)
  sys.exit(f"error: missed bars: {', '.join(record['missed'])}" if record["missed"] else 0)


if __name__ == "__main__":
  app.run(main)
