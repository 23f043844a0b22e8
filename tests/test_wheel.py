"""The wheel: all of the library, the commands and configs inside of it, and nothing else; it works on its own."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from puzzle_jax import environment

ROOT = Path(__file__).parents[1]
COMMANDS = {"__init__", "clean", "generate", "launch", "run", "search", "sweep"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Built from a copy, and unpacked."""
  source, unpacked = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
  for name in ("puzzle_jax", "experiments", "configs"):
    shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
  for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(unpacked)]
  subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "."], cwd=source, check=True)
  (file,) = unpacked.glob("*.whl")
  with zipfile.ZipFile(file) as archive:
    archive.extractall(unpacked)
  file.unlink()
  return unpacked


def test_contents(wheel: Path) -> None:
  (info,) = (p.name for p in wheel.glob("*.dist-info"))
  assert {p.name for p in wheel.iterdir()} == {"puzzle_jax", info}
  found = {p.relative_to(wheel / "puzzle_jax").as_posix() for p in (wheel / "puzzle_jax").rglob("*") if p.is_file()}
  library = {p.relative_to(ROOT / "puzzle_jax").as_posix() for p in (ROOT / "puzzle_jax").rglob("*") if p.is_file()}
  configs = {f"configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
  commands = {name for name in found if name.startswith("experiments/")}
  assert commands >= {f"experiments/{name}.py" for name in COMMANDS}
  assert not commands & {"experiments/readme.py", "experiments/golden.py"}
  assert found - commands == {name for name in library if "__pycache__" not in name} | configs
  assert (wheel / info / "licenses" / "LICENSE").is_file()
  assert "Requires-Python: >=3.11" in (wheel / info / "METADATA").read_text()


def test_nothing_imports_what_is_not_there(wheel: Path) -> None:
  for path in wheel.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
      names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      assert not {name.partition(".")[0] for name in names} & {"experiments", "configs", "tests"}, path


def test_a_command_of_the_wheel_finds_its_configs(wheel: Path, tmp_path: Path) -> None:
  """Beside somebody's own packages of the same names."""
  for name in ("experiments", "configs"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
  command = [sys.executable, "-m", "puzzle_jax.experiments.run", "--config=configs/tiny.py:x", "--workdir=run"]
  environ = os.environ | {"PYTHONPATH": str(wheel)}
  done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
  assert done.stderr.splitlines()[-1] == "error: this config has no variants; leave out the colon and what follows it"


def test_versions_are_said_once_or_agree() -> None:
  setup = (ROOT / "setup.py").read_text()
  assert f'"jax>={".".join(map(str, environment.JAX))},' in setup
  assert f'python_requires=">={".".join(map(str, environment.PYTHON))}"' in setup
  version = re.search(r'version="([\d.]+)"', setup)
  assert version
  assert f"version: {version[1]}\n" in (ROOT / "CITATION.cff").read_text()
