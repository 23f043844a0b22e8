"""The search space against the paper's counts, and what it refuses."""

import math

import pytest

from puzzle_jax import arch, space
from puzzle_jax.arch import BlockSpec
from puzzle_jax.config import SpaceConfig
from puzzle_jax.errors import PuzzleError

PAPER = {"attention": ("gqa", "linear", "none"), "ffn": (0.87, 0.75, 0.5, 0.25, 0.2, 0.1, "linear", "none")}


def names(subblocks: tuple[arch.Subblock, ...]) -> list[str]:
  return [s.name for s in subblocks]


def test_the_paper_s_space(architecture):
  llama_70b = architecture(*["gqa8/w28672"] * 80, hidden_size=8192, num_heads=64, head_dim=128)
  built = space.build(llama_70b, **PAPER, ffn_multiple=256)
  layer = built.layers[0]
  assert names(layer.attention) == ["gqa8", "gqa4", "gqa2", "gqa1", "linear", "none"]
  assert names(layer.ffn)[:4] == ["w28672", "w24832", "w21504", "w14336"]
  assert (len(layer.attention), len(layer.ffn), len(layer.blocks)) == (6, 9, 54)
  assert len(layer.single_replacements) == len(layer.variants) == 5 + 8
  assert built.log10_children == pytest.approx(80 * math.log10(54))
  assert str(built) == "54 blocks a layer, 80 layers: 10^139 children"
  assert {s: PAPER[s] for s in PAPER} == {s: getattr(SpaceConfig(), s) for s in PAPER}


def test_pairs_and_single_replacements(architecture):
  (layer,) = space.build(architecture("gqa2/w48"), attention=["none"], ffn=["linear"], ffn_multiple=8).layers
  assert [b.name for b in layer.blocks] == ["gqa2/w48", "gqa2/linear", "none/w48", "none/linear"]
  assert [b.name for b in layer.single_replacements] == ["gqa2/linear", "none/w48"]
  assert layer.parent == layer.blocks[0] == BlockSpec.parse("gqa2/w48")
  assert [s.id for s in layer.variants] == ["attention.none", "ffn.linear"]


def test_kv_heads_are_proper_divisors_of_the_parent_s(architecture):
  parent = architecture("gqa3/w48", num_heads=9)
  (layer,) = space.build(parent, attention=["gqa"], ffn=[], ffn_multiple=8).layers
  assert names(layer.attention) == ["gqa3", "gqa1"]


def test_widths_are_multiples_without_doubles_and_no_wider_than_the_parent(architecture):
  (layer,) = space.build(
    architecture("gqa2/w44"), attention=[], ffn=[1.0, 0.75, 0.7, 0.01, "w40", "w32"], ffn_multiple=8
  ).layers
  assert names(layer.ffn) == ["w44", "w32", "w8", "w40"]  # 44 rounds to 48, wider than the parent


def test_layers_of_their_own(architecture):
  parent = architecture("gqa2/w48", "none/w48", "gqa4/w16")
  choices = {"attention": ["gqa", "none"], "ffn": [0.5], "ffn_multiple": 8}
  built = space.build(parent, **choices, layers={"2": {"attention": [], "ffn": ["none"]}})
  assert built.to_json() == [
    {"attention": ["gqa2", "gqa1", "none"], "ffn": ["w48", "w24"]},
    {"attention": ["none"], "ffn": ["w48", "w24"]},
    {"attention": ["gqa4"], "ffn": ["w16", "none"]},
  ]
  assert str(built) == "2/6 blocks a layer, 3 layers: 10^1 children"


@pytest.mark.parametrize(
  "choices, message",
  [
    ({"attention": ["gqa0"]}, "'gqa0' is no attention subblock"),
    ({"attention": ["gqa3"]}, "gqa3 does not divide the parent's 4 KV heads; use `gqa`"),
    ({"attention": ["mamba"]}, "'mamba' is no attention subblock; known: gqaN, linear, none"),
    ({"ffn": [1.5]}, r"ratio 1.5 is not in \(0, 1\]"),
    ({"ffn": ["w64"]}, "w64 is larger than the parent's w48 in layer 0; remove it"),
    ({"attention": ["gqa8"], "layers": {}}, "gqa8 does not divide the parent's 4 KV heads"),
    ({"layers": {"1": {}}}, r"no layers \['1'\]; the parent has 0 to 0"),
    ({"layers": {"0": {"attn": []}}}, r"unknown keys \['attn'\]; known: attention, ffn"),
  ],
)
def test_refuses(architecture, choices, message):
  defaults = {"attention": [], "ffn": [], "ffn_multiple": 8}
  with pytest.raises(PuzzleError, match=message):
    space.build(architecture("gqa4/w48"), **(defaults | choices))


def test_an_engine_narrows_the_space(architecture):
  parent = architecture("gqa2/w512", "gqa2/w512", hidden_size=64)
  choices = {"attention": ["gqa", "linear", "none"], "ffn": [0.5, 0.25, "linear", "none"], "ffn_multiple": 128}
  vllm = space.build(parent, **choices, engine="vllm").layers
  assert [names(layer.attention) for layer in vllm] == [["gqa2", "gqa1"], ["gqa2", "gqa1", "none"]]
  assert [names(layer.ffn) for layer in vllm] == [["w512", "w256", "w128", "none"]] * 2
  portable = space.build(parent, **choices, engine="portable").layers[0]
  assert names(portable.ffn) == ["w512", "w256"]  # the first layer keeps its attention, and so an FFN
