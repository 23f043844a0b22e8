"""Distillation on several devices of one host against one of them, at the same rows a device.

    python -m experiments.benchmarks.mesh --shapes=llama_8b                                     (two GPUs)
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python -m experiments.benchmarks.mesh \\
      --shapes=tiny --dtype=float32 --steps=2 --repeats=1                                       (to try it)

BLD: all variants of a layer in one step (`experiments.benchmarks.bld`), batches over the axis `data`. GKD: a child of
`--layers` such layers against a parent of as many, weights and optimiser cut over `data`, too. `speedup` is the rate in
tokens/s over one device's. Writes experiments/results/mesh_SHAPES.json.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
from puzzle_jax.data import PackedText
from puzzle_jax.errors import PuzzleError
from puzzle_jax.mesh import MeshConfig
from puzzle_jax.model import decoder
from puzzle_jax.store import write_json

flags.adopt_module_key_flags(blocks)  # --shapes, --dtype, --steps, --repeats
_LAYERS = flags.DEFINE_integer("layers", 2, "Of parent and child in GKD.")
_STAGES = flags.DEFINE_list("stages", ["bld", "gkd"], "What to time.")
_RECORD = flags.DEFINE_string("record", "", "The record; empty: experiments/results/mesh_SHAPES.json.")


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
  """The same of GKD."""
  config, space, (rows, tokens) = blocks.layer_space(flags.FLAGS.shapes)
  model = Architecture(config, (space.parent,) * _LAYERS.value)
  settings = gkd.GKDConfig(steps=1000, warmup_steps=0, dtype=flags.FLAGS.dtype, attention="fast")
  layer, _ = blocks.random_weights(config, space)
  table = np.random.default_rng(3).standard_normal((config.vocab_size, config.hidden_size), np.float32)
  weights = {"embed": table, "head": table, "norm": np.ones(config.hidden_size, np.float32), "layers": []}
  stacked = decoder.stacked(model, jax.tree.map(jnp.asarray, weights | {"layers": [layer] * _LAYERS.value}))
  state = [gkd.State.first(jax.tree.map(lambda w: 0.9 * w, stacked), settings).on(mesh)]
  parent = mesh_lib.shard_state(mesh, stacked)
  batch = gkd.on_mesh(mesh, _packed(rows * mesh.size, tokens, config.vocab_size))

  def step() -> Any:
    state[0] = gkd.train_step(state[0], batch, parent, child=model, parent=model, config=settings, mesh=mesh)
    return state[0]

  return step


def measured(make: Callable[[Mesh], Callable[[], Any]], devices: int) -> dict[str, float]:
  """Seconds of a step and tokens/s on so many devices."""
  _, _, (rows, tokens) = blocks.layer_space(flags.FLAGS.shapes)
  step, last = make(mesh_lib.build(MeshConfig(data=devices))), list[Any]()

  def keep() -> None:
    last[:] = [step()]

  steps, repeats = flags.FLAGS.steps, flags.FLAGS.repeats
  seconds = sides.fastest(keep, lambda: jax.block_until_ready(last), steps=steps, repeats=repeats)
  return {"devices": devices, "seconds": seconds, "tokens_per_s": devices * rows * tokens / seconds}


def main(argv: list[str]) -> None:
  del argv
  devices = jax.device_count()
  if devices < 2:
    raise PuzzleError(f"there is {devices} device; two or more are compared with one")
  makers = {"bld": run_bld, "gkd": run_gkd}
  record: dict[str, Any] = {
    "command": "python -m experiments.benchmarks.mesh " + " ".join(sys.argv[1:]),
    "date": time.strftime("%F"),
    **sides.of_device(),
    "rows_per_device": blocks.SHAPES[flags.FLAGS.shapes]["batch"][0],
    "tokens_per_row": blocks.SHAPES[flags.FLAGS.shapes]["batch"][1],
    "dtype": flags.FLAGS.dtype,
    "layers": _LAYERS.value,
  }
  for name in _STAGES.value:
    one, several = (measured(makers[name], count) for count in (1, devices))
    record[name] = {"one": one, "several": several, "speedup": several["tokens_per_s"] / one["tokens_per_s"]}
    print(f"{name}: {record[name]['speedup']:.2f} times the rate of one device on {devices}")
    write_json(Path(_RECORD.value or RESULTS / f"mesh_{flags.FLAGS.shapes}.json"), record)


if __name__ == "__main__":
  app.run(main)
