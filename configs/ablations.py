"""The paper's ablations at the scale of SmolLM2-135M, one choice changed at a time; run all by

    python -m experiments.ablations --workdir=runs/ablations --change.data.source=TEXT.jsonl.gz

`base` is the default of every choice: a library of 3.3 M tokens a layer, a child of 1.5 times the parent's speed by the
mixed-integer program, 4.1 M tokens of global distillation (cosine + KL). An arm that changes global distillation alone
starts from the base's child, one that changes the search from its scores, and so on.
"""

import dataclasses
import functools
from typing import Any

import ml_collections

from puzzle_jax.bld import BLDConfig, CoupledConfig
from puzzle_jax.config import CostsConfig, DataConfig, RunConfig, ScoresConfig, SearchConfig, SpaceConfig
from puzzle_jax.config_files import choose
from puzzle_jax.data.sampling import PARENT, SamplingConfig
from puzzle_jax.gkd import GKDConfig
from puzzle_jax.rolling import ActivationsConfig
from puzzle_jax.search import Limits

BASE = "base"
TEXT = "texts/openstax_ccby.jsonl.gz"  # stands for --change.data.source in the arms that name sources
STEPS = 400
BLD = BLDConfig(
  steps=STEPS,
  batch_rows=16,
  learning_rate=2e-3,
  learning_rates=("attention.gqa*=5e-3",),
  warmup_steps=20,
  dtype="bfloat16",
)


def _mix(*, cosine: float = 0.0, kl: float = 0.0, lm: float = 0.0, **others: Any) -> dict[str, dict[str, Any]]:
  return {"gkd": {"cosine_weight": cosine, "kl_weight": kl, "lm_weight": lm, **others}}


# What each arm changes, by section.
ARMS: dict[str, dict[str, dict[str, Any]]] = {
  BASE: {},
  # The eight mixes of the paper's table; the base is cosine + KL.
  "gkd_none": {"gkd": {"steps": 0}},
  "gkd_lm": _mix(lm=1.0),
  "gkd_kl": _mix(kl=1.0),
  "gkd_cosine": _mix(cosine=1.0),
  "gkd_lm_cosine": _mix(lm=1.0, cosine=1.0),
  "gkd_lm_kl": _mix(lm=1.0, kl=1.0),
  "gkd_lm_cosine_kl": _mix(lm=1.0, cosine=1.0, kl=1.0),
  # Of the KL, and of how the parent answers.
  "kl_temperature_2": {"gkd": {"kl_temperature": 2.0}},
  "kl_top_64": _mix(kl=1.0, kl_top_k=64),
  "kl_top_64_cached": _mix(kl=1.0, kl_top_k=64, teacher="cached"),
  "attention_fast": {"gkd": {"attention": "fast"}},
  # The library.
  "random_start": {"gkd": {"start": "random"}},
  "bld_none": {"bld": {"steps": 0}},
  "bld_quarter": {"bld": {"steps": STEPS // 4}},
  "bld_half": {"bld": {"steps": STEPS // 2}},
  "coupled": {"coupled": {"solutions": 2}},
  # Scores and search.
  "scores_lm_loss": {"scores": {"metric": "lm_loss"}},
  "search_greedy": {"search": {"rule": "greedy"}},
  "search_noop_only": {"search": {"rule": "noop_only"}},
  "search_uniform": {"search": {"rule": "uniform"}},
  "search_most_parameters": {"search": {"rule": "most_parameters"}},
  "search_random": {"search": {"rule": "random_feasible"}},
  # The data of all stages, at equal tokens.
  "data_parent": {"data": {"source": PARENT}},
  "data_mix": {"data": {"source": f"{TEXT},{PARENT}"}},
}
# How often an arm is run, each time with another order of rows (and another child, where it is drawn); 1 elsewhere.
SEEDS = {
  BASE: 3,
  "gkd_kl": 2,
  "gkd_lm_cosine_kl": 2,
  "kl_top_64": 2,
  "kl_top_64_cached": 2,
  "search_random": 3,
  "data_parent": 2,
  "data_mix": 2,
}
# What an arm is held against, where that is not the base.
AGAINST = {"kl_top_64": "gkd_kl", "kl_top_64_cached": "kl_top_64"}


def _arm(name: str) -> RunConfig:
  length, rows, steps = 512, 32, 250
  config = RunConfig(
    name=f"ablations.py:{name}",
    device="gpu",
    data=DataConfig(
      source=TEXT,
      seq_len=length,
      train_tokens=786_432,
      gkd_tokens=1_048_576,
      heldout_tokens=65_536,
      eval_tokens=98_304,
      sampling=SamplingConfig(prompts="configs/openings.jsonl", batch_rows=256, dtype="bfloat16"),
    ),
    activations=ActivationsConfig(batch_rows=32),
    space=SpaceConfig(ffn=(0.75, 0.5, 0.25, "linear", "none")),
    bld=BLD,
    scores=ScoresConfig(granularity="subblocks", batch_rows=32, precision="tensorfloat32"),
    costs=CostsConfig(
      table="experiments/results/costs_smollm2_135m.json",
      hardware="2 cores of AMD EPYC",
      input_tokens=64,
      output_tokens=192,
    ),
    search=SearchConfig(limits=Limits(min_speedup=1.5)),
    coupled=CoupledConfig(bld=BLD),
    gkd=GKDConfig(
      steps=steps,
      batch_rows=rows,
      learning_rate=5e-4,
      warmup_steps=25,
      checkpoint_steps=10 * steps,  # an arm is a minute: done again, if it is killed
      dtype="bfloat16",
      remat=False,
    ),
  )
  changes = {section: dataclasses.replace(getattr(config, section), **fields) for section, fields in ARMS[name].items()}
  return dataclasses.replace(config, **changes)


VARIANTS = {name: functools.partial(_arm, name) for name in ARMS}


def get_config(arm: str = BASE) -> ml_collections.ConfigDict:
  return choose(VARIANTS, arm)
