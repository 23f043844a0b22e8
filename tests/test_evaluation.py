"""Likelihoods against one text at a time, tasks and what is preserved by hand, texts at other lengths."""

import dataclasses
import json

import numpy as np
import pytest
import scipy.special

import puzzle_jax
from configs import tiny
from experiments import harness, tiny_parent
from puzzle_jax import data, pipeline
from puzzle_jax.config import RunConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluation import likelihood, quality, suite, tasks
from puzzle_jax.evaluation.likelihood import Likelihood, Request
from puzzle_jax.evaluation.preserved import preserved
from puzzle_jax.evaluation.tasks import Item
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.report import closing_table, render
from tests.report_examples import Page, make_summary

# Likelihoods


@pytest.fixture(scope="module")
def speaker(model):
  return LanguageModel(*model("gqa2/w48", "none/linear", vocab_size=257), tiny_parent.byte_tokenizer())


def test_likelihoods_are_those_of_one_text_at_a_time(speaker):
  rng = np.random.default_rng(0)
  lengths = [(1, 1), (5, 3), (20, 13), (30, 40), (1, 70), (250, 7), (9, 9), (31, 2)]
  requests = [Request(tuple(rng.integers(0, 257, sum(both)).tolist()), both[0]) for both in lengths]
  best = requests[2].ids[:20]
  for _ in range(5):  # one that greedy decoding would write
    tokens = np.zeros((1, 32), np.int32)
    tokens[0, : len(best)] = best
    best = (*best, int(speaker.logits(tokens)[0, len(best) - 1].argmax()))
  requests.append(Request(best, 20))
  found = likelihood.score_all((speaker.architecture, speaker.params), requests, batch_tokens=128)
  for request, one in zip(requests, found, strict=True):
    tokens = np.zeros((1, 256), np.int32)
    tokens[0, : len(request.ids) - 1] = request.ids[:-1]
    log_p = scipy.special.log_softmax(speaker.logits(tokens)[0].astype(np.float64), axis=-1)
    places = range(request.start - 1, len(request.ids) - 1)
    assert one.log_p == pytest.approx(sum(log_p[t, request.ids[t + 1]] for t in places), abs=2e-4)
    assert one.greedy == all(log_p[t].argmax() == request.ids[t + 1] for t in places)
  assert found[-1].greedy
  assert not found[3].greedy


@pytest.mark.parametrize("request_", [Request((1, 2), 2), Request((1, 2), 0), Request((1,) * 258, 3)])
def test_likelihood_refuses(speaker, request_):
  with pytest.raises(PuzzleError, match="at most the context of 256"):
    likelihood.score_all((speaker.architecture, speaker.params), [request_], batch_tokens=64)


def test_pairs_are_encoded_as_the_harness_does():
  tokenizer = tiny_parent.byte_tokenizer()
  start, encode = tokenizer.eos_id, tokenizer.encode
  spaced, empty, ended = likelihood.encode([("ab  ", "cd"), ("", "xy"), ("", "<|end|>x")], tokenizer)
  assert spaced == Request(tuple(encode("ab  cd")), 2)  # the spaces belong to what follows
  assert empty == Request((start, *encode("xy")), 1)
  assert ended == Request((start, *encode("x")), 1)  # begins with the start token already


# Tasks


def test_answers_by_hand():
  items = [Item("c", (" aa", " bbbbbb"), 1), Item("c", ("a", "b", "c"), 0)]
  found = [Likelihood(value, False) for value in (-2.0, -3.0, -1.0, -1.0, -5.0)]
  answers = tasks.answers(items, found)
  assert answers.plain.tolist() == [False, True]  # of equal ones the first
  assert answers.normalised is not None
  assert answers.normalised.tolist() == [True, True]  # -1 and -0.5 a character; the space does not count
  targets = tasks.answers([Item("c", (" x",), 0)] * 2, [Likelihood(-9.0, True), Likelihood(-0.1, False)])
  assert targets.plain.tolist() == [True, False]
  assert targets.normalised is None


def test_items_with_targets(tmp_path):
  path = tmp_path / "lambada.jsonl"
  path.write_text('{"context": "a b", "target": " c"}\n{"context": "", "choices": ["b", "c"], "answer": 1}\n')
  assert tasks.read_items(path, targets=True) == [Item("a b", (" c",), 0), Item("", ("b", "c"), 1)]
  with pytest.raises(PuzzleError, match="line 1: expected"):
    tasks.read_items(path)


def test_what_is_preserved():
  rng = np.random.default_rng(0)
  parent, child = rng.random(400) < 0.7, rng.random(400) < 0.6
  found = preserved([(parent, child)])
  assert (found.parent, found.child) == pytest.approx((parent.mean(), child.mean()))
  assert found.ratio == pytest.approx(child.mean() / parent.mean())
  drawn = rng.integers(400, size=(10_000, 400))  # items themselves, drawn again
  low, high = np.quantile(child[drawn].mean(1) / parent[drawn].mean(1), [0.025, 0.975])
  assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)
  same = preserved([(parent, parent)])
  assert (same.ratio, same.low, same.high) == (1, 1, 1)  # pairs do not vary against each other
  both = preserved([(parent, child), (parent[:10], parent[:10])])
  assert both.child == pytest.approx((child.mean() + parent[:10].mean()) / 2)  # tasks count alike
  never = preserved([(np.zeros(3, bool), np.ones(3, bool))])
  assert (never.ratio, never.low) == (None, None)


# Texts at several lengths


@pytest.mark.parametrize("length", [7, 16, 50, 999])
def test_rows_of_another_length_hold_the_same_text(length):
  rng, tokenizer = np.random.default_rng(0), tiny_parent.byte_tokenizer()
  texts = ["".join(rng.choice(list("abcd"), rng.integers(1, 40))) for _ in range(40)]
  packed = data.pack(texts, tokenizer, seq_len=16, max_tokens=400, seed=1)
  found = data.relaid(packed, seq_len=length, eos_id=tokenizer.eos_id)
  if length > 400:
    assert found.num_rows == 0
  else:
    expected = data.pack(texts, tokenizer, seq_len=length, max_tokens=400, seed=1)
    for one, other in zip(found, expected, strict=True):
      np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A run with its data, and files to evaluate on."""
  folder = tmp_path_factory.mktemp("evaluation")
  tiny_parent.write(folder / "parent")
  (folder / "sea.txt").write_text("the sea is wide and blue. " * 40)
  items = [{"context": "the sea is", "choices": [" blue", " a tree", " old"], "answer": i % 3} for i in range(8)]
  (folder / "choices.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
  (folder / "words.jsonl").write_text('{"context": "the sea is", "target": " wide"}\n' * 5)
  values = tiny.get_config().to_dict() | {"parent": str(folder / "parent")}
  values["evaluation"] |= {
    "contexts": (32, 64, 256),
    "texts": (str(folder / "sea.txt"),),
    "tasks": (str(folder / "choices.jsonl"), str(folder / "words.jsonl")),
    "task_items": 6,
  }
  return puzzle_jax.run(values, folder / "run", stages=["data"], quiet=True)


@pytest.fixture(scope="module")
def models(run):
  """The parent, and a child with other weights in the last layer."""
  parent = run.parent_model
  *rest, last = parent.params["layers"]
  other = last | {"ffn": last["ffn"] | {"down": -last["ffn"]["down"]}}
  return (parent.architecture, parent.params | {"layers": [*rest, other]}), (parent.architecture, parent.params)


def test_texts_at_several_lengths(run, models):
  child, parent = models
  rows = suite.compare_texts(run, child, parent)
  assert [(row["text"], row["context"], row["rows"]) for row in rows] == [
    *(("stdlib", length, 256 // length) for length in (32, 64, 256)),
    *(("sea.txt", length, 256 // length) for length in (32, 64, 256)),
  ]
  own = quality.compare(child, parent, run.packed("eval"), batch_rows=2)
  assert own.items() <= rows[0].items()
  assert all(row["kl"] > 0.001 for row in rows)
  assert len({row["perplexity"] for row in rows}) == 6
  alone = dataclasses.replace(run.config.evaluation, contexts=(), texts=())
  plain = puzzle_jax.open_run(run.workdir.root)
  plain.config = dataclasses.replace(run.config, evaluation=alone)
  assert suite.compare_texts(plain, child, parent) == []  # what the run measures anyway


def test_a_short_text_is_measured_as_far_as_it_goes(run, models, tmp_path):
  (tmp_path / "short.txt").write_text("the sea is wide and blue. " * 4)
  other = puzzle_jax.open_run(run.workdir.root)
  evaluation = dataclasses.replace(run.config.evaluation, contexts=(32, 256), texts=(str(tmp_path / "short.txt"),))
  other.config = dataclasses.replace(run.config, evaluation=evaluation)
  rows = suite.compare_texts(other, *models)
  assert [(row["text"], row["context"], row["rows"]) for row in rows] == [
    ("stdlib", 32, 8),
    ("stdlib", 256, 1),
    ("short.txt", 32, 3),
  ]


def test_tasks_of_parent_and_child(run, models):
  child, parent = models
  found = suite.compare_tasks(run, child, parent)
  assert {name: task["items"] for name, task in found.tasks.items()} == {"choices": 6, "words": 5}
  assert found.answers["choices.parent"].sum() == found.answers["choices.child"].sum() == 2  # one of three is right
  assert found.tasks["choices"]["preserved"]["parent"] == pytest.approx(1 / 3)
  assert "normalised" not in found.tasks["words"]
  assert found.mean.parent == pytest.approx((1 / 3 + found.answers["words.parent"].mean()) / 2)
  same = suite.compare_tasks(run, parent, parent)
  assert same.tasks["choices"]["preserved"]["ratio"] == 1
  json.dumps(same.to_json(), allow_nan=False)


# What is shown, and refused


def test_the_page_shows_texts_and_tasks():
  half = {"parent": 0.5, "child": 0.45, "ratio": 0.9, "low": 0.85, "high": 0.96}
  texts = {"text": "<b>wiki", "context": 8192, "rows": 9, "tokens": 73719.0, "kl": 0.1, "kl_stderr": 0.01}
  texts |= {"perplexity": 11.0, "parent_perplexity": 10.0, "loss_change": np.log(1.1), "loss_change_stderr": 0.01}
  arc = {"sha256": "", "items": 2376, "preserved": half, "normalised": half | {"ratio": None, "low": None}}
  summary = make_summary(layers=3) | {
    "texts": [texts],
    "tasks": {"tasks": {"arc": arc, "last_word": {"sha256": "", "items": 100, "preserved": half}}, "mean": half},
  }
  page, line = Page(render(summary)), "50.0 % 45.0 % 90.0 % 85.0 to 96.0"
  assert "<b>wiki 8,192 73,719 10 11 0.100 0.0769 to 0.123 90.9 % 88.8 to 93.0" in page.text  # t of 8 degrees: 2.306
  assert f"arc likeliest choice 2,376 {line} arc likeliest a character 2,376 50.0 % 45.0 % –" in page.text
  assert f"last_word greedy target 100 {line} mean likeliest choice or target 2,476 {line}" in page.text
  assert "accuracy, mean of tasks                  50.0 %           45.0 %    0.90×" in closing_table(summary)


def test_the_table_of_the_harness():
  results = {
    name: {"arc_easy": {"alias": "arc_easy", "acc,none": acc, "acc_stderr,none": 0.01, "acc_norm,none": 0.25}}
    for name, acc in (("smollm2-135m", 0.5), ("runs/quickstart", 0.45))
  }
  heading, *lines = ([*map(str.strip, line.split())] for line in harness.table(results))
  assert heading == ["task", "metric", "smollm2-135m", "quickstart"]
  assert lines == [
    ["arc_easy", "acc", "0.5000", "0.4500", "90.0", "%"],
    ["arc_easy", "acc_norm", "0.2500", "0.2500", "100.0", "%"],
  ]
  assert harness.table({"a": results["runs/quickstart"]})[1].split() == ["arc_easy", "acc", "0.4500"]


def test_a_changed_task_redoes_the_evaluation_alone(run, tmp_path):
  stages = {stage.name: stage for stage in pipeline.STAGES}
  task = tmp_path / "task.jsonl"
  evaluation = dataclasses.replace(run.config.evaluation, tasks=(str(task),))
  other = puzzle_jax.open_run(run.workdir.root)
  other.config = dataclasses.replace(run.config, evaluation=evaluation)
  keys = []
  for context in "ab":
    task.write_text(json.dumps({"context": context, "target": " x"}))
    keys.append({name: stages[name].key(other) for name in ("data", "evaluation")})
  assert keys[0]["data"] == keys[1]["data"]
  assert [name for name, _ in keys[0]["evaluation"]["files"]] == ["sea.txt", "task.jsonl"]
  assert keys[0]["evaluation"]["files"] != keys[1]["evaluation"]["files"]


@pytest.mark.parametrize(
  "change, message",
  [
    ({"contexts": (1,)}, "evaluation.contexts=1 must be at least 2"),
    ({"contexts": (512,)}, "a row longer than all of data.eval_tokens=256"),
    ({"task_items": -1}, "evaluation.task_items=-1 must be at least 0"),
    ({"tasks": ("a/x.jsonl", "b/x.jsonl.gz")}, "must name files of different names"),
  ],
)
def test_refuses(change, message):
  values = tiny.get_config().to_dict()
  values["evaluation"] |= change
  with pytest.raises(PuzzleError, match=message):
    RunConfig.from_dict(values)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"contexts": (257,)}, "more than the parent's context of 256 tokens"),
    ({"tasks": ("gone.jsonl",)}, "task gone.jsonl cannot be read"),
    ({"texts": ("gone.txt",)}, "no file matches 'gone.txt'"),
    (
      {"max_new_tokens": 250},
      r"max_new_tokens=250 behind a prompt of \d+ tokens .* the parent's context of 256",
    ),
    ({"tasks": ("long.jsonl",)}, "task long.jsonl has an item of 1201 tokens, more than the parent's context of 256"),
    ({"texts": ("corpus.*",)}, r"corpus.jsonl is of data.source='.*/corpus.jsonl', which is trained on"),
    ({"data.task": "gone.jsonl"}, "task gone.jsonl cannot be read"),
  ],
)
def test_refuses_before_any_work(run, tmp_path, monkeypatch, change, message):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "long.jsonl").write_text(json.dumps({"context": "the sea " * 150, "target": "."}))
  (tmp_path / "corpus.jsonl").write_text('{"text": "the sea is wide"}\n{"text": "the sea is blue"}\n')
  values = run.config.to_dict()
  values["data"] |= {"eval_tokens": 1024, "source": str(tmp_path / "corpus.jsonl")}
  values["data"]["task"] = change.get("data.task", "")
  values["evaluation"] |= {key: value for key, value in change.items() if key != "data.task"}
  with pytest.raises(PuzzleError, match=message):
    puzzle_jax.run(values, tmp_path / "run", quiet=True)
  assert not (tmp_path / "run").exists()
