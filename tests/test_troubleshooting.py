"""Each mistake of docs/troubleshooting.md is made here, and prints what stands there: neither can change alone.

A message stands in the page behind `<!-- error: NAME -->`; `…` is what differs from machine to machine.
"""

import dataclasses
import errno
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from absl import flags
from huggingface_hub import errors

import puzzle_jax
from experiments import tiny_parent
from puzzle_jax import environment, pipeline, preflight, store
from puzzle_jax.costs import CostTable, Scenario, jax_timing
from puzzle_jax.errors import PuzzleError
from puzzle_jax.runs import Run
from puzzle_jax.store import StageStore, Workdir

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections reads configs so

Patch = pytest.MonkeyPatch
CASES: dict[str, Callable[..., str]] = {}


def case(function: Callable[..., str]) -> Callable[..., str]:
  CASES[function.__name__.replace("_", "-")] = function
  return function


def documented() -> dict[str, str]:
  """The messages of the page by name, white space aside."""
  found = re.findall(r"<!-- error: ([\w-]+) -->\n```\n(.*?)\n```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
  assert len(dict(found)) == len(found)
  return {name: " ".join(text.split()) for name, text in found}


@pytest.fixture(scope="module")
def command() -> Iterator[ModuleType]:
  """`experiments.run`, with its flags for as long as this file is tested."""
  from experiments import run

  yield run
  for name in run_flags():
    delattr(flags.FLAGS, name)
  del sys.modules["experiments.run"]


def run_flags() -> list[str]:
  return [f.name for f in flags.FLAGS.flags_by_module_dict().get("experiments.run", [])]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A folder with a parent in `parents/tiny`, text in `texts/`, and configs."""
  folder = tmp_path_factory.mktemp("troubles")
  tiny_parent.write(folder / "parents" / "tiny")
  (folder / "texts").mkdir()
  lines = [json.dumps({"text": f"{i}: " + "a b c " * 40}) for i in range(60)]
  (folder / "texts" / "some.jsonl").write_text("\n".join(lines))
  shutil.copytree(ROOT / "configs", folder / "configs")
  names = ("attention.gqa2", "attention.gqa1", "attention.linear", "attention.none", "ffn.w64", "ffn.w32", "ffn.linear")
  seconds = {"32/32": {"1": {"prefill_s": 0.001, "decode_s": 0.01}}}
  scenarios, subblocks = (Scenario("32/32", 32, 32),), dict.fromkeys((*names, "ffn.none"), seconds)
  costs = CostTable("given", jax_timing.hardware(), {}, 4, scenarios, subblocks, seconds, {})
  (folder / "costs.json").write_text(json.dumps(costs.to_json()))
  return folder


class Said:
  """Starts the command in a folder and returns what it ends with."""

  def __init__(self, command: ModuleType, monkeypatch: Patch):
    self._command, self._monkeypatch = command, monkeypatch

  def __call__(self, *overrides: str, config: str = "configs/tiny.py", workdir: str = "runs/mine") -> str:
    arguments = [f"--config={config}", f"--workdir={workdir}"]
    if config == "configs/tiny.py":
      arguments += [
        "--config.parent=parents/tiny",
        "--config.data.source=texts/*.jsonl",
      ]
    for name in [n for n in flags.FLAGS if n.startswith("config.")]:
      delattr(flags.FLAGS, name)
    for name in run_flags():
      flags.FLAGS[name].unparse()
    self._monkeypatch.setattr(sys, "argv", ["run", *arguments, *overrides])
    with pytest.raises(SystemExit) as end:
      self._command.launch.run(self._command.main)
    return str(end.value)

  def parent(self, name: str) -> Path:
    """A copy of the parent to spoil."""
    return Path(shutil.copytree("parents/tiny", f"parents/{name}"))


@pytest.fixture
def said(command: ModuleType, files: Path, tmp_path: Path, monkeypatch: Patch) -> Said:
  shutil.copytree(files, tmp_path, dirs_exist_ok=True)
  monkeypatch.chdir(tmp_path)
  return Said(command, monkeypatch)


def change_json(path: Path, **values: Any) -> None:
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


def message(call: Callable[[], Any]) -> str:
  """What a command prints of the error that a call raises."""
  with pytest.raises(PuzzleError) as e:
    call()
  return f"error: {e.value}"


# Starting


@case
def python_too_old(said: Said, monkeypatch: Patch) -> str:
  monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
  return message(environment.check)


@case
def not_installed(said: Said, monkeypatch: Patch) -> str:
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  return message(environment.check)


@case
def jax_too_old(said: Said, monkeypatch: Patch) -> str:
  monkeypatch.setattr(metadata, "version", lambda name: "0.4.30")
  return message(environment.check)


@case
def missing_extra(said: Said, monkeypatch: Patch) -> str:
  monkeypatch.setitem(sys.modules, "wandb", None)
  return said("--wandb=puzzle")


class Device:
  platform = "cpu"

  def memory_stats(self) -> None:
    return None


@case
def no_gpu(said: Said, monkeypatch: Patch) -> str:
  monkeypatch.setattr(preflight.jax, "devices", lambda: [Device()])
  return said(config="configs/smollm2_135m.py:compare")


@case
def no_such_platform(said: Said, monkeypatch: Patch) -> str:
  def devices() -> None:
    raise RuntimeError("Unable to initialize backend 'cuda'")

  monkeypatch.setattr(preflight.jax, "devices", devices)
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  return said()


# The config


@case
def wrong_config_path(said: Said) -> str:
  return said(config="configs/smolm2.py:quickstart")


@case
def wrong_config_variant(said: Said) -> str:
  return said(config="configs/smollm2_135m.py:quikstart")


@case
def config_without_variants(said: Said) -> str:
  return said(config="configs/tiny.py:quickstart")


@case
def wrong_config_key(said: Said) -> str:
  return said("--config.search.limits.min_sped_up=1.5")


@case
def wrong_type(said: Said) -> str:
  return said("--config.gkd.steps=1e3")


@case
def wrong_flag(said: Said) -> str:
  return said("--stage=search")


@case
def wrong_stage(said: Said) -> str:
  return said("--stages=serach")


@case
def mesh_without_devices(said: Said) -> str:
  return said("--config.mesh.data=64", "--config.bld.batch_rows=64")


@case
def mesh_that_divides_no_batch(said: Said, monkeypatch: Patch) -> str:
  monkeypatch.setattr("puzzle_jax.mesh.build", lambda config: None)  # as if there were as many devices
  return said("--config.mesh.data=3")


@case
def stage_without_inputs(said: Said) -> str:
  return said("--stages=search")


# The parent


@case
def wrong_parent_path(said: Said) -> str:
  return said("--config.parent=./parents/tinny")


@case
def parent_not_fetched(said: Said, monkeypatch: Patch) -> str:
  def offline(*args: Any, **kwargs: Any) -> None:
    raise errors.LocalEntryNotFoundError("Cannot reach the hub")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
  return said("--config.parent=parents/tinny")


@case
def gated_repository(said: Said, monkeypatch: Patch) -> str:
  def gated(*args: Any, **kwargs: Any) -> None:
    response: Any = SimpleNamespace(headers={}, request=None, status_code=403)
    raise errors.GatedRepoError("403", response=response)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
  return said("--config.parent=meta-llama/Llama-3.1-8B-Instruct")


@case
def unsupported_family(said: Said) -> str:
  Path("parents/gpt2").mkdir()
  Path("parents/gpt2/config.json").write_text('{"model_type": "gpt2"}')
  return said("--config.parent=parents/gpt2")


@case
def truncated_weights(said: Said) -> str:
  weights = said.parent("cut") / "model.safetensors"
  weights.write_bytes(weights.read_bytes()[:-1000])
  return said("--config.parent=parents/cut")


@case
def weights_not_finite(said: Said) -> str:
  weights = said.parent("broken") / "model.safetensors"
  arrays = safetensors.numpy.load_file(weights)
  arrays["model.norm.weight"] = np.full_like(arrays["model.norm.weight"], np.nan)
  safetensors.numpy.save_file(arrays, weights, metadata={"format": "pt"})
  return said("--config.parent=parents/broken")


@case
def run_as_parent(said: Said) -> str:
  Path("runs/first/gkd/model").mkdir(parents=True)
  return said("--config.parent=runs/first")


@case
def tokenizer_without_bos(said: Said) -> str:
  change_json(said.parent("nobos") / "tokenizer_config.json", add_bos_token=True)
  return said("--config.parent=parents/nobos")


@case
def tokenizer_of_another_model(said: Said) -> str:
  path = str(said.parent("mixed") / "tokenizer.json")
  backend = tokenizers.Tokenizer.from_file(path)
  backend.add_tokens(["another"])
  backend.save(path)
  return said("--config.parent=parents/mixed")


@case
def no_chat_template(said: Said) -> str:
  path = said.parent("base") / "tokenizer_config.json"
  path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
  return said("--config.parent=parents/base")


@case
def sequence_too_long(said: Said) -> str:
  return said(
    "--config.data.seq_len=512", *(f"--config.data.{n}_tokens=1024" for n in ("train", "gkd", "heldout", "eval"))
  )


# The text


@case
def wrong_text_path(said: Said) -> str:
  return said("--config.data.source=text/*.jsonl")


@case
def text_column_missing(said: Said) -> str:
  Path("texts/some.jsonl").write_text('{"body": "a text"}\n{"body": "another"}\n')
  return said()


@case
def too_little_text(said: Said) -> str:
  return said("--config.data.train_tokens=1000000")


# Costs and the target


@case
def wrong_scenario_table(said: Said) -> str:
  return said("--config.costs.table=costs.json", "--config.costs.input_tokens=64")


@case
def table_of_another_machine(said: Said) -> str:
  table = json.loads(Path("costs.json").read_text()) | {"hardware": "1 x NVIDIA H100 80GB HBM3"}
  Path("costs.json").write_text(json.dumps(table))
  return said("--config.costs.table=costs.json")


@case
def target_out_of_reach(said: Said) -> str:
  return said("--config.costs.table=costs.json", "--config.search.limits.max_params_ratio=0.1")


# The machine and the work directory


@case
def out_of_memory_by_arithmetic(said: Said, monkeypatch: Patch) -> str:
  monkeypatch.setattr(preflight, "memory_bytes", lambda: 100_000)
  return said("--stages=data,activations,library")


@case
def out_of_device_memory(said: Said, monkeypatch: Patch) -> str:
  """The device's own error, of an array that no machine holds."""

  def make(run: Run, store: StageStore) -> None:
    jnp.zeros((1 << 50,), jnp.int8).block_until_ready()

  stages = (dataclasses.replace(s, make=make) if s.name == "activations" else s for s in pipeline.STAGES)
  monkeypatch.setattr(pipeline, "STAGES", tuple(stages))
  return said("--stages=data,activations")


@case
def work_directory_in_use(said: Said) -> str:
  with Workdir("runs/mine").lock():
    return said()


@case
def work_directory_of_another_parent(said: Said) -> str:
  said("--stages=data")
  tiny_parent.write(Path("parents/other"), seed=1)
  return said("--config.parent=parents/other")


@case
def work_directory_not_writable(said: Said) -> str:
  Path("notes.txt").write_text("")
  return said(workdir="notes.txt/mine")


@case
def disk_too_small(said: Said, monkeypatch: Patch) -> str:
  usage = shutil.disk_usage(".")
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
  return said()


@case
def disk_full(said: Said, monkeypatch: Patch) -> str:
  def sync(path: Path) -> None:
    if "train" in path.name:
      raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(store, "_sync", sync)
  return said()


@case
def corrupt_file(said: Said) -> str:
  said("--stages=data")
  Path("runs/mine/data/train.safetensors").write_bytes(b"something else")
  return message(lambda: Workdir("runs/mine").stage("data").path("train.safetensors"))


@case
def cleaned_file(said: Said) -> str:
  said("--stages=data")
  folder = Workdir("runs/mine").stage("data")
  folder.clean(["train.safetensors"])
  return message(lambda: folder.path("train.safetensors"))


@case
def not_a_run(said: Said) -> str:
  return message(lambda: puzzle_jax.open_run("runs/none"))


@pytest.mark.parametrize("name", CASES)
def test_the_page_shows_what_is_printed(name: str, said: Said, monkeypatch: Patch) -> None:
  arguments = [monkeypatch] * ("monkeypatch" in inspect.signature(CASES[name]).parameters)
  printed = " ".join(CASES[name](said, *arguments).split())
  assert printed.startswith("error: ")
  shown = documented().get(name, "nothing")
  pattern = ".+".join(map(re.escape, shown.split("…")))
  assert re.fullmatch(pattern, printed), f"docs/troubleshooting.md shows for {name}:\n{shown}\nprinted is:\n{printed}"


def test_the_page_shows_nothing_else() -> None:
  assert documented().keys() == CASES.keys()


@pytest.mark.parametrize(
  "own, flags",
  [
    ("", "--xla_gpu_enable_triton_gemm=false"),
    ("--xla_a=1", "--xla_a=1 --xla_gpu_enable_triton_gemm=false"),
    ("--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true"),
  ],
)
def test_xla_flags_of_ones_own_win(own, flags, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", own)
  environment.prepare()
  assert os.environ["XLA_FLAGS"] == flags
