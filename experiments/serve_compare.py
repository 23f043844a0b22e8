"""Parent and child in a serving engine: throughput, latency, memory and the largest batch, side by side.

    python -m experiments.serve_compare --engine=vllm --child=runs/mine --scenarios=128/1024,2048/128 --batches=1,64 \\
      --out=served/mine

Both are exported to OUT/exports first, the parent being the run's unless --parent names another. Without --child,
exports that are there are taken as they are: they can be made where JAX is and carried to where the engine is. What was
measured in vLLM is kept in OUT, and the same command goes on. Children of one parent can share what was measured of it
(--parent_out).
"""

import contextlib
import dataclasses
import datetime
import sys
from pathlib import Path

from absl import app, flags, logging

from puzzle_jax import weights
from puzzle_jax.costs import Scenario
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import open_parent
from puzzle_jax.progress import Progress
from puzzle_jax.serving import served, tensorrt_llm
from puzzle_jax.serving.export import export, find_child
from puzzle_jax.serving.hf_export import DTYPES
from puzzle_jax.serving.vllm_process import VLLM
from puzzle_jax.store import Workdir, read_json, write_json

_ENGINE = flags.DEFINE_enum("engine", None, ["vllm", "tensorrt_llm", "torch"], "What runs both.", required=True)
_OUT = flags.DEFINE_string("out", None, "A folder for exports, what was measured, and served.json.", required=True)
_CHILD = flags.DEFINE_string("child", "", "A run's work directory, or a child's own; not needed once it is exported.")
_PARENT = flags.DEFINE_string("parent", "", "The run's if empty; all that --config.parent takes.")
_PARENT_OUT = flags.DEFINE_string("parent_out", "", "Where the parent's export and measurements are; OUT if empty.")
_SCENARIOS = flags.DEFINE_list("scenarios", ["128/128"], "Tokens in and out, such as 128/1024.")
_BATCHES = flags.DEFINE_list("batches", ["1", "64"], "Requests at once.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", list(DTYPES), "Of the child's weights; the parent's are in bfloat16.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Of each timing; the mean of the faster half counts.", lower_bound=1)
_EXPORT_ONLY = flags.DEFINE_bool("export_only", False, "Stop when both are exported.")
_PYTHON = flags.DEFINE_string("engine_python", sys.executable, "The Python of the environment that has the engine.")
_PATH = flags.DEFINE_string("engine_path", "", "A folder of packages that holds it, if not of that environment.")
_BATCHED = flags.DEFINE_integer(
  "max_batched_tokens", VLLM.max_batched_tokens, "That a step takes at most in vLLM.", lower_bound=256
)
_TENSOR_PARALLEL = flags.DEFINE_integer("tensor_parallel", 1, "GPUs that each model is split over.", lower_bound=1)


def exports(roots: dict[str, Path]) -> dict[str, Path]:
  """Parent and child as the engine reads them; made where they are missing."""
  paths = {name: root / "exports" / name for name, root in roots.items()}
  if not _CHILD.value:
    if missing := [path for path in paths.values() if not path.is_dir()]:
      raise PuzzleError(f"there is no {missing[0]} yet; name the child with --child")
    return paths
  found = find_child(_CHILD.value)
  workdir = found.workdir
  if not (parent := _PARENT.value or (read_json(workdir / "config.json")["parent"] if workdir else "")):
    raise PuzzleError(f"{_CHILD.value} is of no run: name its parent with --parent")
  digest = weights.fingerprint(sorted(f for f in found.folder.iterdir() if f.is_file()))
  opened = open_parent(parent)
  if _is_missing(paths["child"], {"weights": digest, "dtype": _DTYPE.value, "engine": _ENGINE.value}):
    export(_CHILD.value, paths["child"], dtype=_DTYPE.value, engine=_ENGINE.value)
  if _is_missing(paths["parent"], {"weights": opened.digest, "engine": _ENGINE.value}):
    served.export_parent(opened, paths["parent"], dtype="bfloat16", engine=_ENGINE.value)
  return paths


def _is_missing(path: Path, made_of: dict[str, str]) -> bool:
  """Whether an export has to be made; beside it is noted of what. One of something else is refused."""
  note = path.with_suffix(".json")
  if not path.is_dir():
    write_json(note, made_of)
    return True
  if note.is_file() and read_json(note) != made_of:
    raise PuzzleError(f"{path} is of another model, --dtype or --engine than asked for: name another --out")
  return False


def _numbers(text: str, flag: str) -> list[int]:
  try:
    numbers = [int(part) for part in text.split("/")]
  except ValueError:
    numbers = [0]
  if min(numbers) < 1 or len(numbers) != (2 if flag == "scenarios" else 1):
    raise PuzzleError(f"--{flag}: {text} is not {'INPUT/OUTPUT in tokens' if flag == 'scenarios' else 'a number'}")
  return numbers


def _measured(
  models: dict[str, Path], scenarios: list[Scenario], batches: list[int], folders: dict[str, Path]
) -> dict[str, served.Served]:
  ranks = _TENSOR_PARALLEL.value
  if _ENGINE.value == "tensorrt_llm":
    return tensorrt_llm.serve(
      models, scenarios=scenarios, batches=batches, ranks=ranks, folder=folders["child"], progress=Progress()
    )
  if _ENGINE.value == "torch":
    if ranks > 1 or _DTYPE.value != "bfloat16":
      raise PuzzleError("--engine=torch runs bfloat16 on one GPU: leave out --tensor_parallel and --dtype")
    try:
      from puzzle_jax.serving import torch_served  # an extra
    except ImportError as e:
      raise PuzzleError(f"--engine=torch needs {e.name}: run `pip install torch`") from e
    return torch_served.serve(models, scenarios=scenarios, batches=batches, rounds=_ROUNDS.value, progress=Progress())
  return served.serve(
    models,
    scenarios=scenarios,
    batches=batches,
    rounds=_ROUNDS.value,
    engine=VLLM(python=_PYTHON.value, path=_PATH.value, max_batched_tokens=_BATCHED.value, tensor_parallel=ranks),
    folders=folders,
    progress=Progress(),
  )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  try:
    scenarios = [Scenario(text, *_numbers(text, "scenarios")) for text in _SCENARIOS.value]
    batches = sorted({_numbers(text, "batches")[0] for text in _BATCHES.value})
    roots = {"parent": Path(_PARENT_OUT.value or _OUT.value), "child": Path(_OUT.value)}
    with contextlib.ExitStack() as locks:
      for root in dict.fromkeys(roots.values()):
        locks.enter_context(Workdir(root).lock())
      models = exports(roots)
      if _EXPORT_ONLY.value:
        return
      found = _measured(models, scenarios, batches, {name: root / "measured" for name, root in roots.items()})
  except PuzzleError as e:
    sys.exit(f"error: {e}")
  described = {name: dataclasses.asdict(model) for name, model in found.items()}
  write_json(roots["child"] / "served.json", {"date": datetime.date.today().isoformat()} | described)
  print(", ".join(str(v) for k, v in found["child"].engine.items() if k in ("name", "version", "hardware")))
  print(served.table(found["parent"], found["child"]))


if __name__ == "__main__":
  app.run(main)
