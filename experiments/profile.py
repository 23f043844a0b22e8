"""Measures what each subblock of a config's space costs in an engine on this machine: the cost table of a search.

    pip install llama-cpp-python
    python -m experiments.profile --engine=llamacpp --config=configs/smollm2_135m.py:quickstart --out=costs.json
    python -m experiments.run --config=configs/smollm2_135m.py:quickstart --config.costs.table=costs.json \\
      --config.space.engine=llama_cpp --config.search.engine=llama_cpp --workdir=runs/cpu

Shapes are the parent's, weights are random. With --children, so many random children are timed beside the models that
the table comes from, and what the table predicts of them is printed beside what was measured.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np
from absl import flags

from puzzle_jax import space
from puzzle_jax.arch import Architecture, BlockSpec
from puzzle_jax.costs import Scenario, jax_timing
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import open_parent
from puzzle_jax.progress import Progress
from puzzle_jax.serving import engines, llamacpp_timing
from puzzle_jax.serving.gguf_export import TYPES
from puzzle_jax.store import write_json

from . import launch  # relative: in the wheel, `experiments` lies in `puzzle_jax` (setup.py)

_CONFIG = launch.define_config()
flags.adopt_module_key_flags(launch)  # --help shows --config, too
_ENGINE = flags.DEFINE_enum("engine", None, ["llamacpp"], "What will run the child.", required=True)
_OUT = flags.DEFINE_string("out", None, "The cost table, JSON.", required=True)
_SCENARIOS = flags.DEFINE_list("scenarios", [], "Tokens in and out, such as 128/1024; the config's if empty.")
_DTYPE = flags.DEFINE_enum("dtype", "Q4_1", list(TYPES), "Of the weights.")
_LAYERS = flags.DEFINE_integer("layers", 0, "Of the timed models; the parent's if 0.")
_ROUNDS = flags.DEFINE_integer("rounds", 10, "How often each model is timed.")
_THREADS = flags.DEFINE_integer("threads", os.cpu_count() or 1, "Of llama.cpp.")
_CHILDREN = flags.DEFINE_integer("children", 0, "Random children to time beside.", lower_bound=0)


def parse_scenario(text: str) -> Scenario:
  """`128/1024`: tokens in, tokens out."""
  try:
    first, second = map(int, text.split("/"))
  except ValueError:
    raise PuzzleError(f"--scenarios={text} is not INPUT/OUTPUT in tokens, such as 128/1024") from None
  return Scenario(text, first, second)


def random_children(parent: Architecture, built: space.Space, number: int) -> dict[str, Architecture]:
  """Children that llama.cpp runs; of the k-th, about k in `number` + 1 layers are not the parent's."""
  rng, engine = np.random.default_rng(0), engines.by_name("llama_cpp")
  found = {}
  for k in range(1, number + 1):
    blocks: list[BlockSpec] = []
    for i, layer in enumerate(built.layers):
      able = [b for b in layer.blocks if not engines.objection(engine, i, b.name, num_layers=len(built.layers))]
      changed = rng.random() < k / (number + 1)
      blocks.append(able[rng.integers(len(able))] if changed else layer.parent)
    found[f"child {k}"] = dataclasses.replace(parent, blocks=tuple(blocks))
  return found


def main(argv: list[str]) -> None:
  del argv
  config = launch.run_config(_CONFIG)
  parent = open_parent(config.parent)
  architecture = parent.architecture
  built = space.build(architecture, **dataclasses.asdict(config.space) | {"engine": "llama_cpp"})
  timing = llamacpp_timing.TimingConfig(
    dtype=_DTYPE.value, layers=_LAYERS.value or architecture.num_layers, rounds=_ROUNDS.value, threads=_THREADS.value
  )
  table = llamacpp_timing.measure(
    parent,
    built,
    scenarios=[parse_scenario(s) for s in _SCENARIOS.value] or [config.costs.scenario],
    config=timing,
    hardware=jax_timing.hardware(),
    progress=Progress(),
    children=random_children(architecture, built, _CHILDREN.value),
  )
  write_json(Path(_OUT.value), table.to_json())
  for child in table.details["children"]:
    errors = [f"{phase} {child['predicted'][phase] / child[phase] - 1:+.1%}" for phase in ("prefill_s", "decode_s")]
    print(f"{child['scenario']}, {child['model']}: predicted against measured: {', '.join(errors)}")


if __name__ == "__main__":
  launch.run(main)
