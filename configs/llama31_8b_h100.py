"""Llama-3.1-8B-Instruct in the paper's settings on H100s: what it needs, `experiments.plan` says.

    python -m experiments.plan --config=configs/llama31_8b_h100.py --devices=8

Global distillation takes 5 B tokens: a few billion recover most (paper section 6). By that plan 40 hours on eight
H100s, the library 15 of them; all of it fits. Never run at this size.
"""

import ml_collections

from puzzle_jax import paper
from puzzle_jax.config import SpaceConfig
from puzzle_jax.config_files import to_config_dict


def get_config() -> ml_collections.ConfigDict:
  config = paper.run(
    "llama31_8b_h100.py",
    parent="meta-llama/Llama-3.1-8B-Instruct",
    space=SpaceConfig(),
    gkd_tokens=5_000_000_000,
    gkd_rows=8,
    min_speedup=1.7,
    window_tokens=2**28,
  )
  return to_config_dict(config)
