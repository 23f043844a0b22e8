"""Writes the README's measured tables from experiments/results/: python -m experiments.readme [--check]."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

_ROOT = Path(__file__).parent.parent
_CHECK = flags.DEFINE_bool("check", False, "Change nothing; fail if the README's tables are not those of the records.")


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


TABLES = {"quickstart": quickstart, "parent_quality": parent_quality}


def updated(text: str) -> str:
  """The README with each block between `<!-- table: NAME -->` and `<!-- end -->` made anew."""

  def block(match: re.Match[str]) -> str:
    return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

  return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", block, text, flags=re.DOTALL)


def main(argv: list[str]) -> None:
  del argv
  path = _ROOT / "README.md"
  text = path.read_text()
  if _CHECK.value:
    if updated(text) != text:
      sys.exit("error: README.md's tables differ from experiments/results/; run python -m experiments.readme")
    return
  path.write_text(updated(text))


if __name__ == "__main__":
  app.run(main)
