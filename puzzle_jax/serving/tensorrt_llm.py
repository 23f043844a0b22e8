"""Exported models in TensorRT-LLM's PyTorch backend, by its own commands: `trtllm-serve` and `trtllm-bench`.

Written against the documentation of releases 1.0 to 1.3; nothing here has met the engine itself. Its older backend, the
engine builder, is no longer among what `trtllm-bench` of 1.3 takes. Imports neither JAX nor TensorRT-LLM.
"""

import contextlib
import importlib.metadata
import json
import random
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from puzzle_jax.costs import Scenario
from puzzle_jax.errors import PuzzleError, why_no_memory
from puzzle_jax.parents import open_parent
from puzzle_jax.progress import Progress
from puzzle_jax.serving import engines, served
from puzzle_jax.serving.served import Figures, Served

_COMMAND = "trtllm-bench"
_MISSING = (
  f"TensorRT-LLM is not installed here ({_COMMAND} is not found): `pip install tensorrt_llm` as its documentation "
  "says, or start from NVIDIA's container tensorrt-llm/release"
)
_METRICS = {  # as the report calls them
  "output": "Total Output Throughput (tokens/sec)",
  "total": "Total Token Throughput (tokens/sec)",
  "first": "Average time-to-first-token [TTFT] (ms)",
  "token": "Average time-per-output-token [TPOT] (ms)",
}
_WARMUP = 2  # requests


def serve_command(model: Path, *, scenario: Scenario, batch: int, ranks: int = 1) -> list[str]:
  """Starts a server (OpenAI's API) for an exported model."""
  limits = ["--max_batch_size", str(batch), "--max_seq_len", str(scenario.tokens), "--tp_size", str(ranks)]
  return ["trtllm-serve", str(model), "--backend", "pytorch", "--trust_remote_code", *limits]


def bench_command(model: Path, dataset: Path, *, batch: int, ranks: int = 1) -> list[str]:
  """Measures one batch of the requests of a dataset."""
  throughput = ["throughput", "--backend", "pytorch", "--dataset", str(dataset), "--streaming"]
  load = ["--num_requests", str(batch), "--concurrency", str(batch), "--max_batch_size", str(batch)]
  named = [_COMMAND, "--model", model.name, "--model_path", str(model)]
  return [*named, *throughput, *load, "--warmup", str(_WARMUP), "--tp", str(ranks)]


def write_dataset(path: Path, scenario: Scenario, *, requests: int, vocab_size: int) -> None:
  """Requests of random tokens, one JSON object a line, as `trtllm-bench` reads them."""
  rng = random.Random(0)
  with path.open("w") as f:
    for i in range(requests):
      ids = rng.choices(range(vocab_size), k=scenario.input_tokens)
      print(json.dumps({"task_id": i, "input_ids": ids, "output_tokens": scenario.output_tokens}), file=f)


def parse_report(text: str) -> Figures:
  """The figures of what `trtllm-bench throughput --streaming` prints.

  Raises:
    PuzzleError: the report or one of its figures is not there, with the last line that was printed.
  """
  found = {}
  for key, label in _METRICS.items():
    match = re.search(rf"^{re.escape(label)}:\s+([\d.,eE+-]+)\s*$", text, re.MULTILINE)
    if match is None:
      last = next((line for line in reversed(text.splitlines()) if line.strip()), "nothing")
      raise PuzzleError(f"{_COMMAND} printed no {label!r}; its last line: {last.strip()}")
    found[key] = float(match[1].replace(",", ""))
  return Figures(found["total"], found["output"], found["first"] / 1e3, found["token"] / 1e3)


def installed() -> str:
  """The version that is installed, or nothing where it does not say; raises PuzzleError where there is none."""
  if shutil.which(_COMMAND) is None:
    raise PuzzleError(_MISSING)
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    return importlib.metadata.version("tensorrt_llm")
  return ""


def hardware(ranks: int) -> str:
  """The GPUs, as cost tables name them; raises PuzzleError where the driver's own command names none."""
  installed()
  query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
  try:
    names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
  except (OSError, subprocess.CalledProcessError) as e:
    raise PuzzleError(f"TensorRT-LLM needs a GPU, and nvidia-smi names none: {e}") from e
  return f"{ranks} x {names[0].strip()}"


def bench(model: Path, scenario: Scenario, *, batch: int, ranks: int, log: Path, keep: bool = False) -> Figures:
  """Measures one batch of requests; what the engine prints goes to `log`. With `keep`, a report there is read again."""
  if keep and log.is_file():
    with contextlib.suppress(PuzzleError):
      return parse_report(log.read_text())
  log.parent.mkdir(parents=True, exist_ok=True)
  vocab_size = open_parent(str(model)).architecture.config.vocab_size
  write_dataset(log.with_suffix(".jsonl"), scenario, requests=batch, vocab_size=vocab_size)
  command = bench_command(model, log.with_suffix(".jsonl"), batch=batch, ranks=ranks)
  ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
  log.write_text(ended.stdout)
  try:
    return parse_report(ended.stdout)
  except PuzzleError as e:
    raise PuzzleError(why_no_memory(ended.stdout) or str(e)) from e


def serve(
  models: Mapping[str, Path],
  *,
  scenarios: Sequence[Scenario],
  batches: Sequence[int],
  ranks: int,
  folder: Path,
  progress: Progress,
) -> dict[str, Served]:
  """Measures exported models, as `served.serve` does in vLLM.

  Args:
    models: exported for `tensorrt_llm`.
    scenarios, batches: requests that come at once.
    ranks: GPUs that each model is split over.
    folder: for datasets and what the engine printed.
    progress: shows it.

  Raises:
    PuzzleError: TensorRT-LLM is missing, or fails; its output is in `folder`.
  """
  installed()
  result = {}
  with progress.bar("serving", total=len(models) * len(scenarios) * len(batches), unit="point") as bar:
    for name, path in models.items():
      architecture = open_parent(str(path)).architecture
      engines.check_ranks("tensorrt_llm", architecture, ranks, what=name)
      figures: dict[str, dict[str, Figures]] = {}
      for scenario in scenarios:
        for batch in batches:
          log = folder / f"{name}_{scenario.input_tokens}_{scenario.output_tokens}_{batch}.log"
          figures.setdefault(scenario.name, {})[str(batch)] = bench(path, scenario, batch=batch, ranks=ranks, log=log)
          bar.update()
      result[name] = Served(
        weight_bytes=served.weight_bytes(path),
        kv_bytes_per_token=served.kv_bytes_per_token(architecture, ranks),
        kv_cache_tokens=0,
        max_batch={},
        figures=figures,
        engine={"name": "TensorRT-LLM", "gpus": ranks},
      )
  return result
