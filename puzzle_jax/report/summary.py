"""All figures of a run in one dictionary: what the report and the closing table show. Of an unfinished run, what is
there. Read are small files alone, and of the parent what its header says: no weights.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from puzzle_jax import scoring
from puzzle_jax.arch import Architecture, BlockSpec
from puzzle_jax.costs import CostTable
from puzzle_jax.runs import Run
from puzzle_jax.store import StageStore

_QUALITY = ("perplexity", "kl", "kl_stderr", "loss_change", "loss_change_stderr")
_CURVE_POINTS = 200  # of a training curve
_FILES = {"child": ("gkd", "model"), "export": ("export", "hf")}


def summarise(run: Run) -> dict[str, Any]:
  """All figures of a run's finished stages.

  Raises:
    PuzzleError: the parent cannot be read, or a file is corrupt.
  """
  stages, config, metric = _current(run), run.config, run.config.scores.metric
  done = {store.root.name for store in stages}
  summary: dict[str, Any] = {
    "name": config.name,
    "command": f"python -m experiments.run --config=configs/{config.name} --workdir={run.workdir.root}",
    "config": config.to_dict(),
    "parent": {"name": run.parent.name, "source": config.parent, "license": run.parent.license},
    **_provenance(run, stages),
    "space": run.space.to_json(),
    "metric": metric,
    "stages": [
      {
        "name": store.root.name,
        "seconds": store.record["timing"]["seconds"],
        "resumed": store.record["resumed"],  # the seconds are those of the last sitting alone
        "bytes": store.size,
        "versions": store.record["versions"],
        "hardware": store.record.get("hardware"),
      }
      for store in stages
    ],
    "files": {name: "/".join(path) for name, path in _FILES.items() if path[0] in done}
    | {"report": "report/report.html"},
  }
  if "scores" in done:
    summary["scores"] = run.scores
    summary["rank_correlation"] = scoring.rank_correlation(run.space, run.scores, metric=metric)
  if "library" in done:
    reports = [run.library.report(i) for i in range(run.parent.architecture.num_layers)]
    summary["library"] = [
      {name: {k: v for k, v in report.items() if k != "curve"} for name, report in layer.items()} for layer in reports
    ]
    summary["library_curves"] = training_curves(reports)
  if "costs" in done:
    summary["costs"] = run.costs.to_json()
  if "search" in done:
    summary["solution"] = run.solution
    summary["frontier"] = run.store("search").get_json("frontier.json")["points"]
  if "gkd" in done:
    summary["gkd"] = run.store("gkd").get_json("history.json")["steps"]
  evaluation = run.store("evaluation").get_json("evaluation.json") if "evaluation" in done else {}
  if evaluation:
    summary |= {key: evaluation[key] for key in ("before_gkd", "samples", "texts", "tasks") if key in evaluation}
    summary["eval_tokens"] = evaluation["after_gkd"]["tokens"]
    timed = evaluation["timing"]["seconds"]
    summary["timing_rounds"] = {model: seconds.pop("rounds") for model, seconds in timed.items() if "rounds" in seconds}
  batch = summary["solution"]["batch"] if "search" in done else config.costs.batches[0]
  limits = {k: v for k, v in dataclasses.asdict(config.search.limits).items() if v is not None}
  scenario = dataclasses.asdict(config.costs.scenario)
  return summary | {
    "target": {"scenario": scenario, "batch": batch, "limits": limits},
    "models": _models(run, summary, evaluation, batch),
  }


def training_curves(layers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
  """Of each variant's training: `step` and `loss`, the mean since the step before and of that the median over layers.

  Args:
    layers: `Library.report` of each.
  """
  found: dict[str, list[list[float]]] = defaultdict(list)
  for name, report in (item for layer in layers for item in layer.items()):
    if curve := [loss for loss in report["curve"] if loss is not None]:
      found[name].append(curve)
  result = {}
  for name, curves in found.items():
    steps = min(map(len, curves))
    stops = np.unique(np.linspace(0, steps, min(steps, _CURVE_POINTS) + 1, dtype=int))[1:]
    means = np.add.reduceat(np.array([curve[:steps] for curve in curves]), [0, *stops[:-1]], axis=1)
    means /= np.diff(stops, prepend=0)
    result[name] = {"step": stops.tolist(), "loss": np.median(means, axis=0).tolist()}
  return result


def _current(run: Run) -> list[StageStore]:
  """The finished stages that were made of what their inputs hold now, in the order in which they were finished."""
  found = {store.root.name: store for store in run.workdir.finished() if store.root.name != "report"}

  def stale(store: StageStore) -> bool:
    inputs = store.key["inputs"].items()
    return any(name not in found or found[name].content() != content for name, content in inputs)

  while gone := [name for name, store in found.items() if stale(store)]:
    found = {name: store for name, store in found.items() if name not in gone}
  return list(found.values())


def _provenance(run: Run, stages: Sequence[StageStore]) -> dict[str, Any]:
  """When, on what and by what the last stage was made: as it recorded them, or as an earlier report of the run did."""
  found: dict[str, Any] = dict.fromkeys(("date", "hardware", "versions"))
  if "summary.json" in (stored := run.store("report")):
    found |= {key: value for key, value in stored.get_json("summary.json").items() if key in found}
  for record in (store.record for store in stages):
    found["versions"] = record["versions"]
    if "hardware" in record:
      found |= {"hardware": record["hardware"], "date": record["timing"]["finished"].split()[0]}
  return found


def _models(run: Run, summary: dict[str, Any], evaluation: dict[str, Any], batch: int) -> dict[str, dict[str, Any]]:
  """Parent and child, what is predicted and what was measured of them."""
  parent, scenario = run.parent.architecture, run.config.costs.scenario
  architectures = {"parent": parent}
  if "solution" in summary:
    blocks = tuple(map(BlockSpec.parse, summary["solution"]["blocks"]))
    architectures["child"] = Architecture(parent.config, blocks)
  costs = CostTable.from_json(summary["costs"]) if "costs" in summary else None
  models: dict[str, dict[str, Any]] = {}
  for name, architecture in architectures.items():
    model = models[name] = {"params": architecture.num_params(), "blocks": [b.name for b in architecture.blocks]}
    if costs:
      model["weight_bytes"] = costs.weight_bytes(architecture)
      model["kv_bytes_per_token"] = architecture.kv_bytes_per_token(bytes_per_value=costs.kv_width)
      predicted = costs.predict(architecture.blocks, scenario.name, str(batch))
      model |= {f"predicted_{k}": v for k, v in predicted.items()}
    if measured := evaluation.get("timing", {}).get("seconds", {}).get(name):
      model |= measured
      total = sum(measured.values())
      model["throughput"] = batch * scenario.tokens / total
      model["output_throughput"] = batch * scenario.output_tokens / total
      model["prefill_tokens_per_s"] = batch * scenario.input_tokens / measured["prefill_s"]
      model["decode_tokens_per_s"] = batch * scenario.output_tokens / measured["decode_s"]
  if evaluation:
    after = evaluation["after_gkd"]
    models["parent"] |= {"perplexity": after["parent_perplexity"], "kl": 0.0, "kl_stderr": 0.0}
    models["child"] |= {key: after[key] for key in _QUALITY if key in after}
  return models
