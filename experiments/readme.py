"""Writes the measured tables of README and docs from experiments/results/: python -m experiments.readme [--check]."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

_ROOT = Path(__file__).parent.parent
_CHECK = flags.DEFINE_bool("check", False, "Change nothing; fail if the tables are not those of the records.")


def _record(name: str) -> Any:
  return json.loads((_ROOT / "experiments" / "results" / f"{name}.json").read_text())


def _table(header: list[str], rows: list[list[str]]) -> str:
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quickstart() -> str:
  """Parent and child of the quickstart, side by side."""
  record = _record("quickstart")
  parent, child = record["models"]["parent"], record["models"]["child"]

  def row(label: str, key: str, form: str, scale: float = 1.0) -> list[str]:
    a, b = parent[key] * scale, child[key] * scale
    return [label, format(a, form), format(b, form), f"{b / a:.2f}×"]

  rows = [
    row("parameters (M)", "params", ".1f", 1e-6),
    row("KV cache (bytes a token, fp32)", "kv_bytes_per_token", ",d", 1),
    row("decode (tokens/s, batch 1)", "decode_tokens_per_s", ".1f"),
    row("prefill (tokens/s)", "prefill_tokens_per_s", ".0f"),
    row("whole scenario (tokens/s, measured)", "throughput", ".1f"),
    row("perplexity (held-out text)", "perplexity", ".2f"),
    ["KL to the parent (nats a token)", "0", f"{child['kl']:.3f} ± {child['kl_stderr']:.3f}", ""],
  ]
  scenario = record["target"]["scenario"]
  limits = ", ".join(f"{name} {value:g}" for name, value in record["target"]["limits"].items())
  minutes = sum(record["stages"].values()) / 60
  return (
    f"`{record['command']}`, {minutes:.1f} minutes on {record['hardware']} ({record['date']}, JAX "
    f"{record['versions']['jax']}, Python {record['versions']['python']}); {scenario['input_tokens']} tokens in, "
    f"{scenario['output_tokens']} out; asked for: {limits}; {record['eval_tokens']:.0f} held-out tokens.\n\n"
  ) + _table(["", "parent", "child", "ratio"], rows)


def parent_quality() -> str:
  """The built-in parent against independent readers of the same file."""
  record = _record("parent_quality")
  rows = [[name, f"{value:.4f}"] for name, value in record["perplexity"].items()]
  return _table(["engine", f"perplexity, {record['tokens']:,} tokens of {record['text']['name']}"], rows)


def _run_by(record: Any) -> str:
  return f"`{record['command']}`, {record['hardware']}, {record['date']}, JAX {record['versions']['jax']}."


def interactions() -> str:
  """How well estimates rank children, and how far they are from the KL that is measured."""
  record = _record("interactions")
  names = {
    "random": "100 random children, 1.05 to 2 times as fast",
    "optimal": "the search's own at 20 speeds from 1.05 to 2",
    "neighbours": "20 near-optimal children at 1.5",
    "neighbours_in_child": "the same, scores taken in the best of them",
    "neighbours_mean": "the same, the mean of both scores",
  }
  rows = []
  for key, name in names.items():
    s = record["summary"][key]
    rows.append([name, f"{s['spearman']:.2f}", *(f"{s[f'ratio_{q}']:.2f}" for q in ("p10", "median", "p90"))])
  header = ["estimate: the sum of scores, for", "Spearman's ρ with the KL", "KL / estimate, 10 %", "median", "90 %"]
  return f"{_run_by(record)}\n\n{_table(header, rows)}"


def compare() -> str:
  """Ways to choose a child at one target, before and after the same global distillation."""
  record = _record("compare")
  rows = []
  for name, result in sorted(record["methods"].items(), key=lambda item: item[1]["after_gkd"]["kl"]):
    kl = [f"{result[when]['kl']:.3f} ± {result[when]['kl_stderr']:.3f}" for when in ("before_gkd", "after_gkd")]
    row = [name, f"{result['speedup']:.3f}", f"{result['params'] * 1e-6:.1f}", f"{result['score']:.3f}", *kl]
    rows.append([*row, f"{result['after_gkd']['perplexity']:.2f}"])
  header = ["method", "predicted speed-up", "parameters (M)", "sum of scores", "KL", "KL after GKD", "perplexity after"]
  return f"{_run_by(record)}\n\n{_table(header, rows)}"


def search() -> str:
  """Seconds of the search, and what else finds the same optima."""
  record = _record("search")
  times = [
    [t["name"], f"{t['median_wall_s']:.2f}", f"{max(t['wall_s']):.2f}", f"{t['target_s']}"] for t in record["times"]
  ]
  peers = [[p["name"], f"{p['same']} of {p['instances']}", f"{p['time_ratio']:.1f}"] for p in record["peers"]]
  where = (
    f"`{record['command']}`, {record['hardware']['cores']} cores of {record['hardware']['cpu']}, {record['date']}."
  )
  return "\n\n".join(
    [
      where,
      _table(["tables", "seconds (median)", "slowest", "aim"], times),
      _table(["peer", "same optimum (1e-9)", "its time / ours"], peers),
    ]
  )


TABLES = {f.__name__: f for f in (quickstart, parent_quality, interactions, compare, search)}


def updated(text: str) -> str:
  """A page with each block between `<!-- table: NAME -->` and `<!-- end -->` made anew."""

  def block(match: re.Match[str]) -> str:
    return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

  return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", block, text, flags=re.DOTALL)


def main(argv: list[str]) -> None:
  del argv
  for path in (_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md"))):
    text = path.read_text()
    if updated(text) == text:
      continue
    if _CHECK.value:
      sys.exit(f"error: {path.name}'s tables differ from experiments/results/; run python -m experiments.readme")
    path.write_text(updated(text))


if __name__ == "__main__":
  app.run(main)
