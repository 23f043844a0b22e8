"""Distillation on several devices of one host against one of them, at the same rows a device.

    XLA_FLAGS="--xla_gpu_enable_triton_gemm=false --xla_gpu_enable_latency_hiding_scheduler=true" \\
      python -m experiments.benchmarks.mesh --shapes=llama_8b                                    (two GPUs)
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m experiments.benchmarks.mesh \\
      --shapes=tiny --dtype=float32 --steps=2 --repeats=1 --record=mesh_tiny.json                (to try it)

BLD: all variants of a layer in one step (`experiments.benchmarks.bld`), batches over the axis `data`. GKD: a child of
`--layers` such layers against a parent of as many, weights and optimiser cut over `data`, too. `speedup` is the rate in
tokens/s over one device's; `peak_bytes_so_far` is of the first device since the process began, so it only rises. Writes
experiments/results/mesh_SHAPES.json, which keeps the stages that are not asked for.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from jax.sharding import Mesh

from experiments import RESULTS
from experiments.benchmarks import bld as blocks
from experiments.benchmarks import sides
from puzzle_jax import bld, gkd, memory
from puzzle_jax import mesh as mesh_lib
from puzzle_jax.activations import Batch, where_of
from puzzle_jax.arch import Architecture
from puzzle_jax.costs import jax_timing
from puzzle_jax.data import PackedText
from puzzle_jax.errors import PuzzleError
from puzzle_jax.mesh import MeshConfig
from puzzle_jax.model import decoder
from puzzle_jax.store import read_json, write_json

flags.adopt_module_key_flags(blocks)  # --shapes, --dtype, --steps, --repeats
_LAYERS = flags.DEFINE_integer("layers", 4, "Of parent and child in GKD.")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 0, "In GKD; 0: that of the model that the shapes are of.")
_STAGES = flags.DEFINE_list("stages", ["bld", "gkd"], "What to time.")
_RECORD = flags.DEFINE_string("record", "", "The record; empty: experiments/results/mesh_SHAPES.json.")
_VOCABULARIES = {"llama_8b": 128256, "llama_70b": 128256, "smollm2": 49152, "tiny": 512}


def vocabulary() -> int:
  """Of parent and child in GKD; BLD needs none."""
  return _VOCABULARY.value or _VOCABULARIES[flags.FLAGS.shapes]


def _packed(rows: int, tokens: int, vocabulary: int) -> PackedText:
  """Rows of one document each."""
  found = np.random.default_rng(2).integers(vocabulary, size=(rows, tokens), dtype=np.int32)
  return PackedText(found, np.ones_like(found), np.broadcast_to(np.arange(tokens, dtype=np.int32), found.shape))


def run_bld(mesh: Mesh) -> Callable[[], Any]:
  """A step of BLD; each call does one and returns what it leaves."""
  config, space, (rows, tokens) = blocks.layer_space(flags.FLAGS.shapes)
  rows *= mesh.size
  settings = bld.BLDConfig(dtype=flags.FLAGS.dtype, steps=1000)
  parent, variants = jax.tree.map(lambda w: w[None], blocks.random_weights(config, space))  # one layer
  jobs = tuple(job for job in bld.decoupled(space) if job.name in variants)
  trained = mesh_lib.place_layers(mesh, bld.split({job.name: {job.replaced[0]: variants[job.name]} for job in jobs}))
  state = [trained, mesh_lib.place_layers(mesh, mesh_lib.fetch(bld.init_states(settings, trained)))]
  on_mesh, scale = mesh_lib.place_layers(mesh, parent), mesh_lib.place_layers(mesh, (np.ones(1, np.float32),) * 2)
  x = mesh_lib.place(mesh, blocks.random_input(config, (rows, tokens))[None], mesh_lib.rows_of_layers(mesh, 1, rows))
  batch = Batch(x, *where_of(config, _packed(rows, tokens, config.vocab_size), mesh, one_document=True))
  run = memory.Step(space.parent, jobs, config, settings)

  def step() -> Any:
    state[0], state[1], _ = run(on_mesh, state[0], state[1], batch, scale)
    return state

  return step


def run_gkd(mesh: Mesh) -> Callable[[], Any]:
  """The same of GKD; no device holds more than its share of the weights."""
  config, space, (rows, tokens) = blocks.layer_space(flags.FLAGS.shapes)
  config = dataclasses.replace(config, vocab_size=vocabulary())
  model = Architecture(config, (space.parent,) * _LAYERS.value)
  settings = gkd.GKDConfig(steps=1000, warmup_steps=0, dtype=flags.FLAGS.dtype, attention="fast")
  layer = {s.slot: blocks.draw(s.tensors(config)) for s in space.parent.subblocks}
  weights = blocks.draw(model.head_tensors()) | {"layers": [layer] * _LAYERS.value}
  parent = mesh_lib.shard_state(mesh, decoder.stacked(model, weights))
  state = [gkd.State.first(jax.tree.map(lambda w: 0.9 * w, parent), settings, mesh)]
  batch = gkd.on_mesh(mesh, _packed(rows * mesh.size, tokens, config.vocab_size))

  def step() -> Any:
    state[0] = gkd.train_step(state[0], batch, parent, child=model, parent=model, config=settings, mesh=mesh)
    return state[0]

  return step


def measured(make: Callable[[Mesh], Callable[[], Any]], devices: int) -> dict[str, Any]:
  """Seconds of a step and tokens/s on so many devices, and the first one's peak."""
  _, _, (rows, tokens) = blocks.layer_space(flags.FLAGS.shapes)
  step, last = make(mesh_lib.build(MeshConfig(data=devices))), list[Any]()

  def keep() -> None:
    last[:] = [step()]

  steps, repeats = flags.FLAGS.steps, flags.FLAGS.repeats
  seconds = sides.fastest(keep, lambda: jax.block_until_ready(last), steps=steps, repeats=repeats)
  return {
    "devices": devices,
    "seconds": seconds,
    "tokens_per_s": devices * rows * tokens / seconds,
    "peak_bytes_so_far": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
  }


def described(stage: str) -> dict[str, Any]:
  """All that decides about a stage's figures."""
  rows, tokens = blocks.SHAPES[flags.FLAGS.shapes]["batch"]
  names = ("shapes", "dtype", "steps", "repeats", *(["layers"] if stage == "gkd" else []))
  given = [f"--{name}={flags.FLAGS[name].value}" for name in names]
  given += [f"--vocabulary={vocabulary()}"] if stage == "gkd" else []
  return {
    "command": f"python -m experiments.benchmarks.mesh --stages={stage} {' '.join(given)}",
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    "date": time.strftime("%F"),
    "hardware": jax_timing.hardware(),
    "versions": jax_timing.versions(),
    "rows_per_device": rows,
    "tokens_per_row": tokens,
  }


def main(argv: list[str]) -> None:
  del argv
  devices = jax.device_count()
  if devices < 2:
    raise PuzzleError(f"there is {devices} device; two or more are compared with one")
  makers = {"bld": run_bld, "gkd": run_gkd}
  path = Path(_RECORD.value or RESULTS / f"mesh_{flags.FLAGS.shapes}.json")
  record = read_json(path) if path.exists() else {}
  for name in _STAGES.value:
    one, several = (measured(makers[name], count) for count in (1, devices))
    speedup = several["tokens_per_s"] / one["tokens_per_s"]
    record[name] = described(name) | {"one": one, "several": several, "speedup": speedup}
    print(f"{name}: {speedup:.2f} times the rate of one device on {devices}")
    write_json(path, record)


if __name__ == "__main__":
  app.run(main)
