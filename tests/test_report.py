"""The report against its input: every number shown is one of the summary's, and the page needs nothing else."""

import copy
import itertools
import math
import random
import re
import statistics
import subprocess
import sys
from typing import Any

import pytest
from report_examples import Page, make_summary

from puzzle_jax import scoring
from puzzle_jax.arch import GQA, NoFFN, SwiGLU
from puzzle_jax.report import certainty, closing, closing_table, plots, render
from puzzle_jax.report.summary import training_curves
from puzzle_jax.space import LayerSpace


@pytest.fixture(scope="module", params=["smollm2", "composed", "tiny"])
def summary(request: pytest.FixtureRequest) -> dict[str, Any]:
  return {
    "smollm2": lambda: make_summary(),
    "composed": lambda: make_summary(layers=6, composed=True, seed=1),
    "tiny": lambda: make_summary(layers=2, seed=2),
  }[request.param]()


SECTIONS = [
  "Parent and child",
  "The child's layers",
  "The stages",
  "What each replacement costs",
  "Attention against FFN",
  "Time saved against quality lost",
  "The frontier",
  "The block library",
  "Global distillation",
  "Predicted against measured",
  "Evaluation",
  "In their own words",
  "The run",
]


def test_report_needs_no_jax() -> None:
  program = "import sys, puzzle_jax.report; sys.exit('jax' in sys.modules)"
  subprocess.run([sys.executable, "-c", program], check=True)


def test_page_has_every_section_and_figure(summary: dict[str, Any]) -> None:
  page = Page(render(summary))
  assert page.headings == SECTIONS
  assert "Left out" not in page.text
  figures = [attributes["id"] for tag, attributes in page.tags if attributes.get("class") == "plotly-graph-div"]
  assert sorted(figures) == sorted(["evaluation", *(make.__name__ for make in plots.FIGURES)])


def test_page_loads_nothing_and_is_the_same_each_time(summary: dict[str, Any]) -> None:
  text = render(summary)
  assert text == render(copy.deepcopy(summary))
  assert text.count("* plotly.js v") == 1
  page = Page(text)
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
  tags = [tag for tag, _ in Page(render(summary)).tags]
  for sample in summary["samples"]:
    sample.update(prompt=evil, parent=evil, child=evil)
  summary["name"] = summary["parent"]["name"] = summary["command"] = summary["hardware"] = evil
  summary["config"]["name"] = summary["versions"]["git"] = summary["stages"][0]["name"] = evil
  page = Page(render(summary))
  assert [tag for tag, _ in page.tags] == tags
  assert page.text.count(evil) >= 3 * 2 + 7


def test_page_says_what_was_asked_and_found() -> None:
  summary = make_summary()
  text = Page(render(summary)).text
  models = summary["models"]
  same = sum(block == "gqa3/w1536" for block in models["child"]["blocks"])
  assert "128 tokens in and 128 out, one request at a time" in text
  assert "at least 1.3 times the parent's speed" in text
  assert f"{same} of 30 layers keep the parent's block" in text
  assert f"{100 * 9.104 / 10.41:.1f} % of the probability" in text
  speed = models["child"]["throughput"] / models["parent"]["throughput"]
  assert f"{speed:.2f} times as fast" in text
  assert speed >= 1.3
  interval = certainty.speedup(summary)
  assert interval is not None
  assert f"(95 % interval {interval.low:.2f} to {interval.high:.2f}; prefill " in text
  assert f"Measured, it meets “at least 1.3 times the parent's speed”: {speed:.3g}" in text
  half = 2.13145 * 0.0121  # Student's t, 15 degrees of freedom
  assert f"between {0.2134 - half:#.3g} and {0.2134 + half:#.3g} (95 % interval over 16 rows of text)" in text
  low, high = (100 * 9.104 / 10.41 * math.exp(sign * 2.13145 * 0.012) for sign in (-1, 1))
  assert f"the next-token quality between {low:.1f} and {high:.1f} %" in text
  assert "These errors come from 4 rows of text, and are rough themselves." in text
  for limit, certain in ((interval.low - 1e-3, True), (interval.low + 1e-3, False), (interval.high + 1e-3, True)):
    summary["target"]["limits"]["min_speedup"] = limit
    doubt = "lies within the measurement's interval, so this is not certain."
    assert (doubt not in Page(render(summary)).text) == certain
  summary["target"]["limits"]["min_speedup"] = 50.0
  assert "Measured, it misses “at least 50 times the parent's speed”" in Page(render(summary)).text
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
  text = Page(render(summary)).text
  assert "Noise, by block and layer none/w1536 1 " in text
  # 15 a layer: 6 measured and 9 sums
  assert "1 of 45 block scores are noise: less than two standard errors from the parent's 0 (marked below)." in text
  for layer in summary["scores"]:
    for entry in layer.values():
      entry["kl_stderr"] = 0.0
  assert "The block scores have no standard errors." in Page(render(summary)).text


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


def test_training_curves_are_medians_over_layers_of_means_over_steps() -> None:
  rng = random.Random(0)
  layers = [{"ffn.w8": {"curve": [rng.random() for _ in range(1001)]}} for _ in range(3)]
  layers[1]["ffn.w8"]["curve"] += [5.0, None]  # this layer went on, until it failed
  found = training_curves([*layers, {"ffn.none": {"curve": []}}])
  assert set(found) == {"ffn.w8"}
  steps = found["ffn.w8"]["step"]
  assert len(steps) == 200
  assert steps[-1] == 1001
  start, stop = steps[41:43]
  means = [statistics.mean(layer["ffn.w8"]["curve"][start:stop]) for layer in layers]
  assert found["ffn.w8"]["loss"][42] == pytest.approx(statistics.median(means))
  short = training_curves([{"ffn.w8": {"curve": [3.0, 2.0]}}])["ffn.w8"]
  assert short == {"step": [1, 2], "loss": [3.0, 2.0]}


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

  bars = figures["predicted_against_measured"].data
  keys = [prefix + phase for prefix in ("predicted_", "") for phase in ("prefill_s", "decode_s")]
  assert [list(trace.y) for trace in bars] == [[summary["models"][m][k] for m in ("parent", "child")] for k in keys]
  assert [trace.xaxis for trace in bars] == ["x", "x2"] * 2


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
      "limits": {
        "min_decode_speedup": 1.5,
        "max_memory_bytes": 400 * 2**20,
        "max_kv_ratio": 0.6,
        "max_first_token_ratio": 0.9,
      },
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
    "target:   at most 0.6 of the parent's KV cache per token",
    "target:   the first token within 0.9 of the parent's time (MISSED: 1)",
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


@pytest.mark.parametrize(
  "seconds,text",
  [
    (None, "–"),
    (0.07588, "75.9 ms"),
    (3.6305, "3.63 s"),
    (59.96, "1 min 0 s"),
    (218.6, "3 min 39 s"),
    (3599.7, "1 h 0 min"),
    (4350, "1 h 12 min"),
  ],
)
def test_duration(seconds: float | None, text: str) -> None:
  assert closing.duration(seconds) == text


def test_page_lists_the_stages() -> None:
  summary = make_summary(layers=3)
  text = Page(render(summary)).text
  assert "library distils the variants, one block at a time 4 min 3 s 488.3 MiB" in text
  assert "all 13 min 3 s" in text
  assert "Not all stages were made by the same version" not in text
  summary["stages"][4]["versions"]["git"] = "def456"
  text = Page(render(summary)).text
  assert "puzzle_jax 0.1.0, git def456 scores" in text


def test_page_of_an_unfinished_run() -> None:
  """What is there after the search: the child is predicted, not measured."""
  summary = make_summary(layers=3)
  for key in ("before_gkd", "eval_tokens", "timing_rounds", "gkd", "samples"):
    del summary[key]
  kept = ("params", "blocks", "weight_bytes", "kv_bytes_per_token", "predicted_prefill_s", "predicted_decode_s")
  summary["models"] = {name: {key: model[key] for key in kept} for name, model in summary["models"].items()}
  page = Page(render(summary))
  seconds = {m: sum(summary["models"][m][f"predicted_{p}_s"] for p in ("prefill", "decode")) for m in summary["models"]}
  speed = seconds["parent"] / seconds["child"]
  assert "Not evaluated." in page.text
  assert f"the costs of its blocks predict {speed:.2f} times the parent's speed" in page.text
  assert page.text.count("Left out") == 4  # global distillation, what is measured, evaluation, samples


MISSING = {
  "scores": ["What each replacement costs", "Attention against FFN", "Time saved against quality lost"],
  "space": ["What each replacement costs", "Attention against FFN", "Time saved against quality lost"],
  "target": ["Time saved against quality lost"],
  "costs": ["Time saved against quality lost"],
  "frontier": ["The frontier"],
  "library": ["The block library"],
  "gkd": ["Global distillation"],
  "samples": ["In their own words"],
  "models": ["Parent and child", "The child's layers", "Predicted against measured", "Evaluation"],
  "stages": ["The stages"],
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
  page, text = Page(render(summary)), closing_table(summary)
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
  page = Page(render(summary))
  assert page.text.count("Left out") == 3  # the table, the speeds, the evaluation
  assert "None" not in page.text + closing_table(summary)
  assert "none/w1536" not in plots.block_scores(summary)[0]
