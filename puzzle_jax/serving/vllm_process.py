"""vLLM in processes of its own: one a model, what it measured kept as it comes (imports neither JAX nor vLLM)."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from puzzle_jax.errors import PuzzleError, why_no_memory
from puzzle_jax.store import digest, write_json

TESTED = "0.25.1"
_WORKER = Path(__file__).with_name("vllm_worker.py")
_NO_MEMORY = ("out of memory", "No available memory for the cache blocks", "larger than the available KV cache")
_TAKEN = "is less than desired GPU memory"  # the model before may not be quite gone
_POLL_S = 0.2
_RESULTS = 2  # raised when the worker measures otherwise: older results are not taken up
_BLOCK = 128  # tokens of a request that the KV cache holds together: fewer are more work for the scheduler
_WAIT_S, _TRIES = 10.0, 6

Point = dict[str, Any]  # see `vllm_worker`


@dataclasses.dataclass(frozen=True)
class VLLM:
  """How vLLM is run.

  Attributes:
    python: the interpreter of the environment that has it.
    path: a folder of Python packages that it lies in, if not that environment's own.
    memory: share of the GPU's memory that it takes.
    max_batched_tokens: that a step takes at most.
    tensor_parallel: GPUs that each model is split over.
    gpus: its own, by number; empty: the first ones.
  """

  python: str = sys.executable
  path: str = ""
  memory: float = 0.9
  max_batched_tokens: int = 16384
  tensor_parallel: int = 1
  gpus: tuple[str, ...] = ()

  @property
  def side_by_side(self) -> "list[VLLM]":
    """As many of it as `gpus` have room for, each with GPUs of its own."""
    each = self.tensor_parallel
    if len(self.gpus) % each:
      raise PuzzleError(f"{len(self.gpus)} GPUs are not to be split into groups of {each}")
    starts = range(0, len(self.gpus), each)
    return [dataclasses.replace(self, gpus=self.gpus[i : i + each]) for i in starts] or [self]

  def settings(self, model: Path, *, max_length: int, batches: Sequence[int], dummy: bool) -> dict[str, Any]:
    """vLLM's own, for requests of up to `max_length` tokens in batches; `dummy`: random weights.

    CUDA graphs are captured for these batches and powers of two, instead of vLLM's fifty sizes, to start faster. The
    scheduler and what feeds the GPU have a process each, as with several GPUs: both are Python, and would take turns.
    """
    sizes = {2**i for i in range(max(512, *batches).bit_length())} | set(batches)
    return {
      "model": os.fspath(model.resolve()),
      "load_format": "dummy" if dummy else "auto",
      "skip_tokenizer_init": True,
      "trust_remote_code": True,
      "tensor_parallel_size": self.tensor_parallel,
      "gpu_memory_utilization": self.memory,
      "max_model_len": max_length,
      "max_num_seqs": max(batches),
      "max_num_batched_tokens": self.max_batched_tokens,
      "block_size": _BLOCK,
      "distributed_executor_backend": "mp",
      "enable_prefix_caching": True,
      "compilation_config": {"cudagraph_capture_sizes": sorted(sizes)},
    }


@dataclasses.dataclass(frozen=True)
class Measured:
  """Of a model.

  Attributes:
    engine: as it described itself; {} where it did not start.
    points: each one's line.
    wall_s: what loading and measuring took, all sittings together.
  """

  engine: dict[str, Any]
  points: tuple[dict[str, Any], ...]
  wall_s: float

  def seconds(self, point: Point, kind: str = "seconds") -> list[float] | None:
    """By round, or another of a line's lists (`vllm_worker`); None where the point could not be reached."""
    return self._line(point).get(kind)

  def tokens(self, point: Point) -> list[list[int]]:
    """Of a `continue` point; raises PuzzleError where that failed."""
    line = self._line(point)
    if "tokens" not in line:
      raise PuzzleError(f"vLLM did not generate: {line['unreachable']}")
    return line["tokens"]

  def unreachable(self) -> list[dict[str, Any]]:
    return [line for line in self.points if "unreachable" in line]

  def _line(self, point: Point) -> dict[str, Any]:
    return next(line for line in self.points if line["point"] == point)


def measure(
  engine: VLLM,
  settings: dict[str, Any],
  points: Sequence[Point],
  *,
  vocab_size: int,
  folder: Path,
  tick: Callable[[int], Any],
) -> Measured:
  """Measures points of a model; what an earlier call has measured for the same settings is not measured again.

  Args:
    engine: where vLLM is.
    settings: of `VLLM.settings`.
    points: what to measure.
    vocab_size: random prompts are drawn from.
    folder: the model's own, for results and the engine's log.
    tick: called several times a second with the number of points that have come; what it raises ends the engine.

  Raises:
    PuzzleError: vLLM is missing or too old, or fails. Where it says that memory is short, the point, or all of a model
      that does not load, are recorded as not reachable instead.
  """
  folder.mkdir(parents=True, exist_ok=True)
  key = digest({k: v for k, v in settings.items() if k != "model"} | {"tested": TESTED, "results": _RESULTS})[:12]
  results, log, job = folder / f"{key}.jsonl", folder / "vllm.log", folder / "job.json"
  described = {"settings": settings, "results": str(results), "vocab_size": vocab_size, "oldest": TESTED}
  write_json(job, described | {"points": list(points), "parent": os.getpid()})
  seen = tries = 0

  def look() -> int:
    nonlocal seen
    came = len(_lines(results, points)) - seen
    tick(came)
    seen += came
    return came

  look()
  while seen < len(points):
    before, starts = seen, _starts(results)
    code = _run([engine.python, "-P", str(_WORKER), str(job)], log, _environment(engine), look)
    if seen == len(points) or (code < 0 and seen > before):  # killed, and got on: the next goes on behind it
      continue
    text = log.read_text(errors="replace")
    said = text.splitlines()
    if any(_TAKEN in line for line in said) and (tries := tries + 1) < _TRIES:
      time.sleep(_WAIT_S)
      continue
    if not (short := why_no_memory(text, _NO_MEMORY)):
      raise PuzzleError(_explained(said, code, log))
    done = [line["point"] for line in _lines(results, points)]
    missing = [p for p in points if p not in done]
    with results.open("a") as lost:  # the point at which memory ran short; all where the model did not even load
      for point in missing[:1] if _starts(results) > starts else missing:
        print(json.dumps({"point": point, "unreachable": short}), file=lost)
    look()
  loads, lines = [line["engine"] for line in _read(results) if "engine" in line], _lines(results, points)
  wall_s = sum(e["load_s"] for e in loads) + sum(line.get("wall_s", 0.0) for line in lines)
  return Measured(loads[0] if loads else {}, tuple(lines), wall_s)


def _run(command: Sequence[str], log: Path, env: dict[str, str], look: Callable[[], Any]) -> int:
  """Waits for a worker, looking at what it has written; returns its exit code."""
  with log.open("w") as out:
    # A session of its own: what interrupts this process must not look like a failure of the engine.
    try:
      process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    except OSError as e:
      raise PuzzleError(f"{command[0]} cannot be started ({e.strerror}); name the Python that has vLLM") from e
    try:
      while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
          process.wait(_POLL_S)
        look()
      return process.returncode
    finally:
      with contextlib.suppress(ProcessLookupError):  # vLLM's own process may outlive the worker, and hold the memory
        os.killpg(process.pid, signal.SIGKILL)
      process.wait()


def _environment(engine: VLLM) -> dict[str, str]:
  """FlashInfer would compile its sampler for minutes at every start; Triton's kernels are kept for all models."""
  env = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRITON_CACHE_DIR": os.path.expanduser("~/.triton/cache"),  # vLLM's own choice is a folder for each model
  } | os.environ
  if engine.gpus:
    env["CUDA_VISIBLE_DEVICES"] = ",".join(engine.gpus)
  if engine.path:
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [engine.path, env.get("PYTHONPATH", "")]))
  return env


def _read(results: Path) -> Iterable[dict[str, Any]]:
  """Whole lines: a worker may be writing another, or may have been killed while it did."""
  text = results.read_text() if results.is_file() else ""
  return map(json.loads, text[: text.rfind("\n") + 1].splitlines())


def _lines(results: Path, points: Sequence[Point]) -> list[dict[str, Any]]:
  """Of each point that has come."""
  lines = list(_read(results))
  return [found for point in points if (found := next((line for line in lines if line.get("point") == point), None))]


def _starts(results: Path) -> int:
  """How often the model has been loaded."""
  return sum("engine" in line for line in _read(results))


def _explained(said: Sequence[str], code: int, log: Path) -> str:
  for line in reversed(said):
    if line.startswith("error: "):
      return line.removeprefix("error: ")
    if _TAKEN in line:
      return "the GPU's memory is taken by another process; end that, and start again to go on"
  last = next((line for line in reversed(said) if "Error" in line), said[-1] if said else "nothing")
  return f"vLLM ended with code {code}; its log, {log}, says: {last.strip()}"
