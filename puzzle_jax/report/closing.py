"""Parent and child side by side in plain text: the table that a run ends with, and what it shares with the page.

All functions take the run's summary (`report.summary`) and leave out what it does not have.
"""

import dataclasses
import math
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Summary = Mapping[str, Any]

MISSING = "–"
SLOTS = ("attention", "ffn")
KEY = "gqaN: attention with N key/value heads; wN: FFN of N channels; linear: one matrix; none: left out"
_QUALITY = "next-token quality: the probability of the true next token over the parent's, geometric mean"
_BARS = "▁▂▃▄▅▆▇█"
_SIGNS = {"linear": "/", "none": "·"}
_STRIP_LAYERS = 60  # a line of the strip
_WIDTH = 96  # of the terminal text


def lookup(data: Any, *path: str | int) -> Any:
  """The value at a path of keys and indices, or None where any part of it is missing."""
  for key in path:
    try:
      data = data[key]
    except (KeyError, IndexError, TypeError):
      return None
  return data


def number(value: float | None, unit: str = "") -> str:
  """For people: `134.5 M`, `42.7 tokens/s`, `513 MiB` (bytes come in powers of 1024)."""
  if value is None:
    return MISSING
  base, prefixes = (1024, ("bytes", "KiB", "MiB", "GiB", "TiB")) if unit == "B" else (1000, ("", "k", "M", "G"))
  power = 0
  while power < len(prefixes) - 1 and abs(value) >= base ** (power + 1) and (unit == "B" or abs(value) >= 100_000):
    power += 1
  value /= base**power
  figures = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
  return " ".join(part for part in (figures, prefixes[power], "" if unit == "B" else unit) if part)


def duration(seconds: float | None) -> str:
  """For people: `75.9 ms`, `3.63 s`, `3 min 39 s`, `1 h 12 min`."""
  if seconds is None:
    return MISSING
  if seconds < 59.95:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
  minutes, rest = divmod(round(seconds), 60)
  return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def ratio(child: float | None, parent: float | None) -> float | None:
  """Child over parent, where both are known and the parent's is not 0."""
  return child / parent if child is not None and parent else None


def quality_kept(summary: Summary) -> float | None:
  """The share, 1 for the parent itself, of the parent's next-token quality that the child keeps.

  It is the ratio of the perplexities: the probability that the child gives to the true next token over the probability
  that the parent gives to it, as a geometric mean over the evaluation's tokens.
  """
  return ratio(lookup(summary, "models", "parent", "perplexity"), lookup(summary, "models", "child", "perplexity"))


def speedup(summary: Summary) -> float | None:
  """How many times as fast as the parent the child is in the whole scenario, measured."""
  return ratio(lookup(summary, "models", "child", "throughput"), lookup(summary, "models", "parent", "throughput"))


def predicted_throughput(summary: Summary, model: str) -> float | None:
  """Input and output tokens/s, as the costs of the blocks predict."""
  seconds = [lookup(summary, "models", model, f"predicted_{phase}") for phase in ("prefill_s", "decode_s")]
  scenario = lookup(summary, "target", "scenario")
  if None in seconds or scenario is None or not sum(seconds):
    return None
  tokens = scenario["input_tokens"] + scenario["output_tokens"]
  return (lookup(summary, "target", "batch") or 1) * tokens / sum(seconds)


def prediction_error(summary: Summary, model: str) -> float | None:
  """Predicted over measured throughput, minus 1."""
  predicted, measured = predicted_throughput(summary, model), lookup(summary, "models", model, "throughput")
  return predicted / measured - 1 if predicted and measured else None


_LIMITS = {
  "min_speedup": "at least {} times the parent's speed",
  "min_decode_speedup": "at least {} times the parent's decode speed",
  "min_throughput": "at least {} tokens/s, input and output",
  "max_runtime_s": "at most {} s for the whole scenario",
  "max_first_token_s": "the first token within {} s",
  "max_token_s": "at most {} s for each further token",
  "max_memory_bytes": "at most {} of weights and KV cache",
  "max_memory_ratio": "at most {} of the parent's memory",
  "max_params": "at most {} parameters",
  "max_params_ratio": "at most {} of the parent's parameters",
  "max_kv_bytes_per_token": "at most {} of KV cache per token",
  "max_kv_ratio": "at most {} of the parent's KV cache per token",
  "max_first_token_ratio": "the first token within {} of the parent's time",
}


@dataclasses.dataclass(frozen=True)
class Target:
  """A limit of the search, and what was measured of the child; None: it was not timed, or is arithmetic."""

  name: str
  limit: float
  words: str
  measured: float | None
  met: bool | None


def limit_words(name: str, value: float) -> str:
  """A field of `search.Limits` and its value, in words."""
  return _LIMITS.get(name, f"{name} = {{}}").format(number(value, "B" if "bytes" in name else ""))


def targets(summary: Summary) -> list[Target]:
  """What was asked, and whether the stopwatch agrees."""
  parent, child = (lookup(summary, "models", model) or {} for model in ("parent", "child"))
  prefill, decode = child.get("prefill_s"), child.get("decode_s")
  timed = {
    "min_speedup": speedup(summary),
    "min_decode_speedup": ratio(child.get("decode_tokens_per_s"), parent.get("decode_tokens_per_s")),
    "min_throughput": child.get("throughput"),
    "max_runtime_s": None if prefill is None or decode is None else prefill + decode,
    "max_first_token_s": prefill,
    "max_first_token_ratio": ratio(parent.get("prefill_tokens_per_s"), child.get("prefill_tokens_per_s")),
    "max_token_s": ratio(decode, lookup(summary, "target", "scenario", "output_tokens")),
  }
  found = []
  for name, limit in (lookup(summary, "target", "limits") or {}).items():
    value = timed.get(name)
    met = None if value is None else value >= limit if name.startswith("min") else value <= limit
    found.append(Target(name, limit, limit_words(name, limit), value, met))
  return found


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the table, formatted; `ratio` is the child's over the parent's."""

  label: str
  parent: str
  child: str
  ratio: str = ""


def rows(summary: Summary) -> list[Row]:
  """Parent against child, without the rows of which nothing is known."""

  def both(label: str, key: str, unit: str = "") -> Row:
    parent, child = (lookup(summary, "models", model, key) for model in ("parent", "child"))
    return _row(label, parent, child, unit)

  def kl(label: str, *path: str) -> Row:
    value, error = (lookup(summary, *path, key) for key in ("kl", "kl_stderr"))
    text = MISSING if value is None else f"{value:.3g}" + ("" if error is None else f" ± {error:.2g}")
    return Row(label, "0", text)

  def accuracy(label: str) -> Row:
    mean = lookup(summary, "tasks", "mean")
    if not mean:
      return Row(label, MISSING, MISSING)
    return Row(label, f"{100 * mean['parent']:.1f} %", f"{100 * mean['child']:.1f} %", _times(mean["ratio"]))

  predicted = [predicted_throughput(summary, model) for model in ("parent", "child")]
  errors = [
    MISSING if (error := prediction_error(summary, model)) is None else f"{100 * error:+.1f} %"
    for model in ("parent", "child")
  ]
  kept = quality_kept(summary)
  table = [
    both("parameters", "params"),
    both("weight memory", "weight_bytes", "B"),
    both("KV cache per token", "kv_bytes_per_token", "B"),
    both("prefill, measured", "prefill_tokens_per_s", "tokens/s"),
    both("decode, measured", "decode_tokens_per_s", "tokens/s"),
    both("whole scenario, measured", "throughput", "tokens/s"),
    _row("whole scenario, predicted", predicted[0], predicted[1], "tokens/s"),
    Row("  prediction off by", errors[0], errors[1]),
    both("perplexity", "perplexity"),
    Row("next-token quality", "100 %", MISSING if kept is None else f"{100 * kept:.1f} %"),
    kl("KL to the parent, nats/token", "models", "child"),
    kl("  before global distillation", "before_gkd"),
    accuracy("accuracy, mean of tasks"),
  ]
  return [row for row in table if row.child != MISSING]


def _row(label: str, parent: float | None, child: float | None, unit: str) -> Row:
  return Row(label, number(parent, unit), number(child, unit), _times(ratio(child, parent)))


def _times(change: float | None) -> str:
  return MISSING if change is None else f"{change:.2f}×"


@dataclasses.dataclass(frozen=True)
class Cell:
  """A subblock of the strip: `stem` is its name without the number, `share` its number over the parent's, 0 to 1."""

  name: str
  stem: str
  share: float
  is_parent: bool

  @property
  def label(self) -> str:
    return self.name + (" (the parent's)" if self.is_parent else "")

  @property
  def sign(self) -> str:
    """One character for it."""
    if re.search(r"\d", self.name):
      return _BARS[max(math.ceil(self.share * len(_BARS)), 1) - 1]
    return _SIGNS.get(self.stem, self.stem[0].upper())


def strip(summary: Summary) -> dict[str, list[Cell]]:
  """The child's subblocks by slot, one a layer; empty without a child."""
  parent = lookup(summary, "models", "parent", "blocks") or []
  child = lookup(summary, "models", "child", "blocks") or lookup(summary, "solution", "blocks") or []
  return cells_of(parent, child) if len(parent) == len(child) and child else {}


def cells_of(parent: Sequence[str], child: Sequence[str]) -> dict[str, list[Cell]]:
  """A child's subblocks by slot, one a layer, from its blocks and its parent's."""
  cells: dict[str, list[Cell]] = {slot: [] for slot in SLOTS}
  for own, block in zip(parent, child, strict=True):
    for slot, own_name, name in zip(SLOTS, own.split("/"), block.split("/"), strict=True):
      stem, size = _split(name)
      own_stem, own_size = _split(own_name)
      share = 0.0 if name == "none" else min(size / own_size, 1.0) if stem == own_stem and own_size else 1.0
      cells[slot].append(Cell(name, stem, share, name == own_name))
  return cells


def _split(name: str) -> tuple[str, int]:
  """`w768` as ("w", 768)."""
  digits = re.search(r"\d+", name)
  return re.sub(r"\d+", "", name), int(digits.group()) if digits else 0


def _legend(cells: Sequence[Cell]) -> str:
  """What the signs stand for; the parent's first, then the largest."""
  found: dict[str, list[str]] = {}
  for cell in sorted(set(cells), key=lambda c: (not c.is_parent, -c.share, c.name)):
    found.setdefault(cell.sign, []).append(cell.label)
  return "   ".join(f"{sign} {', '.join(labels)}" for sign, labels in found.items())


def _strip_lines(summary: Summary) -> Iterator[str]:
  cells = strip(summary)
  if not cells:
    return
  yield f"the child's layers, 0 to {len(cells['ffn']) - 1}"
  for start in range(0, len(cells["ffn"]), _STRIP_LAYERS):
    for slot in SLOTS:
      yield f"  {slot:<10} {''.join(c.sign for c in cells[slot][start : start + _STRIP_LAYERS])}"
  yield from (f"  {slot:<10} {_legend(cells[slot])}" for slot in SLOTS)
  yield f"  {KEY}"


def _text(text: str, indent: str) -> str:
  """A model's text in a paragraph; what a terminal would act on is taken out."""
  plain = "".join(c if c.isprintable() else " " for c in text)
  return textwrap.fill(" ".join(plain.split()), _WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent))


def closing_table(summary: Summary, *, workdir: str = "WORKDIR") -> str:
  """What a run gave, for a terminal.

  Args:
    summary: of the run.
    workdir: its directory, as paths and commands are to name it.

  Returns:
    Lines of text, without a newline at the end.
  """
  scenario, batch = lookup(summary, "target", "scenario"), lookup(summary, "target", "batch")
  lines = [f"{lookup(summary, 'parent', 'name') or 'parent'}, and the child that this run made of it"]
  if scenario:
    requests = "one request" if batch in (1, None) else f"{batch} requests at once"
    lines.append(
      f"scenario: {scenario['input_tokens']} tokens in, {scenario['output_tokens']} out, {requests}; "
      f"measured on {lookup(summary, 'hardware') or 'this machine'}"
    )
  for target in targets(summary):
    verdict = "" if target.met is None else f" ({'met' if target.met else 'MISSED'}: {number(target.measured)})"
    lines.append(f"target:   {target.words}{verdict}")
  lines += ["", f"{'':<30} {'parent':>16} {'child':>16} {'ratio':>8}"]
  lines += [f"{r.label:<30} {r.parent:>16} {r.child:>16} {r.ratio:>8}".rstrip() for r in rows(summary)]
  if quality_kept(summary) is not None:
    lines.append(_QUALITY)
  lines += ["", *_strip_lines(summary)]
  if sample := lookup(summary, "samples", 0):
    lines += ["", _text(sample["prompt"], "prompt   ")]
    lines += [_text(sample[model], f"{model:<9}") for model in ("parent", "child")]
  files = {name: f"{workdir}/{path}" for name, path in (lookup(summary, "files") or {}).items()}
  if files:
    lines += ["", "files", *(f"  {name:<10} {path}" for name, path in files.items())]
  if "child" in files:
    lines += ["", "next", f'  python -m experiments.generate --model={files["child"]} --prompt="What is a star?"']
  return "\n".join(lines)
