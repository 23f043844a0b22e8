"""Documents, split, packing and batches."""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from puzzle_jax import data
from puzzle_jax.data import builders, stdlib
from puzzle_jax.data.packing import _lay_out
from puzzle_jax.errors import PuzzleError
from puzzle_jax.tokenizer import Tokenizer


def byte_tokenizer(*, bos=False):
  """One token a byte; 0 is EOS, 1 is BOS."""
  names = ["</s>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
  backend = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(names)}, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens(names[:2])
  if bos:
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
  return Tokenizer(backend, {"eos_token": "</s>", "bos_token": "<s>"}, None, frozenset([0]))


def write_lines(path, texts, field="text"):
  lines = "".join(json.dumps({field: text, "id": "x"}) + "\n" for text in texts)
  path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
  return str(path)


def every(source):
  return [*source.train, *source.heldout]


# The embedded text.


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
  folder = tmp_path_factory.mktemp("embedded")
  return folder, data.load_documents("stdlib", data_dir=folder)


def test_embedded_text_is_plenty_and_mostly_words(embedded):
  texts = every(embedded[1])
  assert len(texts) > 300
  assert sum(map(len, texts)) > 1_200_000
  text = " ".join(texts)
  assert sum(c.isalpha() or c.isspace() for c in text) > 0.9 * len(text)
  assert not {"`~", ":class:", "\t"} & {mark for mark in ("`~", ":class:", "\t") if mark in text}


def test_embedded_parts_share_no_paragraph(embedded):
  train, heldout = (
    {p for text in part for p in text.split("\n\n") if len(p.split()) > 12}
    for part in (embedded[1].train, embedded[1].heldout)
  )
  assert len(heldout) > 300
  assert not heldout & train


def test_embedded_text_is_prepared_once_and_the_same_anew(embedded, tmp_path, monkeypatch):
  folder, source = embedded
  texts = list(stdlib.documents())
  monkeypatch.setattr(stdlib, "documents", lambda: pytest.fail("made again"))
  assert data.load_documents("stdlib", data_dir=folder).digest == source.digest
  monkeypatch.setattr(stdlib, "documents", lambda: iter(texts))
  assert data.load_documents("stdlib", data_dir=tmp_path).digest == source.digest


def test_cleaning_of_documentation():
  text = """Return the :class:`~pathlib.Path` of ``x``, which has been broken over the lines of a well-
  known paragraph of some twenty words or even more.

  Usage
  -----

  An example follows that shows how it is done::

      for x in range(3):
          print(x)

  ===  ======
  a    table
  ===  ======
  """
  expected = (
    "Return the pathlib.Path of `x`, which has been broken over the lines of a well-known paragraph of some twenty "
    "words or even more.\n\nUsage\n\nAn example follows that shows how it is done:\n\n"
    "      for x in range(3):\n          print(x)"
  )
  seen: set[str] = set()
  assert stdlib._clean(text, seen) == expected
  assert stdlib._clean(text, seen, title="again") == ""
  assert stdlib._clean("Too short to be of use.", seen) == ""


# Local files.


def test_files_of_all_kinds(tmp_path):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "a.txt").write_text("One file\nis one document.")
  (tmp_path / "in" / "b.txt.gz").write_bytes(gzip.compress("zipped Ünïcode 😀".encode()))
  write_lines(tmp_path / "in" / "c.jsonl", ["first\nline", "", "  ", "second"])
  write_lines(tmp_path / "in" / "d.jsonl.gz", ["third", "half \ud83d"])
  source = data.load_documents(str(tmp_path / "in" / "*"), data_dir=tmp_path / "out")
  expected = ["One file\nis one document.", "zipped Ünïcode 😀", "first\nline", "second", "third", "half ?"]
  assert sorted(every(source)) == sorted(expected)
  assert len(source.heldout) >= 1


def test_the_last_suffix_says_what_a_file_is(tmp_path):
  source = data.load_documents(write_lines(tmp_path / "a.txt.jsonl", ["one", "two", "three"]), data_dir=tmp_path)
  assert sorted([*source.train, *source.heldout]) == ["one", "three", "two"]


def test_text_field(tmp_path):
  path = write_lines(tmp_path / "a.jsonl", ["one", "two"], field="body")
  assert sorted(every(data.load_documents(path, data_dir=tmp_path / "out", text_field="body"))) == ["one", "two"]


def test_many_shards_are_one_dataset(tmp_path, monkeypatch):
  monkeypatch.setattr(builders, "_SHARD_BYTES", 100)
  texts = [f"document {i} of some length" for i in range(30)]
  for i in range(0, 30, 3):
    write_lines(tmp_path / f"{i:02d}.jsonl", texts[i : i + 3])
  source = data.load_documents(f"{tmp_path}/*.jsonl", data_dir=tmp_path / "out")
  assert len(list((tmp_path / "out").rglob("*.array_record*"))) == 10
  assert Counter(every(source)) == Counter(texts)


def test_duplicates_go_and_the_first_stays(tmp_path):
  texts = ["Some  text\n", "some text", "Some text", "other text"]
  path = write_lines(tmp_path / "a.jsonl", texts)
  assert sorted(every(data.load_documents(path, data_dir=tmp_path))) == ["Some  text\n", "other text"]


def test_digest_follows_content_and_prepared_files_are_reused(tmp_path):
  path = write_lines(tmp_path / "a.jsonl", ["one", "two", "three"])
  first = data.load_documents(path, data_dir=tmp_path / "out")
  written = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}
  assert data.load_documents(path, data_dir=tmp_path / "out").digest == first.digest
  assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()} == written
  write_lines(tmp_path / "a.jsonl", ["one", "two", "four"])
  changed = data.load_documents(path, data_dir=tmp_path / "out")
  assert sorted(every(changed)) == ["four", "one", "two"]
  assert changed.digest != first.digest


def test_preparation_is_quiet(tmp_path, capfd):
  data.load_documents(write_lines(tmp_path / "a.jsonl", ["one", "two"]), data_dir=tmp_path / "out")
  assert capfd.readouterr() == ("", "")


def run_script(script, folder, *path):
  """Runs a script in a process of its own, in `folder`."""
  path = os.pathsep.join([*path, str(Path(__file__).parent.parent)])
  command = [sys.executable, "-c", script]
  return subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, check=False).returncode


def test_killed_preparation_leaves_nothing_that_counts(tmp_path):
  path = write_lines(tmp_path / "a.jsonl", [f"document {i}" for i in range(5)])
  script = """
import os, signal
from pathlib import Path
from puzzle_jax import data
from puzzle_jax.data import builders
read = builders.read_file
def killed(*args):
  yield next(read(*args))
  os.kill(os.getpid(), signal.SIGKILL)
builders.read_file = killed
data.load_documents("a.jsonl", data_dir=Path("out"))
"""
  assert run_script(script, tmp_path) == -signal.SIGKILL
  (prepared,) = (tmp_path / "out").glob("*/text_files")
  (left,) = prepared.iterdir()
  assert left.name != "1.0.0"
  assert len(every(data.load_documents(path, data_dir=tmp_path / "out"))) == 5
  assert [p.name for p in prepared.iterdir()] == ["1.0.0"]


@pytest.mark.parametrize(
  "name, content, message",
  [
    ("a.jsonl", '{"text": "one"}\n{"body": "two", "title": "t", "n": 3}\n', r"a\.jsonl:2.*\['body', 'title'\]"),
    ("a.jsonl", '{"text": "one"}\n{"text": 3}\n', r"a\.jsonl:2 has no text in 'text'"),
    ("a.jsonl", '{"text": "one"}\n\n["two"]\n', r"a\.jsonl:3 has no text in 'text'"),
    ("a.jsonl", '{"text": "one"}\n{"te', r"a\.jsonl:2 is not JSON"),
    ("a.jsonl", '{"text": "one"}\n' + '{"a":' * 100_000, r"a\.jsonl:2 is JSON of more than 100 levels"),
    ("a.jsonl", '{"text": "one"}\n{"text": "two", "n": ' + "9" * 5000 + "}", r"a\.jsonl:2 is not JSON .*4300"),
    ("a.jsonl", '{"text": "one"}\n', "holds 1 different documents"),
    ("a.jsonl", "\n", "holds 0 different documents"),
    ("a.txt", "one", "holds 1 different documents"),
    ("a.txt", b"\xff\xfe", r"a\.txt cannot be read as UTF-8"),
    ("a.jsonl.gz", "plain", r"a\.jsonl\.gz cannot be read"),
    ("a.jsonl.gz", gzip.compress(b"x" * 1000, mtime=0)[:-5], r"a\.jsonl\.gz cannot be read"),
    ("a.csv", "text\none\n", r"a\.csv is none of \.txt"),
  ],
)
def test_file_errors(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
  with pytest.raises(PuzzleError, match=message):
    data.load_documents(str(tmp_path / name), data_dir=tmp_path / "out")


def test_nothing_found(tmp_path):
  with pytest.raises(PuzzleError, match=r"no file matches '.*\*\.txt'"):
    data.load_documents(f"{tmp_path}/*.txt", data_dir=tmp_path)
  with pytest.raises(PuzzleError, match=r"is a folder: say .*/\*\.txt"):
    data.load_documents(str(tmp_path), data_dir=tmp_path)
  with pytest.raises(PuzzleError, match="heldout_fraction=1"):
    data.load_documents("stdlib", data_dir=tmp_path, heldout_fraction=1)


# The split.


def test_split_is_by_document_and_stays(tmp_path):
  texts = [f"document number {i}" for i in range(1_000)]
  one, more = (
    data.load_documents(write_lines(tmp_path / f"{n}.jsonl", texts[:n]), data_dir=tmp_path, heldout_fraction=0.2)
    for n in (700, 1_000)
  )
  assert not set(more.train) & set(more.heldout)
  assert 140 <= len(more.heldout) <= 260  # 4.7 standard deviations
  assert set(one.heldout) == set(more.heldout) & set(texts[:700])
  train = list(more.train)
  assert train == sorted(train, key=texts.index)
  assert [more.train[i] for i in range(len(train))] == train
  assert list(more.train[5:8]) == train[5:8]


def test_each_part_gets_a_document(tmp_path):
  path = write_lines(tmp_path / "a.jsonl", ["one", "two"])
  for fraction in (0.001, 0.999):
    source = data.load_documents(path, data_dir=tmp_path, heldout_fraction=fraction)
    assert (len(source.train), len(source.heldout), source.forced) == (1, 1, True)
  many = data.load_documents(write_lines(tmp_path / "b.jsonl", [f"number {i}" for i in range(100)]), data_dir=tmp_path)
  assert not many.forced


# Datasets of tensorflow-datasets.


class PuzzleTestText(tfds.core.GeneratorBasedBuilder):
  """A dataset as others write them: sorted by key, with another text field and more splits."""

  VERSION = tfds.core.Version("2.0.0")

  def _info(self):
    features = {
      "body": tfds.features.Text(),
      "title": tfds.features.Text(),
      "label": tfds.features.ClassLabel(names="ab"),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager):
    return {"test": self._generate_examples(["unused"]), "train": self._generate_examples(["one", "two", "three ü"])}

  def _generate_examples(self, texts):
    for i, text in enumerate(texts):
      yield i, {"body": text, "title": f"title {i}", "label": "a"}


class PuzzleTestOffline(PuzzleTestText):
  def _split_generators(self, dl_manager):
    raise ConnectionError("no route to host")


@pytest.mark.parametrize("name", ["puzzle_test_text:body", "puzzle_test_text:2.0.0:body"])
def test_registered_dataset(tmp_path, name):
  source = data.load_documents(f"tfds:{name}", data_dir=tmp_path)
  assert sorted(every(source)) == ["one", "three ü", "two"]


def test_registered_dataset_takes_the_text_field_of_the_config(tmp_path):
  source = data.load_documents("tfds:puzzle_test_text:2.0.0", data_dir=tmp_path, text_field="title")
  assert sorted(every(source)) == ["title 0", "title 1", "title 2"]


@pytest.mark.parametrize(
  "name, message",
  [
    ("puzzle_test_text", r"no text in 'text'; its text fields are \['body', 'title'\]"),
    ("puzzle_test_texd", r"no dataset 'puzzle_test_texd'; near: \['puzzle_test_text'"),
    ("puzzle_test_offline:body", r"cannot be had \(ConnectionError: no route to host\)"),
    ("puzzle_test_text:9.9.9:body", "cannot be had"),
  ],
)
def test_registered_dataset_errors(tmp_path, name, message):
  with pytest.raises(PuzzleError, match=message):
    data.load_documents(f"tfds:{name}", data_dir=tmp_path)


def test_tensorflow_is_never_imported(tmp_path):
  """Not even where it is installed: a package of that name that ends the process stands in for it."""
  (tmp_path / "tensorflow").mkdir()
  (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
  write_lines(tmp_path / "a.jsonl", [f"document {i}" for i in range(9)])
  script = """
import sys
from pathlib import Path
from puzzle_jax import data
from tests.test_data import byte_tokenizer
source = data.load_documents("a.jsonl", data_dir=Path("out"))
registered = data.load_documents("tfds:puzzle_test_text:body", data_dir=Path("out"))
packed = data.pack([*source.train, *registered.train], byte_tokenizer(), seq_len=8)
assert next(data.batches(packed, batch_size=2, seed=0)).tokens.shape == (2, 8)
assert "tensorflow" not in sys.modules
"""
  assert run_script(script, tmp_path, str(tmp_path)) == 0


# Packing.


def lay_out_slowly(documents, seq_len, num_tokens):
  """Token by token."""
  rows, row = [], []
  for document in documents:
    for i, token in enumerate(document):
      new = not row or i == 0
      segment = 1 if not row else row[-1][1] + new
      row.append((token, segment, 0 if new else row[-1][2] + 1))
      if len(row) == seq_len:
        rows.append(row)
        row = []
  if row:
    rows.append(row + [(-1, 0, 0)] * (seq_len - len(row)))
  cells = np.array(rows).reshape(-1, 3)
  cells[num_tokens:] = (-1, 0, 0)
  return cells[: -(-num_tokens // seq_len) * seq_len].reshape(-1, seq_len, 3)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(2, 7), st.data())
def test_rows_as_laid_out_token_by_token(lengths, seq_len, draw):
  total = sum(lengths)
  stream = np.arange(total, dtype=np.int32)
  documents = np.split(stream, np.cumsum(lengths)[:-1])
  num_tokens = draw.draw(st.integers(1, total))
  packed = _lay_out(documents, seq_len, num_tokens, pad_id=-1)
  assert all(array.dtype == np.int32 for array in packed)
  np.testing.assert_array_equal(np.stack(packed, axis=-1), lay_out_slowly(documents, seq_len, num_tokens))
  mask = np.asarray(data.target_mask(packed.segment_ids))
  for b, t in np.ndindex(mask.shape):
    follows = t + 1 < seq_len and packed.positions[b, t + 1] == packed.positions[b, t] + 1
    assert mask[b, t] == (follows and packed.segment_ids[b, t] > 0 and packed.segment_ids[b, t + 1] > 0)


def test_pack_ends_documents_with_eos_and_keeps_their_text():
  texts = [f"text {i} " * (i + 1) for i in range(20)]
  tokenizer = byte_tokenizer()
  packed = data.pack(texts, tokenizer, seq_len=16)
  stream = packed.tokens[packed.segment_ids > 0]
  assert tokenizer.decode(stream).split("</s>")[-1] == ""
  assert Counter(tokenizer.decode(stream).split("</s>")[:-1]) == Counter(texts)
  assert packed.num_tokens == stream.size == sum(len(text) + 1 for text in texts)
  assert (packed.tokens[packed.segment_ids == 0] == tokenizer.eos_id).all()


def test_pack_starts_documents_with_bos_where_the_parent_does():
  packed = data.pack(["ab", "cd"], byte_tokenizer(bos=True), seq_len=8)
  assert (packed.tokens[0, [0, 4]] == 1).all()
  np.testing.assert_array_equal(packed.positions[0], [0, 1, 2, 3, 0, 1, 2, 3])


def test_no_second_eos():
  assert data.pack(["ab</s>"], byte_tokenizer(), seq_len=3).num_tokens == 3


def test_pack_is_a_function_of_the_seed_and_a_longer_one_goes_on():
  texts = [f"text number {i}" for i in range(700)]
  tokenizer = byte_tokenizer()
  a, b, c = (
    data.pack(texts, tokenizer, seq_len=16, max_tokens=n, seed=s) for n, s in ((1000, 1), (3000, 1), (1000, 2))
  )
  assert a.tokens.shape == (62, 16)
  assert a.num_tokens == 992
  assert jax.tree.all(jax.tree.map(np.array_equal, a, b.rows(slice(62))))
  assert not np.array_equal(a.tokens, c.tokens)


@pytest.mark.parametrize(
  "texts, options, message",
  [
    (["abc", "def"], {"seq_len": 4, "max_tokens": 13}, "12 tokens are asked for and the 2 documents hold 8"),
    (["abc"], {"seq_len": 4, "max_tokens": 3}, "max_tokens=3 is less than one row"),
    (["abc"], {"seq_len": 1}, "seq_len=1"),
    ([], {"seq_len": 4}, "no documents"),
  ],
)
def test_pack_errors(texts, options, message):
  with pytest.raises(PuzzleError, match=message):
    data.pack(texts, byte_tokenizer(), **options)


def test_target_mask_under_jit():
  segments = np.array([[1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3]])
  expected = [[True, False, True, False, False, False], [False, False, True, True, True, False]]
  np.testing.assert_array_equal(jax.jit(data.target_mask)(segments), expected)


# Batches.


@pytest.fixture(scope="module")
def packed():
  rows = np.arange(10, dtype=np.int32)[:, None] + np.zeros(4, np.int32)
  return data.PackedText(rows, np.ones_like(rows), np.arange(4, dtype=np.int32) + np.zeros_like(rows))


def row_numbers(batches):
  return np.concatenate([batch.tokens[:, 0] for batch in batches])


def test_epochs_hold_every_row_once_in_an_order_of_their_own(packed):
  rows = row_numbers(data.batches(packed, batch_size=2, seed=3, num_epochs=3)).reshape(3, 10)
  for epoch in rows:
    assert sorted(epoch) == list(range(10))
  assert len({tuple(epoch) for epoch in rows}) == 3


def test_batches_go_on_over_epochs_and_drop_what_fills_none(packed):
  batches = list(data.batches(packed, batch_size=4, seed=0, num_epochs=3))
  assert [batch.tokens.shape for batch in batches] == [(4, 4)] * 7
  assert all(array.dtype == np.int32 for batch in batches for array in batch)


@pytest.mark.parametrize("done", [0, 1, 4, 9])
def test_resumed_batches_are_the_ones_that_were_left(packed, done):
  whole = data.batches(packed, batch_size=3, seed=7)
  for _ in range(done):
    next(whole)
  state = json.loads(json.dumps(whole.get_state()))
  rest = row_numbers([next(whole) for _ in range(8)])
  resumed = data.batches(packed, batch_size=3, seed=7)
  resumed.set_state(state)
  np.testing.assert_array_equal(row_numbers([next(resumed) for _ in range(8)]), rest)
  again = data.batches(packed, batch_size=3, seed=7)
  np.testing.assert_array_equal(row_numbers([next(again) for _ in range(done + 8)])[done * 3 :], rest)


def test_seeds_give_other_orders(packed):
  a, b = (row_numbers(data.batches(packed, batch_size=5, seed=s, num_epochs=1)) for s in (0, 1))
  assert not np.array_equal(a, b)


def test_batch_larger_than_the_set(packed):
  with pytest.raises(PuzzleError, match="batch_size=11 is more than the 10 rows"):
    data.batches(packed, batch_size=11, seed=0)
