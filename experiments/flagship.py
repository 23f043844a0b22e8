"""What the children of configs/flagship.py have come to, as one small record: experiments/results/flagship.json.

    python -m experiments.sweep --config=configs/flagship.py --workdir=runs/flagship …
    python -m experiments.serve_compare --engine=vllm --child=runs/flagship/min_speedup=1.5 \\
      --out=served/min_speedup=1.5 --parent_out=served/parent --scenarios=6144/2048,7680/512,7680/128 \\
      --batches=256 --max_batched_tokens=65536 --rounds=1
    python -m experiments.flagship --workdir=runs/flagship --served=served

The second is for each child. A child is a run's directory in WORKDIR that got as far as its search; what it was in vLLM
lies under the same name in SERVED. One that was not served or evaluated yet is written with what there is.
`experiments.readme` and `experiments.pictures` show the record.
"""

import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import app, flags

from configs import flagship as config_file
from experiments import RESULTS
from puzzle_jax.arch import BlockSpec
from puzzle_jax.config import RunConfig
from puzzle_jax.costs import CostTable
from puzzle_jax.data.sampling import PARENT
from puzzle_jax.data.sets import rows_by_share
from puzzle_jax.errors import PuzzleError
from puzzle_jax.records import open_record
from puzzle_jax.report.closing import lookup
from puzzle_jax.serving import vllm_timing
from puzzle_jax.store import read_json, write_json

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs' directories are.", required=True)
_SERVED = flags.DEFINE_string("served", "served", "Where the folders of experiments.serve_compare are.")

PARENT_TOKENS = 2e12  # "trained on 2 trillion tokens": the model card of HuggingFaceTB/SmolLM2-135M-Instruct
_QUALITY = ("perplexity", "kl", "kl_stderr", "loss_change", "loss_change_stderr")
_MODELS = ("parent", "child")


def collect(workdir: Path, served: Path) -> dict[str, Any]:
  """The record.

  Raises:
    PuzzleError: no child, children of several parents, or one that another was served for.
  """
  folders = [path for path in sorted(workdir.iterdir()) if _is_run(path)] if workdir.is_dir() else []
  summaries = {path.name: open_record(path).summary for path in folders}
  summaries = {name: summary for name, summary in summaries.items() if "solution" in summary}
  if not summaries:
    raise PuzzleError(f"{workdir} holds no run that has a child; name the --workdir of experiments.sweep")
  first = next(iter(summaries.values()))
  if any(
    summary["models"]["parent"]["blocks"] != first["models"]["parent"]["blocks"] for summary in summaries.values()
  ):
    raise PuzzleError(f"{workdir} holds children of several parents")
  children = [
    child_of(summary, workdir, name, _read(served / name / "served.json")) for name, summary in summaries.items()
  ]
  own = ("params", "blocks", "kv_bytes_per_token", "weight_bytes")
  return {
    "command": f"python -m experiments.flagship --workdir=runs/{workdir.name} --served={served.name}",
    "date": max(child["date"] for child in children),
    "parent": {"name": first["parent"]["name"], "license": first["parent"]["license"], "tokens": PARENT_TOKENS}
    | {key: first["models"]["parent"][key] for key in own},
    "scenario": first["target"]["scenario"]["name"],
    "batch": first["target"]["batch"],
    "costs": {key: first["costs"]["details"].get(key) for key in ("command", "date", "wall_s")}
    | {key: first["costs"][key] for key in ("hardware", "versions")},
    "children": sorted(children, key=lambda child: child["target"]),
  }


def _is_run(path: Path) -> bool:
  return (path / "config.json").is_file() or (path / "report" / "summary.json").is_file()


def _read(path: Path) -> dict[str, Any] | None:
  return read_json(path) if path.is_file() else None


def child_of(summary: dict[str, Any], workdir: Path, name: str, served: dict[str, Any] | None) -> dict[str, Any]:
  """What the record keeps of a child; `served` is None where it was not served yet."""
  parent, child = (summary["models"][model] for model in _MODELS)
  found = {
    "run": name,
    "target": summary["config"]["search"]["limits"]["min_speedup"],
    "command": _command(summary["config"], f"runs/{workdir.name}/{name}"),
    "date": max(filter(None, [summary["date"], served and served["date"]])),
    "hardware": summary["hardware"],
    "versions": summary["versions"],
    "score": summary["solution"]["score"],
    **{key: child[key] for key in ("params", "blocks", "kv_bytes_per_token", "weight_bytes")},
    "speed": speed(summary, served),
    "tokens": tokens(RunConfig.from_dict(summary["config"]), len(summary.get("gkd", ()))),
    "stages": {
      stage["name"]: {key: stage.get(key) for key in ("seconds", "resumed", "hardware")} for stage in summary["stages"]
    },
  }
  if served is not None:
    kv = {model: served[model]["kv_bytes_per_token"] for model in _MODELS}
    if kv["child"] * parent["kv_bytes_per_token"] != kv["parent"] * child["kv_bytes_per_token"]:
      raise PuzzleError(f"{name}: what was served has another KV cache than the run's child; serve that one")
    found["served"] = {"date": served["date"], "command": _served_command(served, workdir, name)}
    for model in _MODELS:
      found["served"][model] = {key: value for key, value in served[model].items() if key != "figures"}
  if "perplexity" in child:
    after = {key: child[key] for key in _QUALITY if key in child}
    before = {key: summary["before_gkd"][key] for key in _QUALITY if key in summary["before_gkd"]}
    rows = {"tokens": summary["eval_tokens"], "parent_perplexity": parent["perplexity"]}
    found["heldout"] = rows | {"before_gkd": before, "after_gkd": after}
  return found | {key: summary[key] for key in ("texts", "tasks", "samples") if key in summary}


def speed(summary: dict[str, Any], served: dict[str, Any] | None) -> dict[str, dict[str, dict[str, Any]]]:
  """By scenario and batch, what the costs predict of parent and child, what was measured, and the child's ratios; where
  the costs have a floor, by phase whether GPU or host is the limit (`vllm_timing.limit_of`).

  `throughput` is of tokens in and out, `output_throughput` of those that come out: of one closed batch, so that the
  ratio is the same.
  """
  costs, models = CostTable.from_json(summary["costs"]), summary["models"]
  found: dict[str, dict[str, dict[str, Any]]] = {}
  for scenario in costs.scenarios:
    for batch in costs.fixed[scenario.name]:
      predicted: dict[str, dict[str, Any]] = {}
      for model in _MODELS:
        blocks = map(BlockSpec.parse, models[model]["blocks"])
        phases = costs.predict(blocks, scenario.name, batch)
        seconds, floor = sum(phases.values()), costs.floor.get(scenario.name, {}).get(batch)
        predicted[model] = {
          "throughput": int(batch) * scenario.tokens / seconds,
          "output_throughput": int(batch) * scenario.output_tokens / seconds,
        }
        if floor:
          predicted[model]["limit"] = vllm_timing.limit_of(phases, floor)
      here = {"predicted": predicted, "predicted_speedup": _ratio(predicted)}
      found.setdefault(scenario.name, {})[batch] = here
  for name, batches in (lookup(served, "parent", "figures") or {}).items():
    for batch, figures in batches.items():
      if (child := lookup(served, "child", "figures", name, batch)) is not None:
        measured = {"parent": figures, "child": child}
        found.setdefault(name, {}).setdefault(batch, {}).update(measured=measured, speedup=_ratio(measured))
  return found


def _ratio(models: dict[str, dict[str, Any]]) -> float:
  return models["child"]["throughput"] / models["parent"]["throughput"]


def tokens(config: RunConfig, gkd_steps: int) -> dict[str, float]:
  """That the parent wrote for all sets; that each layer's variants and the child were trained on, repetitions included,
  and how many of them differ; and what both trainings are of those that the parent was trained on."""
  data, written = config.data, 0
  for part, names in {"train": ("train", "gkd"), "heldout": ("heldout", "eval")}.items():
    for name in names if PARENT in data.sources else ():
      rows = rows_by_share(getattr(data, f"{name}_tokens") // data.seq_len, data.shares_by_part[part])
      written += rows[data.sources.index(PARENT)] * data.seq_len
  bld = config.bld.steps * config.bld.batch_rows * data.seq_len
  gkd = gkd_steps * config.gkd.batch_rows * data.seq_len
  return {
    "written": written,
    "bld": bld,
    "bld_different": min(bld, data.train_tokens),
    "gkd": gkd,
    "gkd_different": min(gkd, data.gkd_tokens),
    "share": (bld + gkd) / PARENT_TOKENS,
  }


def _command(config: dict[str, Any], workdir: str) -> str:
  """That makes a run, with the fields that differ from the config's; files by their names."""
  own, ours = (dict(_fields(json.loads(json.dumps(c)))) for c in (config_file.get_config().to_dict(), config))
  changed = [f"--config.{name}={shlex.quote(_shown(value))}" for name, value in ours.items() if own.get(name) != value]
  return " ".join(["python -m experiments.run --config=configs/flagship.py", *changed, f"--workdir={workdir}"])


def _fields(section: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
  for name, value in section.items():
    if isinstance(value, dict) and value:
      yield from _fields(value, f"{path}{name}.")
    else:
      yield f"{path}{name}", value


def _shown(value: Any) -> str:
  if isinstance(value, str):
    return ",".join(Path(part).name if part.startswith("/") else part for part in value.split(","))
  if isinstance(value, list):
    return f"({''.join(json.dumps(_shown(v) if isinstance(v, str) else v) + ', ' for v in value).rstrip()})"
  return str(value)


def _served_command(served: dict[str, Any], workdir: Path, name: str) -> str:
  figures = served["parent"]["figures"]
  batches = sorted({int(batch) for by_batch in figures.values() for batch in by_batch})
  engine = served["child"]["engine"]
  command = (
    f"python -m experiments.serve_compare --engine={engine.get('name', 'vllm').lower()} "
    f"--child=runs/{workdir.name}/{name} --out=served/{name} "
    f"--scenarios={','.join(figures)} --batches={','.join(map(str, batches))}"
  )
  most = engine.get("max_batched_tokens")
  return command if most is None else f"{command} --max_batched_tokens={most}"


def main(argv: list[str]) -> None:
  del argv
  try:
    record = collect(Path(_WORKDIR.value), Path(_SERVED.value))
  except PuzzleError as e:
    sys.exit(f"error: {e}")
  write_json(RESULTS / "flagship.json", record)
  for child in record["children"]:
    missing = [
      f"not {word} yet" for key, word in {"served": "served", "heldout": "evaluated"}.items() if key not in child
    ]
    print(f"{child['run']}: {', '.join(missing) or 'whole'}")


if __name__ == "__main__":
  app.run(main)
