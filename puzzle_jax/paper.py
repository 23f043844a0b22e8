"""The paper's settings of a run, where it names them (configs/llama31_8b_h100.py and its siblings).

The paper's: the space of 54 blocks a layer, 1.0 B tokens of blockwise distillation, composed KL scores, global
distillation with cosine and KL on 8K sequences. Ours, since the paper does not say: rows of a batch, learning rates,
held-out tokens.
"""

from puzzle_jax.bld import BLDConfig
from puzzle_jax.config import (
  CostsConfig,
  DataConfig,
  EvaluationConfig,
  RunConfig,
  ScoresConfig,
  SearchConfig,
  SpaceConfig,
)
from puzzle_jax.costs.jax_timing import TimingConfig
from puzzle_jax.gkd import GKDConfig
from puzzle_jax.rolling import ActivationsConfig
from puzzle_jax.search import Limits

BLD_TOKENS = 1_000_000_000
_ROWS, _TOKENS = 8, 8192


def run(
  name: str, *, parent: str, space: SpaceConfig, gkd_tokens: int, gkd_rows: int, min_speedup: float, window_tokens: int
) -> RunConfig:
  """A run of the full size; rounded down to whole batches.

  Args:
    name: of the config.
    parent: a directory or hub id.
    space: of the search.
    gkd_tokens: of global distillation.
    gkd_rows: of its batch, of 8,192 tokens each.
    min_speedup: that the child must reach, at 2,048 tokens in and as many out.
    window_tokens: of training activations that lie on the disk at once.
  """
  bld_steps, gkd_steps = BLD_TOKENS // (_ROWS * _TOKENS), gkd_tokens // (gkd_rows * _TOKENS)
  heldout = _ROWS * _TOKENS
  return RunConfig(
    name=name,
    parent=parent,
    device="gpu",
    data=DataConfig(
      source="texts/*.jsonl.gz",
      heldout_fraction=0.01,
      seq_len=_TOKENS,
      train_tokens=bld_steps * _ROWS * _TOKENS,
      gkd_tokens=gkd_steps * gkd_rows * _TOKENS,
      heldout_tokens=heldout,
      eval_tokens=16 * heldout,
    ),
    activations=ActivationsConfig(batch_rows=_ROWS, attention="fast", window_tokens=window_tokens, tier="disk"),
    space=space,
    bld=BLDConfig(
      attention_target="block",
      steps=bld_steps,
      batch_rows=_ROWS,
      learning_rate=1e-4,
      warmup_steps=500,
      dtype="bfloat16",
    ),
    scores=ScoresConfig(batch_rows=_ROWS, precision="tensorfloat32"),
    costs=CostsConfig(input_tokens=2048, output_tokens=2048, batches=(1, 4), timing=TimingConfig(layers=4)),
    search=SearchConfig(limits=Limits(min_speedup=min_speedup), frontier=(1.25, 1.5, 2.0, 2.5)),
    gkd=GKDConfig(
      steps=gkd_steps,
      batch_rows=gkd_rows,
      learning_rate=5e-5,
      warmup_steps=500,
      checkpoint_steps=200,
      dtype="bfloat16",
      attention="fast",
    ),
    evaluation=EvaluationConfig(batch_rows=1),
  )
