"""Jobs planned on paper: arithmetic against numbers made by hand, and against what the compiler finds."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments import tiny_parent
from puzzle_jax import abstract, bld, chips, forecast, memory, rates, schedule, space
from puzzle_jax.arch import Architecture
from puzzle_jax.bld import BLDConfig
from puzzle_jax.chips import Chip
from puzzle_jax.config import DataConfig, RunConfig
from puzzle_jax.errors import PuzzleError
from puzzle_jax.gkd import GKDConfig
from puzzle_jax.mesh import MeshConfig
from puzzle_jax.needs import gkd_bytes, needs, scores_bytes
from puzzle_jax.parents.known import architecture_of
from puzzle_jax.planned import Job
from puzzle_jax.rolling import ActivationsConfig

CHIP = Chip(
  name="H100",
  tpu="",
  memory_bytes=2e6,
  flops_per_s=dict.fromkeys(chips.PRECISIONS, 1e6),
  memory_bytes_per_s=1e9,
  link_bytes_per_s=1e6,
  network_bytes_per_s=1e5,
  per_host=4,
  dollars_per_hour=2.0,
)
CONFIG = RunConfig(
  data=DataConfig(seq_len=16, train_tokens=1024, gkd_tokens=1024, heldout_tokens=64, eval_tokens=64),
  activations=ActivationsConfig(attention="fast", tier="disk"),
  bld=BLDConfig(attention_target="block", steps=16, batch_rows=4, least_squares=False, dtype="bfloat16"),
  gkd=GKDConfig(steps=8, batch_rows=4),
)


@pytest.fixture
def job(architecture: Callable[..., Architecture], tmp_path: Path) -> Job:
  """Four layers of gqa2/w64 at hidden size 32; the variants are linear attention and half of the FFN."""
  parent = architecture(*["gqa2/w64"] * 4)
  variants = space.build(parent, attention=("linear",), ffn=(0.5,), ffn_multiple=8)
  return Job(
    CONFIG, parent, variants, CHIP, 8, host_bytes=1e9, storage_bytes_per_s=1e6, disk_bytes=1e9, records=tmp_path
  )


def record(folder: Path, name: str, *, hardware: str, rate: float, per_token: int) -> None:
  side = {"hardware": hardware, "flops_per_s": rate, "needed_flops_per_token": per_token}
  sides = {"jax": side | {"compiled_bytes": 30, "planned_bytes": 20}, "jax_attention": side | {"flops_per_s": rate / 2}}
  (folder / f"bld_{name}.json").write_text(json.dumps(sides))


# Of a layer by hand: q and o 32 x 32, k and v 16 x 32, three FFN matrices of 64 x 32, attention to 8 tokens.
FORWARD = 2 * (2 * 32 * 32 + 2 * 16 * 32) + 4 * 32 * 8 + 2 * 3 * 64 * 32
# The parent once; linear attention forward and its gradient, the frozen FFN behind it forward and back; half of an FFN.
STEP = FORWARD + 2 * 2 * 32 * 32 + 2 * 2 * 3 * 64 * 32 + 14 * 32 * 32
TRAINED = 4 * (32 * 32 + 32 + 3 * 32 * 32 + 32)  # bytes, norms included
BATCH = 4 * 16 * 32 * 2  # of what a layer reads, bf16


def test_a_step_s_flops_by_hand(job: Job) -> None:
  assert job.step_flops_per_token == STEP


def test_the_library_by_hand(job: Job) -> None:
  """Memory for activations: products alone. On disk: a batch is read a step, and each is written and read once more."""
  fit = job.needs["library"].flops - 1024 * 4 * FORWARD - 16 * 64 * 4 * STEP
  training, forward = 4 * 16 * 64 * STEP / 1e6, 1024 * 4 * FORWARD / 1e6
  one = schedule.library(job, MeshConfig(), windows=1, tier="host")
  assert one.seconds == pytest.approx(training + forward + fit / 1e6)
  assert one.disk_bytes == 4 * TRAINED
  assert one.rate is not None
  assert one.rate.basis == "roofline"

  two = schedule.library(job, MeshConfig(layer=2), windows=1, tier="host")  # half of the turns, all of the forward pass
  assert two.seconds == pytest.approx(training / 2 + forward + fit / 1e6)

  summed = 2 * TRAINED / 2 / 1e6  # of gradients over two devices: sent once each way
  split = schedule.library(job, MeshConfig(data=2), windows=1, tier="host")
  assert split.seconds == pytest.approx((training + forward + fit / 1e6) / 2 + 4 * 16 * summed)

  slow = schedule.library(dataclasses.replace(job, storage_bytes_per_s=1e3), MeshConfig(), windows=1, tier="disk")
  assert slow.seconds == pytest.approx(4 * 16 * BATCH / 1e3 + 2 * 4 * 16 * BATCH / 1e3 + fit / 1e6)
  assert slow.disk_bytes == 4 * TRAINED + 2 * 16 * BATCH  # the layer's input and the next one's


def test_windows_save_activations_and_cost_states(job: Job) -> None:
  rows = schedule.windows_table(job, MeshConfig(layer=3))
  assert [w.windows for w in rows] == [1, 4, 16, 64, 256]
  assert [w.tokens for w in rows] == [1024, 256, 64, 64, 64]  # a batch at least
  assert [w.activation_bytes for w in rows[:3]] == [4 * 16 * BATCH, 4 * 4 * BATCH, 4 * BATCH]
  states = 5 * 4 * TRAINED
  assert [w.state_bytes for w in rows[:2]] == [0, states]
  assert rows[1].seconds - rows[0].seconds == pytest.approx(3 * 2 * states / 1e6)
  config = dataclasses.replace(CONFIG, activations=dataclasses.replace(CONFIG.activations, window_tokens=256))
  assert needs(config, job.parent, job.space)["library"].disk_bytes == pytest.approx(
    4 * TRAINED + states + 2 * 4 * BATCH  # one layer at a time
  )


def test_the_library_s_split_ends_first_of_all(job: Job) -> None:
  best = schedule.best_library(job)
  meshes = [MeshConfig(data=d, layer=g) for d in (1, 2, 4) for g in (1, 2, 3, 4) if d * g <= 8]
  every = [schedule.library(job, m, windows=w, tier="host").seconds or 0 for m in meshes for w in (1, 2, 4, 8, 16)]
  assert best.seconds == pytest.approx(min(every))
  assert best.mesh.devices <= 8
  assert (best.tier, best.windows) == ("host", 1)


def test_a_small_disk_and_small_hosts_make_windows(job: Job) -> None:
  config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, train_tokens=2**14))
  tight = dataclasses.replace(job, config=config, host_bytes=1.0, disk_bytes=1e6)  # whole: 2.2 MB
  best = schedule.best_library(tight)
  assert (best.tier, best.windows, best.mesh.layer) == ("disk", 8, 2)  # in four, one layer at a time would take longer
  assert best.disk_bytes == 6 * 4 * TRAINED + 3 * 32 * BATCH
  with pytest.raises(PuzzleError, match="raise --disk_tib"):
    schedule.best_library(dataclasses.replace(tight, disk_bytes=1e3))


def test_variants_that_do_not_fit_together_are_trained_in_groups(job: Job) -> None:
  whole = job.groups[4]
  assert (whole.count, whole.fits, len(whole.jobs)) == (1, True, 2)
  smaller = dataclasses.replace(job, chip=dataclasses.replace(CHIP, memory_bytes=(whole.memory_bytes - 4) / 0.9))
  assert (smaller.groups[4].count, smaller.groups[4].fits) == (2, True)
  none = dataclasses.replace(job, chip=dataclasses.replace(CHIP, memory_bytes=1e4))
  assert not schedule.best_library(none).fits


def test_global_distillation(job: Job) -> None:
  params = 4 * job.parent.num_params()
  one = schedule.gkd(job, MeshConfig())
  assert one.memory_bytes == job.needs["gkd"].memory_bytes
  assert one.seconds == pytest.approx(job.needs["gkd"].flops / 1e6)
  flash = dataclasses.replace(CONFIG, gkd=dataclasses.replace(CONFIG.gkd, attention="fast", remat=False))
  row = 16 * 32 * 4  # of the residual stream
  inside = 16 * 4 * (2 * 32 + 2 * 16 + 2 * 64 + 32 + 4 * 16)  # what the matrices put out, and the scores of four heads
  assert one.memory_bytes == 8 * params + 4 * (row * 2 * 4 + inside)
  assert schedule.gkd(job, MeshConfig(data=4, model=2)).memory_bytes == params + row * 2 * 4 + inside / 2
  products = 4 * 16 * 4 * (2 * 32 + 2 * 16 + 2 * 64 + 32)  # no scores; of every block, and where one is computed again
  assert gkd_bytes(flash, job.parent, MeshConfig()) == 8 * params + 4 * (row * 2 * 4 + products) + products
  # On other hosts weights come too slowly: parent, child twice, and gradients, of which three quarters are elsewhere.
  far = dataclasses.replace(job, chip=dataclasses.replace(CHIP, per_host=2, network_bytes_per_s=1e3))
  assert schedule.gkd(far, MeshConfig(data=4)).seconds == pytest.approx(8 * 4 * params * 3 / 4 / 1e3)


def test_what_does_not_fit_says_on_how_many_devices_it_would(job: Job) -> None:
  at_16 = gkd_bytes(CONFIG, job.parent, MeshConfig(data=4, model=4))
  chip = dataclasses.replace(CHIP, memory_bytes=at_16 / 0.9 + 1)
  found = schedule.best_gkd(dataclasses.replace(job, chip=chip))
  assert not found.fits
  assert found.note == "fits on 16 devices"
  with_less = dataclasses.replace(job, chip=dataclasses.replace(chip, memory_bytes=at_16 / 0.9 - 10))
  assert schedule.best_gkd(with_less).note.startswith("fits on no number of devices")


def test_rates(tmp_path: Path) -> None:
  h100, h200, v5e, v5p = (chips.CHIPS[name] for name in ("h100", "h200", "v5e", "v5p"))
  record(tmp_path, "small", hardware="1 x NVIDIA H100 80GB HBM3", rate=100e12, per_token=10)
  record(tmp_path, "large", hardware="1 x NVIDIA H100 80GB HBM3", rate=400e12, per_token=1000)
  record(tmp_path, "tpu", hardware="4 x TPU v5 lite", rate=90e12, per_token=10)

  def found(chip: Chip, per_token: float, target: str = "block") -> rates.Measured | None:
    return rates.measured(tmp_path, chip, attention_target=target, flops_per_token=per_token)

  small, large = found(h100, 90), found(h100, 110)
  assert small is not None
  assert large is not None
  assert (small.name, large.name) == ("bld_small.json", "bld_large.json")
  assert large.compiled_ratio == 1.5
  assert (found(h200, 10), found(v5p, 10)) == (None, None)  # never measured: not by their neighbours' rates
  assert (attention := found(v5e, 10, "attention")) is not None
  assert attention.flops_per_s == 45e12

  measured = rates.of_library(h100, large, dtype="bfloat16")
  assert (measured.basis, measured.flops_per_s) == ("measured", 400e12)
  scaled = rates.of_products(h100, large, "tensorfloat32")
  assert (scaled.basis, scaled.flops_per_s) == ("scaled", pytest.approx(400e12 / 989.4e12 * 494.7e12))
  roofline = rates.of_library(v5p, None, dtype="bfloat16")
  assert (roofline.basis, roofline.flops_per_s) == ("roofline", 459e12)


def test_parents_that_are_known_without_their_files(tmp_path: Path) -> None:
  assert architecture_of("meta-llama/Llama-3.1-8B-Instruct").num_params() == 8_030_261_248  # as published
  large = architecture_of("meta-llama/Llama-3.3-70B-Instruct")
  assert (large.num_params(), large.num_layers) == (70_553_706_496, 80)
  with pytest.raises(PuzzleError, match="is not known here; give a directory"):
    architecture_of("somebody/Llama-9")
  values = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3}
  (tmp_path / "config.json").write_text(json.dumps(values | {"intermediate_size": 4}))
  assert architecture_of(str(tmp_path)).num_layers == 3


def test_a_compiled_step_against_the_arithmetic(job: Job) -> None:
  """Arguments to the byte: weights without norms, gradients' moments, a batch with its rotary tables."""
  jobs, model = bld.decoupled(job.layer), job.parent.config
  sizes = {"rows": 4, "tokens": 16}
  found = abstract.bld_step(job.layer, jobs, model, CONFIG.bld, **sizes, one_document=True, devices=jax.devices("cpu"))
  weights = TRAINED - 4 * 2 * 32
  optimiser = 2 * weights + 2 * 2 * 4  # two moments, and two counts each
  parent = 4 * job.layer.parent.num_params(model)
  batch = 4 * 4 * 16 * (32 + 1 + 2 * 8)  # what is read, whether a token is real, rotary tables
  assert found.arguments == parent + weights + optimiser + batch + 8
  arithmetic = memory.need(job.layer.parent, jobs, model, CONFIG.bld, **sizes).total
  assert abstract.kept_scores(job.layer, jobs, model) == 1  # linear attention has none: the parent's alone
  kept = scores_bytes(job.layer.parent, job.parent, 4, 16)
  assert kept == 4 * 4 * 16 * 16 * 4
  assert 0.6 < found.total / (arithmetic + kept) < 1.7


# In a process of its own: the number of devices is fixed once JAX has begun.
PROGRAM = """
import dataclasses, json, jax
jax.config.update("jax_num_cpu_devices", 4)
from puzzle_jax import abstract
from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig
from puzzle_jax.gkd import GKDConfig
from puzzle_jax.mesh import MeshConfig
model = ModelConfig(vocab_size=64, hidden_size=32, num_heads=4, head_dim=8, max_context=64)
parent, found = Architecture(model, (BlockSpec.parse("gqa2/w64"),) * 4), []
for mesh in (MeshConfig(), MeshConfig(data=2, model=2)):
  step = abstract.gkd_step(parent, GKDConfig(steps=1, batch_rows=4), mesh, tokens=16, devices=jax.devices())
  found.append(dataclasses.asdict(step))
print(json.dumps(found))
"""


def test_global_distillation_compiled(architecture: Callable[..., Architecture]) -> None:
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM],
    cwd=Path(__file__).parents[1],
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
    check=True,
  )
  one, four = json.loads(done.stdout)
  parent = architecture(*["gqa2/w64"] * 4, vocab_size=64)
  weights, norms = 4 * parent.num_params(), 4 * (4 * 2 + 1) * 32
  batch, rest = 3 * 4 * 4 * 16, 4 * (3 + 6)  # token, segment, position; counts and the history
  assert one["arguments"] == 4 * weights + batch + rest  # parent, child, two moments
  assert four["arguments"] == 4 * ((weights - norms) // 4 + norms // 2) + batch // 2 + rest  # norms over data alone
  assert four["temporaries"] < one["temporaries"]
  total = one["arguments"] + one["temporaries"]
  assert 0.4 < total / gkd_bytes(CONFIG, parent, MeshConfig()) < 2.5


def test_the_plan_as_text(job: Job) -> None:
  record(job.records, "x", hardware="1 x NVIDIA H100 80GB HBM3", rate=5e5, per_token=STEP)
  found = forecast.make(job, dollars_per_hour=0, compiled=False)
  text = str(found)
  assert "--stages=library" in text
  assert "measured: this step on this chip" in text
  assert "! gkd does not fit" not in text
  assert "on the chip itself: 1.50 times the arithmetic (bld_x.json)" in text
  tiny = dataclasses.replace(job, chip=dataclasses.replace(CHIP, memory_bytes=1e5))
  assert "! gkd does not fit" in str(forecast.make(tiny, dollars_per_hour=0, compiled=False))
  library = next(s for s in found.to_json()["stages"] if s["name"] == "library")
  assert library["dollars"] == pytest.approx(library["seconds"] * library["devices"] / 3600 * 2.0)


def command(*options: str) -> Any:
  environ = os.environ | {"JAX_PLATFORMS": "cpu"}
  run = [sys.executable, "-m", "experiments.plan", "--json", *options]
  done = subprocess.run(run, cwd=Path(__file__).parents[1], env=environ, capture_output=True, text=True, check=True)
  return json.loads(done.stdout)


def test_the_command_on_a_published_parent() -> None:
  plan = command("--config=configs/llama31_8b_h100.py", "--chip=v5p", "--devices=16", "--nocompile")
  stages = {s["name"]: s for s in plan["stages"]}
  assert plan["parent"]["params"] == 8_030_261_248
  assert stages["library"]["rate"]["basis"] == "roofline"
  # 5 B tokens, forward of the parent, and of the child twice, with its backward pass: about 10 FLOPs a parameter.
  assert stages["gkd"]["flops"] == pytest.approx(5e9 * 10 * 8e9, rel=0.15)
  assert stages["gkd"]["devices"] <= 16


def test_the_command_compiles(tmp_path: Path) -> None:
  tiny_parent.write(tmp_path / "parent")
  parent = f"--config.parent={tmp_path}/parent"
  options = ["--config=configs/tiny.py", parent, "--config.gkd.steps=0", "--config.space.attention=('none',)"]
  (library,) = [s for s in command(*options)["stages"] if s["compiled"]]
  assert library["name"] == "library"
  assert library["compiled"]["backend"] == "cpu"
  assert library["compiled"]["arguments"] < library["memory_bytes"] * 2
