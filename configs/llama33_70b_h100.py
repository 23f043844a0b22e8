"""Llama-3.3-70B-Instruct on H100s, with the space of the paper's later models, which every engine runs.

    python -m experiments.plan --config=configs/llama33_70b_h100.py --devices=64

The parent's attention or none, times FFN widths (paper section 7). By that plan the library takes 36 hours on 64 H100s,
global distillation as long as Llama-3.1-70B's. Never run at this size.
"""

import ml_collections

from puzzle_jax import paper
from puzzle_jax.config import SpaceConfig
from puzzle_jax.config_files import to_config_dict


def get_config() -> ml_collections.ConfigDict:
  config = paper.run(
    "llama33_70b_h100.py",
    parent="meta-llama/Llama-3.3-70B-Instruct",
    space=SpaceConfig(attention=("none",), ffn=(0.87, 0.75, 0.5, 0.25, 0.2, 0.1, "none"), ffn_multiple=256),
    gkd_tokens=45_000_000_000,
    gkd_rows=32,
    min_speedup=2.17,
    window_tokens=2**27,
  )
  return to_config_dict(config)
