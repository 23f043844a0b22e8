"""Programs on eight virtual CPU devices, in a process of their own: their number is fixed once JAX has begun."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from xla_flags import QUICK


def run(program: str, *args: str) -> Any:
  """What a program prints last, as JSON."""
  done = subprocess.run(
    [sys.executable, "-c", program, *args],
    env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {QUICK}", "JAX_PLATFORMS": "cpu"},
    cwd=Path(__file__).parents[1],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])
