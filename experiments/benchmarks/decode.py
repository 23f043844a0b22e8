"""A decode step of the built-in PyTorch engine at a large parent's shapes, against what reading the memory takes.

    python -m experiments.benchmarks.decode                                            (one H100)
    python -m experiments.benchmarks.decode --vllm=VLLM.json                           (with vLLM's step beside it)
    python -m experiments.benchmarks.decode --parent=smollm2-135m --batch=2 --context=64 --layers=2,4 --bandwidth_mib=64

Two depths of equal layers are timed in turn; the whole model's step is on the line through both. The floor
is the bytes that a step must read (all weights but the embedding, of which a few rows, and the filled KV cache) at the
bandwidth of a large sum in the same process. VLLM.json: `{"step_s": …}` with whatever describes it; or a cost table of
experiments.profile --engine=vllm, whose first scenario's step at that batch and context is predicted for the parent.
Writes experiments/results/decode_LLAMA.json.
"""

import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import app, flags

from experiments import RESULTS
from puzzle_jax.arch import Architecture
from puzzle_jax.costs.differences import quiet_mean
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import known
from puzzle_jax.serving import torch_attention, torch_engine, vllm_timing
from puzzle_jax.serving.torch_engine import Cache, RandomWeights, Session
from puzzle_jax.store import write_json

_PARENT = flags.DEFINE_string("parent", "meta-llama/Llama-3.1-8B", "Whose shapes; weights are random.")
_NAME = flags.DEFINE_string("name", "llama_8b", "Of the record: experiments/results/decode_NAME.json.")
_BATCH = flags.DEFINE_integer("batch", 64, "Requests at once.", lower_bound=1)
_CONTEXT = flags.DEFINE_integer("context", 1024, "Tokens in each row's cache.", lower_bound=1)
_LAYERS = flags.DEFINE_list("layers", ["8", "16"], "Two depths.")
_STEPS = flags.DEFINE_integer("steps", 32, "In one timing.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Of each timing; the mean of the faster half counts.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", list(torch_engine.DTYPES), "Of weights and cache.")
_BANDWIDTH = flags.DEFINE_integer("bandwidth_mib", 8192, "Of the array whose sum is timed.", lower_bound=1)
_VLLM = flags.DEFINE_string("vllm", "", "vLLM's step, JSON.")


def step_bytes(parent: Architecture, *, batch: int, context: float, width: int) -> float:
  """What a decode step must read: weights once, of an embedding of its own a row a request, and the filled cache."""
  c = parent.config
  unread = 0 if c.tie_embeddings else (c.vocab_size - batch) * c.hidden_size
  kv = batch * context * parent.kv_bytes_per_token(bytes_per_value=width)
  return width * (parent.num_params() - unread) + kv


def bandwidth() -> float:
  """Bytes a second that the device reads."""
  values = torch.ones(_BANDWIDTH.value * 2**18, dtype=torch.float32, device=torch_engine.device())
  times = []
  for _ in range(10):
    torch_engine.wait()
    begin = time.perf_counter()
    values.sum()
    torch_engine.wait()
    times.append(time.perf_counter() - begin)
  return values.nbytes / min(times)


def step_seconds(parent: Architecture, depths: list[int]) -> dict[int, list[float]]:
  """Seconds of a step by depth and round, both in turn."""
  batch, context, steps = _BATCH.value, _CONTEXT.value, _STEPS.value
  weights = RandomWeights(parent, dtype=_DTYPE.value)
  models = {d: Architecture(parent.config, (parent.blocks * d)[:d]) for d in depths}
  heads = torch_engine.kv_heads(models[max(depths)])
  first = max(0, context - steps // 2)  # the timed steps lie around the context
  dtype = torch_engine.DTYPES[_DTYPE.value]
  cache = Cache(parent.config, heads, batch=batch, length=first + steps, dtype=dtype)
  sessions = {d: Session(weights.model(a), cache) for d, a in models.items()}
  found: dict[int, list[float]] = {d: [] for d in depths}
  for i in range(_ROUNDS.value + 1):
    for depth, session in sessions.items():
      session.capture()
      session.at.fill_(first)
      torch_engine.wait()
      begin = time.perf_counter()
      session.decode(steps)
      torch_engine.wait()
      if i:  # the first warms up
        found[depth].append((time.perf_counter() - begin) / steps)
  return found


def vllm_step(given: dict[str, Any], parent: Architecture) -> float:
  """vLLM's seconds of a step, from what was measured there.

  Raises:
    PuzzleError: the file holds neither a step nor a cost table with the batch and the context.
  """
  if "step_s" in given:
    return float(given["step_s"])
  name = f"{parent.blocks[0].name} x "
  points = [
    p
    for p in given.get("details", {}).get("points", [])
    if p["kind"] == "decode" and p["batch"] == _BATCH.value and p["model"].startswith(name)
  ]
  depths = sorted({int(p["model"].rsplit(" ", 1)[1]) for p in points})
  steps = []
  for depth in depths:
    lead = vllm_timing.lead(given["details"]["timing"]["decode_steps"])
    line = sorted((p["tokens"] + lead, p["seconds"]) for p in points if p["model"] == f"{name}{depth}")
    contexts, seconds = [c for c, _ in line], [s for _, s in line]
    if not contexts[0] <= _CONTEXT.value <= contexts[-1]:
      raise PuzzleError(f"--vllm={_VLLM.value}: its contexts {contexts} leave out {_CONTEXT.value}")
    steps.append(float(np.interp(_CONTEXT.value, contexts, seconds)))
  if len(steps) < 2:
    raise PuzzleError(f"--vllm={_VLLM.value} holds neither step_s nor steps of {name}N at batch {_BATCH.value}")
  return at_depth(depths, steps, parent.num_layers)


def at_depth(depths: list[int], seconds: list[float], layers: int) -> float:
  """On the line through two depths."""
  slope = (seconds[1] - seconds[0]) / (depths[1] - depths[0])
  return seconds[0] + slope * (layers - depths[0])


def main(argv: list[str]) -> None:
  del argv
  try:
    parent = known.architecture_of(_PARENT.value)
    given = json.loads(Path(_VLLM.value).read_text()) if _VLLM.value else {}
    peer = vllm_step(given, parent) if given else None
  except PuzzleError as e:
    sys.exit(f"error: {e}")
  depths = sorted(map(int, _LAYERS.value))
  read_rate = bandwidth()
  rounds = step_seconds(parent, depths)
  means = [quiet_mean(rounds[d]) for d in depths]
  step_s = at_depth(depths, means, parent.num_layers)
  width = torch_engine.DTYPES[_DTYPE.value].itemsize
  floor_s = step_bytes(parent, batch=_BATCH.value, context=_CONTEXT.value, width=width) / read_rate
  record: dict[str, Any] = {
    "command": shlex.join(["python", "-m", "experiments.benchmarks.decode", *sys.argv[1:]]),
    "date": time.strftime("%F"),
    "hardware": torch_engine.gpu() or "CPU",
    "versions": {"torch": torch.__version__},
    "kernel": torch_attention.has_kernel(parent.config.head_dim),
    "parent": _PARENT.value,
    "batch": _BATCH.value,
    "context": _CONTEXT.value,
    "dtype": _DTYPE.value,
    "bandwidth_bytes_per_s": read_rate,
    "depths": {
      str(d): {"seconds": m, "spread": statistics.pstdev(rounds[d]) / m} for d, m in zip(depths, means, strict=True)
    },
    "step_s": step_s,
    "floor_s": floor_s,
    "to_floor": step_s / floor_s,
  }
  if peer is not None:
    record["vllm"] = {"step_s": peer, "to_vllm": step_s / peer, "hardware": given.get("hardware"), "bar": 1.15}
    record["vllm"]["versions"] = given.get("versions")
  write_json(RESULTS / f"decode_{_NAME.value}.json", record)
  print(json.dumps(record, indent=2))


if __name__ == "__main__":
  app.run(main)
