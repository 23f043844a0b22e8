"""The tables of docs/flagship.md, from the record of `experiments.flagship`.

What a child lacks, because it was not served or evaluated yet, is left out or empty.
"""

import html
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from puzzle_jax.report import closing
from puzzle_jax.report.closing import MISSING, lookup

Record = dict[str, Any]
Table = tuple[list[str], list[list[str]]]


def name(child: Record) -> str:
  """By the speed that was asked for."""
  return f"{child['target']:g}×"


def speedup(record: Record, child: Record, key: str = "speedup") -> float | None:
  """In the scenario and at the batch that were asked for: measured, or with the key `predicted_speedup`."""
  return lookup(child, "speed", record["scenario"], str(record["batch"]), key)


def _cell(form: str, *values: Any) -> str:
  return MISSING if None in values else form.format(*values)


def _percent(preserved: Record | None) -> str:
  """`97.9% (97.1 to 98.7)`."""
  ratio, low, high = (lookup(preserved, key) for key in ("ratio", "low", "high"))
  return _cell("{:.1%}", ratio) + ("" if None in (ratio, low, high) else f" ({100 * low:.1f} to {100 * high:.1f})")


def _named(child: Record, text: str, context: int) -> Record | None:
  """What was measured on a text at a context length."""
  return next((t for t in child.get("texts", ()) if (t["text"], t["context"]) == (text, context)), None)


def point_costs(record: Record) -> list[str]:
  """For each child the speed that another percent of the accuracy would cost: on the line to the next slower child, and
  from the slowest to the parent."""
  found, slower, better = [], 1.0, 1.0
  for child in record["children"]:
    x, y = speedup(record, child), lookup(child, "tasks", "mean", "ratio")
    if x is None or y is None:
      found.append(MISSING)
      continue
    found.append(f"{(x - slower) / (100 * (better - y)):.3f}×" if x > slower and y < better else MISSING)
    slower, better = x, y
  return found


def where(record: Record) -> str:
  """How, where and when it was made and measured."""
  children = record["children"]
  engines = [child["served"]["child"]["engine"] for child in children if "served" in child]
  made = _listed(f"{child['hardware']}, JAX {child['versions']['jax']}" for child in children)
  text = f"`{record['command']}`, {record['date']}; the children were made on {made}"
  if engines:
    served = _listed(
      f"{e['name']} {e.get('version', '')} on {e.get('hardware', 'an unknown machine')}" for e in engines
    )
    text += f" and measured in {served}: {record['scenario']} tokens, batch {record['batch']}"
    spread = _parents_spread(record)
    text += f"; the parent, measured again, differed by at most {spread:.1%}" if spread else "; the parent once for all"
  return f"{text}."


def _listed(texts: Iterable[str]) -> str:
  return " and ".join(dict.fromkeys(texts))


def children(record: Record) -> Table:
  """The frontier: speed and quality of each child."""
  header = ["asked", "parameters (M)", "KV cache (bytes a token)", "predicted", "measured", "preserved (95 %)"]
  header += ["speed for another percent", "KL, held-out text", "perplexity"]
  parent = record["parent"]
  perplexity = next((c["heldout"]["parent_perplexity"] for c in record["children"] if "heldout" in c), None)
  size = [f"{parent['params'] / 1e6:.1f}", f"{parent['kv_bytes_per_token']:,}"]
  rows = [["parent", *size, "", "", "", "", "0", _cell("{:.2f}", perplexity)]]
  for child, costs in zip(record["children"], point_costs(record), strict=True):
    rows.append(
      [
        name(child),
        f"{child['params'] / 1e6:.1f}",
        f"{child['kv_bytes_per_token']:,}",
        _cell("{:.2f}×", speedup(record, child, "predicted_speedup")),
        _cell("{:.2f}×", speedup(record, child)),
        _percent(lookup(child, "tasks", "mean")),
        costs,
        _cell("{:.4f} ± {:.4f}", *(lookup(child, "heldout", "after_gkd", key) for key in ("kl", "kl_stderr"))),
        _cell("{:.2f}", lookup(child, "heldout", "after_gkd", "perplexity")),
      ]
    )
  return header, rows


def served(record: Record) -> Table:
  """Every scenario that was measured: both throughputs, latencies, and the prediction."""
  header = ["scenario, batch", "model", "tokens/s, in and out", "predicted", "out", "ratio", "predicted"]
  header += ["limit of decoding", "first token (ms)", "each token (ms)"]
  rows = []
  for scenario, batch in _measured(record):
    head = f"{scenario}, {batch}"
    for child in record["children"]:
      here = lookup(child, "speed", scenario, batch)
      if lookup(here, "measured") is None:
        continue
      for model in ("parent", "child") if head else ("child",):
        figures, predicted = here["measured"][model], lookup(here, "predicted", model)
        error = predicted["throughput"] / figures["throughput"] - 1 if predicted else None
        ratios = [_cell("{:.3f}×", here.get(key)) for key in ("speedup", "predicted_speedup")]
        rows.append(
          [
            head,
            name(child) if model == "child" else "parent",
            f"{figures['throughput']:,.0f}",
            _cell("{:+.1%}", error),
            f"{figures['output_throughput']:,.0f}",
            *(ratios if model == "child" else ["", ""]),
            (lookup(predicted, "limit", "decode_s") or "").replace("gpu", "GPU"),
            f"{1e3 * figures['first_token_s']:,.0f}",
            f"{1e3 * figures['token_s']:.2f}",
          ]
        )
        head = ""
  return header, rows


def _measured(record: Record) -> list[tuple[str, str]]:
  """The scenarios and batches in which some child was measured."""
  places = [
    (scenario, batch)
    for child in record["children"]
    for scenario, batches in child["speed"].items()
    for batch, found in batches.items()
    if "measured" in found
  ]
  return list(dict.fromkeys(places))


def _parents_spread(record: Record) -> float:
  """How far the parent's own throughput lies apart at most, in any scenario."""
  spreads = []
  for scenario, batch in _measured(record):
    found = [lookup(c, "speed", scenario, batch, "measured", "parent", "throughput") for c in record["children"]]
    known = [value for value in found if value]
    spreads.append(max(known) / min(known) - 1)
  return max(spreads, default=0.0)


def quality(record: Record) -> Table:
  """Perplexity and KL on every text and at every context length."""
  rows = []

  def add(text: str, context: str, found: Sequence[Record | None], parent: float) -> None:
    values = [[lookup(one, key) for key in ("perplexity", "kl", "kl_stderr")] for one in found]
    rows.append([text, context, f"{parent:.2f}", *(_cell("{:.2f}; {:.4f} ± {:.4f}", *three) for three in values)])

  heldout = [child.get("heldout") for child in record["children"]]
  for when, words in {"before_gkd": "before", "after_gkd": "after"}.items() if any(heldout) else ():
    parent = next(one["parent_perplexity"] for one in heldout if one)
    add(f"held out, {words} global distillation", "", [lookup(one, when) for one in heldout], parent)
  for text, context in dict.fromkeys((t["text"], t["context"]) for c in record["children"] for t in c.get("texts", ())):
    found = [_named(child, text, context) for child in record["children"]]
    add(f"`{text}`", f"{context:,}", found, next(one["parent_perplexity"] for one in found if one))
  return ["text", "context", "parent", *map(name, record["children"])], rows


def tasks(record: Record) -> Table:
  """Accuracy of parent and children on each task, and what is preserved."""
  header = ["task", "items", "parent", *map(name, record["children"])]
  rows = []

  def add(label: str, items: str, *path: str) -> None:
    found = [lookup(child, "tasks", *path) for child in record["children"]]
    parent = next((preserved["parent"] for preserved in found if preserved), None)
    if parent is not None:
      cells = [f"{f['child']:.1%}: {_percent(f)}" if f else MISSING for f in found]
      rows.append([label, items, f"{parent:.1%}", *cells])

  known: dict[str, int] = {}
  for child in record["children"]:
    known |= {task: found["items"] for task, found in (lookup(child, "tasks", "tasks") or {}).items()}
  for task, items in known.items():
    add(task, f"{items:,}", "tasks", task, "preserved")
    add(f"{task}, a character", f"{items:,}", "tasks", task, "normalised")
  add("mean of the tasks", f"{sum(known.values()):,}", "mean")
  return header, rows


def spent(record: Record) -> Table:
  """Tokens and minutes of each stage; what all children share is said once."""
  rows, made = [], record["children"]

  def add(label: str, cells: list[str]) -> None:
    same = len(set(cells)) == 1
    rows.append([label, cells[0] if same else "", *([""] * len(cells) if same else cells)])

  counts = [child["tokens"] for child in made]
  add("text that the parent wrote, tokens", [f"{count['written']:,}" for count in counts])
  for stage, words in {"bld": "blockwise distillation, tokens a layer", "gkd": "global distillation, tokens"}.items():
    add(words, [f"{count[stage]:,} ({count[f'{stage}_different']:,} different)" for count in counts])
  total = record["parent"]["tokens"] / 1e12
  add(f"both, of the parent's {total:g} T", [f"{count['share']:.4%}" for count in counts])
  if seconds := record["costs"]["wall_s"]:
    rows.append(["measuring the costs of blocks, minutes", f"{seconds / 60:.1f}", *[""] * len(made)])
  for stage in dict.fromkeys(stage for child in made for stage in child["stages"]):
    add(f"{stage}, minutes", [_minutes(child["stages"].get(stage)) for child in made])
  return ["", "all", *map(name, made)], rows


def _minutes(stage: Record | None) -> str:
  if stage is None:
    return MISSING
  return f"{stage['seconds'] / 60:.1f}" + (" (its last sitting)" if stage["resumed"] else "")


def blocks(record: Record) -> Table:
  """What each child's layers are: how many of a kind, and layer by layer."""
  rows = []
  for child in record["children"]:
    cells = closing.cells_of(record["parent"]["blocks"], child["blocks"])
    for slot, title in {"attention": "attention", "ffn": "FFN"}.items():
      counts = Counter(cell.name for cell in cells[slot])
      strip = "".join(cell.sign for cell in cells[slot])
      kinds = ", ".join(f"{number} × `{kind}`" for kind, number in counts.most_common())
      rows.append([name(child) if slot == "attention" else "", title, f"`{strip}`", kinds])
  return ["child", "", "layer by layer", "of a kind"], rows


def chat(record: Record) -> Table:
  """Answers of parent and children to the same questions."""
  rows = []
  answered = [child for child in record["children"] if child.get("samples")]
  for sample in answered[0]["samples"] if answered else ():
    rows.append([f"**{_verbatim(sample['prompt'])}**", ""])
    rows.append(["parent", _verbatim(sample["parent"])])
    for child in answered:
      answer = next((s["child"] for s in child["samples"] if s["prompt"] == sample["prompt"]), MISSING)
      rows.append([name(child), _verbatim(answer)])
  return ["", ""], rows


def _verbatim(text: str) -> str:
  """A model's text in a cell of a table."""
  marked = re.sub(r"([\\`*_\[\]|~#])", r"\\\1", html.escape(text.strip(), quote=False))
  return "<br>".join(" ".join(line.split()) for line in marked.splitlines() if line.strip())
