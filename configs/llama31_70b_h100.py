"""Llama-3.1-70B-Instruct in the paper's settings on H100s, to a child 2.17 times as fast: see `experiments.plan`.

    python -m experiments.plan --config=configs/llama31_70b_h100.py --devices=64

By that plan the library takes 51 hours on 64 H100s and global distillation, which fills them (64 GiB each at sequences
of 8,192 tokens), three weeks. Never run at this size.
"""

import ml_collections

from puzzle_jax import paper
from puzzle_jax.config import SpaceConfig
from puzzle_jax.config_files import to_config_dict


def get_config() -> ml_collections.ConfigDict:
  config = paper.run(
    "llama31_70b_h100.py",
    parent="meta-llama/Llama-3.1-70B-Instruct",
    space=SpaceConfig(),
    gkd_tokens=45_000_000_000,
    gkd_rows=32,
    min_speedup=2.17,
    window_tokens=2**27,
  )
  return to_config_dict(config)
