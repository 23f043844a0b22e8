"""What stages need by arithmetic, against the programs and the bytes themselves."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from puzzle_jax import gkd, space
from puzzle_jax.arch import Architecture
from puzzle_jax.config import DataConfig, RunConfig
from puzzle_jax.data import PackedText
from puzzle_jax.gkd import GKDConfig
from puzzle_jax.model import decoder
from puzzle_jax.needs import Need, needs
from puzzle_jax.pipeline import STAGES

CONFIG = RunConfig(
  data=DataConfig(seq_len=24, train_tokens=480, gkd_tokens=480, heldout_tokens=48, eval_tokens=48),
  gkd=GKDConfig(steps=1, batch_rows=8),
)


def of(architecture: Architecture, config: RunConfig) -> dict[str, Need]:
  return dict(
    needs(config, architecture, space.build(architecture, attention=("none",), ffn=(0.5, "none"), ffn_multiple=8))
  )


def test_every_stage_is_known(architecture: Callable[..., Architecture]) -> None:
  assert of(architecture("gqa2/w64"), CONFIG).keys() == {stage.name for stage in STAGES}


def test_a_step_of_global_distillation(
  model: Callable[..., Any], packed: PackedText, matmul_flops: Callable[..., int]
) -> None:
  """The need counts causal attention as half; the program computes all of it: contexts of 24 instead of 12."""
  architecture, params = model("gqa2/w64")
  state = gkd.State(
    decoder.stacked(architecture, params),
    CONFIG.gkd.optimizer().init(decoder.stacked(architecture, params)),
    jnp.zeros((), jnp.int32),
    jnp.zeros((1, len(gkd.METRICS))),
  )
  program = jax.make_jaxpr(
    lambda s, p: gkd.train_step.__wrapped__(s, packed, p, child=architecture, parent=architecture, config=CONFIG.gkd)
  )(state, decoder.stacked(architecture, params))
  full = matmul_flops(program.jaxpr) / of(architecture, CONFIG)["gkd"].flops
  assert 0.9 < full < 1.3

  weights = sum(x.nbytes for x in jax.tree.leaves((state.params, state.optimizer, params)))
  assert weights < of(architecture, CONFIG)["gkd"].memory_bytes < 4 * weights


def test_what_a_need_grows_with(architecture: Callable[..., Architecture]) -> None:
  base = of(architecture("gqa2/w64", "gqa2/w64"), CONFIG)
  deeper = of(architecture(*["gqa2/w64"] * 4), CONFIG)
  assert deeper["library"].flops == 2 * base["library"].flops
  assert deeper["library"].disk_bytes == 2 * base["library"].disk_bytes
  assert deeper["library"].memory_bytes == base["library"].memory_bytes  # one layer at a time
  assert deeper["scores"].flops > 2 * base["scores"].flops
  longer = of(
    architecture("gqa2/w64", "gqa2/w64"), dataclasses.replace(CONFIG, gkd=dataclasses.replace(CONFIG.gkd, steps=3))
  )
  assert longer["gkd"].flops == pytest.approx(3 * base["gkd"].flops)
  assert {name for name in base if base[name] != longer[name]} == {"gkd"}
