"""The report against its input: every number shown is one of the summary's, and the page needs nothing else."""

import copy
import html.parser
import itertools
import math
import random
import re
import statistics
import subprocess
import sys
from typing import Any

import pytest

from puzzle_jax import scoring
from puzzle_jax.arch import GQA, NoFFN, SwiGLU
from puzzle_jax.report import closing, closing_table, plots, render
from puzzle_jax.space import LayerSpace

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
        variants[name] = {"finite": True, "losses": losses, "curve": [init, (init + trained) / 2, trained]}
    library.append(variants)
  kinds = [parent, parent, "gqa3/w768", "none/w1536", "linear/w768", "gqa1/linear", "gqa3/none"]
  child = [rng.choice(kinds) for _ in range(layers)]
  seconds = {name: {"prefill_s": p / 1e3, "decode_s": d / 1e3} for name, (_, p, d) in SUBBLOCKS.items()}
  fixed = {"prefill_s": 0.02, "decode_s": 0.6}
  models: dict[str, dict[str, Any]] = {}
  for name, blocks in (("parent", [parent] * layers), ("child", child)):
    predicted = dict(fixed)
    for slot, phase in itertools.product((0, 1), fixed):
      predicted[phase] += sum(seconds[f"{closing.SLOTS[slot]}.{b.split('/')[slot]}"][phase] for b in blocks)
    is_child = name == "child"
    measured = {phase: value * rng.uniform(0.97, 1.06) for phase, value in predicted.items()}
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
  return {
    "name": "smollm2_135m:quickstart",
    "date": "2026-11-22",
    "command": "python -m experiments.run --config=configs/smollm2_135m.py:quickstart --workdir=runs/quickstart",
    "parent": {"name": "SmolLM2-135M-Instruct", "source": "smollm2-135m", "license": "apache-2.0"},
    "hardware": "2 cores of AMD EPYC",
    "versions": {"puzzle_jax": "0.1.0", "jax": "0.10.2", "python": "3.11.7", "git": "abc123"},
    "target": {
      "scenario": {"name": "chat", "input_tokens": 128, "output_tokens": 128},
      "batch": 1,
      "limits": {"min_speedup": 1.3},
    },
    "models": models,
    "before_gkd": {"perplexity": 12.63, "kl": 0.4021, "kl_stderr": 0.0203},
    "eval_tokens": 4096,
    "space": [{"attention": attention, "ffn": ffn}] * layers,
    "metric": "kl",
    "scores": scores,
    "library": library,
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
      {"min_speedup": s, "score": 0.3123 * math.exp(5 * (s - 1.36)), "throughput": 63.1 * s, "memory_bytes": 4.8e8 / s}
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
      {"name": name, "seconds": seconds, "bytes": size}
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


@pytest.fixture(scope="module", params=["smollm2", "composed", "tiny"])
def summary(request: pytest.FixtureRequest) -> dict[str, Any]:
  return {
    "smollm2": lambda: make_summary(),
    "composed": lambda: make_summary(layers=6, composed=True, seed=1),
    "tiny": lambda: make_summary(layers=2, seed=2),
  }[request.param]()


class _Page(html.parser.HTMLParser):
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


SECTIONS = [
  "Parent and child",
  "The child's layers",
  "What each replacement costs",
  "Attention against FFN",
  "Time saved against quality lost",
  "The frontier",
  "The block library",
  "Global distillation",
  "Predicted against measured",
  "In their own words",
  "The run",
]


def test_report_needs_no_jax() -> None:
  program = "import sys, puzzle_jax.report; sys.exit('jax' in sys.modules)"
  subprocess.run([sys.executable, "-c", program], check=True)


def test_page_has_every_section_and_figure(summary: dict[str, Any]) -> None:
  page = _Page(render(summary))
  assert page.headings == SECTIONS
  assert "Left out" not in page.text
  figures = [attributes["id"] for tag, attributes in page.tags if attributes.get("class") == "plotly-graph-div"]
  assert figures == [make.__name__ for make in plots.FIGURES]


def test_page_loads_nothing_and_is_the_same_each_time(summary: dict[str, Any]) -> None:
  text = render(summary)
  assert text == render(copy.deepcopy(summary))
  assert text.count("* plotly.js v") == 1
  page = _Page(text)
  assert not [tag for tag, attributes in page.tags if {"src", "href", "srcset", "data", "action"} & set(attributes)]
  style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
  assert style is not None
  assert "url(" not in style[1]
  assert "@import" not in style[1]
  policy = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
  assert len(policy) == 1
  assert policy[0] is not None
  assert policy[0].startswith("default-src 'none'")


def test_page_escapes_what_models_and_people_wrote() -> None:
  evil = "</script><script>alert('x')</script><img src=http://example.com/a.png>"
  summary = make_summary(layers=2)
  tags = [tag for tag, _ in _Page(render(summary)).tags]
  for sample in summary["samples"]:
    sample.update(prompt=evil, parent=evil, child=evil)
  summary["name"] = summary["parent"]["name"] = summary["command"] = summary["hardware"] = evil
  page = _Page(render(summary))
  assert [tag for tag, _ in page.tags] == tags
  assert page.text.count(evil) >= 3 * 2


def test_page_says_what_was_asked_and_found() -> None:
  summary = make_summary()
  text = _Page(render(summary)).text
  models = summary["models"]
  same = sum(block == "gqa3/w1536" for block in models["child"]["blocks"])
  assert "128 tokens in and 128 out, one request at a time" in text
  assert "at least 1.3 times the parent's speed" in text
  assert f"{same} of 30 layers keep the parent's block" in text
  assert f"{100 * 9.104 / 10.41:.1f} % of the probability" in text
  speed = models["child"]["throughput"] / models["parent"]["throughput"]
  assert f"{speed:.2f} times as fast" in text
  assert speed >= 1.3
  assert f"Measured, it meets “at least 1.3 times the parent's speed”: {speed:.3g}." in text
  assert f"between {0.2134 - 1.96 * 0.0121:#.3g} and {0.2134 + 1.96 * 0.0121:#.3g} (95 % interval)" in text
  summary["target"]["limits"]["min_speedup"] = 50.0
  assert "Measured, it misses “at least 50 times the parent's speed”" in _Page(render(summary)).text
  assert "target:   at least 50 times the parent's speed (MISSED: 1." in closing_table(summary)


def test_block_scores_are_those_of_the_search(summary: dict[str, Any]) -> None:
  layers = plots.block_scores(summary)
  assert len(layers) == len(summary["scores"])
  for space, measured, scores in zip(summary["space"], summary["scores"], layers, strict=True):
    names = [f"{a}/{f}" for a, f in itertools.product(space["attention"], space["ffn"])]
    assert list(scores) == names[1:]
    assert {name for name, score in scores.items() if not score.summed} == set(measured)


def test_summed_scores_equal_scoring_compose() -> None:
  space = LayerSpace((GQA(3), GQA(1)), (SwiGLU(8), SwiGLU(4), NoFFN()))
  measured = {
    name: {"kl": kl, "kl_stderr": error, "lm_loss": -kl, "lm_loss_stderr": error}
    for name, kl, error in (("gqa1/w8", 0.3, 0.03), ("gqa3/w4", 0.1, 0.04), ("gqa1/w4", 0.5, 0.1))
  }  # gqa3/none was not finite: it and its pair have no score
  for metric in ("kl", "lm_loss"):
    want = scoring.compose(space, measured, metric=metric)
    layer = {"attention": ["gqa3", "gqa1"], "ffn": ["w8", "w4", "none"]}
    (got,) = plots.block_scores({"metric": metric, "space": [layer], "scores": [measured]})
    assert {"gqa3/w8": (0.0, 0.0)} | {name: (s.value, s.stderr) for name, s in got.items()} == want


def test_heat_map_holds_the_scores_and_marks_the_chosen_and_the_noise(summary: dict[str, Any]) -> None:
  figure = plots.heat_map(summary)
  assert figure is not None
  heat, noise, chosen = figure.data
  scores = plots.block_scores(summary)
  medians = []
  for row, name in enumerate(heat.y):
    found = {}
    for layer in heat.x:
      if heat.z[row][layer] is None:
        assert name not in scores[layer]
        continue
      found[layer] = 10 ** heat.z[row][layer]
      assert found[layer] == pytest.approx(max(scores[layer][name].value, plots.FLOOR))
      assert heat.text[row][layer].startswith(f"{scores[layer][name].value:.3g} ± {scores[layer][name].stderr:.2g}")
    medians += [statistics.median(found.values())] if found else []
  assert medians == sorted(medians)
  assert list(chosen.y) == summary["models"]["child"]["blocks"]
  assert set(chosen.y) <= set(heat.y)
  want = {(i, n) for i, layer in enumerate(scores) for n, s in layer.items() if s.value < 2 * s.stderr}
  assert set(zip(noise.x, noise.y, strict=True)) == want


def test_page_lists_the_noise() -> None:
  summary = make_summary(layers=3)
  for layer in summary["scores"]:
    for entry in layer.values():
      entry["kl_stderr"] = entry["kl"] / 3
  summary["scores"][1]["none/w1536"]["kl_stderr"] = summary["scores"][1]["none/w1536"]["kl"] / 1.9
  text = _Page(render(summary)).text
  assert "Noise, by block and layer none/w1536 1 " in text
  assert "1 of 45 block scores are noise (marked below)." in text  # 15 a layer: 6 measured and 9 sums
  for layer in summary["scores"]:
    for entry in layer.values():
      entry["kl_stderr"] = 0.0
  assert "The block scores have no standard errors." in _Page(render(summary)).text


def test_marginals_are_means_of_single_replacements() -> None:
  summary = make_summary(layers=4)
  figure = plots.marginals(summary)
  assert figure is not None
  attention, ffn = figure.data
  for layer, scores in enumerate(summary["scores"]):
    singles = {
      "attention": [s["kl"] for name, s in scores.items() if name.endswith("/w1536")],
      "ffn": [s["kl"] for name, s in scores.items() if name.startswith("gqa3/")],
    }
    assert [len(v) for v in singles.values()] == [3, 3]
    assert attention.y[layer] == pytest.approx(statistics.fmean(singles["attention"]))
    assert ffn.y[layer] == pytest.approx(statistics.fmean(singles["ffn"]))


def test_cost_against_score_has_every_block_and_the_chosen(summary: dict[str, Any]) -> None:
  figure = plots.cost_against_score(summary)
  assert figure is not None
  points, picked = figure.data
  assert len(points.x) == sum(map(len, plots.block_scores(summary)))
  index = points.text.index(next(t for t in points.text if t.startswith("layer 1, linear/w768")))
  assert points.x[index] == pytest.approx(3.4 + 41.0 - 1.0 - 12.0 + 6.1 + 64.0 - 3.2 - 33.0)
  assert points.y[index] == pytest.approx(plots.block_scores(summary)[1]["linear/w768"].value)
  names = [re.match(r"layer (\d+), ([^<]*)", text) for text in picked.text]
  changed = [(str(i), b) for i, b in enumerate(summary["models"]["child"]["blocks"]) if b != "gqa3/w1536"]
  assert [m.groups() for m in names if m] == changed


def test_other_figures_hold_the_summarys_numbers(summary: dict[str, Any]) -> None:
  figures = plots.figures(summary)
  line, child = figures["frontier"].data
  want = sorted((p["throughput"], p["score"]) for p in summary["frontier"])
  assert list(zip(line.x, line.y, strict=True)) == want
  assert (child.x, child.y) == ((summary["solution"]["throughput"],), (summary["solution"]["score"],))

  first, trained = figures["distillation"].data
  for bars, key in ((first, "delta_init"), (trained, "delta_trained")):
    for value, name in zip(bars.x, bars.y, strict=True):
      assert value == statistics.median(layer[name]["losses"][key] for layer in summary["library"])
  assert set(first.y) == set(summary["library"][0])

  for trace, key in zip(figures["global_distillation"].data, ("loss", "kl", "cosine"), strict=True):
    assert list(trace.y) == [step[key] for step in summary["gkd"]]
    assert trace.x[0] == 1

  predicted, measured = figures["predicted_against_measured"].data
  order = [("parent", "prefill_s"), ("child", "prefill_s"), ("parent", "decode_s"), ("child", "decode_s")]
  assert list(predicted.y) == [summary["models"][model][f"predicted_{phase}"] for model, phase in order]
  assert list(measured.y) == [summary["models"][model][phase] for model, phase in order]


def test_closing_table_by_hand() -> None:
  parent = {
    "params": 134_515_008,
    "weight_bytes": 512 * 2**20,
    "kv_bytes_per_token": 46_080,
    "throughput": 64.0,
    "prefill_tokens_per_s": 256.0,
    "decode_tokens_per_s": 40.0,
    "predicted_prefill_s": 0.5,
    "predicted_decode_s": 3.5,
    "perplexity": 9.0,
    "kl": 0.0,
    "kl_stderr": 0.0,
    "blocks": ["gqa3/w1536"] * 4,
  }
  child = parent | {
    "params": 100_886_256,
    "weight_bytes": 384 * 2**20,
    "kv_bytes_per_token": 23_040,
    "throughput": 96.0,
    "decode_tokens_per_s": 60.0,
    "predicted_decode_s": 2.0,
    "perplexity": 10.0,
    "kl": 0.125,
    "kl_stderr": 0.0123,
    "blocks": ["gqa3/w1536", "gqa1/w768", "linear/linear", "none/none"],
  }
  summary = {
    "parent": {"name": "P"},
    "hardware": "an abacus",
    "target": {
      "scenario": {"name": "chat", "input_tokens": 128, "output_tokens": 128},
      "batch": 1,
      "limits": {"min_decode_speedup": 1.5, "max_memory_bytes": 400 * 2**20},
    },
    "models": {"parent": parent, "child": child},
    "before_gkd": {"kl": 0.25, "kl_stderr": 0.02},
    "samples": [{"prompt": "Hi", "parent": "one\n\x1b[2Jtwo", "child": "three"}],
    "files": {"child": "gkd/model", "report": "report/report.html"},
  }
  assert closing_table(summary, workdir="runs/a").split("\n") == [
    "P, and the child that this run made of it",
    "scenario: 128 tokens in, 128 out, one request; measured on an abacus",
    "target:   at least 1.5 times the parent's decode speed (met: 1.5)",
    "target:   at most 400 MiB of weights and KV cache",
    "",
    "                                         parent            child    ratio",
    "parameters                              134.5 M          100.9 M    0.75×",
    "weight memory                           512 MiB          384 MiB    0.75×",
    "KV cache per token                       45 KiB         22.5 KiB    0.50×",
    "prefill, measured                  256 tokens/s     256 tokens/s    1.00×",
    "decode, measured                    40 tokens/s      60 tokens/s    1.50×",
    "whole scenario, measured            64 tokens/s      96 tokens/s    1.50×",
    "whole scenario, predicted           64 tokens/s   102.4 tokens/s    1.60×",
    "  prediction off by                      +0.0 %           +6.7 %",
    "perplexity                                    9               10    1.11×",
    "next-token quality                        100 %           90.0 %",
    "KL to the parent, nats/token                  0    0.125 ± 0.012",
    "  before global distillation                  0      0.25 ± 0.02",
    "next-token quality: the probability of the true next token over the parent's, geometric mean",
    "",
    "the child's layers, 0 to 3",
    "  attention  █▃/·",
    "  ffn        █▄/·",
    "  attention  █ gqa3 (the parent's)   / linear   ▃ gqa1   · none",
    "  ffn        █ w1536 (the parent's)   / linear   ▄ w768   · none",
    "  gqaN: attention with N key/value heads; wN: FFN of N channels; linear: one matrix; none: left out",
    "",
    "prompt   Hi",
    "parent   one [2Jtwo",
    "child    three",
    "",
    "files",
    "  child      runs/a/gkd/model",
    "  report     runs/a/report/report.html",
    "",
    "next",
    '  python -m experiments.generate --model=runs/a/gkd/model --prompt="What is a star?"',
  ]


def test_closing_table_fits_a_terminal() -> None:
  summary = make_summary(layers=80)
  text = closing_table(summary)
  assert max(map(len, text.splitlines())) <= 100
  lines = [
    line.split(maxsplit=1)[1] for line in text.splitlines() if re.fullmatch(r"  (attention|ffn) +[▁-█/·]+", line)
  ]
  assert [len(line) for line in lines] == [60, 60, 20, 20]
  cells = closing.strip(summary)
  assert "".join(lines[::2]) == "".join(cell.sign for cell in cells["attention"])
  assert "".join(lines[1::2]) == "".join(cell.sign for cell in cells["ffn"])


@pytest.mark.parametrize(
  "value,unit,text",
  [
    (None, "B", "–"),
    (0, "B", "0 bytes"),
    (1023, "B", "1,023 bytes"),
    (46_080, "B", "45 KiB"),
    (0.0421, "", "0.0421"),
    (9.104, "", "9.104"),
    (46_080, "tokens/s", "46,080 tokens/s"),
    (134_515_008, "", "134.5 M"),
    (70_553_706_496, "", "70.55 G"),
  ],
)
def test_number(value: float | None, unit: str, text: str) -> None:
  assert closing.number(value, unit) == text


MISSING = {
  "scores": ["What each replacement costs", "Attention against FFN", "Time saved against quality lost"],
  "space": ["What each replacement costs", "Attention against FFN", "Time saved against quality lost"],
  "target": ["Time saved against quality lost"],
  "costs": ["Time saved against quality lost"],
  "frontier": ["The frontier"],
  "library": ["The block library"],
  "gkd": ["Global distillation"],
  "samples": ["In their own words"],
  "models": ["Parent and child", "The child's layers", "Predicted against measured"],
}


@pytest.mark.parametrize("part", [*make_summary(layers=1), "all"])
@pytest.mark.parametrize("how", ["gone", "null"])
def test_missing_parts_are_left_out_with_a_note(part: str, how: str) -> None:
  summary = make_summary(layers=3)
  for key in list(summary) if part == "all" else [part]:
    if how == "gone":
      del summary[key]
    else:
      summary[key] = None
  if part == "models":
    del summary["before_gkd"]
  page, text = _Page(render(summary)), closing_table(summary)
  assert page.headings == SECTIONS
  left_out = [tag for tag, attributes in page.tags if attributes.get("class") == "left-out"]
  expected = {h for headings in MISSING.values() for h in headings} if part == "all" else MISSING.get(part, [])
  assert len(left_out) == len(expected)
  assert page.text.count("Left out") == len(expected)
  assert "None" not in page.text + text
  assert "nan" not in text


def test_null_numbers_are_no_numbers() -> None:
  summary = make_summary(layers=3)
  for model in summary["models"].values():
    model.update({key: None for key in model if key != "blocks"})
  summary["before_gkd"] = dict.fromkeys(summary["before_gkd"])
  summary["solution"] |= {"score": None, "throughput": None}
  summary["stages"][0] |= {"seconds": None, "bytes": None}
  summary["scores"][0]["none/w1536"]["kl"] = None
  summary["library"][0]["ffn.w768"]["losses"]["delta_trained"] = None
  summary["gkd"][0]["cosine"] = None
  page = _Page(render(summary))
  assert page.text.count("Left out") == 2  # the table and the speeds
  assert "None" not in page.text + closing_table(summary)
  assert "none/w1536" not in plots.block_scores(summary)[0]
