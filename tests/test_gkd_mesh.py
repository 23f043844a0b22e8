"""Global distillation on eight virtual CPU devices: the same losses and child however it is sharded."""

import re
import types
from typing import Any

import eight_devices
import jax
import numpy as np
import pytest

from puzzle_jax import mesh

PROGRAM = """
import gc, json, math, sys
from pathlib import Path
import jax
import numpy as np
from puzzle_jax import gkd, mesh
from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig
from puzzle_jax.data import PackedText
from puzzle_jax.mesh import MeshConfig
from puzzle_jax.model import decoder
from puzzle_jax.progress import Progress

root = Path(sys.argv[1])
model = ModelConfig(vocab_size=64, hidden_size=32, num_heads=4, head_dim=8, max_context=64)
parent = Architecture(model, (BlockSpec.parse("gqa2/w64"),) * 4)
child = Architecture(model, (*(BlockSpec.parse("gqa1/w32"),) * 2, *(BlockSpec.parse("linear/w48"),) * 2))
weights = [decoder.init(a, jax.random.key(i), keep=jax.device_get) for i, a in enumerate((child, parent))]
rng = np.random.default_rng(0)
segments = np.repeat(np.array([[1] * 20 + [2] * 12]), 16, axis=0)
positions = np.repeat(np.array([[*range(20), *range(12)]]), 16, axis=0)
packed = PackedText(*(np.array(x, np.int32) for x in (rng.integers(0, 64, (16, 32)), segments, positions)))

class Stopped(Exception):
  pass

held = []  # bytes on the first device, whenever a layer is read, after each step, and before a layer comes back
def look():
  on = [x for x in jax.live_arrays() if jax.devices()[0] in x.sharding.device_set]
  held.append(sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in on))

def read(params):
  def layers():
    for layer in params["layers"]:
      look()
      yield layer
  return {**params, "layers": layers()}

fetch = mesh.fetch
def looking(tree):
  look()
  return fetch(tree)
mesh.fetch = looking

def train(sizes, name, *, stop_after=0, parent_lies="sharded"):
  gc.collect()  # of the training before
  held.clear()
  config = gkd.GKDConfig(
    steps=4, batch_rows=8, learning_rate=1e-4, warmup_steps=1, ema=0.5, eval_steps=2, checkpoint_steps=2,
    parent=parent_lies,
  )
  def log(step, metrics):
    look()
    if step == stop_after:
      raise Stopped
  params, history = gkd.train(
    (child, read(weights[0])), (parent, read(weights[1])), packed, config=config, heldout=packed.rows(slice(8)),
    folder=root / name, progress=Progress(quiet=True), mesh=mesh.build(MeshConfig(*sizes)), log=log,
  )
  assert all(type(x) is np.ndarray for x in jax.tree.leaves(params))
  return {"history": history, "sums": [float(np.sum(np.abs(x))) for x in jax.tree.leaves(params)], "held": max(held)}

found = {}
for sizes in ((1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 2, 4)):
  found[",".join(map(str, sizes))] = train(sizes, f"at{sizes}")
found["whole parent"] = train((8, 1, 1), "whole", parent_lies="whole")
try:
  train((8, 1, 1), "moved", stop_after=3)
except Stopped:
  found["stopped"] = True
found["moved"] = train((2, 2, 2), "moved")
found["bytes"] = [4 * a.num_params() for a in (child, parent)]

tokens = 40  # a row: no weight has such an axis
def program(sizes):
  on = mesh.build(MeshConfig(*sizes))
  student = Architecture(model, (*(BlockSpec.parse("gqa2/w32"),) * 2, *(BlockSpec.parse("linear/w48"),) * 2))
  first = decoder.stacked(student, decoder.init(student, jax.random.key(2), keep=jax.device_get))
  state = gkd.State.first(mesh.shard_state(on, first), gkd.GKDConfig(steps=1), on)
  batch = gkd.on_mesh(on, PackedText(*np.ones((3, 8, tokens), np.int32)))
  teacher = mesh.shard_state(on, decoder.stacked(parent, weights[1]))
  models = {"child": student, "parent": parent, "config": gkd.GKDConfig(steps=1), "mesh": on}
  return gkd.train_step.lower(state, batch, teacher, **models).compile().as_text().splitlines()
found["hlo"] = {f"{a},{b},1": program((a, b, 1)) for a, b in ((8, 1), (4, 2))}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  return eight_devices.run(PROGRAM, str(tmp_path_factory.mktemp("gkd")))


@pytest.mark.parametrize("name", ["8,1,1", "2,2,2", "1,2,4", "whole parent", "moved"])
def test_the_child_is_that_of_one_device(found, name):
  """A checkpoint of (8, 1, 1) that is "moved" to (2, 2, 2) included."""
  assert found["stopped"]
  expected = found["1,1,1"]
  assert len(expected["history"]) == 4
  for step, metrics in enumerate(expected["history"]):
    assert found[name]["history"][step] == pytest.approx(metrics, rel=1e-5, abs=1e-7), step
  assert found[name]["sums"] == pytest.approx(expected["sums"], rel=1e-5)


@pytest.mark.parametrize(
  "name, shares, whole", [("8,1,1", 8, 0), ("2,2,2", 4, 0), ("1,2,4", 2, 0), ("whole parent", 8, 1)]
)
def test_no_device_ever_holds_more_than_its_share(found, name, shares, whole):
  """Of the parent, and of the child five times: AdamW's moments, average and best; beside them batches and a layer."""
  child, parent = found["bytes"]
  expected = 5 * child / shares + (parent if whole else parent / shares)
  assert expected < found[name]["held"] < 1.1 * expected + child / 4


@pytest.mark.parametrize("sizes, rows", [("8,1,1", 1), ("4,2,1", 2)])
def test_weights_go_to_the_rows_and_not_rows_to_weights(found, sizes, rows):
  """In the compiled step nothing is gathered that has an axis of tokens."""
  lines = found["hlo"][sizes]
  shapes = [shape for line in lines for shape in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", line)]
  gathered = {tuple(map(int, shape.split(","))) for shape in shapes}
  assert (64, 32) in gathered or (32, 32) in gathered
  assert not [shape for shape in gathered if {40, rows * 40, 8 * 40} & set(shape)]
  assert any(f"[{rows},40,32]" in line for line in lines)  # of a device: its own rows


def test_axes_of_a_state():
  on = mesh.build(mesh.MeshConfig())

  sizes: Any = types.SimpleNamespace(shape={"data": 4, "model": 2, "layer": 1})

  def spec(name: str, *shape: int) -> tuple[Any, ...]:
    return tuple(mesh.state_spec(sizes, (jax.tree_util.DictKey(name),), shape))

  assert spec("gate", 3, 16, 8) == (None, ("model", "data"), None)
  assert spec("down", 3, 8, 16) == (None, None, ("model", "data"))
  assert spec("q", 3, 8, 16) == (None, ("model", "data"), None)
  assert spec("k", 3, 2, 16) == (None, "model", "data")  # too few for both
  assert spec("o", 3, 8, 5) == (None, "data", None)  # not to be cut across
  assert spec("embed", 64, 6) == (("model", "data"), None)
  assert spec("linear", 3, 8, 8) == (None, "data", None)
  assert spec("norm", 3, 8) == (None, "data")
  assert spec("norm", 3, 6) == (None, None)
  assert spec("count") == ()
  assert mesh.shard_state(on, {"w": np.ones((2, 3))})["w"].sharding.is_fully_replicated
