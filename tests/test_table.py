"""The block table: what is read, written, restricted and refused."""

import copy
import json
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from puzzle_jax.errors import PuzzleError
from puzzle_jax.search.decimals import exact
from puzzle_jax.search.table import Table, Variant


def _variant(attention: str, ffn: str, *, score: float = 0.0, seconds: float = 0.1, **more: Any) -> dict[str, Any]:
  costs = {"chat": {b: {"prefill_s": seconds, "decode_s": 2 * seconds} for b in ("1", "8")}}
  sizes = {"params": 10, "param_bytes": 20, "kv_bytes_per_token": 4, "score_stderr": 0.25}
  return {"attention": attention, "ffn": ffn, "score": score, "costs": costs} | sizes | more


@pytest.fixture
def data() -> dict[str, Any]:
  """Two layers, of three and two variants; the last has no cost at batch 8."""
  last = _variant("none", "none", score=-0.5, seconds=0.0, params=0, param_bytes=0, kv_bytes_per_token=0)
  del last["costs"]["chat"]["8"]
  fixed = {"1": {"prefill_s": 0.5, "decode_s": 0.7}, "8": {"prefill_s": 0.6, "decode_s": 0.8}}
  return {
    "format": "puzzle-block-table/1",
    "made_by": "a test",
    "scenarios": {"chat": {"input_tokens": 3, "output_tokens": 2}},
    "fixed": {"params": 100, "param_bytes": 200, "costs": {"chat": fixed}},
    "layers": [
      {
        "variants": [
          _variant("gqa2", "w8", parent=True),
          _variant("gqa1", "w8", score=0.125, weights="decoupled"),
          _variant("gqa1", "w8", score=0.1, weights="coupled"),
        ]
      },
      {"variants": [_variant("gqa2", "w8", parent=True, seconds=0.3), last]},
    ],
  }


def test_round_trip_through_json(data):
  table = Table.from_json(data)
  written = table.to_json()
  assert written["made_by"] == "a test"
  assert json.loads(json.dumps(written, allow_nan=False)) == written
  assert Table.from_json(written).to_json() == written
  for given, kept in zip(data["layers"], written["layers"], strict=True):
    for row, back in zip(given["variants"], kept["variants"], strict=True):
      assert back == row
  assert {key: written[key] for key in ("format", "scenarios", "fixed")} == {
    key: data[key] for key in ("format", "scenarios", "fixed")
  }


def test_fields(data):
  table = Table.from_json(data)
  assert table.num_layers == 2
  assert table.parent == (0, 0)
  assert table.layers[0][2] == Variant("gqa1", "w8", "coupled")
  assert table.layers[0][2].block == "gqa1/w8"
  np.testing.assert_array_equal(table.allowed, [[True, True, True], [True, True, False]])
  assert table.score[1, 1] == -0.5
  assert not table.score.flags.writeable


def test_optional_keys_default_to_zero():
  row = {"attention": "a", "ffn": "f", "parent": True, "score": 1, "costs": {}}
  table = Table.from_json(
    {"format": "puzzle-block-table/1", "scenarios": {"s": {"input_tokens": 1, "output_tokens": 0}}}
    | {"layers": [{"variants": [row]}]}
  )
  for column in (table.score_stderr, table.params, table.param_bytes, table.kv_bytes_per_token):
    np.testing.assert_array_equal(column, [[0.0]])
  assert table.fixed_params == table.fixed_param_bytes == 0


def test_figures_are_sums_in_decimal_arithmetic(data):
  table = Table.from_json(data)
  figures = table.figures((1, 0), "chat", 1)
  assert figures.params == 100 + 10 + 10
  assert figures.kv_bytes_per_token == 8
  assert figures.memory_bytes == 200 + 40 + 1 * (3 + 2) * 8
  assert figures.prefill_s == Fraction("0.9")  # 0.5 + 0.1 + 0.3, which floats make 0.9000000000000000(2)
  assert figures.decode_s == Fraction("1.5")
  assert figures.runtime_s == Fraction("2.4")
  assert table.figures((1, 0), "chat", 8).memory_bytes == 200 + 40 + 8 * 5 * 8
  assert table.total_score((1, 1)) == Fraction(-3, 8)
  assert exact(0.1) * 3 == Fraction("0.3")


@pytest.mark.parametrize(
  "quantity", ["params", "memory_bytes", "kv_bytes_per_token", "prefill_s", "decode_s", "runtime_s"]
)
def test_weights_add_up_to_figures(data, quantity):
  table = Table.from_json(data)
  weights = table.weights(quantity, "chat", 1)
  fixed = getattr(table.fixed_figures("chat", 1), quantity)
  for choice in ((0, 0), (2, 1), (1, 0)):
    total = getattr(table.figures(choice, "chat", 1), quantity)
    assert float(fixed) + weights[[0, 1], choice].sum() == pytest.approx(float(total), rel=1e-14)


def test_batches_are_those_that_all_allowed_variants_have(data):
  table = Table.from_json(data)
  assert table.batches(["chat"]) == (1,)
  assert table.restrict(lambda layer, variant: variant.attention != "none").batches(["chat"]) == (1, 8)
  assert "layer 1, none/none has no cost at batch 8" in table.missing_cost("chat", 8)
  for layer in data["layers"]:
    for variant in layer["variants"]:
      variant["costs"]["chat"].pop("1")
  with pytest.raises(PuzzleError, match=r"no batch that every variant has a cost for.*layer 1, none/none"):
    Table.from_json(data).batches(["chat"])


def test_restrict_keeps_indices_and_the_file(data):
  table = Table.from_json(data)
  narrow = table.restrict(lambda layer, variant: variant.weights != "decoupled" and variant.attention != "none")
  np.testing.assert_array_equal(narrow.allowed, [[True, False, True], [True, False, False]])
  assert narrow.to_json() == table.to_json()
  with pytest.raises(PuzzleError, match=r"layer 1: the restriction leaves no variant of gqa2/w8, none/none"):
    table.restrict(lambda layer, variant: layer == 0)


def test_freeze(data):
  table = Table.from_json(data)
  np.testing.assert_array_equal(table.freeze({0: "gqa1/w8"}).allowed, [[False, True, True], [True, True, False]])
  with pytest.raises(PuzzleError, match=r"freeze 1:gqa1/w8: layer 1 has no such variant.*gqa2/w8, none/none"):
    table.freeze({1: "gqa1/w8"})
  with pytest.raises(PuzzleError, match=r"freeze 2:gqa1/w8: there are layers 0 to 1"):
    table.freeze({2: "gqa1/w8"})


_FIRST = ("layers", 0, "variants", 0)
_COST = (*_FIRST, "costs", "chat", "8")


@pytest.mark.parametrize(
  ("path", "value", "message"),
  [
    (("format",), "other/1", "format 'other/1' is not"),
    (("scenarios",), {}, "no scenarios"),
    (("scenarios",), None, "scenarios: expected an object"),
    (("scenarios", "chat", "input_tokens"), 1.5, r"scenario chat: .*\[1.5, 2\]"),
    (("scenarios", "chat"), {"input_tokens": 0, "output_tokens": 0}, "not both 0"),
    (("layers",), [], "no layers"),
    (("layers", 1, "variants"), [], "layer 1 has no variants"),
    (("layers", 1), {}, "layer 1 has no variants"),
    ((*_FIRST, "score"), math.nan, "layer 0, variant 0 gqa2/w8: score is nan"),
    ((*_FIRST, "score"), "0", "layer 0, variant 0 gqa2/w8: score is '0', not a number"),
    ((*_FIRST, "score"), ..., "layer 0, variant 0 gqa2/w8: score is missing"),
    ((*_FIRST, "param_bytes"), -1, "layer 0, variant 0 gqa2/w8: param_bytes is -1; it must be finite and not negative"),
    ((*_FIRST, "param_bytes"), True, "param_bytes is True, not a number"),
    ((*_FIRST, "params"), 2**60 + 1, "too large to be held exactly"),
    ((*_FIRST, "kv_bytes_per_tokens"), 1, "unknown key 'kv_bytes_per_tokens'; known: .*kv_bytes_per_token"),
    ((*_FIRST, "attention"), "gqa2/w8", "layer 0, variant 0: attention is 'gqa2/w8'"),
    ((*_FIRST, "ffn"), ..., "layer 0, variant 0: ffn is None"),
    ((*_FIRST, "weights"), 3, "layer 0, variant 0: `weights` must be a name"),
    ((*_FIRST, "parent"), ..., "layer 0: exactly one variant must have `parent: true`; none has"),
    (("layers", 0, "variants", 2, "parent"), True, r"exactly one .*; gqa2/w8, gqa1/w8 \(coupled\) has"),
    (
      ("layers", 0, "variants", 2, "weights"),
      "decoupled",
      r"variant 2 gqa1/w8 \(decoupled\): the same name as variant 1",
    ),
    ((*_COST, "prefill_s"), -0.1, "gqa2/w8: scenario chat, batch 8: prefill_s is -0.1"),
    ((*_COST, "decode_s"), math.nan, "gqa2/w8: scenario chat, batch 8: decode_s is nan"),
    ((*_COST, "decode_s"), ..., "gqa2/w8: scenario chat, batch 8: decode_s is missing"),
    ((*_FIRST, "costs", "code"), {}, "costs of scenario 'code', which the table does not describe; it has chat"),
    ((*_FIRST, "costs", "chat", "auto"), {}, "batch 'auto' of scenario chat is no positive whole number"),
    (("fixed", "costs", "chat", "8"), ..., "fixed: no costs for scenario chat, batch 8"),
    (("fixed", "params"), math.inf, "fixed: params is inf"),
    ((*_FIRST, "costs", "chat", "08"), {}, "batch '08' of scenario chat is no positive whole number"),
  ],
)
def test_bad_tables_are_refused_by_name(data, path, value, message):
  target = data = copy.deepcopy(data)
  for key in path[:-1]:
    target = target[key]
  if value is ...:
    del target[path[-1]]
  else:
    target[path[-1]] = value
  with pytest.raises(PuzzleError, match=message):
    Table.from_json(data)


def test_a_number_beyond_all_floats(data):
  data["fixed"]["params"] = 10**400
  with pytest.raises(PuzzleError, match="fixed: params is a whole number of 1329 bits, too large"):
    Table.from_json(data)


def test_read(tmp_path, data):
  path = tmp_path / "table.json"
  path.write_text(json.dumps(data))
  assert Table.read(path).to_json() == Table.from_json(data).to_json()
  with pytest.raises(PuzzleError, match=r"none\.json cannot be read"):
    Table.read(tmp_path / "none.json")
  for text, message in (
    ("{", "is not JSON"),
    ("[" * 100_000, "is JSON of more than 100 levels"),
    ("[]", "no JSON obj"),
  ):
    path.write_text(text)
    with pytest.raises(PuzzleError, match=rf"table\.json .*{message}.*; name a puzzle-block-table/1 file"):
      Table.read(path)
