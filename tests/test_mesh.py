"""The same answers on eight virtual CPU devices as on one, however they are arranged."""

import re

import eight_devices
import numpy as np
import pytest

from experiments import tiny_parent
from puzzle_jax import mesh
from puzzle_jax.errors import PuzzleError
from puzzle_jax.mesh import MeshConfig

MESHES = ((1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 2, 4))  # data, model, layer

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def device_groups(line: str) -> list[list[int]]:
  """Which devices an operation of a compiled program joins, in any of the forms in which XLA writes it."""

  def numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]

  def iota(dims: str, permutation: str | None) -> np.ndarray:
    shape = numbers(dims)
    array = np.arange(np.prod(shape)).reshape(shape)
    return array.transpose(numbers(permutation)) if permutation else array

  if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[^=]*?\})\}", line):
    return [numbers(group) for group in match[1].split("},{")]
  if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
    return iota(match[3], match[4]).reshape(int(match[1]), int(match[2])).tolist()
  if match := re.search(
    r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? *\{([^}]*)\}", line
  ):
    axes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
    names, joined = list(axes), re.findall(r"'(\w+)'", match[4])
    ids = iota(match[2] or ",".join(axes.values()), match[3]).reshape([int(n) for n in axes.values()])
    last = [names.index(name) for name in joined]
    size = int(np.prod([ids.shape[i] for i in last]))
    return np.moveaxis(ids, last, range(-len(last), 0)).reshape(-1, size).tolist()
  raise AssertionError(f"no groups are found in {line}")


@pytest.mark.parametrize(
  "text, groups",
  [
    ("replica_groups={{0,1},{2,3}}, x={1}", [[0, 1], [2, 3]]),
    ("source_target_pairs={{0,2},{2,0}}", [[0, 2], [2, 0]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[4,2]<=[2,2,2]T(2,1,0), dimensions={2}", [[0, 4], [2, 6], [1, 5], [3, 7]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, y={1}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
  ],
)
def test_groups_are_read(text, groups):
  assert device_groups(f"%x = f32[4] all-reduce(%y), {text}") == groups


PROGRAM = """
import json, shutil, sys
from pathlib import Path
import puzzle_jax
from configs import tiny
from puzzle_jax import memory
from puzzle_jax.config import RunConfig

parent, root, names, *meshes = sys.argv[1:]
STAGES = ["data", "activations", "library", "scores"]
COLLECTIVES = [f"{name}{kind}(" for name in names.split(",") for kind in ("", "-start")]
programs = []
call = memory.Step.__call__
def recorded(step, *args):
  result = call(step, *args)
  programs.append([line for line in step.hlo.splitlines() if any(f" {name}" in line for name in COLLECTIVES)])
  return result
memory.Step.__call__ = recorded
found = {}
for sizes in meshes:
  values = tiny.get_config()
  values.parent = parent
  values.data.train_tokens, values.bld.batch_rows, values.bld.layers, values.bld.steps = 1024, 8, 4, 3
  values.space.attention, values.space.ffn, values.activations.dtype = ("gqa", "linear"), (0.5,), "float32"
  values.scores.batch_rows = 8
  values.mesh.data, values.mesh.model, values.mesh.layer = map(int, sizes.split(","))
  programs.clear()
  run = puzzle_jax.run(values.to_dict(), Path(root) / sizes, stages=STAGES, quiet=True)
  losses = [run.library.losses(i) for i in range(4)]
  found[sizes] = {"losses": losses, "scores": run.scores, "collectives": programs[-1]}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mesh")
  tiny_parent.write(folder / "parent")
  meshes = [",".join(map(str, sizes)) for sizes in MESHES]
  return eight_devices.run(PROGRAM, str(folder / "parent"), str(folder), ",".join(COLLECTIVES), *meshes)


@pytest.mark.parametrize("sizes", ["8,1,1", "2,2,2", "1,2,4"])
def test_the_library_is_that_of_one_device(found, sizes):
  for layer, expected in enumerate(found["1,1,1"]["losses"]):
    for name, losses in expected.items():
      assert found[sizes]["losses"][layer][name] == pytest.approx(losses, rel=1e-5, abs=1e-7), f"{layer} {name}"


@pytest.mark.parametrize("sizes", ["8,1,1", "2,2,2", "1,2,4"])
def test_the_scores_are_those_of_one_device(found, sizes):
  for layer, expected in enumerate(found["1,1,1"]["scores"]):
    for block, scores in expected.items():
      for name, value in scores.items():
        whole = 5.0 if name == "lm_loss" else value  # a difference of two losses near 5 nats
        error = abs(found[sizes]["scores"][layer][block][name] - value)
        assert error <= 1e-5 * abs(whole) + 1e-7, f"{layer} {block} {name}"


def test_layers_side_by_side_exchange_nothing(found):
  """Devices (data, model, layer) are numbered with the layer's index last: groups must hold one of its values only."""
  assert found["1,1,1"]["collectives"] == []
  for sizes, layers in (("2,2,2", 2), ("1,2,4", 4)):
    assert found[sizes]["collectives"]
    for line in found[sizes]["collectives"]:
      for group in device_groups(line):
        assert len({device % layers for device in group}) == 1, line


def test_too_few_devices():
  with pytest.raises(PuzzleError, match=r"mesh: data=64 x model=1 x layer=2 are 128 devices and there are \d+ of cpu"):
    mesh.build(MeshConfig(data=64, layer=2))
  with pytest.raises(PuzzleError, match=r"mesh\.model=0 must be at least 1"):
    MeshConfig(model=0)
