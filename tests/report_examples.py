"""What the report's tests share: a summary such as a run on SmolLM2 writes, and a parser of pages."""

import html.parser
import itertools
import math
import random
import statistics
from typing import Any

from puzzle_jax.report import closing

# What a subblock costs in quality (nats a token in a middle layer) and in time (milliseconds of prefill and decode).
SUBBLOCKS = {
  "attention.gqa3": (0.0, 3.4, 41.0),
  "attention.gqa1": (0.004, 3.1, 38.0),
  "attention.linear": (0.03, 1.0, 12.0),
  "attention.none": (0.06, 0.0, 0.0),
  "ffn.w1536": (0.0, 6.1, 64.0),
  "ffn.w768": (0.012, 3.2, 33.0),
  "ffn.linear": (0.05, 1.0, 12.5),
  "ffn.none": (0.09, 0.0, 0.0),
}


def make_summary(*, layers: int = 30, composed: bool = False, seed: int = 0) -> dict[str, Any]:
  """A summary such as a run on SmolLM2 writes; the same for the same arguments."""
  rng = random.Random(seed)
  attention, ffn = ([i.partition(".")[2] for i in SUBBLOCKS if i.startswith(slot)] for slot in ("attention", "ffn"))
  parent = f"{attention[0]}/{ffn[0]}"
  scores: list[dict[str, Any]] = []
  library: list[dict[str, Any]] = []
  for layer in range(layers):
    # The ends of a model matter most; one row of text decides little.
    weight = 0.3 + 4.0 * math.exp(-layer) + 1.2 * math.exp(layer - layers)
    here = {}
    for a, f in itertools.product(attention, ffn):
      if f"{a}/{f}" == parent or (not composed and a != attention[0] and f != ffn[0]):
        continue
      kl = weight * (SUBBLOCKS[f"attention.{a}"][0] + SUBBLOCKS[f"ffn.{f}"][0]) * math.exp(rng.gauss(0, 0.5))
      error = 0.15 * kl + 2e-4
      here[f"{a}/{f}"] = {"kl": kl, "kl_stderr": error, "lm_loss": kl * rng.uniform(-0.5, 1.2), "lm_loss_stderr": error}
    scores.append(here)
    variants = {}
    for name, (loss, _, _) in SUBBLOCKS.items():
      if loss:
        init = min(1.0, 6 * loss * rng.uniform(0.8, 1.4) + 0.1)
        trained = init if name.endswith("none") else init * rng.uniform(0.5, 0.8)
        losses = {"delta_init": init, "delta_trained": trained, "paper_init": init / 50, "paper_trained": trained / 50}
        variants[name] = {"finite": True, "losses": losses}
    library.append(variants)
  kinds = [parent, parent, "gqa3/w768", "none/w1536", "linear/w768", "gqa1/linear", "gqa3/none"]
  child = [rng.choice(kinds) for _ in range(layers)]
  seconds = {name: {"prefill_s": p / 1e3, "decode_s": d / 1e3} for name, (_, p, d) in SUBBLOCKS.items()}
  fixed = {"prefill_s": 0.02, "decode_s": 0.6}
  models: dict[str, dict[str, Any]] = {}
  rounds: dict[str, dict[str, list[float]]] = {}
  for name, blocks in (("parent", [parent] * layers), ("child", child)):
    predicted = dict(fixed)
    for slot, phase in itertools.product((0, 1), fixed):
      predicted[phase] += sum(seconds[f"{closing.SLOTS[slot]}.{b.split('/')[slot]}"][phase] for b in blocks)
    is_child = name == "child"
    rounds[name] = {phase: [value * rng.uniform(0.97, 1.1) for _ in range(10)] for phase, value in predicted.items()}
    measured = {phase: statistics.fmean(sorted(timed)[:5]) for phase, timed in rounds[name].items()}
    params: int = 28_312_128 + sum(3_540_096 - 1_769_472 * ("w768" in b) - 884_736 * ("none/" in b) for b in blocks)
    models[name] = {
      "params": params,
      "weight_bytes": 4 * params,
      "kv_bytes_per_token": sum(1536 * b.startswith("gqa3") + 512 * b.startswith("gqa1") for b in blocks),
      **measured,
      **{f"predicted_{k}": v for k, v in predicted.items()},
      "throughput": 256 / sum(measured.values()),
      "output_throughput": 128 / sum(measured.values()),
      "prefill_tokens_per_s": 128 / measured["prefill_s"],
      "decode_tokens_per_s": 128 / measured["decode_s"],
      "perplexity": 10.41 if is_child else 9.104,
      "kl": 0.2134 if is_child else 0.0,
      "kl_stderr": 0.0121 if is_child else 0.0,
      "blocks": blocks,
    }
  models["child"] |= {"loss_change": math.log(10.41 / 9.104), "loss_change_stderr": 0.012}
  return {
    "name": "smollm2_135m:quickstart",
    "date": "2026-11-22",
    "command": "python -m experiments.run --config=configs/smollm2_135m.py:quickstart --workdir=runs/quickstart",
    "parent": {"name": "SmolLM2-135M-Instruct", "source": "smollm2-135m", "license": "apache-2.0"},
    "hardware": "2 cores of AMD EPYC",
    "config": {
      "name": "smollm2_135m:quickstart",
      "data": {"source": "stdlib", "seq_len": 256, "heldout_tokens": 1024, "eval_tokens": 4096},
      "search": {"limits": {"min_speedup": 1.3, "max_params": None}},
    },
    "versions": {"puzzle_jax": "0.1.0", "jax": "0.10.2", "python": "3.11.7", "git": "abc123"},
    "target": {
      "scenario": {"name": "chat", "input_tokens": 128, "output_tokens": 128},
      "batch": 1,
      "limits": {"min_speedup": 1.3},
    },
    "models": models,
    "timing_rounds": rounds,
    "before_gkd": {
      "perplexity": 12.63,
      "kl": 0.4021,
      "kl_stderr": 0.0203,
      "loss_change": math.log(12.63 / 9.104),
      "loss_change_stderr": 0.02,
    },
    "eval_tokens": 4096,
    "space": [{"attention": attention, "ffn": ffn}] * layers,
    "metric": "kl",
    "scores": scores,
    "library": library,
    "library_curves": {
      name: {"step": [1, 2, 3], "loss": [losses["delta_init"], losses["delta_trained"], losses["delta_trained"]]}
      for name, losses in ((name, report["losses"]) for name, report in library[0].items())
      if not name.endswith("none")
    },
    "costs": {
      "backend": "jax",
      "hardware": "2 cores of AMD EPYC",
      "scenarios": [{"name": "chat", "input_tokens": 128, "output_tokens": 128}],
      "subblocks": {name: {"chat": {"1": value}} for name, value in seconds.items()},
      "fixed": {"chat": {"1": fixed}},
      "details": {"points": []},
    },
    "solution": {
      "blocks": child,
      "score": 0.3123,
      "params": models["child"]["params"],
      "memory_bytes": models["child"]["weight_bytes"] + 256 * models["child"]["kv_bytes_per_token"],
      "runtime_s": sum(models["child"][f"predicted_{phase}"] for phase in fixed),
      "throughput": 256 / sum(models["child"][f"predicted_{phase}"] for phase in fixed),
      "mip_gap": 0.0,
    },
    "frontier": [
      {
        "min_speedup": s,
        "score": 0.3123 * math.exp(5 * (s - 1.36)),
        "throughput": 63.1 * s,
        "memory_bytes": 4.8e8 / s,
        "params": 1.2e8 / s,
        "blocks": [rng.choice(kinds) for _ in range(layers)],
      }
      for s in (1.6, 1.1, 1.2, 1.3, 1.45)
    ],
    "gkd": [
      {"loss": 2.5 * x + 0.4, "kl": 0.4 * x + 0.2, "cosine": 2.1 * x + 0.2, "lm": 2.4, "gradient_norm": 1 + x}
      for x in (math.exp(-step / 20) * rng.uniform(0.9, 1.1) for step in range(60))
    ],
    "samples": [
      {
        "prompt": "What is a neutron star?",
        "parent": "A neutron star is the collapsed core of a massive star.\nIt is among the densest objects known: "
        "a teaspoon of it would weigh about a billion tonnes on Earth.",
        "child": "A neutron star is a very dense star that remains after a supernova. It is made of neutrons and has "
        "a strong magnetic field.",
      },
      {
        "prompt": "Write a haiku about autumn.",
        "parent": "Leaves of gold descend,\nA crisp wind through silent trees,\nAutumn's last farewell.",
        "child": "Autumn leaves fall down,\nThe wind is cold and the sky,\nThe leaves are the leaves.",
      },
    ],
    "stages": [
      {"name": name, "seconds": seconds, "bytes": size, "versions": {"puzzle_jax": "0.1.0", "git": "abc123"}}
      for name, seconds, size in (
        ("data", 21.3, 412_000),
        ("costs", 96.0, 31_000),
        ("activations", 38.2, 1_170_000_000),
        ("library", 242.9, 512_000_000),
        ("scores", 187.4, 64_000),
        ("search", 1.2, 220_000),
        ("child", 1.9, 460_000_000),
        ("gkd", 151.0, 460_000_000),
        ("evaluation", 42.0, 4_100),
        ("export", 1.4, 230_000_000),
      )
    ],
    "files": {"child": "gkd/model", "export": "export/hf", "report": "report/report.html"},
  }


class Page(html.parser.HTMLParser):
  """Tags with their attributes, headings and visible text of a page."""

  def __init__(self, page: str):
    super().__init__()
    self.tags: list[tuple[str, dict[str, str | None]]] = []
    self.headings: list[str] = []
    self.text = ""
    self._open = ""
    self.feed(page)
    self.close()

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    self.tags.append((tag, dict(attrs)))
    self._open = tag
    if tag == "h2":
      self.headings.append("")

  def handle_endtag(self, tag: str) -> None:
    self._open = "" if tag == self._open else self._open

  def handle_data(self, data: str) -> None:
    if self._open == "h2":
      self.headings[-1] += data
    if self._open not in ("script", "style"):
      self.text = " ".join([*self.text.split(), *data.split()])
