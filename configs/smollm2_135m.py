"""SmolLM2-135M-Instruct, the parent that `make quickstart` brings along, on the machine at hand.

    python -m experiments.run --config=configs/smollm2_135m.py:quickstart --workdir=runs/quickstart

`quickstart` (two CPU cores, under 15 minutes, under 8 GiB): a reduced space, subblock scores, a few thousand tokens.

`compare` (one H100, ten minutes up to the search): the full space of 36 blocks a layer, scored in pairs on 65,536
tokens, for the comparisons of docs/search.md. It needs more text than the built-in and a cost table:

    python -m experiments.run --config=configs/smollm2_135m.py:compare --config.data.source=TEXT.jsonl.gz \
      --workdir=runs/compare --stages=data,costs,activations,library,scores,search
    python -m experiments.interactions --workdir=runs/compare
    python -m experiments.compare --workdir=runs/compare --name=compare

`library` (one H100): the full space distilled on 20 M tokens, 2 M different ones ten times, and scored in pairs:

    python -m experiments.run --config=configs/smollm2_135m.py:library --config.data.source=TEXT.jsonl.gz \
      --workdir=runs/library --stages=data,costs,activations,library,scores,search

The cost table was measured on two CPU cores, where children are fast by having few weights:

    python -m experiments.run --config=configs/smollm2_135m.py:compare --config.costs.table= --config.device=any \
      --workdir=runs/costs --stages=costs

`python -m experiments.sweep` with either makes a child for each of several speeds.
"""

import dataclasses

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
  SpaceConfig,
)
from puzzle_jax.config_files import Add, choose
from puzzle_jax.costs.jax_timing import TimingConfig
from puzzle_jax.gkd import GKDConfig
from puzzle_jax.search import Limits

PROMPTS = (
  "What is the capital of France?",
  "Explain what a list is in Python, in two sentences.",
  "Write a short sentence about the sea.",
)


def _quickstart() -> RunConfig:
  steps, rows, length = 64, 2, 256
  return RunConfig(
    name="smollm2_135m.py:quickstart",
    data=DataConfig(
      seq_len=length,
      train_tokens=16_384,
      gkd_tokens=steps * rows * length,
      heldout_tokens=1_024,
      eval_tokens=4_096,
    ),
    space=SpaceConfig(attention=("linear", "none"), ffn=(0.75, 0.5, 0.25, "linear", "none"), ffn_multiple=128),
    bld=BLDConfig(steps=8, batch_rows=4, learning_rate=5e-4, warmup_steps=2),
    scores=ScoresConfig(granularity="subblocks"),
    costs=CostsConfig(input_tokens=64, output_tokens=192, timing=TimingConfig(layers=30, rounds=10)),
    search=SearchConfig(limits=Limits(min_speedup=1.2), margin=0.05, frontier=(1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0)),
    gkd=GKDConfig(steps=steps, batch_rows=rows, learning_rate=2e-4, warmup_steps=6, checkpoint_steps=32),
    evaluation=EvaluationConfig(prompts=PROMPTS),
  )


def _compare() -> RunConfig:
  steps, rows, length = 200, 8, 512
  return RunConfig(
    name="smollm2_135m.py:compare",
    device="gpu",
    data=DataConfig(
      seq_len=length,
      train_tokens=262_144,
      gkd_tokens=steps * rows * length,
      heldout_tokens=65_536,
      eval_tokens=65_536,
    ),
    activations=ActivationsConfig(batch_rows=32),
    space=SpaceConfig(),
    bld=BLDConfig(steps=64, batch_rows=16, learning_rate=5e-4, warmup_steps=8),
    scores=ScoresConfig(batch_rows=32, precision="tensorfloat32"),
    costs=CostsConfig(
      table="experiments/results/costs_smollm2_135m.json",
      hardware="2 cores of AMD EPYC",
      input_tokens=64,
      output_tokens=192,
      timing=TimingConfig(layers=30, rounds=10),
    ),
    search=SearchConfig(limits=Limits(min_speedup=1.5)),
    gkd=GKDConfig(steps=steps, batch_rows=rows, learning_rate=2e-4, warmup_steps=20),
    evaluation=EvaluationConfig(batch_rows=16),
  )


def _library() -> RunConfig:
  compare = _compare()
  return dataclasses.replace(
    compare,
    name="smollm2_135m.py:library",
    data=dataclasses.replace(compare.data, train_tokens=1_966_080, gkd_tokens=16_384),
    bld=BLDConfig(
      fit_tokens=262_144, steps=1_221, batch_rows=32, learning_rate=5e-4, warmup_steps=50, dtype="bfloat16"
    ),
    scores=dataclasses.replace(compare.scores, batch_rows=128),
  )


VARIANTS = {"quickstart": _quickstart, "compare": _compare, "library": _library}


def get_config(variant: str = "quickstart") -> ml_collections.ConfigDict:
  return choose(VARIANTS, variant)


def sweep(add: Add) -> None:
  """Children from a tenth faster to twice as fast: all stages before the search are made once and shared."""
  for speedup in (1.1, 1.25, 1.5, 2.0):
    add({"search.limits.min_speedup": speedup})
