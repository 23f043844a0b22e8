"""One computation on several sides, each in a process of its own, one after the other: this project's and a peer's.

A benchmark gives each side a function that times a step and returns its figures; `compare` runs them and writes the
record. The sides must say the same `first_loss`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments import RESULTS
from puzzle_jax.store import write_json

Figures = dict[str, Any]


def fastest(step: Callable[[], Any], wait: Callable[[], None], *, steps: int, repeats: int) -> float:
  """Seconds of a step: of so many in a row, the fastest of the repeats, after two steps that compile and warm up."""
  for _ in range(2):
    step()
  wait()
  times = []
  for _ in range(repeats):
    begin = time.perf_counter()
    for _ in range(steps):
      step()
    wait()
    times.append((time.perf_counter() - begin) / steps)
  return min(times)


def matmul_flops_per_s(dtype: str, *, steps: int, repeats: int) -> float:
  """The rate of large square matrix products on the device, in JAX."""
  import jax
  import jax.numpy as jnp

  size = 8192 if jax.default_backend() == "gpu" else 2048
  out = [jax.random.normal(jax.random.key(1), (size, size)).astype(dtype)]
  a = out[0]
  product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest" if dtype == "float32" else None))

  def multiply() -> None:
    out[0] = product(a)

  return 2 * size**3 / fastest(multiply, lambda: jax.block_until_ready(out), steps=steps, repeats=repeats)


def of_device() -> Figures:
  """Of JAX's first device: its peak memory, its name, and the versions that ran."""
  import jax

  from puzzle_jax.costs import jax_timing

  return {
    "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    "hardware": jax_timing.hardware(),
    "versions": jax_timing.versions(),
  }


def compare(
  module: str,
  name: str,
  *,
  flags: Sequence[str],
  needed: Mapping[str, int],
  tokens: int,
  tolerance: float,
  details: Mapping[str, Any],
) -> None:
  """Runs sides of a benchmark and writes experiments/results/NAME.json, anew after each.

  Args:
    module: of the benchmark, which prints one side's figures as JSON for `--side=`.
    name: of the record.
    flags: of the command.
    needed: FLOPs a token that each side needs; `jax` is this project's, `torch` the peer.
    tokens: of a step.
    tolerance: between the first losses of those two, relative.
    details: for the record.
  """
  sides: dict[str, Figures] = {}
  for side, flops in needed.items():
    command = [sys.executable, "-m", module, f"--side={side}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
      sys.exit(f"error: {side}: {done.stderr[-2000:]}")
    figures = json.loads(done.stdout.splitlines()[-1])
    rate = tokens / figures["seconds"]
    sides[side] = figures | {"tokens_per_s": rate, "needed_flops_per_token": flops, "flops_per_s": rate * flops}
    print(side, sides[side], flush=True)
    record = {
      "command": f"python -m {module} {' '.join(flags)}",
      "date": time.strftime("%F"),
      "xla_flags": os.environ.get("XLA_FLAGS", ""),
      **details,
      "tokens_per_step": tokens,
      **_ratios(sides, tolerance),
      **sides,
    }
    write_json(RESULTS / f"{name}.json", record)
  print(_ratios(sides, tolerance))


def _ratios(sides: Mapping[str, Figures], tolerance: float) -> dict[str, dict[str, float]]:
  """Of each side to the matrix products of this project's process and to the peer, as far as they were run."""
  result = {}
  if "jax" in sides:
    rate = sides["jax"]["matmul_flops_per_s"]
    result["share_of_matmul_rate"] = {name: side["flops_per_s"] / rate for name, side in sides.items()}
  if "torch" in sides:
    if "jax" in sides:
      ours, theirs = (sides[side]["first_loss"] for side in ("jax", "torch"))
      if abs(ours - theirs) > tolerance * abs(theirs):
        sys.exit(f"error: the sides do not compute the same: first losses {ours} and {theirs}")
    peer = sides["torch"]["tokens_per_s"]
    result["times_the_peer"] = {name: side["tokens_per_s"] / peer for name, side in sides.items() if name != "torch"}
  return result
