"""Text that the parent writes: kinds of prompts, the same in any parts, and a data stage that goes on after a kill."""

import dataclasses
import json
import os
import signal
import threading
import time

import eight_devices
import pytest

import puzzle_jax
from configs import tiny
from experiments import tiny_parent
from puzzle_jax import data, preemption
from puzzle_jax.config import DataConfig, RunConfig
from puzzle_jax.data import sampling, sets
from puzzle_jax.data.documents import SourceFile
from puzzle_jax.data.sampling import Sampler, SamplingConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.progress import Progress
from puzzle_jax.store import file_digest

TEXTS = [f"Paragraph {i} of a text begins here.\n\nAnd it goes on and on with number {i}.\nno" for i in range(5)]
CONFIG = SamplingConfig(max_tokens=120, batch_rows=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("parent") / "parent"
  tiny_parent.write(path)
  return path


@pytest.fixture(scope="module")
def parent(model):
  return LanguageModel(*model("gqa2/w48", vocab_size=257), tiny_parent.byte_tokenizer())


@pytest.fixture(scope="module")
def written(parent):
  return Sampler(parent, CONFIG, [TEXTS], seed=3).write(0, 12)


def test_each_kind_begins_as_it_should(parent, written):
  header = "user: "
  beginnings = tuple(line[:4] for text in TEXTS for line in text.split("\n") if len(line.split()) > 3)
  for i, text in enumerate(written):
    assert len(text) <= 120
    if i % 3 == 1:
      assert text.startswith(beginnings)
    elif i % 3 == 2:
      asked, _, answer = text.removeprefix(header).rpartition("\n")
      assert text.startswith(header)
      assert len(parent.tokenizer.encode(asked)) > 3
      assert answer
    else:
      assert not text.startswith((header, *beginnings))
  assert len(set(written)) == 12


def test_each_source_of_prompts_is_taken_as_often_as_the_others(parent):
  many, one = [f"{10 + i} apples on a table" for i in range(30)], ["other text begins so"]
  texts = Sampler(parent, dataclasses.replace(CONFIG, kinds=("text",)), [many, one], seed=3).write(0, 24)
  beginnings = [text[:4] for text in texts]
  assert 6 <= beginnings.count("othe") <= 18
  assert {b for b in beginnings if b != "othe"} <= {text[:4] for text in many}


def test_kinds_named_twice_come_twice_as_often(parent):
  texts = Sampler(parent, dataclasses.replace(CONFIG, kinds=("chat", "text", "chat")), [TEXTS], seed=3).write(0, 6)
  assert [text.startswith("user: ") for text in texts] == [True, False, True] * 2


def test_documents_are_the_same_in_other_parts(parent, written):
  assert Sampler(parent, CONFIG, [TEXTS], seed=3).write(4, 5) == written[4:9]
  assert not set(Sampler(parent, CONFIG, [TEXTS], seed=4).write(4, 5)) & set(written)


def test_sigterm_does_not_wait_until_all_is_written(parent, listening, monkeypatch):
  def endless(*args, ended, **options):
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    while not ended(0, []):
      time.sleep(0.01)

  monkeypatch.setattr(sampling.generation, "generate", endless)
  with pytest.raises(preemption.PreemptedError):
    Sampler(parent, CONFIG, [TEXTS], seed=3).write(0, 3)


def test_all_devices_write(folder):
  program = f"""
import json
from puzzle_jax.data.sampling import Sampler, SamplingConfig
from puzzle_jax.model.language_model import LanguageModel
parent = LanguageModel.open({str(folder)!r})
print(json.dumps(Sampler(parent, SamplingConfig(max_tokens=96, batch_rows=2), [{TEXTS}], seed=3).write(0, 12)))
"""
  alone = Sampler(LanguageModel.open(folder), dataclasses.replace(CONFIG, max_tokens=96), [TEXTS], seed=3).write(0, 12)
  assert eight_devices.run(program) == alone


def test_without_a_template_there_is_no_chat(parent, written):
  plain = dataclasses.replace(parent, tokenizer=dataclasses.replace(parent.tokenizer, chat_template=None))
  texts = Sampler(plain, CONFIG, [TEXTS], seed=3).write(0, 4)
  assert texts[:2] == written[:2]
  assert not any(text.startswith("user: ") for text in texts)
  with pytest.raises(PuzzleError, match="the parent has no chat template"):
    Sampler(plain, dataclasses.replace(CONFIG, kinds=("chat",)), [TEXTS], seed=3)


class Scripted:
  """Writes numbered documents, every third one like the one before it, and empty ones."""

  def __init__(self):
    self.calls = []

  def write(self, first, count):
    self.calls.append(first)
    return ["" if i % 4 == 3 else f"document number {i - (i % 3 == 2)}" for i in range(first, first + count)]


def load(writer, folder, **changes):
  settings = {"part_documents": 8, "train_tokens": 300, "heldout_tokens": 60, "heldout_fraction": 0.25} | changes
  tokenizer = tiny_parent.byte_tokenizer()
  return sampling.load(lambda: writer, tokenizer, folder=folder, progress=Progress(quiet=True), **settings)


def test_parts_are_written_until_there_is_enough_and_only_once(tmp_path):
  tokenizer = tiny_parent.byte_tokenizer()
  first = Scripted()
  source = load(first, tmp_path)
  assert first.calls == [8 * i for i in range(len(first.calls))]
  for part, least in ((source.train, 300), (source.heldout, 60)):
    assert sum(len(tokenizer.encode(text)) + 1 for text in part) >= least
  texts = [*source.train, *source.heldout]
  assert len(set(texts)) == len(texts)
  assert all(text.removeprefix("document number ").isdigit() for text in texts)
  again = Scripted()
  assert load(again, tmp_path).digest == source.digest
  assert again.calls == []
  more = Scripted()
  longer = load(more, tmp_path, train_tokens=900)
  assert more.calls[0] == 8 * len(first.calls)
  assert set(source.heldout) < set(longer.heldout)


def test_a_parent_that_repeats_itself_is_given_up(tmp_path):
  class Dull(Scripted):
    def write(self, first, count):
      return ["the same"] * count

  with pytest.raises(PuzzleError, match="the parent writes nothing new after 9 tokens"):
    load(Dull(), tmp_path)


@pytest.mark.parametrize(
  "rows, shares, expected",
  [(10, (1, 1), [5, 5]), (3, (1, 1), [2, 1]), (7, (0.5, 0.25, 0.25), [3, 2, 2]), (2, (8, 1, 1), [2, 0, 0])],
)
def test_rows_by_share(rows, shares, expected):
  assert sets.rows_by_share(rows, shares) == expected


def test_sets_of_a_mix_hold_the_shares_and_share_no_rows():
  tokenizer = tiny_parent.byte_tokenizer()

  def source(name):
    texts = [f"{name}{i:03d}" for i in range(200)]
    return data.DocumentSource(name=name, digest="", train=texts[:150], heldout=texts[150:])

  sources = [source("a"), source("b")]
  amounts = {"train": {"train": 160, "gkd": 80}, "heldout": {"eval": 40}}
  shares = {"train": (3, 1), "heldout": (1, 3)}
  made = data.pack_sets(enumerate(sources), shares, amounts, tokenizer, seq_len=10, seed=0, shuffled=("train",))
  texts = {name: tokenizer.decode(mixed.packed.tokens.reshape(-1)) for name, mixed in made.items()}
  for name, rows in (("train", [12, 4]), ("gkd", [6, 2]), ("eval", [1, 3])):
    assert made[name].rows_by_source == rows
    assert texts[name].count("a") == 2 * rows[0]  # a row of ten tokens is two documents
  whole = texts["train"] + texts["gkd"] + texts["eval"]
  assert len({whole[i : i + 4] for i in range(len(whole)) if whole[i] in "ab"}) == 56
  assert texts["gkd"].rindex("a") < texts["gkd"].index("b")  # source by source
  assert texts["train"].rindex("a") > texts["train"].index("b")  # shuffled
  with pytest.raises(PuzzleError, match="train part of 'b': 800 tokens are asked for"):
    data.pack_sets(enumerate(sources), {"train": (1, 4)}, {"train": {"train": 1000}}, tokenizer, seq_len=10, seed=0)
  costly = iter([(1, sources[1]), (0, sources[0])])
  with pytest.raises(PuzzleError, match="train part of 'b'"):
    data.pack_sets(costly, {"train": (1, 4)}, {"train": {"train": 1000}}, tokenizer, seq_len=10, seed=0)
  assert list(costly) == [(0, sources[0])]  # is not made


def test_a_source_whose_documents_are_all_on_one_side_is_refused_beside_another(folder, tmp_path):
  for name, count in (("few", 3), ("many", 200)):
    lines = (json.dumps({"text": f"{i}: the quick brown fox jumps over the lazy dog number {i}"}) for i in range(count))
    (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
  values = tiny.get_config().to_dict() | {"parent": str(folder)}
  values["data"] |= {"source": f"{tmp_path / 'few.jsonl'},{tmp_path / 'many.jsonl'}", "heldout_fraction": 0.001}
  with pytest.raises(PuzzleError, match=r"few.jsonl' are all learnt from .*set data.heldout_fraction=0.001 otherwise"):
    puzzle_jax.run(values, tmp_path / "run", stages=["data"], quiet=True)


def test_the_data_stage_mixes_the_parents_text_with_a_file(folder, tmp_path, monkeypatch):
  texts = [f"{i}: the quick brown fox jumps over the lazy dog number {i}" for i in range(200)]
  path = tmp_path / "fox.jsonl"
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
  values = tiny.get_config().to_dict() | {"parent": str(folder)}
  values["data"] |= {"source": f"parent,{path}", "shares": (1.0, 3.0), "train_tokens": 2048}
  values["data"]["sampling"] |= {"max_tokens": 96, "batch_rows": 1, "prompts": str(path)}
  config = RunConfig.from_dict(values)

  write, calls = Sampler.write, []

  def dies(self, first, count):
    calls.append(first)
    if len(calls) == 2:
      raise KeyboardInterrupt
    return write(self, first, count)

  monkeypatch.setattr(Sampler, "write", dies)
  with pytest.raises(KeyboardInterrupt):
    puzzle_jax.run(config, tmp_path / "run", stages=["data"], quiet=True)
  run = puzzle_jax.run(config, tmp_path / "run", stages=["data"], quiet=True)
  assert calls[:3] == [0, 8, 8]  # the first part was kept
  found = run.store("data").get_json("data.json")
  own, file = found["sources"]
  assert own["rows"] == {"train": 16, "gkd": 2, "heldout": 2, "eval": 2}
  assert file["rows"] == {"train": 48, "gkd": 6, "heldout": 6, "eval": 6}
  assert file["files"] == [SourceFile("fox.jsonl", file_digest(path))._asdict()]
  assert found["tokenizer"] == run.tokenizer.digest
  rows = [run.tokenizer.decode(row) for row in run.packed("eval").tokens]
  end = run.tokenizer.special_tokens["eos_token"]
  of_the_file = [all(any(piece in text for text in texts) for piece in row.split(end)) for row in rows]
  assert of_the_file == [False] * 2 + [True] * 6


@pytest.mark.parametrize(
  "change, message",
  [
    ({"kinds": ("start", "poem")}, "must name some of start, text, chat"),
    ({"kinds": ()}, "must name some of"),
    ({"temperatures": (0.0, 1.0)}, "must be above 0"),
    ({"prompts": "stdlib,parent"}, "must name texts that begin the parent's documents"),
    ({"prompts": "stdlib,"}, "must name texts that begin the parent's documents"),
    ({"max_tokens": 64}, "must be at least 96"),
    ({"dtype": "float16"}, "is not one of float32, bfloat16"),
  ],
)
def test_refuses(change, message):
  with pytest.raises(PuzzleError, match=message):
    SamplingConfig(**change)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"source": "parent,"}, "must name sources, each once"),
    ({"source": "a.txt, a.txt"}, "must name sources, each once"),
    ({"source": "parent,stdlib", "shares": (1.0,)}, "must be 2 numbers above 0"),
    ({"source": "parent,stdlib", "shares": (1.0, 0.0)}, "must be 2 numbers above 0"),
    ({"source": "parent,stdlib", "heldout_shares": (1.0,)}, r"data.heldout_shares=\(1.0,\) must be 2 numbers"),
  ],
)
def test_refuses_a_mix(change, message):
  with pytest.raises(PuzzleError, match=message):
    DataConfig(**change)
