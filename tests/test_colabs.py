"""The notebooks, executed from top to bottom: on the tiny run, and on the records that come with the repository."""

import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tiny_costs import write_costs

import puzzle_jax
from configs import tiny
from experiments import tiny_parent
from puzzle_jax.errors import PuzzleError
from puzzle_jax.records import NAMES, open_record

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A tiny run whose blocks are scored by two metrics."""
  folder = tmp_path_factory.mktemp("colabs")
  tiny_parent.write(folder / "parent")
  config = tiny.get_config()
  config.parent = str(folder / "parent")
  write_costs(folder / "costs.json", config.parent)
  config.costs.table = str(folder / "costs.json")
  puzzle_jax.run(config.to_dict(), folder / "run", quiet=True)
  return folder / "run"


@pytest.fixture(autouse=True)
def kernels_find_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
  monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))


def execute(path: Path, folder: Path, workdir: str = "") -> nbformat.NotebookNode:
  """Runs a notebook with another WORKDIR; an error in a cell is raised."""
  notebook = nbformat.read(path, as_version=4)
  (switch,) = [cell for cell in notebook.cells if cell.source.startswith('WORKDIR = ""')]
  switch.source = switch.source.replace('""', repr(workdir), 1)
  folder.mkdir(exist_ok=True)
  client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}})
  # Its own stand-in for widgets in a page misses the end of a cell now and then, and waits until the timeout. Without
  # it, what `interact` draws is an output of its cell.
  client.comm_open_handlers.clear()
  client.execute()
  return notebook


def outputs(notebook: nbformat.NotebookNode) -> str:
  return str([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_on_the_tiny_run(path: Path, workdir: Path, tmp_path: Path) -> None:
  notebook = execute(path, tmp_path / "here", str(workdir))
  assert "Traceback" not in outputs(notebook)
  figures = [cell for cell in notebook.cells if "application/vnd.plotly.v1+json" in str(cell.get("outputs", ""))]
  assert len(figures) == {"block_scores": 4, "search": 3, "block_library": 3, "child": 1}[path.stem]


@pytest.mark.parametrize("name", ["block_scores", "search", "block_library"])
def test_runs_on_the_record(name: str, tmp_path: Path) -> None:
  shown = outputs(execute(ROOT / "colabs" / f"{name}.ipynb", tmp_path))
  assert "Traceback" not in shown
  assert "30 layers" in shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_without_outputs(path: Path) -> None:
  cells = nbformat.read(path, as_version=4).cells
  assert all(cell.outputs == [] and cell.execution_count is None for cell in cells if cell.cell_type == "code")
  assert all(len(cell.source.splitlines()) <= 22 for cell in cells)


def test_records(workdir: Path, tmp_path: Path) -> None:
  for name in NAMES:
    record = open_record(name=name)
    assert record.table.num_layers == len(record.summary["scores"]) == 30
  whole = open_record(workdir)
  kept = tmp_path / "kept"
  for file in ("report/summary.json", "search/table.json"):
    (kept / file).parent.mkdir(parents=True)
    shutil.copy(workdir / file, kept / file)
  assert open_record(kept).table.to_json() == whole.table.to_json()
  assert open_record(kept).summary["scores"] == whole.summary["scores"]
  assert open_record(kept.as_uri()).summary["scores"] == whole.summary["scores"]
  with pytest.raises(PuzzleError, match=re.escape(f"{tmp_path}/report/summary.json cannot be read")):
    _ = open_record(tmp_path).summary
  with pytest.raises(PuzzleError, match="there is no record 'x'; known: full_space, quickstart"):
    open_record(name="x")
