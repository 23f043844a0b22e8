"""What a block library is worth, one choice changed at a time; run all by `python -m experiments.block_library`.

`base` is the default of every choice. Of SmolLM2-135M's 30 layers every third is distilled; scores are of single
subblocks in the parent. On one H100 an arm takes about a minute.
"""

from typing import Any

import ml_collections

from configs.base import to_config_dict
from puzzle_jax.bld import BLDConfig, CoupledConfig
from puzzle_jax.config import CostsConfig, DataConfig, RunConfig, ScoresConfig, SearchConfig, SpaceConfig
from puzzle_jax.rolling import ActivationsConfig
from puzzle_jax.search import Limits

LAYERS = tuple(range(1, 30, 3))
PAIRS = ("gqa1/w768", "linear/w768", "gqa1/w384", "linear/w384")
STEPS = 200

# What each arm changes, by section.
ARMS: dict[str, dict[str, dict[str, Any]]] = {
  "base": {},
  "base, untrained": {"bld": {"steps": 0}},
  "no fit": {"bld": {"least_squares": False}},
  "no fit, untrained": {"bld": {"least_squares": False, "steps": 0}},
  "truncated, no fit": {"bld": {"init": "truncate", "least_squares": False}},
  "truncated, no fit, untrained": {"bld": {"init": "truncate", "least_squares": False, "steps": 0}},
  "random, no fit": {"bld": {"init": "random", "least_squares": False}},
  "random, no fit, untrained": {"bld": {"init": "random", "least_squares": False, "steps": 0}},
  "paper's loss": {"bld": {"loss": "paper"}},
  "attention as its own target": {"bld": {"attention_target": "attention"}},
  "fp32 activations": {"activations": {"dtype": "float32"}},
  "fp8 activations": {"activations": {"dtype": "float8"}},
  "documents run together": {"activations": {"attention": "fast"}},
  "half the steps": {"bld": {"steps": STEPS // 2}},
  "twice the steps": {"bld": {"steps": 2 * STEPS}},
  "coupled": {"coupled": {"blocks": PAIRS}, "scores": {"granularity": "composed"}},
  "coupled from the start": {
    "coupled": {"blocks": PAIRS, "from_library": False},
    "scores": {"granularity": "composed"},
  },
}


def get_config(arm: str = "base") -> ml_collections.ConfigDict:
  """The config of one of `ARMS`."""
  if arm not in ARMS:
    raise ValueError(f"configs/block_library.py has no arm {arm!r}; known: {', '.join(ARMS)}")
  length = 512
  bld = BLDConfig(steps=STEPS, batch_rows=32, learning_rate=5e-4, warmup_steps=20, dtype="bfloat16")
  left_alone = {str(i): {"attention": (), "ffn": ()} for i in range(30) if i not in LAYERS}
  config = RunConfig(
    name=f"block_library.py:{arm}",
    data=DataConfig(seq_len=length, train_tokens=2_097_152, gkd_tokens=8 * length, heldout_tokens=65_536),
    activations=ActivationsConfig(batch_rows=32),
    space=SpaceConfig(ffn=(0.75, 0.5, 0.25, "linear", "none"), layers=left_alone),
    bld=bld,
    scores=ScoresConfig(granularity="subblocks", batch_rows=32),
    costs=CostsConfig(table="experiments/results/costs_smollm2_135m.json", input_tokens=64, output_tokens=192),
    search=SearchConfig(limits=Limits(max_params_ratio=0.95)),
    coupled=CoupledConfig(bld=bld),
  )
  values = to_config_dict(config)
  for section, changes in ARMS[arm].items():
    values[section].update(changes)
  return values
