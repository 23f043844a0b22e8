"""A random four-layer parent through all stages in under a minute: for tests, and to see what a run looks like.

python -m experiments.tiny_parent --out=runs/tiny_parent
python -m experiments.run --config=configs/tiny.py --config.parent=runs/tiny_parent --workdir=runs/tiny
"""

import ml_collections

from puzzle_jax.bld import BLDConfig
from puzzle_jax.config import CostsConfig, DataConfig, EvaluationConfig, RunConfig, SearchConfig, SpaceConfig
from puzzle_jax.config_files import to_config_dict
from puzzle_jax.costs.jax_timing import TimingConfig
from puzzle_jax.gkd import GKDConfig
from puzzle_jax.search import Limits


def get_config() -> ml_collections.ConfigDict:
  config = RunConfig(
    name="tiny.py",
    parent="runs/tiny_parent",
    data=DataConfig(seq_len=32, train_tokens=512, gkd_tokens=256, heldout_tokens=256, eval_tokens=256),
    space=SpaceConfig(attention=("gqa", "linear", "none"), ffn=(0.5, "linear", "none"), ffn_multiple=8),
    bld=BLDConfig(steps=6, batch_rows=4, learning_rate=1e-3, warmup_steps=2),
    costs=CostsConfig(input_tokens=32, output_tokens=32, timing=TimingConfig(layers=4, rounds=2, decode_steps=4)),
    search=SearchConfig(limits=Limits(max_params_ratio=0.75)),
    gkd=GKDConfig(steps=6, batch_rows=2, learning_rate=5e-5, warmup_steps=2, checkpoint_steps=2),
    evaluation=EvaluationConfig(prompts=("Hello",), max_new_tokens=4),
  )
  return to_config_dict(config)
