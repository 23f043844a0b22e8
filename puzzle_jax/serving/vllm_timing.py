"""Costs in vLLM on the GPU at hand, by difference between whole models of random weights (imports no JAX).

Each model of `by_difference` is loaded once (`vllm_process`) and measured at every batch: the prefill of each
scenario's input, the same with a short answer, and decode steps at a few contexts that serve all scenarios. A
scenario's seconds are those of the short answer and of the further steps, interpolated between contexts. The short
answer has what no step has: where prompts are read in parts, early requests decode beside late ones' prompts, which
takes them longer, and as many steps at the end are of smaller batches. Steps are timed undisturbed; how much longer the
mean one takes is pooled over all models and belongs to no block.

A step takes what the GPU or the host's work takes, whichever is longer; so variants are timed beside the parent's
layers, and the all but empty model, whose steps are the host's, is no part of the fit but the table's floor. Children
given beside the space, the parent first, are timed in whole scenarios instead, and left out of the fit: what the table
predicts of them is held against them.

Nothing is measured twice: what came is kept in a folder, model by model and point by point, and the same call goes on.
With `passes` above one, all models are loaded and measured again, as many times, so that a machine that drifts is seen.
On several GPUs (`VLLM.gpus`) as many models are measured at once, each on its own.
"""

import dataclasses
import queue
import statistics
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from puzzle_jax import store, weights
from puzzle_jax.arch import Architecture, Subblock
from puzzle_jax.costs import CostTable, Scenario, Seconds, head_bytes
from puzzle_jax.costs.differences import quiet_mean
from puzzle_jax.errors import PuzzleError
from puzzle_jax.progress import Progress
from puzzle_jax.serving import by_difference, engines, fp8, hf_export, vllm_process
from puzzle_jax.serving.by_difference import HOST_SHARE, PHASES, Differences
from puzzle_jax.serving.vllm_process import VLLM, Measured, Point
from puzzle_jax.space import Space

_KV_BYTES = 2  # of a value in vLLM's cache: the model's bfloat16
SETTLE = 4  # steps of a batch before those that are timed
_SHORT = 128  # tokens of a short answer at most
_FULL, _SHALLOW, _EMPTY = range(3)  # of `timed_models`


@dataclasses.dataclass(frozen=True)
class TimingConfig:
  """How costs are timed.

  Attributes:
    dtype: of the weights, one of `hf_export.DTYPES`.
    layers: of the models that subblocks are timed in; two thirds of them are the parent's own.
    rounds: of each point; the mean of the faster half counts.
    decode_steps: in one timing; behind `SETTLE` that are not timed.
    ffn_widths: how many of the space's FFN widths are timed, the others being interpolated; 0: all.
    passes: over all models.
  """

  dtype: str = "bfloat16"
  layers: int = 60
  rounds: int = 4
  decode_steps: int = 64
  ffn_widths: int = 0
  passes: int = 1

  def __post_init__(self) -> None:
    if self.layers < 6 or self.rounds < 1 or self.decode_steps < 1 or self.passes < 1 or self.ffn_widths < 0:
      raise PuzzleError(f"layers >= 6, rounds, decode_steps and passes >= 1 are needed; got {self}")


def lead(decode_steps: int) -> float:
  """Tokens from a prompt's end to the middle of the steps that are timed."""
  return SETTLE + (decode_steps + 1) / 2


@dataclasses.dataclass(frozen=True)
class Plan:
  """Which points are measured.

  Attributes:
    scenarios, batches: asked for.
    config: how.
  """

  scenarios: tuple[Scenario, ...]
  batches: tuple[int, ...]
  config: TimingConfig

  def prefill(self, batch: int, tokens: int) -> Point:
    return {"kind": "prefill", "batch": batch, "tokens": tokens, "rounds": self.config.rounds}

  def decode(self, batch: int, context: int) -> Point:
    timing = {"settle": SETTLE, "steps": self.config.decode_steps, "rounds": self.config.rounds}
    return {"kind": "decode", "batch": batch, "tokens": context} | timing

  def short(self, batch: int, tokens: int) -> Point:
    """Prompts with the shortest answer that a scenario has behind them, or with `_SHORT` tokens."""
    outputs = [s.output_tokens for s in self.scenarios if s.input_tokens == tokens]
    return self.prefill(batch, tokens) | {"kind": "scenario", "output": min(*outputs, _SHORT)}

  def whole(self, batch: int, scenario: Scenario) -> Point:
    """Once: it takes long, and a long generation varies little."""
    tokens = {"tokens": scenario.input_tokens, "output": scenario.output_tokens}
    return {"kind": "scenario", "batch": batch, "rounds": 1} | tokens

  @property
  def lead(self) -> float:
    return lead(self.config.decode_steps)

  @property
  def contexts(self) -> list[int]:
    """Prompts of the decode timings: steps are timed where scenarios begin and end, less what is close to another."""
    ends = sorted({n for s in self.scenarios for n in (s.input_tokens, s.tokens)})
    kept = [ends[0], ends[-1]]
    for end in ends[1:-1]:
      if all(max(end, other) > 1.25 * min(end, other) for other in kept):
        kept.append(end)
    if len(kept) == 2:
      kept.append(sum(ends[:: len(ends) - 1]) // 2)
    return sorted({max(1, round(at - self.lead)) for at in kept})

  @property
  def parts(self) -> list[Point]:
    """Of a model that subblocks are timed in; contexts ascend, as the worker wants them."""
    points = []
    for batch in self.batches:
      for tokens in sorted({s.input_tokens for s in self.scenarios}):
        points += [self.prefill(batch, tokens), self.short(batch, tokens)]
      points += [self.decode(batch, context) for context in self.contexts]
    return points

  @property
  def wholes(self) -> list[Point]:
    """Of a child."""
    points = []
    for batch in self.batches:
      points += [self.prefill(batch, tokens) for tokens in sorted({s.input_tokens for s in self.scenarios})]
      points += [self.whole(batch, scenario) for scenario in self.scenarios]
    return points

  @property
  def longest(self) -> int:
    """Tokens of the longest request."""
    return max(*(s.tokens for s in self.scenarios), self.contexts[-1] + 1 + SETTLE + self.config.decode_steps)


def measure(
  parent: Architecture,
  space: Space,
  *,
  plan: Plan,
  engine: VLLM,
  folder: Path,
  progress: Progress,
  children: Mapping[str, Architecture] | None = None,
) -> CostTable:
  """Times every subblock of a space.

  Args:
    parent: its shapes; weights are random.
    space: must hold only what vLLM runs (`space.build(engine="vllm")`).
    plan: scenarios, batches, and how they are timed.
    engine: where vLLM is.
    folder: what was measured is kept there, and taken up again.
    progress: shows it.
    children: whole models to time beside the parent's; predicted and measured seconds go to `details`.

  Raises:
    PuzzleError: vLLM is missing or fails, a block that it does not run, parts that were measured elsewhere, or nothing
      that could be reached.
  """
  subblocks = by_difference.subblocks_of(space)
  timed = by_difference.spread_widths(subblocks, parent, plan.config.ffn_widths)
  models = by_difference.timed_models(parent, timed, layers=plan.config.layers, engine="vllm", beside_base=True)
  wholes = {"parent": parent} | dict(children or {}) if children is not None else {}
  for name, model in (models | wholes).items():
    engines.check_export("vllm", model, format="hf", dtype=plan.config.dtype)
    engines.check_ranks("vllm", model, engine.tensor_parallel, what=name)
  points = dict.fromkeys(models, plan.parts) | dict.fromkeys(wholes, plan.wholes)
  found = _all(models | wholes, points, plan, engine, folder, progress)
  about = _same_machine(found, folder)
  empty = list(models)[_EMPTY]
  fitted = {name: model for name, model in models.items() if name != empty}
  stall_s = _stalls([found[name] for name in fitted], plan)
  parts, floor, unreachable = _parts(fitted, empty, found, plan, subblocks, stall_s)
  if not parts:
    raise PuzzleError(f"vLLM reached none of the scenarios at any batch: {unreachable[0]['why']}; take smaller ones")
  costs, fixed = by_difference.cost_tables(parts)
  width = 4 if plan.config.dtype == "float32" else 2  # of embedding and head beside 8-bit matrices, too
  details: dict[str, Any] = {
    "timing": dataclasses.asdict(plan.config),
    "engine": about,
    "wall_s": sum(m.wall_s for passes in found.values() for m in passes),
    "kv_cache_tokens": {name: passes[0].engine.get("kv_cache_tokens") for name, passes in found.items()},
    "points": _points(models, found, plan),
    "unreachable": unreachable,
    "stall_s": {str(batch): s for batch, s in stall_s.items()},
    "limits": _limits(found[list(models)[_SHALLOW]], plan, floor, stall_s),
    "residuals": {s: {b: p.residuals for b, p in batches.items()} for s, batches in parts.items()},
    "interpolation": {s: {b: p.interpolation for b, p in batches.items()} for s, batches in parts.items()},
  }
  table = CostTable(
    backend="vllm",
    hardware=about["hardware"],
    versions={"vllm": about["version"], "python": about["python"]},
    bytes_per_value=1 if plan.config.dtype in fp8.ALGORITHMS else width,
    head_bytes=head_bytes(parent, engine="vllm", width=width),
    scenarios=tuple(s for s in plan.scenarios if s.name in parts),
    subblocks=costs,
    fixed=fixed,
    details=details,
    kv_bytes_per_value=_KV_BYTES,
    tensor_parallel=engine.tensor_parallel,
    floor=floor,
  )
  details["children"] = _children(wholes, found, plan, table)
  return table


def _all(
  models: Mapping[str, Architecture],
  points: Mapping[str, Sequence[Point]],
  plan: Plan,
  engine: VLLM,
  folder: Path,
  progress: Progress,
) -> dict[str, list[Measured]]:
  """Each model in each pass, as many at once as there are places for the engine; the first error ends all."""
  jobs = [(i, name) for i in range(plan.config.passes) for name in models]
  places, turn, stopped = queue.SimpleQueue[VLLM](), threading.Lock(), threading.Event()
  for place in engine.side_by_side:
    places.put(place)
  with progress.bar("costs", total=sum(len(points[name]) for _, name in jobs), unit="point") as bar:

    def tick(came: int) -> None:
      if stopped.is_set():
        raise PuzzleError("another model's measurement has failed")
      with turn:
        bar.update(came)

    def measured(job: tuple[int, str]) -> Measured:
      (i, name), place = job, places.get()
      bar.set_postfix_str(name)
      try:
        return _one(models[name], points[name], plan, place, folder / f"pass {i + 1}" / name.replace("/", " "), tick)
      finally:
        places.put(place)

    with ThreadPoolExecutor(places.qsize()) as pool:
      found = {job: pool.submit(measured, job) for job in jobs}
      try:
        for done in as_completed(found.values()):
          done.result()
      except BaseException:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
  return {name: [found[i, name].result() for i in range(plan.config.passes)] for name in models}


def _one(model: Architecture, points: Sequence[Point], plan: Plan, engine: VLLM, folder: Path, tick: Any) -> Measured:
  """A model of random weights: vLLM needs its configuration only."""
  config = dataclasses.replace(model.config, max_context=max(model.config.max_context, plan.longest))
  longer = dataclasses.replace(model, config=config)
  made = folder / store.digest(longer.to_json() | {"dtype": plan.config.dtype})[:12]
  made.mkdir(parents=True, exist_ok=True)
  exported = hf_export.exported_architecture(longer, dtype=plan.config.dtype, engine="vllm")
  described = hf_export.hf_config(exported, tokenizer=None, dtype=plan.config.dtype)
  if plan.config.dtype in fp8.ALGORITHMS:
    described["quantization_config"] = fp8.quantization_config(plan.config.dtype)
  weights.write_json(made / "config.json", described)
  hf_export.write_modelling_files(made)
  settings = engine.settings(made, max_length=plan.longest, batches=plan.batches, dummy=True)
  vocab = model.config.vocab_size
  return vllm_process.measure(engine, settings, points, vocab_size=vocab, folder=made, tick=tick)


def _same_machine(found: Mapping[str, Sequence[Measured]], folder: Path) -> dict[str, Any]:
  """The engine's description of itself; refuses parts of another machine or version."""
  told = [m.engine for models in found.values() for m in models if m.engine]
  if not told:
    raise PuzzleError(f"vLLM loaded none of the models: memory is short; its logs are in {folder}")
  for key in ("hardware", "version", "max_batched_tokens"):
    if len(values := sorted({str(e[key]) for e in told})) > 1:
      raise PuzzleError(f"{folder} holds measurements of {key} {' and '.join(values)}: name another folder")
  return {k: v for k, v in told[0].items() if k not in ("kv_cache_tokens", "load_s")} | {
    "load_s": statistics.fmean(e["load_s"] for e in told)
  }


def _mean(passes: Sequence[Measured], point: Point, kind: str = "seconds") -> float | None:
  """Of the faster half of all rounds; None if it was not reached each time."""
  rounds = [m.seconds(point, kind) for m in passes]
  return quiet_mean([s for r in rounds for s in r or ()]) if all(rounds) else None


def _steps_s(passes: Sequence[Measured], plan: Plan, batch: int, contexts: np.ndarray, kind: str) -> float | None:
  """Seconds of steps, one at each context."""
  steps = {c: _mean(passes, plan.decode(batch, c), kind) for c in plan.contexts}
  known = {c + plan.lead: s for c, s in steps.items() if s is not None}
  if not known or (len(known) < len(steps) and max(known) < contexts[-1] + 1):
    return None
  return float(np.interp(contexts, list(known), list(known.values())).sum())


def _totals(
  passes: Sequence[Measured], plan: Plan, batch: int, scenario: Scenario, stall_s: Mapping[int, float] | None = None
) -> Seconds | None:
  """A short answer, and for each further token an undisturbed step and `stall_s`; without the latter, a mean step."""
  short = plan.short(batch, scenario.input_tokens)
  prefill, begun = _mean(passes, plan.prefill(batch, scenario.input_tokens)), _mean(passes, short)
  if prefill is None or begun is None:
    return None
  further = np.arange(scenario.input_tokens + short["output"], scenario.tokens, dtype=float)
  kind, stall = ("mean_s", 0.0) if stall_s is None else ("seconds", stall_s[batch])
  steps = _steps_s(passes, plan, batch, further, kind) if len(further) else 0.0
  if steps is None:
    return None
  return {"prefill_s": prefill, "decode_s": max(begun - prefill, 0.0) + steps + len(further) * stall}


def _stalls(models: Collection[Sequence[Measured]], plan: Plan) -> dict[int, float]:
  """By batch, how much longer than undisturbed a step takes in the mean of models and contexts; seconds."""
  found = {}
  for batch in plan.batches:
    lines = [(m, plan.decode(batch, context)) for passes in models for m in passes for context in plan.contexts]
    means, undisturbed = (
      [s for m, point in lines for s in m.seconds(point, kind) or ()] for kind in ("mean_s", "seconds")
    )
    found[batch] = statistics.fmean(means) - statistics.fmean(undisturbed) if means else 0.0
  return found


def _parts(
  fitted: Mapping[str, Architecture],
  empty: str,
  found: Mapping[str, Sequence[Measured]],
  plan: Plan,
  subblocks: Sequence[Subblock],
  stall_s: Mapping[int, float],
) -> tuple[dict[str, dict[str, Differences]], dict[str, dict[str, Seconds]], list[dict[str, Any]]]:
  """By scenario and batch the differences, and what the all but empty model takes; and what could not be reached."""
  parts: dict[str, dict[str, Differences]] = {}
  floor: dict[str, dict[str, Seconds]] = {}
  unreachable = []
  for scenario in plan.scenarios:
    for batch in plan.batches:
      # The host's tokens come in bunches, of which no step is undisturbed.
      seconds = {name: _totals(found[name], plan, batch, scenario, stall_s) for name in fitted}
      seconds[empty] = _totals(found[empty], plan, batch, scenario)
      if missing := [name for name, s in seconds.items() if s is None]:
        why = next(line["unreachable"] for m in found[missing[0]] for line in m.unreachable())
        unreachable.append({"scenario": scenario.name, "batch": batch, "models": missing, "why": why})
        continue
      reached = {name: s for name, s in seconds.items() if s is not None}
      floor.setdefault(scenario.name, {})[str(batch)] = reached.pop(empty)
      parts.setdefault(scenario.name, {})[str(batch)] = by_difference.differences(fitted, reached, subblocks)
  return parts, floor, unreachable


def limit_of(seconds: Seconds, floor: Seconds) -> dict[str, str]:
  """By phase, what a model of these seconds waits for, `gpu` or `host`; `floor` is what an all but empty one takes."""
  return {phase: "host" if floor[phase] > HOST_SHARE * seconds[phase] else "gpu" for phase in PHASES}


def _limits(
  shallow: Sequence[Measured],
  plan: Plan,
  floor: Mapping[str, Mapping[str, Seconds]],
  stall_s: Mapping[int, float],
) -> dict[str, dict[str, dict[str, Any]]]:
  """How much of the seconds of the shallower model an all but empty one takes, and so who is the limit: GPU or host."""
  limits: dict[str, dict[str, dict[str, Any]]] = {}
  for scenario in plan.scenarios:
    for batch, least in floor.get(scenario.name, {}).items():
      whole = _totals(shallow, plan, int(batch), scenario, stall_s)
      assert whole is not None
      share = {phase: by_difference.share(least[phase], whole[phase]) for phase in PHASES}
      limits.setdefault(scenario.name, {})[batch] = {"empty_to_base": share, "limit": limit_of(whole, least)}
  return limits


def _points(
  models: Mapping[str, Architecture], found: Mapping[str, Sequence[Measured]], plan: Plan
) -> list[dict[str, Any]]:
  """Each timing with its spread; of steps, how far a line from the first context to the last is from it."""
  points = []
  for name in models:
    for point in plan.parts:
      rounds = [s for m in found[name] for s in m.seconds(point) or ()]
      if not rounds:
        continue
      seconds = quiet_mean(rounds)
      line = {"model": name} | {k: point[k] for k in ("kind", "batch", "tokens")}
      line |= {"seconds": seconds, "spread": statistics.pstdev(rounds) / seconds}
      if point["kind"] == "decode" and point["tokens"] in plan.contexts[1:-1]:
        ends = (plan.contexts[0], plan.contexts[-1])
        first, last = (_mean(found[name], plan.decode(point["batch"], c)) for c in ends)
        if first is not None and last is not None:
          line["affine_residual"] = float(np.interp(point["tokens"], ends, [first, last])) / seconds - 1
      points.append(line)
  return points


def _children(
  wholes: Mapping[str, Architecture],
  found: Mapping[str, Sequence[Measured]],
  plan: Plan,
  table: CostTable,
) -> list[dict[str, Any]]:
  """Whole scenarios of whole models, measured and predicted; where the limit is the host, `limit` says so."""
  lines = []
  for name, child in wholes.items():
    for scenario in table.scenarios:
      for batch in map(int, table.fixed[scenario.name]):
        total = _mean(found[name], plan.whole(batch, scenario))
        prefill = _mean(found[name], plan.prefill(batch, scenario.input_tokens))
        if total is None or prefill is None:
          continue
        predicted = table.predict(child.blocks, scenario.name, str(batch))
        took = {"prefill_s": prefill, "decode_s": total - prefill}
        limit = limit_of(took, table.floor[scenario.name][str(batch)])["decode_s"]
        lines.append(
          {"model": name, "scenario": scenario.name, "batch": batch, "blocks": [b.name for b in child.blocks]}
          | took
          | {"predicted": predicted, "limit": limit}
          | {"throughput": batch * scenario.tokens / total, "error": total / sum(predicted.values()) - 1}
        )
  return lines
