"""Costs in TensorRT-LLM, by difference between whole models of random weights, timed by its own `trtllm-bench`.

Each model of `by_difference` is written as an exported directory and measured in every scenario at every batch: the
prefill is the time until the batch has its first tokens on average, decoding what each further token takes. A report is
kept where it was printed, and the same call goes on behind the last. Written against the documentation of releases 1.0
to 1.3; nothing here has met the engine itself. Imports no JAX.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from puzzle_jax.arch import Architecture
from puzzle_jax.costs import CostTable, Scenario, Seconds, head_bytes
from puzzle_jax.errors import PuzzleError, why_no_memory
from puzzle_jax.parents import Parent
from puzzle_jax.progress import Progress
from puzzle_jax.serving import by_difference, engines, tensorrt_llm
from puzzle_jax.serving.by_difference import Differences
from puzzle_jax.serving.hf_export import export_hf
from puzzle_jax.serving.served import Figures
from puzzle_jax.space import Space
from puzzle_jax.store import digest, temporary_folder

ENGINE = "tensorrt_llm"  # in the table of capabilities
_KV_BYTES = 2  # of a value in its cache


@dataclasses.dataclass(frozen=True)
class TimingConfig:
  """How costs are timed.

  Attributes:
    layers: of the models that subblocks are timed in.
    rounds: of each point.
    ffn_widths: how many of the space's FFN widths are timed, the others being interpolated; 0: all.
    ranks: GPUs that each model is split over.
  """

  layers: int = 8
  rounds: int = 3
  ffn_widths: int = 0
  ranks: int = 1

  def __post_init__(self) -> None:
    if self.layers < 6 or self.rounds < 1 or self.ffn_widths < 0 or self.ranks < 1:
      raise PuzzleError(f"layers >= 6, rounds and ranks >= 1 are needed; got {self}")


def measure(
  parent: Parent,
  space: Space,
  *,
  scenarios: Sequence[Scenario],
  batches: Sequence[int],
  config: TimingConfig,
  hardware: str,
  folder: Path,
  progress: Progress,
) -> CostTable:
  """Times every subblock of a space in bfloat16.

  Args:
    parent: its shapes and its tokenizer; weights are random.
    space: must hold only what TensorRT-LLM runs (`space.build(engine="tensorrt_llm")`).
    scenarios, batches: requests that come at once.
    config: how.
    hardware: the machine's name.
    folder: for requests and what the engine printed.
    progress: shows it.

  Raises:
    PuzzleError: TensorRT-LLM is missing or fails, or a model that it does not run.
  """
  version = tensorrt_llm.installed()
  subblocks = by_difference.subblocks_of(space)
  timed = by_difference.spread_widths(subblocks, parent.architecture, config.ffn_widths)
  models = by_difference.timed_models(parent.architecture, timed, layers=config.layers, engine=ENGINE)
  for name, model in models.items():
    engines.check_ranks(ENGINE, model, config.ranks, what=name)
  points = [(s, batch) for s in scenarios for batch in sorted(batches)]
  found: dict[tuple[str, str, int], list[Figures]] = {}
  unreachable: list[dict[str, Any]] = []
  with progress.bar("costs", total=len(models) * len(points) * config.rounds, unit="point") as bar:
    for name, model in models.items():
      made_from = model.to_json() | {"ranks": config.ranks, "hardware": hardware, "version": version}
      place = folder / digest(made_from)[:12]
      with temporary_folder() as scratch:
        exported = _write(model, parent, Path(scratch))
        for scenario, batch in list(points):
          for k in range(config.rounds):
            log = place / f"{scenario.input_tokens}_{scenario.output_tokens}_{batch} round {k + 1}.log"
            try:
              figures = tensorrt_llm.bench(exported, scenario, batch=batch, ranks=config.ranks, log=log, keep=True)
            except PuzzleError as e:
              if not (why := why_no_memory(str(e))):
                raise
              unreachable.append({"scenario": scenario.name, "batch": batch, "models": [name], "why": why})
              points.remove((scenario, batch))
              break
            found.setdefault((name, scenario.name, batch), []).append(figures)
            bar.update()
  if not points:
    raise PuzzleError(f"TensorRT-LLM reached none of the scenarios at any batch: {unreachable[0]['why']}")
  parts: dict[str, dict[str, Differences]] = {}
  for scenario, batch in points:
    totals = {name: _totals(found[name, scenario.name, batch], scenario) for name in models}
    split = by_difference.differences(models, totals, subblocks)
    parts.setdefault(scenario.name, {})[str(batch)] = split
  costs, fixed = by_difference.cost_tables(parts)
  details: dict[str, Any] = {
    "timing": dataclasses.asdict(config),
    "points": [
      {"model": name, "scenario": scenario, "batch": batch, "rounds": [dataclasses.asdict(f) for f in figures]}
      for (name, scenario, batch), figures in found.items()
    ],
    "unreachable": unreachable,
    "residuals": {s: {b: p.residuals for b, p in by_batch.items()} for s, by_batch in parts.items()},
  }
  return CostTable(
    backend=ENGINE,
    hardware=hardware,
    versions={"tensorrt_llm": version},
    bytes_per_value=2,
    head_bytes=head_bytes(parent.architecture, engine=ENGINE, width=2),
    scenarios=tuple(s for s in scenarios if s.name in parts),
    subblocks=costs,
    fixed=fixed,
    details=details,
    kv_bytes_per_value=_KV_BYTES,
    tensor_parallel=config.ranks,
  )


def _write(model: Architecture, parent: Parent, folder: Path) -> Path:
  (folder / "child").mkdir()
  by_difference.write_random(folder / "child", model, parent.tokenizer())
  export_hf(folder / "child", folder / "model", engine=ENGINE)
  return folder / "model"


def _totals(rounds: Sequence[Figures], scenario: Scenario) -> Seconds:
  """Of a scenario: its first token is the prefill's."""
  first, token = (statistics.median(getattr(f, key) for f in rounds) for key in ("first_token_s", "token_s"))
  return {"prefill_s": first, "decode_s": (scenario.output_tokens - 1) * token}
