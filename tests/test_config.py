"""The configuration says at once which value is wrong, by its full name."""

import dataclasses
import re

import pytest

from puzzle_jax.config import DTYPES, RunConfig, SearchConfig, SpaceConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.search import Limits


def test_round_trip():
  default = RunConfig()
  assert RunConfig.from_dict(default.to_dict()) == default
  assert RunConfig.from_dict({}) == default


def test_without_gkd_no_tokens_are_needed_for_it():
  assert RunConfig.from_dict({"data": {"gkd_tokens": 0}, "gkd": {"steps": 0}}).gkd.steps == 0


def test_what_flags_give_becomes_what_the_stages_take():
  """Lists become tuples, whole numbers stand for fractions, absent limits stay absent."""
  config = RunConfig.from_dict(
    {
      "space": {"ffn": [1, 0.5, "none"], "layers": {"0": {"ffn": [0.5]}}},
      "costs": {"batches": [1, 8]},
      "bld": {"learning_rate": 1},
      "search": {"limits": {"min_speedup": 2, "max_params": None}, "frontier": [1, 1.5]},
    }
  )
  assert config.space == SpaceConfig(ffn=(1.0, 0.5, "none"), layers={"0": {"ffn": [0.5]}})
  assert config.costs.batches == (1, 8)
  assert isinstance(config.bld.learning_rate, float)
  assert (config.search.limits.min_speedup, config.search.limits.max_params) == (2.0, None)
  assert config.search.frontier == (1.0, 1.5)


@pytest.mark.parametrize(
  "values, message",
  [
    # unknown keys, with the nearest known one
    ({"serach": {}}, "unknown config key config.serach; did you mean search? known: name, parent, device, mesh, data"),
    ({"bld": {"lerning_rate": 1e-4}}, "unknown config key config.bld.lerning_rate; did you mean learning_rate?"),
    (
      {"search": {"limits": {"min_sped_up": 2}}},
      "unknown config key config.search.limits.min_sped_up; did you mean min_speedup?",
    ),
    ({"costs": {"timing": {"xyz": 1}}}, "unknown config key config.costs.timing.xyz; known: layers, rounds"),
    # types
    ({"data": {"seed": "1"}}, "config.data.seed='1' is not of type int"),
    ({"data": {"seed": 1.5}}, "config.data.seed=1.5 is not of type int"),
    ({"data": {"seed": True}}, "config.data.seed=True is not of type int"),
    ({"bld": {"least_squares": 1}}, "config.bld.least_squares=1 is not of type bool"),
    ({"bld": {"learning_rate": "1e-4"}}, "config.bld.learning_rate='1e-4' is not of type float"),
    ({"bld": 3}, "config.bld must be a mapping of init, least_squares"),
    ({"space": {"attention": "gqa"}}, "config.space.attention='gqa' is not of type tuple[str, ...]"),
    ({"space": {"ffn": [None]}}, "config.space.ffn=None is not of type str | float"),
    ({"space": {"layers": []}}, "config.space.layers=[] is not of type"),
    ({"costs": {"batches": [1, 2.5]}}, "config.costs.batches=2.5 is not of type int"),
    # ranges
    ({"data": {"seq_len": 1}}, "data.seq_len=1 must be at least 2"),
    ({"data": {"seq_len": 512, "heldout_tokens": 256}}, "data.heldout_tokens=256 is less than one row of"),
    ({"data": {"heldout_fraction": 1.0}}, "data.heldout_fraction=1.0 must be between 0 and 1"),
    ({"data": {"gkd_tokens": 511}}, "data.gkd_tokens=511 is less than one batch of gkd.batch_rows=2 rows"),
    ({"activations": {"dtype": "float64"}}, "activations.dtype='float64' is not one of " + ", ".join(DTYPES)),
    ({"activations": {"batch_rows": 0}}, "activations.batch_rows=0 must be at least 1"),
    ({"scores": {"batch_rows": 0}}, "scores.batch_rows=0 must be at least 1"),
    ({"evaluation": {"max_new_tokens": 0}}, "evaluation.max_new_tokens=0 must be at least 1"),
    ({"space": {"ffn_multiple": 0}}, "space.ffn_multiple=0 must be at least 1"),
    ({"costs": {"output_tokens": 0}}, "costs.output_tokens=0 must be at least 1"),
    ({"costs": {"batches": []}}, "costs.batches=() must name one batch size or more"),
    ({"costs": {"batches": [4, 0]}}, "costs.batches=(4, 0) must name one batch size or more, each at least 1"),
    ({"bld": {"loss": "mse"}}, "bld.loss='mse' is not one of delta, paper"),
    ({"scores": {"metric": "perplexity"}}, "scores.metric='perplexity' is not one of kl, lm_loss, cosine, accuracy"),
    ({"scores": {"metric": "accuracy"}}, "scores.metric='accuracy' needs a task"),
    ({"gkd": {"kl_weight": 0, "cosine_weight": 0}}, "one of them must be above 0"),
    ({"costs": {"timing": {"layers": 1}}}, "layers >= 2"),
    ({"search": {"limits": {"min_speedup": 0}}}, "limit min_speedup=0.0 must be"),
    ({"export": {"dtype": "int8"}}, "export.dtype='int8' is not one of"),
    ({"gkd": {"clip_norm": 0}}, "clip_norm > 0 and warmup_steps >= 0 needed; got clip_norm=0.0"),
    ({"bld": {"clip_norm": -1.0}}, "bld.clip_norm=-1.0 must be above 0"),
    ({"data": {"seed": -1}}, "data.seed=-1 must be from 0 to 4294967295"),
    ({"gkd": {"seed": 2**32}}, "gkd.seed=4294967296 must be from 0 to 4294967295"),
    ({"data": {"source": "a/x.txt"}, "evaluation": {"texts": ["b/x.txt"]}}, "are told apart by their names"),
  ],
)
def test_names_what_is_wrong(values, message):
  with pytest.raises(PuzzleError, match=re.escape(message)):
    RunConfig.from_dict(values)


def test_a_margin_tightens_the_limits_on_time_alone():
  limits = Limits(min_speedup=1.25, max_token_s=0.02, max_memory_ratio=0.8, max_kv_ratio=0.5, max_first_token_ratio=0.9)
  searched = SearchConfig(limits=limits, margin=0.05).searched
  assert searched.min_speedup == pytest.approx(1.3125)
  assert searched.max_token_s == pytest.approx(0.02 / 1.05)
  assert searched.max_first_token_ratio == pytest.approx(0.9 / 1.05)
  assert dataclasses.replace(searched, min_speedup=1.25, max_token_s=0.02, max_first_token_ratio=0.9) == limits
  assert SearchConfig(limits=limits).searched == limits
  with pytest.raises(PuzzleError, match=r"search.margin=-0.1"):
    SearchConfig(margin=-0.1)
