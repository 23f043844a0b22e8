"""Costs in llama.cpp on the machine at hand, by difference between whole models of random weights (imports no JAX).

The models are those of `by_difference`. All are timed in turn, several rounds; a round of a model is the prefill of the
scenario's input, a few decode steps right behind it, and a few at the scenario's end. A step's time is affine in the
context: the mean of both is the mean step. Children given beside the space are timed in the same rounds, with every
step of the output, and left out of the fit: what the table predicts of them can be held against them. Batch 1.
"""

import dataclasses
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle_jax.arch import Architecture
from puzzle_jax.costs import CostTable, Scenario
from puzzle_jax.costs.differences import quiet_mean
from puzzle_jax.errors import PuzzleError
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
_TIMED = ("prefill", "first", "last")
_KV_BYTES = 2  # of a value in llama.cpp's cache: 16-bit floats


@dataclasses.dataclass(frozen=True)
class TimingConfig:
  """How costs are timed.

  Attributes:
    dtype: of the weights, one of `gguf_export.TYPES`.
    layers: of the models.
    rounds: the mean of the faster half counts.
    decode_steps: in each of a round's two timings.
    threads: of llama.cpp.
  """

  dtype: str = "Q4_1"
  layers: int = 30
  rounds: int = 10
  decode_steps: int = 8
  threads: int = 2

  def __post_init__(self) -> None:
    if self.layers < 6 or self.rounds < 1 or self.decode_steps < 1 or self.threads < 1:
      raise PuzzleError(f"layers >= 6, rounds, decode_steps and threads >= 1 are needed; got {self}")


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
    PuzzleError: llama-cpp-python is missing, or a block that llama.cpp does not run.
  """
  version = _version()
  subblocks = subblocks_of(space)
  models = timed_models(parent.architecture, subblocks, layers=config.layers, engine="llama_cpp")
  whole = models | dict(children or {})
  seconds: dict[str, dict[str, list[dict[str, float]]]] = {s.name: {name: [] for name in whole} for s in scenarios}
  with temporary_folder() as scratch, progress.bar("files", total=len(whole), unit="model") as bar:
    files = {}
    for i, (name, architecture) in enumerate(whole.items()):
      files[name] = Path(scratch) / f"{i}.gguf"
      _write(architecture, parent, files[name], config.dtype)
      bar.update()
    sizes = {name: file.stat().st_size for name, file in files.items()}
    with progress.bar("costs", total=len(scenarios) * len(whole) * (config.rounds + 1), unit="timing") as bar:
      for scenario in scenarios:
        opened = {name: _Model(file, scenario, config, whole=name not in models) for name, file in files.items()}
        for i in range(config.rounds + 1):
          for name, model in opened.items():
            found = model()
            if i:  # the first round warms up
              seconds[scenario.name][name].append(found)
            bar.update()
  parts: dict[str, dict[str, Differences]] = {}
  points: list[dict[str, Any]] = []
  for scenario in scenarios:
    rounds = seconds[scenario.name]
    totals = {name: {phase: _total(rounds[name], phase, scenario) for phase in PHASES} for name in models}
    split = differences(models, totals, subblocks)
    parts[scenario.name] = {"1": split}
    points += [
      _point(name, rounds[name], scenario) | {"residual": split.residuals[name]["decode_s"]} for name in models
    ]
  costs, fixed = cost_tables(parts)
  details: dict[str, Any] = {"timing": dataclasses.asdict(config), "points": points}
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
    | {"blocks": [b.name for b in child.blocks], "predicted": table.predict(child, s.name, "1"), "bytes": sizes[name]}
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
  """A file in llama.cpp; called, it gives seconds of the prefill and of a decode step at both ends of the output.

  With `whole`, all of the output is decoded, and both are the mean step.
  """

  def __init__(self, file: Path, scenario: Scenario, config: TimingConfig, *, whole: bool):
    import llama_cpp  # type: ignore[import-not-found, unused-ignore]

    self._scenario, self._whole = scenario, whole
    self._steps = min(config.decode_steps, max(1, scenario.output_tokens // 2))
    threads: dict[str, Any] = {"n_threads": config.threads, "n_threads_batch": config.threads}
    # Flash attention is what llama.cpp's own programs choose; without it, caches are padded to the widest layer's.
    self._model = llama_cpp.Llama(str(file), n_ctx=scenario.tokens + 1, flash_attn=True, verbose=False, **threads)

  def __call__(self) -> dict[str, float]:
    self._model.reset()
    found = {"prefill": self._eval(self._scenario.input_tokens, at_once=True)}
    if self._whole:
      step = self._eval(self._scenario.output_tokens) / self._scenario.output_tokens
      return found | {"first": step, "last": step}
    found["first"] = self._eval(self._steps) / self._steps
    if (fill := self._scenario.tokens - self._scenario.input_tokens - 2 * self._steps) > 0:
      self._eval(fill, at_once=True)
    found["last"] = self._eval(self._steps) / self._steps
    return found

  def _eval(self, tokens: int, *, at_once: bool = False) -> float:
    begin = time.perf_counter()
    for part in [[1] * tokens] if at_once else [[1]] * tokens:
      self._model.eval(part)
    return time.perf_counter() - begin


def _total(rounds: Sequence[Mapping[str, float]], phase: str, scenario: Scenario) -> float:
  """Seconds of a scenario's phase."""
  if phase == "prefill_s":
    return quiet_mean([r["prefill"] for r in rounds])
  return scenario.output_tokens * quiet_mean([(r["first"] + r["last"]) / 2 for r in rounds])


def _point(name: str, rounds: Sequence[Mapping[str, float]], scenario: Scenario) -> dict[str, Any]:
  found: dict[str, Any] = {"scenario": scenario.name, "model": name}
  found |= {phase: _total(rounds, phase, scenario) for phase in PHASES}
  for phase in _TIMED:
    seconds = [r[phase] for r in rounds]
    found[phase] = {"seconds": quiet_mean(seconds), "spread": statistics.pstdev(seconds) / quiet_mean(seconds)}
  return found
