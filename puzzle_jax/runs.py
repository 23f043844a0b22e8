"""A run: what its work directory holds, opened (docs/architecture.md)."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from puzzle_jax import data, distributed, mesh, scoring, space
from puzzle_jax.arch import Architecture
from puzzle_jax.config import RunConfig
from puzzle_jax.costs import CostTable, jax_timing
from puzzle_jax.errors import PuzzleError
from puzzle_jax.evaluation.tasks import Task
from puzzle_jax.library import Library
from puzzle_jax.metrics import Series, WandbRun
from puzzle_jax.model.language_model import LanguageModel, to_device
from puzzle_jax.parents import Parent, open_parent
from puzzle_jax.progress import Progress
from puzzle_jax.search.table import Table
from puzzle_jax.store import StageStore, Workdir, read_json
from puzzle_jax.tokenizer import Tokenizer


class Run:
  """A run in a work directory: its parent, and what its stages have made."""

  def __init__(self, config: RunConfig, workdir: str | os.PathLike[str], *, quiet: bool = False):
    self.config, self.workdir = config, Workdir(workdir)
    self.progress = Progress(quiet=quiet or not distributed.is_first())
    self.wandb: WandbRun | None = None

  def store(self, stage: str) -> StageStore:
    return self.workdir.stage(stage)

  def metrics(self, stage: str, part: str = "") -> Series:
    """Where a stage's training, or a part of it, records its metrics."""
    folder = self.workdir.root / stage / "metrics" / part
    return Series(folder, name=f"{stage}/{part}".rstrip("/"), wandb=self.wandb)

  @property
  def mesh(self) -> Mesh:
    """The devices that the run uses; of what one of several processes does alone, its first."""
    return self._mesh if distributed.count() == jax.process_count() else mesh.one_device()

  @functools.cached_property
  def _mesh(self) -> Mesh:
    return mesh.build(self.config.mesh)

  @functools.cached_property
  def parent(self) -> Parent:
    return open_parent(self.config.parent)

  @functools.cached_property
  def parent_model(self) -> LanguageModel:
    """The parent, on the device, fp32."""
    return LanguageModel.of(self.parent, self.tokenizer)

  def parent_on(self, mesh: Mesh) -> LanguageModel:
    """The parent, fp32, on a mesh (`mesh.shard_weights`)."""
    return self.parent_model if mesh.size == 1 else LanguageModel.of(self.parent, self.tokenizer, mesh=mesh)

  def parent_with(self, layer: int, block: str) -> LanguageModel:
    """The parent with one block, such as `gqa1/w768`, in a layer's place: the library's, or of it and the parent.

    Raises:
      PuzzleError: no such layer, or the space has no such block there.
    """
    layers = self.space.layers
    if not 0 <= layer < len(layers):
      raise PuzzleError(f"layer {layer} does not exist; the parent has 0 to {len(layers) - 1}")
    found = {spec.name: spec for spec in layers[layer].blocks}
    if block not in found:
      raise PuzzleError(f"layer {layer} has no variant {block!r}; it has {', '.join(found)}")
    parent, spec = self.parent_model, found[block]
    blocks, weights = list(parent.architecture.blocks), list(parent.params["layers"])
    blocks[layer] = spec
    weights[layer] = to_device(
      scoring.block_weights(layers[layer], spec, weights[layer], self.library.load_layer(layer))
    )
    architecture = Architecture(parent.architecture.config, tuple(blocks))
    return LanguageModel(architecture, {**parent.params, "layers": weights}, self.tokenizer)

  @functools.cached_property
  def tokenizer(self) -> Tokenizer:
    return self.parent.tokenizer()

  @functools.cached_property
  def space(self) -> space.Space:
    return space.build(self.parent.architecture, **dataclasses.asdict(self.config.space))

  def packed(self, name: str) -> data.PackedText:
    """One of `PACKED_SETS`."""
    return data.PackedText(**self.store("data").get_arrays(f"{name}.safetensors"))

  @functools.cached_property
  def task(self) -> Task | None:
    """The task that blocks are scored on besides text, if the config names one."""
    return Task.from_arrays(self.store("data").get_arrays("task.safetensors")) if self.config.data.task else None

  @property
  def library(self) -> Library:
    return Library(self.store("library"))

  @property
  def scores(self) -> list[dict[str, dict[str, float]]]:
    """By layer and block name: metrics and standard errors, differences to the parent."""
    store = self.store("scores")
    return [store.get_json(f"layer_{i:02d}.json")["blocks"] for i in range(len(self.space.layers))]

  @property
  def costs(self) -> CostTable:
    return CostTable.from_json(self.store("costs").get_json("costs.json"))

  @property
  def table(self) -> Table:
    """The block table of the search."""
    return Table.from_json(self.store("search").get_json("table.json"))

  @property
  def solution(self) -> dict[str, Any]:
    """The architecture that the search chose, with what it predicts of it; of the second search, if there was one."""
    coupled = self.store("coupled")
    return coupled.get_json("solution_0.json") if "solution_0.json" in coupled else self.first_solution

  @property
  def first_solution(self) -> dict[str, Any]:
    """That of the first search."""
    return self.store("search").get_json("solution_0.json")

  @property
  def summary(self) -> dict[str, Any]:
    """All figures of the run: what the report shows."""
    return self.store("report").get_json("summary.json")

  @functools.cached_property
  def child(self) -> LanguageModel:
    """The distilled child."""
    return LanguageModel.open(self.store("gkd").folder("model"))


def open_run(workdir: str | os.PathLike[str]) -> Run:
  """Opens a run's directory to look at what it made.

  Raises:
    PuzzleError: it is no run's directory.
  """
  path = Path(workdir) / "config.json"
  if not path.is_file():
    raise PuzzleError(f"{workdir} is no run's directory: it has no config.json; name one that experiments.run made")
  return Run(RunConfig.from_dict(read_json(path)), workdir, quiet=True)


def versions() -> dict[str, str]:
  """Of what decides the results: this package, its commit where there is one, JAX and Python."""
  found = {"puzzle_jax": importlib.metadata.version("puzzle_jax"), **jax_timing.versions()}
  root = Path(__file__).parent.parent
  if (root / ".git").exists():  # else it is installed, perhaps within somebody's own repository
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
      found["git"] = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
  return found


def launch_record(*, wanted: list[str]) -> dict[str, Any]:
  """A line of the run's launches.jsonl: when, where, by which command and which versions it was started."""
  return {
    "time": time.strftime("%FT%T%z"),
    "host": socket.gethostname(),
    "command": sys.argv,
    "stages": wanted,
    "hardware": jax_timing.hardware(),
    "versions": versions(),
  }
