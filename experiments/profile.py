"""Measures what each subblock of a config's space costs in an engine on this machine: the cost table of a search.

    pip install llama-cpp-python
    python -m experiments.profile --engine=llamacpp --config=configs/smollm2_135m.py:quickstart --out=costs.json
    python -m experiments.run --config=configs/smollm2_135m.py:quickstart --config.costs.table=costs.json \\
      --config.space.engine=llama_cpp --config.search.engine=llama_cpp --workdir=runs/cpu

    python -m experiments.profile --engine=torch --config=configs/smollm2_135m.py:compare --batches=64 --out=costs.json

    pip install vllm
    python -m experiments.profile --engine=vllm --config=configs/smollm2_135m.py:quickstart --scenarios=chat,2048/128 \\
      --batches=64,256 --children=4 --out=costs.json

Shapes are the parent's, weights are random. With --children, so many random children are timed beside the models that
the table comes from, and what the table predicts of them is printed beside what was measured. `torch` is the built-in
engine, which needs nothing but PyTorch; `jax` is what a run's own costs are timed in. In vLLM, which takes most of a
minute to load a model, what was measured is kept in OUT.parts: the same command goes on.
"""

import dataclasses
import datetime
import os
import shlex
import statistics
import sys
from pathlib import Path

import numpy as np
from absl import flags

from puzzle_jax import space
from puzzle_jax.arch import Architecture, BlockSpec
from puzzle_jax.config import RunConfig
from puzzle_jax.costs import CostTable, Scenario, jax_timing
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import Parent, known, open_parent
from puzzle_jax.progress import Progress
from puzzle_jax.serving import engines, llamacpp_timing, tensorrt_llm, tensorrt_llm_timing, vllm_timing
from puzzle_jax.serving.gguf_export import TYPES
from puzzle_jax.serving.hf_export import DTYPES
from puzzle_jax.serving.vllm_process import VLLM
from puzzle_jax.store import Workdir, write_json

from . import launch  # relative: in the wheel, `experiments` lies in `puzzle_jax` (setup.py)

PAPER = {  # section 6: tokens in and out
  "chat": (128, 128),
  "short_prompts": (128, 1024),
  "text_generation": (128, 2048),
  "long_generation": (128, 4096),
  "summarisation": (2048, 128),
  "long_context": (2048, 2048),
}
_NAMES = {  # in the table of capabilities
  "llamacpp": "llama_cpp",
  "vllm": "vllm",
  "trtllm": "tensorrt_llm",
  "torch": "torch",
  "jax": "",
}
_CONFIG = launch.define_config()
flags.adopt_module_key_flags(launch)  # --help shows --config, too
_ENGINE = flags.DEFINE_enum("engine", None, list(_NAMES), "What will run the child.", required=True)
_OUT = flags.DEFINE_string("out", None, "The cost table, JSON.", required=True)
_SCENARIOS = flags.DEFINE_list(
  "scenarios", [], f"Tokens in and out, such as 128/1024, or of {', '.join(PAPER)}; the config's if empty."
)
_DTYPE = flags.DEFINE_enum("dtype", None, [*TYPES, *DTYPES], "Of the weights; Q4_1 or bfloat16 if empty.")
_LAYERS = flags.DEFINE_integer("layers", 0, "Of the timed models; if 0 the parent's, in vLLM twice as many.")
_ROUNDS = flags.DEFINE_integer(
  "rounds", 0, "How often each timing is repeated; 10 in llama.cpp, 4 in vLLM, 5 in torch if 0."
)
_CHILDREN = flags.DEFINE_integer("children", 0, "Random children to time beside.", lower_bound=0)
_THREADS = flags.DEFINE_integer("threads", os.cpu_count() or 1, "Of llama.cpp.")
_BATCHES = flags.DEFINE_list("batches", [], "Requests at once, but in llama.cpp; the config's if empty.")
_WIDTHS = flags.DEFINE_integer(
  "ffn_widths", 0, "FFN widths timed in vLLM and torch, the others between them; all if 0."
)
_PASSES = flags.DEFINE_integer("passes", 1, "How often all models are loaded and timed in vLLM.")
_PYTHON = flags.DEFINE_string("engine_python", sys.executable, "The Python of the environment that has vLLM.")
_PATH = flags.DEFINE_string("engine_path", "", "A folder of packages that holds vLLM, if not of that environment.")
_GPUS = flags.DEFINE_list("gpus", [], "Numbers of GPUs on which vLLM measures different models at the same time.")
_BATCHED = flags.DEFINE_integer(
  "max_batched_tokens", VLLM.max_batched_tokens, "That a step takes at most in vLLM.", lower_bound=256
)
_TENSOR_PARALLEL = flags.DEFINE_integer(
  "tensor_parallel", 1, "GPUs that vLLM or TensorRT-LLM splits models over.", lower_bound=1
)


def parse_scenario(text: str) -> Scenario:
  """`128/1024`: tokens in, tokens out; or one of `PAPER`, which is named by its numbers too, as a config's is."""
  if text in PAPER:
    text = "/".join(map(str, PAPER[text]))
  try:
    first, second = map(int, text.split("/"))
  except ValueError:
    raise PuzzleError(f"--scenarios={text} is neither INPUT/OUTPUT in tokens nor one of {', '.join(PAPER)}") from None
  return Scenario(text, first, second)


def random_children(parent: Architecture, built: space.Space, number: int, name: str) -> dict[str, Architecture]:
  """Children that an engine runs; of the k-th, about k in `number` + 1 layers are not the parent's."""
  rng, engine = np.random.default_rng(0), engines.by_name(name)
  found = {}
  for k in range(1, number + 1):
    blocks: list[BlockSpec] = []
    for i, layer in enumerate(built.layers):
      able = [b for b in layer.blocks if not engines.objection(engine, i, b.name, num_layers=len(built.layers))]
      changed = rng.random() < k / (number + 1)
      blocks.append(able[rng.integers(len(able))] if changed else layer.parent)
    found[f"child {k}"] = dataclasses.replace(parent, blocks=tuple(blocks))
  return found


def _batches(config: RunConfig) -> list[int]:
  if not all(batch.isdigit() and int(batch) for batch in _BATCHES.value):
    raise PuzzleError(f"--batches={','.join(_BATCHES.value)} must be whole numbers above 0, separated by commas")
  return sorted({int(batch) for batch in _BATCHES.value} or set(config.costs.batches))


def _in_torch(parent: Architecture, built: space.Space, scenarios: list[Scenario], config: RunConfig) -> CostTable:
  try:
    from puzzle_jax.serving import torch_engine, torch_timing  # an extra
  except ImportError as e:
    raise PuzzleError(f"--engine=torch needs {e.name}: run `pip install torch`") from e
  table = torch_timing.measure(
    parent,
    built,
    scenarios=scenarios,
    batches=_batches(config),
    config=torch_timing.TimingConfig(
      dtype=_DTYPE.value or "bfloat16",
      layers=_LAYERS.value or parent.num_layers,
      rounds=_ROUNDS.value or 5,
      ffn_widths=_WIDTHS.value,
    ),
    hardware=torch_engine.gpu() or jax_timing.hardware(),  # JAX would take the GPU's memory, if it were asked
    progress=Progress(),
    children=random_children(parent, built, _CHILDREN.value, "torch"),
  )
  for child in table.details["children"]:
    print(f"{child['scenario']}, batch {child['batch']}, {child['model']}: throughput predicted {child['error']:+.1%}")
  return table


def _in_trtllm(parent: Parent, built: space.Space, scenarios: list[Scenario], config: RunConfig) -> CostTable:
  if _CHILDREN.value or (_DTYPE.value or "bfloat16") != "bfloat16":
    raise PuzzleError("--engine=trtllm times in bfloat16 and no --children")
  parts = Workdir(f"{_OUT.value}.parts")
  with parts.lock():
    return tensorrt_llm_timing.measure(
      parent,
      built,
      scenarios=scenarios,
      batches=_batches(config),
      config=tensorrt_llm_timing.TimingConfig(
        layers=_LAYERS.value or parent.architecture.num_layers,
        rounds=_ROUNDS.value or 3,
        ffn_widths=_WIDTHS.value,
        ranks=_TENSOR_PARALLEL.value,
      ),
      hardware=tensorrt_llm.hardware(_TENSOR_PARALLEL.value),
      folder=parts.root,
      progress=Progress(),
    )


def _in_jax(parent: Architecture, built: space.Space, scenarios: list[Scenario], config: RunConfig) -> CostTable:
  if _CHILDREN.value or (_DTYPE.value or "float32") != "float32":
    raise PuzzleError("--engine=jax times in float32 and no --children; a run's evaluation times its child in JAX")
  timing = dataclasses.replace(
    config.costs.timing,
    layers=_LAYERS.value or config.costs.timing.layers,
    rounds=_ROUNDS.value or config.costs.timing.rounds,
  )
  return jax_timing.measure(
    parent, built, scenarios=scenarios, batches=_batches(config), config=timing, progress=Progress()
  )


def _in_llamacpp(parent: Parent, built: space.Space, scenarios: list[Scenario]) -> CostTable:
  timing = llamacpp_timing.TimingConfig(
    dtype=_DTYPE.value or "Q4_1",
    layers=_LAYERS.value or parent.architecture.num_layers,
    rounds=_ROUNDS.value or 10,
    threads=_THREADS.value,
  )
  if timing.dtype not in TYPES:
    raise PuzzleError(f"--dtype={timing.dtype} is not of llama.cpp; take one of {', '.join(TYPES)}")
  table = llamacpp_timing.measure(
    parent,
    built,
    scenarios=scenarios,
    config=timing,
    hardware=jax_timing.hardware(),
    progress=Progress(),
    children=random_children(parent.architecture, built, _CHILDREN.value, "llama_cpp"),
  )
  for child in table.details["children"]:
    errors = [f"{phase} {child['predicted'][phase] / child[phase] - 1:+.1%}" for phase in ("prefill_s", "decode_s")]
    print(f"{child['scenario']}, {child['model']}: predicted against measured: {', '.join(errors)}")
  return table


def _in_vllm(parent: Architecture, built: space.Space, scenarios: list[Scenario], config: RunConfig) -> CostTable:
  timing = vllm_timing.TimingConfig(
    dtype=_DTYPE.value or "bfloat16",
    layers=_LAYERS.value or 2 * parent.num_layers,
    rounds=_ROUNDS.value or 4,
    ffn_widths=_WIDTHS.value,
    passes=_PASSES.value,
  )
  if timing.dtype not in DTYPES:
    raise PuzzleError(f"--dtype={timing.dtype} is not of vLLM; take one of {', '.join(DTYPES)}")
  batches = _batches(config)
  parts = Workdir(f"{_OUT.value}.parts")
  with parts.lock():
    table = vllm_timing.measure(
      parent,
      built,
      plan=vllm_timing.Plan(tuple(scenarios), tuple(batches), timing),
      engine=VLLM(
        python=_PYTHON.value,
        path=_PATH.value,
        max_batched_tokens=_BATCHED.value,
        tensor_parallel=_TENSOR_PARALLEL.value,
        gpus=tuple(_GPUS.value),
      ),
      folder=parts.root,
      progress=Progress(),
      children=random_children(parent, built, _CHILDREN.value, "vllm") if _CHILDREN.value else None,
    )
  for scenario, by_batch in table.details["limits"].items():
    for batch, found in by_batch.items():
      if "host" in found["limit"].values():
        phases = " and ".join(phase.removesuffix("_s") for phase, limit in found["limit"].items() if limit == "host")
        print(f"{scenario}, batch {batch}: {phases}: the engine's host work is the limit, not the GPU")
  for child in table.details["children"]:
    limit = "" if child["limit"] == "gpu" else " (the host is the limit)"
    speed = f"{child['throughput']:,.0f} tokens/s measured, predicted {child['error']:+.1%}{limit}"
    print(f"{child['scenario']}, batch {child['batch']}, {child['model']}: {speed}")
  if errors := [abs(child["error"]) for child in table.details["children"] if child["limit"] == "gpu"]:
    print(f"throughput where the GPU is the limit: mean error {statistics.fmean(errors):.1%}, worst {max(errors):.1%}")
  return table


def main(argv: list[str]) -> None:
  del argv
  config, out = launch.run_config(_CONFIG), Path(_OUT.value)
  if out.is_dir() or not os.access(next(p for p in out.absolute().parents if p.exists()), os.W_OK):
    raise PuzzleError(f"--out={out} cannot be written; name a file in a folder of yours")
  named = dataclasses.asdict(config.space) | {"engine": _NAMES[_ENGINE.value]}
  scenarios = list({s.name: s for s in map(parse_scenario, _SCENARIOS.value)}.values()) or [config.costs.scenario]
  if _ENGINE.value == "vllm":
    architecture = known.architecture_of(config.parent)
    table = _in_vllm(architecture, space.build(architecture, **named), scenarios, config)
  elif _ENGINE.value in ("torch", "jax"):
    architecture = known.architecture_of(config.parent)
    measured = _in_torch if _ENGINE.value == "torch" else _in_jax
    table = measured(architecture, space.build(architecture, **named), scenarios, config)
  else:
    parent = open_parent(config.parent)
    built = space.build(parent.architecture, **named)
    if _ENGINE.value == "trtllm":
      table = _in_trtllm(parent, built, scenarios, config)
    else:
      table = _in_llamacpp(parent, built, scenarios)
  for point in table.details["unreachable"]:
    print(f"{point['scenario']}, batch {point['batch']}: not reached: {point['why']}")
  said = [
    argument for argument in sys.argv[1:] if not argument.startswith("--engine_p")
  ]  # where vLLM lies is no matter
  described = {"command": shlex.join(["python", "-m", "experiments.profile", *said])}
  described["date"] = datetime.date.today().isoformat()
  write_json(out, dataclasses.replace(table, details=described | table.details).to_json())


if __name__ == "__main__":
  launch.run(main)
