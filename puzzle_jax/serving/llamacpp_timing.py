"""Costs in llama.cpp on the machine at hand, by difference between whole models of random weights (imports no JAX).

The models are those of `by_difference`. All are timed in turn, several rounds; a round of a model is a whole request:
the scenario's input at once, then every step of its output. (A few steps in place of all are up to a third slower than
their mean, for tens of steps behind a prompt.) Children given beside the space are timed in the same rounds and left
out of the fit: what the table predicts of them can be held against them. Batch 1.

Seconds add up where weights stream from memory. A processor's cache that holds a part of them makes small models faster
than their parts (on an Intel Xeon, 15 layers of SmolLM2 took 3.5 ms a step and 30 layers 8.7): the residuals show it.
"""

import dataclasses
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle_jax.arch import Architecture
from puzzle_jax.costs import CostTable, Scenario
from puzzle_jax.costs.differences import quiet_mean
from puzzle_jax.errors import PuzzleError, why_no_memory
from puzzle_jax.parents import Parent
from puzzle_jax.progress import Progress
from puzzle_jax.serving import by_difference
from puzzle_jax.serving.by_difference import (
  PHASES,
  Differences,
  cost_tables,
  differences,
  subblocks_of,
  timed_models,
)
from puzzle_jax.serving.gguf_export import export_gguf
from puzzle_jax.space import Space
from puzzle_jax.store import temporary_folder

TESTED = "0.3.36"  # llama-cpp-python
_KV_BYTES = 2  # of a value in llama.cpp's cache: 16-bit floats


@dataclasses.dataclass(frozen=True)
class TimingConfig:
  """How costs are timed.

  Attributes:
    dtype: of the weights, one of `gguf_export.TYPES`.
    layers: of the models.
    rounds: the mean of the faster half counts.
    threads: of llama.cpp.
  """

  dtype: str = "Q4_1"
  layers: int = 30
  rounds: int = 10
  threads: int = 2

  def __post_init__(self) -> None:
    if self.layers < 6 or self.rounds < 1 or self.threads < 1:
      raise PuzzleError(f"layers >= 6, rounds and threads >= 1 are needed; got {self}")


def measure(
  parent: Parent,
  space: Space,
  *,
  scenarios: Sequence[Scenario],
  config: TimingConfig,
  hardware: str,
  progress: Progress,
  children: Mapping[str, Architecture] | None = None,
) -> CostTable:
  """Times every subblock of a space.

  Args:
    parent: its shapes and its tokenizer; weights are random.
    space: must hold only what llama.cpp runs (`space.build(engine="llama_cpp")`).
    scenarios: closed requests.
    config: how.
    hardware: the machine's name.
    progress: shows it.
    children: whole models to time beside; predicted and measured seconds go to `details`.

  Raises:
    PuzzleError: llama-cpp-python is missing, a block that llama.cpp does not run, or no scenario fits the memory.
  """
  version = _version()
  subblocks = subblocks_of(space)
  models = timed_models(parent.architecture, subblocks, layers=config.layers, engine="llama_cpp")
  whole = models | dict(children or {})
  seconds: dict[str, dict[str, list[dict[str, float]]]] = {}
  unreachable = []
  with temporary_folder() as scratch, progress.bar("files", total=len(whole), unit="model") as bar:
    files = {}
    for i, (name, architecture) in enumerate(whole.items()):
      files[name] = Path(scratch) / f"{i}.gguf"
      _write(architecture, parent, files[name], config.dtype)
      bar.update()
    sizes = {name: file.stat().st_size for name, file in files.items()}
    with progress.bar("costs", total=len(scenarios) * len(whole) * (config.rounds + 1), unit="timing") as bar:
      for scenario in scenarios:
        try:
          seconds[scenario.name] = _rounds(files, scenario, config, bar.update)
        except (ValueError, RuntimeError) as e:
          if not (why := why_no_memory(str(e))):
            raise
          unreachable.append({"scenario": scenario.name, "batch": 1, "why": why})
  if not seconds:
    raise PuzzleError(f"llama.cpp reached none of the scenarios: {unreachable[0]['why']}; take smaller ones")
  scenarios = [s for s in scenarios if s.name in seconds]
  parts: dict[str, dict[str, Differences]] = {}
  points: list[dict[str, Any]] = []
  for scenario in scenarios:
    rounds = seconds[scenario.name]
    totals = {name: _totals(rounds[name]) for name in models}
    split = differences(models, totals, subblocks)
    parts[scenario.name] = {"1": split}
    points += [
      _point(name, rounds[name], scenario) | {"residual": split.residuals[name]["decode_s"]} for name in models
    ]
  costs, fixed = cost_tables(parts)
  details: dict[str, Any] = {"timing": dataclasses.asdict(config), "points": points, "unreachable": unreachable}
  base = next(iter(models))
  table = CostTable(
    backend="llamacpp",
    hardware=hardware,
    versions={"llama-cpp-python": version, "python": platform.python_version()},
    bytes_per_value=sizes[base] / models[base].num_params(),
    scenarios=tuple(scenarios),
    subblocks=costs,
    fixed=fixed,
    details=details,
    kv_bytes_per_value=_KV_BYTES,
  )
  details["children"] = [
    _point(name, seconds[s.name][name], s)
    | {
      "blocks": [b.name for b in child.blocks],
      "predicted": table.predict(child.blocks, s.name, "1"),
      "bytes": sizes[name],
    }
    for s in scenarios
    for name, child in (children or {}).items()
  ]
  return table


def _version() -> str:
  try:
    return importlib.metadata.version("llama-cpp-python")
  except importlib.metadata.PackageNotFoundError as e:
    raise PuzzleError(f"llama.cpp is not installed: run `pip install llama-cpp-python` (tested: {TESTED})") from e


def _write(architecture: Architecture, parent: Parent, out: Path, dtype: str) -> None:
  with temporary_folder() as folder:
    by_difference.write_random(Path(folder), architecture, parent.tokenizer())
    export_gguf(Path(folder), out, dtype=dtype)


class _Model:
  """A file in llama.cpp; called, it gives the seconds of a request's phases."""

  def __init__(self, file: Path, scenario: Scenario, config: TimingConfig):
    import llama_cpp  # type: ignore[import-not-found, unused-ignore]

    self._scenario = scenario
    threads: dict[str, Any] = {"n_threads": config.threads, "n_threads_batch": config.threads}
    # Flash attention is what llama.cpp's own programs choose; without it, caches are padded to the widest layer's.
    self._model = llama_cpp.Llama(str(file), n_ctx=scenario.tokens + 1, flash_attn=True, verbose=False, **threads)

  def __call__(self) -> dict[str, float]:
    self._model.reset()
    times = [time.perf_counter()]
    self._model.eval([1] * self._scenario.input_tokens)
    times.append(time.perf_counter())
    for _ in range(self._scenario.output_tokens):
      self._model.eval([1])
    times.append(time.perf_counter())
    return {phase: end - begin for phase, begin, end in zip(PHASES, times, times[1:], strict=False)}


def _rounds(
  files: Mapping[str, Path], scenario: Scenario, config: TimingConfig, tick: Callable[[], Any]
) -> dict[str, list[dict[str, float]]]:
  """Seconds of each round by model, in turn; the first round, which warms up, is left out."""
  opened = {name: _Model(file, scenario, config) for name, file in files.items()}
  found: dict[str, list[dict[str, float]]] = {name: [] for name in files}
  for i in range(config.rounds + 1):
    for name, model in opened.items():
      seconds = model()
      if i:
        found[name].append(seconds)
      tick()
  return found


def _totals(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
  return {phase: quiet_mean([r[phase] for r in rounds]) for phase in PHASES}


def _point(name: str, rounds: Sequence[Mapping[str, float]], scenario: Scenario) -> dict[str, Any]:
  totals = _totals(rounds)
  spreads = {phase: statistics.pstdev(r[phase] for r in rounds) / totals[phase] for phase in PHASES}
  return {"scenario": scenario.name, "model": name} | totals | {"spread": spreads}
