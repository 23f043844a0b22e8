"""A Llama-type checkpoint of your own on one H100 (80 GB); README, "Your own checkpoint", has the whole path.

    python -m experiments.run --config=configs/llama.py --config.parent=path/to/checkpoint \
      --config.data.source='texts/*.jsonl.gz' --workdir=runs/mine

It takes 1.1 million tokens of text besides those held out. Not measured yet, neither what it costs nor what it gives;
`--dry_run` gives an estimate. By its arithmetic, parents of up to 2 billion parameters fit: global distillation holds
parent, child and optimiser in fp32. Larger ones, to 8 billion, go as far as the search with
`--stages=data,costs,activations,library,scores,search`.
"""

import ml_collections

from puzzle_jax.bld import BLDConfig
from puzzle_jax.config import (
  ActivationsConfig,
  CostsConfig,
  DataConfig,
  EvaluationConfig,
  RunConfig,
  ScoresConfig,
  SearchConfig,
)
from puzzle_jax.config_files import Add, to_config_dict
from puzzle_jax.gkd import GKDConfig
from puzzle_jax.search import Limits


def get_config() -> ml_collections.ConfigDict:
  steps, rows, length = 200, 4, 1024
  config = RunConfig(
    name="llama.py",
    parent="path/to/checkpoint",
    device="gpu",
    data=DataConfig(
      seq_len=length,
      train_tokens=262_144,
      gkd_tokens=steps * rows * length,
      heldout_tokens=65_536,
      eval_tokens=65_536,
    ),
    activations=ActivationsConfig(batch_rows=8),
    bld=BLDConfig(steps=64, batch_rows=8, learning_rate=2e-4, warmup_steps=8, dtype="bfloat16"),
    scores=ScoresConfig(granularity="subblocks", batch_rows=8, precision="tensorfloat32"),
    costs=CostsConfig(input_tokens=512, output_tokens=128, batches=(1, 8)),
    search=SearchConfig(limits=Limits(min_speedup=1.3), frontier=(1.1, 1.2, 1.4, 1.6, 2.0)),
    gkd=GKDConfig(steps=steps, batch_rows=rows, learning_rate=1e-4, warmup_steps=20, dtype="bfloat16"),
    evaluation=EvaluationConfig(batch_rows=4),
  )
  return to_config_dict(config)


def sweep(add: Add) -> None:
  """Children from a fifth faster to twice as fast."""
  for speedup in (1.2, 1.5, 2.0):
    add({"search.limits.min_speedup": speedup})
