"""Two runs side by side: what differs is named, what cannot be compared is not."""

import copy
import re
from typing import Any

import pytest
import scipy.stats
from report_examples import Page, make_summary

from puzzle_jax.report import closing, compare, render_comparison


@pytest.fixture
def pair() -> tuple[dict[str, Any], dict[str, Any]]:
  """A run, and another with another target and parent text that came out differently."""
  a, b = make_summary(layers=6), make_summary(layers=6, seed=1)
  b["config"]["search"]["limits"]["min_speedup"] = b["target"]["limits"]["min_speedup"] = 1.5
  b["versions"]["git"] = "def456"
  b["models"]["child"]["kl"] = 0.2834
  return a, b


def text_of(a: dict[str, Any], b: dict[str, Any]) -> str:
  return Page(render_comparison(a, b, names=("runs/a", "runs/b"))).text


def test_a_run_against_itself() -> None:
  summary = make_summary(layers=6)
  text = text_of(summary, copy.deepcopy(summary))
  assert "What differs in the configs Nothing. The children's layers" in text
  assert "The children have the same blocks." in text
  assert "B's KL less A's is +0, between" in text
  assert "noise, as far as this tells" in text
  assert "B is 1.00 times as fast as A." in text
  assert "Spearman's ρ = 1.000" in text
  assert "Left out" not in text


def test_what_differs_is_named(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
  a, b = pair
  text = text_of(a, b)
  assert "A B search.limits.min_speedup 1.3 1.5 And around them" in text
  assert "git describe abc123 def456" in text
  apart = [i for i in range(6) if a["models"]["child"]["blocks"][i] != b["models"]["child"]["blocks"][i]]
  assert f"{len(apart)} of 6 layers differ: {', '.join(map(str, apart))}." in text
  # 0.07 apart, standard errors 0.0121 each
  half = scipy.stats.t.ppf(0.975, 15) * 0.0121 * 2**0.5
  found = compare.kl_difference(a, b)
  assert found is not None
  assert (found.value, found.interval.high) == pytest.approx((0.07, 0.07 + half))
  assert "a real difference" in text
  a["models"]["child"]["kl"] = 0.25
  assert compare.kl_difference(a, b).is_noise  # type: ignore[union-attr]


def test_what_was_not_measured_alike_is_not_compared(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
  a, b = pair
  b["hardware"] = "an abacus"
  b["config"]["data"]["source"] = "other.txt"
  text = text_of(a, b)
  assert "times as fast as A" not in text
  assert "Their speeds cannot be compared: not the same hardware, scenario and batch." in text
  assert "The two KLs cannot be compared" in text
  b["metric"] = "lm_loss"
  assert "no block was scored by the same metric in both runs" in text_of(a, b)


def test_runs_of_different_depth() -> None:
  text = text_of(make_summary(layers=6), make_summary(layers=3))
  assert "layers differ" not in text
  assert text.count("Attention: ") == 2


def test_table_of_costs_and_stages(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
  a, b = pair
  b["costs"]["subblocks"]["ffn.w768"]["chat"]["1"]["decode_s"] = 0.0690
  b["stages"] = b["stages"][:4]
  text = text_of(a, b)
  assert "ffn.w768 36.2 ms 72.2 ms 1.99×" in text
  assert "scores 3 min 7 s – –" in text


def test_figures_hold_both_runs(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
  a, b = pair
  figure = compare.frontiers(a, b)
  assert figure is not None
  assert [trace.name for trace in figure.data] == [
    f"{s}: {what}" for s in "AB" for what in ("optimal children", "the child")
  ]
  assert figure.data[3].x == (b["solution"]["throughput"],)
  scores = compare.scores(a, b)
  assert scores is not None
  index = next(i for i, t in enumerate(scores.data[1].text) if t.startswith("layer 2, none/w1536<"))
  assert (scores.data[1].x[index], scores.data[1].y[index]) == tuple(s["scores"][2]["none/w1536"]["kl"] for s in (a, b))


def test_names_and_texts_are_escaped(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
  a, b = pair
  tags = [tag for tag, _ in Page(render_comparison(a, b, names=("runs/a", "runs/b"))).tags]
  evil = "</script><img src=x onerror=alert(1)>"
  a["config"]["data"]["source"] = a["name"] = a["hardware"] = a["command"] = evil
  for summary in pair:
    for sample in summary["samples"]:
      sample.update(prompt=evil, parent=evil, child=evil)
  page = Page(render_comparison(a, b, names=(evil, "runs/b")))
  found = [tag for tag, _ in page.tags]
  assert found.count("img") == tags.count("img") == 0
  assert found.count("script") == tags.count("script")
  assert page.text.count(evil) >= 4


@pytest.mark.parametrize("part", [*make_summary(layers=1), "all"])
@pytest.mark.parametrize("how", ["gone", "null"])
def test_what_one_run_lacks_is_left_out(part: str, how: str) -> None:
  a, b = make_summary(layers=3), make_summary(layers=3)
  for key in list(b) if part == "all" else [part]:
    if how == "gone":
      del b[key]
    else:
      b[key] = None
  for pair in ((a, b), (b, a)):
    text = text_of(*pair)
    assert not re.search(r"\bNone\b|\bnan\b", text)
    assert closing.KEY in text or part in ("models", "all", "solution")
