"""Refuses a Python or a JAX that is too old before anything fails in its own words; in syntax that old Pythons read.

Sets how XLA compiles for GPUs, too, where XLA_FLAGS does not say it.
"""

import importlib.util
import os
import sys
from importlib import metadata

from puzzle_jax.errors import PuzzleError

PYTHON = (3, 11)
JAX = (0, 10)
_TRITON = "--xla_gpu_enable_triton_gemm"  # products by Triton: trying out its tilings takes minutes at every start


def prepare() -> None:
  """What is to be done before JAX first looks for devices."""
  check()
  flags = os.environ.get("XLA_FLAGS", "")
  if _TRITON not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {_TRITON}=false".strip()


def check() -> None:
  """Raises PuzzleError; says what to install, or which Python to take."""
  if sys.version_info[:2] < PYTHON:
    raise PuzzleError(
      f"puzzle_jax needs Python {_dotted(PYTHON)} or newer, {sys.executable} is {_dotted(sys.version_info[:3])}; "
      "make an environment with a newer one, for example make PYTHON=python3.12"
    )
  if importlib.util.find_spec("absl") is None:
    raise PuzzleError(
      f"puzzle_jax is not installed for {sys.executable}; use .venv/bin/python after `make quickstart`, or run "
      "`pip install -e .`"
    )
  try:
    jax = metadata.version("jax")
  except metadata.PackageNotFoundError:
    return  # the search and the serving side do without
  if tuple(map(int, jax.split(".")[:2])) < JAX:
    least = _dotted(JAX)
    raise PuzzleError(
      f"puzzle_jax needs JAX {least} or newer, {jax} is installed; run `pip install --upgrade 'jax>={least}'`"
    )


def _dotted(version: "tuple[int, ...]") -> str:
  return ".".join(map(str, version))
