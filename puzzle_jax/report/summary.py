"""All figures of a finished run in one dictionary: what the report and the closing table show."""

import dataclasses
import time
from typing import Any

from puzzle_jax import scoring
from puzzle_jax.costs import jax_timing
from puzzle_jax.runs import Run, versions


def summarise(run: Run) -> dict[str, Any]:
  """All figures of a finished run."""
  architectures = {"parent": run.parent.architecture, "child": run.child.architecture}
  evaluation, costs, solution = run.store("evaluation").get_json("evaluation.json"), run.costs, run.solution
  scenario, batch = run.config.costs.scenario, solution["batch"]
  perplexity = {
    "parent": {"perplexity": evaluation["after_gkd"]["parent_perplexity"], "kl": 0.0, "kl_stderr": 0.0},
    "child": {k: evaluation["after_gkd"][k] for k in ("perplexity", "kl", "kl_stderr")},
  }
  models = {}
  for name, architecture in architectures.items():
    measured = evaluation["timing"]["seconds"][name]
    predicted = costs.predict(architecture, scenario.name, str(batch))
    total = sum(measured.values())
    models[name] = {
      "params": architecture.num_params(),
      "weight_bytes": architecture.num_params() * costs.bytes_per_value,
      "kv_bytes_per_token": architecture.kv_bytes_per_token(bytes_per_value=costs.bytes_per_value),
      "blocks": [b.name for b in architecture.blocks],
      "throughput": batch * scenario.tokens / total,
      "output_throughput": batch * scenario.output_tokens / total,
      "prefill_tokens_per_s": batch * scenario.input_tokens / measured["prefill_s"],
      "decode_tokens_per_s": batch * scenario.output_tokens / measured["decode_s"],
      **measured,
      **{f"predicted_{k}": v for k, v in predicted.items()},
      **perplexity[name],
    }
  limits = {k: v for k, v in dataclasses.asdict(run.config.search.limits).items() if v is not None}
  num_layers = run.parent.architecture.num_layers
  return {
    "name": run.config.name,
    "date": time.strftime("%F"),
    "command": f"python -m experiments.run --config=configs/{run.config.name} --workdir={run.workdir.root}",
    "parent": {"name": run.parent.name, "source": run.config.parent, "license": run.parent.license},
    "hardware": jax_timing.hardware(),
    "versions": versions(),
    "target": {"scenario": dataclasses.asdict(scenario), "batch": batch, "limits": limits},
    "models": models,
    "before_gkd": evaluation["before_gkd"],
    "eval_tokens": evaluation["after_gkd"]["tokens"],
    "space": run.space.to_json(),
    "metric": run.config.scores.metric,
    "scores": run.scores,
    "rank_correlation": scoring.rank_correlation(run.space, run.scores, metric=run.config.scores.metric),
    "library": [run.library.report(i) for i in range(num_layers)],
    "costs": costs.to_json(),
    "solution": solution,
    "frontier": run.store("search").get_json("frontier.json")["points"],
    "gkd": run.store("gkd").get_json("history.json")["steps"],
    "samples": evaluation["samples"],
    "stages": [
      {"name": store.root.name, "seconds": store.record["timing"]["seconds"], "bytes": store.size}
      for store in run.workdir.finished()
    ],
    "files": {"child": "gkd/model", "export": "export/hf", "report": "report/report.html"},
  }
