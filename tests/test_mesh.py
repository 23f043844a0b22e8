"""The same answers on eight virtual CPU devices as on one, however they are arranged."""

import json
import re

import eight_devices
import numpy as np
import pytest
from tiny_costs import write_text

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
import json, sys
from pathlib import Path
sys.path.append("tests")
import puzzle_jax
from configs import tiny
from puzzle_jax import memory, refine, scoring
from puzzle_jax.config import RunConfig
from puzzle_jax.library import Library
from tiny_costs import write_costs

root, names, *meshes = sys.argv[1:]
COLLECTIVES = [f"{name}{kind}(" for name in names.split(",") for kind in ("", "-start")]
programs, rescored = [], []
call, rescore = memory.Step.__call__, refine.Children.rescored

def recorded(step, *args):
  result = call(step, *args)
  programs.append([line for line in step.hlo.splitlines() if any(f" {name}" in line for name in COLLECTIVES)])
  return result

def kept(children, blocks):
  rescored.append(rescore(children, blocks))
  return rescored[-1]

memory.Step.__call__, refine.Children.rescored = recorded, kept

found = {}
for sizes in meshes:
  values = tiny.get_config()
  values.parent, values.data.source, values.costs.table = f"{root}/parent", f"{root}/text.jsonl", f"{root}/costs.json"
  values.data.train_tokens, values.bld.batch_rows, values.bld.layers, values.bld.steps = 1024, 8, 4, 3
  values.space.attention, values.space.ffn, values.activations.dtype = ("gqa", "linear"), (0.5,), "float32"
  values.scores.batch_rows, values.search.refine_rounds, values.gkd.steps = 8, 1, 0
  values.coupled.blocks, values.coupled.bld.batch_rows, values.coupled.bld.steps = ("linear/w32",), 8, 3
  values.evaluation.prompts, values.evaluation.timed, values.evaluation.tasks = (), False, (f"{root}/task.jsonl",)
  values.mesh.data, values.mesh.model, values.mesh.layer = map(int, sizes.split(","))
  config = RunConfig.from_dict(values.to_dict())
  write_costs(Path(config.costs.table), config.parent, config)
  programs.clear()
  rescored.clear()
  stages = ["data", "costs", "activations", "library", "scores", "search", "coupled", "child", "gkd", "evaluation"]
  run = puzzle_jax.run(config, Path(root) / sizes, stages=stages, quiet=True)
  pairs = run.store("coupled")
  here = {
    "losses": [run.library.losses(i) for i in range(4)],
    "scores": run.scores,
    "rescored": rescored[0].tolist(),
    "rounds": run.first_solution["rounds"],
    "pairs": [Library(pairs).losses(i) for i in range(4)],
    "pairs' scores": [pairs.get_json(f"scores/layer_{i:02d}.json")["blocks"] for i in range(4)],
    "evaluation": run.store("evaluation").get_json("evaluation.json"),
    "collectives": programs[0] + programs[-1],
  }
  children, packed = refine.Children(run), run.packed("heldout").rows(slice(7))
  parent = run.parent_on(run.mesh)
  scorer = scoring.Scorer(parent.architecture, parent.params, packed=packed, batch_rows=7, mesh=run.mesh)
  here["of seven rows"] = scorer.whole(children.blocks(run.solution["blocks"]))
  here["rows on a device"] = [x.sharding.shard_shape(x.shape)[0] for x in scorer._embedded()]
  found[sizes] = here
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mesh")
  tiny_parent.write(folder / "parent")
  write_text(folder / "text.jsonl")
  item = {"context": "a b c", "choices": [" d", " e f g"], "answer": 1}
  (folder / "task.jsonl").write_text(f"{json.dumps(item)}\n" * 4)
  meshes = [",".join(map(str, sizes)) for sizes in MESHES]
  return eight_devices.run(PROGRAM, str(folder), ",".join(COLLECTIVES), *meshes)


on_each_mesh = pytest.mark.parametrize("sizes", ["8,1,1", "2,2,2", "1,2,4"])


def compare_losses(expected, here):
  for layer, losses in enumerate(expected):
    for name, values in losses.items():
      assert here[layer][name] == pytest.approx(values, rel=1e-5, abs=1e-7), f"{layer} {name}"


def compare_scores(expected, here):
  """By metric."""
  for name, value in expected.items():
    whole = 5.0 if name in ("lm_loss", "loss_change") else value  # a difference of two losses near 5 nats
    assert abs(here[name] - value) <= 1e-5 * abs(whole) + 1e-7, name


def compare_layers(expected, here):
  for layer, blocks in enumerate(expected):
    for block, scores in blocks.items():
      compare_scores(scores, here[layer][block])


@on_each_mesh
def test_the_library_is_that_of_one_device(found, sizes):
  compare_losses(found["1,1,1"]["losses"], found[sizes]["losses"])


@on_each_mesh
def test_the_scores_are_those_of_one_device(found, sizes):
  compare_layers(found["1,1,1"]["scores"], found[sizes]["scores"])


@on_each_mesh
def test_blocks_scored_in_the_child_are_those_of_one_device(found, sizes):
  expected, here = found["1,1,1"], found[sizes]
  for one, other in zip(expected["rounds"], here["rounds"], strict=True):
    assert other == {k: v if k == "blocks" else pytest.approx(v, rel=1e-5, abs=1e-7) for k, v in one.items()}
  np.testing.assert_allclose(here["rescored"], expected["rescored"], rtol=1e-5, atol=1e-7)


@on_each_mesh
def test_coupled_pairs_are_those_of_one_device(found, sizes):
  compare_losses(found["1,1,1"]["pairs"], found[sizes]["pairs"])
  compare_layers(found["1,1,1"]["pairs' scores"], found[sizes]["pairs' scores"])


@on_each_mesh
def test_the_evaluation_is_that_of_one_device(found, sizes):
  expected, here = found["1,1,1"]["evaluation"], found[sizes]["evaluation"]
  for quality in ("before_gkd", "after_gkd"):
    compare_scores(expected[quality], here[quality])
  assert here["tasks"] == expected["tasks"]


@pytest.mark.parametrize("sizes, rows", [("1,1,1", [7]), ("8,1,1", [1]), ("2,2,2", [2]), ("1,2,4", [2])])
def test_scores_spread_any_number_of_rows(found, sizes, rows):
  """Seven on eight devices, or on four pairs of devices that hold the weights together."""
  assert found[sizes]["rows on a device"] == rows
  compare_scores(found["1,1,1"]["of seven rows"], found[sizes]["of seven rows"])


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
