"""What a block library is worth, one choice changed at a time; run all by

    python -m experiments.block_library --workdir=runs/study --change.data.source=TEXT.jsonl.gz --record=RECORD.json

`base` is the default of every choice but one: attention is held against the parent's block, as in the paper. Of
SmolLM2-135M's 30 layers every third is distilled; scores are of single subblocks in the parent. An arm takes about two
minutes on one H100.
"""

import dataclasses
import functools
from typing import Any

import ml_collections

from puzzle_jax.bld import BLDConfig, CoupledConfig
from puzzle_jax.config import CostsConfig, DataConfig, RunConfig, ScoresConfig, SearchConfig, SpaceConfig
from puzzle_jax.config_files import choose
from puzzle_jax.rolling import ActivationsConfig
from puzzle_jax.search import Limits

LAYERS = tuple(range(1, 30, 3))
PAIRS = ("gqa1/w768", "linear/w768", "gqa1/w384", "linear/w384")

# What each arm changes, by section.
ARMS: dict[str, dict[str, dict[str, Any]]] = {
  "base": {},
  "untrained": {"bld": {"steps": 0}},
  "no_fit": {"bld": {"least_squares": False}},
  "no_fit_untrained": {"bld": {"least_squares": False, "steps": 0}},
  "truncated_no_fit": {"bld": {"init": "truncate", "least_squares": False}},
  "truncated_no_fit_untrained": {"bld": {"init": "truncate", "least_squares": False, "steps": 0}},
  "random_no_fit": {"bld": {"init": "random", "least_squares": False}},
  "random_no_fit_untrained": {"bld": {"init": "random", "least_squares": False, "steps": 0}},
  # As many tokens, in steps of a quarter of them.
  "small_steps": {"bld": {"batch_rows": 8, "steps": 800}},
  "rate_2e-3": {"bld": {"learning_rate": 2e-3}},
  "small_steps_2e-3": {"bld": {"batch_rows": 8, "steps": 800, "learning_rate": 2e-3}},
  "small_steps_5e-3": {"bld": {"batch_rows": 8, "steps": 800, "learning_rate": 5e-3}},
  "paper_loss": {"bld": {"loss": "paper"}},
  "attention_alone": {"bld": {"attention_target": "attention"}},
  "fp8_activations": {"activations": {"dtype": "float8"}},
  "documents_run_together": {"activations": {"attention": "fast"}},
  "coupled": {"coupled": {"blocks": PAIRS}, "scores": {"granularity": "composed"}},
  "coupled_from_the_start": {
    "coupled": {"blocks": PAIRS, "from_library": False},
    "scores": {"granularity": "composed"},
  },
}


def _arm(name: str) -> RunConfig:
  length = 512
  bld = BLDConfig(
    attention_target="block", steps=200, batch_rows=32, learning_rate=5e-4, warmup_steps=20, dtype="bfloat16"
  )
  left_alone = {str(i): {"attention": (), "ffn": ()} for i in range(30) if i not in LAYERS}
  config = RunConfig(
    name=f"block_library.py:{name}",
    data=DataConfig(seq_len=length, train_tokens=1_638_400, gkd_tokens=8 * length, heldout_tokens=65_536),
    activations=ActivationsConfig(batch_rows=32),
    space=SpaceConfig(ffn=(0.75, 0.5, 0.25, "linear", "none"), layers=left_alone),
    bld=bld,
    scores=ScoresConfig(granularity="subblocks", batch_rows=32),
    costs=CostsConfig(
      table="experiments/results/costs_smollm2_135m.json",
      hardware="2 cores of AMD EPYC",
      input_tokens=64,
      output_tokens=192,
    ),
    search=SearchConfig(limits=Limits(max_params_ratio=0.95)),
    coupled=CoupledConfig(bld=bld),
  )
  changes = {section: dataclasses.replace(getattr(config, section), **fields) for section, fields in ARMS[name].items()}
  return dataclasses.replace(config, **changes)


VARIANTS = {name: functools.partial(_arm, name) for name in ARMS}


def get_config(arm: str = "base") -> ml_collections.ConfigDict:
  return choose(VARIANTS, arm)
