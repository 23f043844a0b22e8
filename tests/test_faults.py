"""A few cases of the fault drill (experiments/benchmarks/faults.py), in processes of their own."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from xla_flags import QUICK


def test_nothing_is_lost(tmp_path: Path) -> None:
  command = [sys.executable, "-m", "experiments.benchmarks.faults", f"--workdir={tmp_path}"]
  record = tmp_path / "record.json"
  done = subprocess.run(
    [*command, "--kills=2", "--damages=2", f"--record={record}"],
    cwd=Path(__file__).parents[1],
    env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "XLA_FLAGS": QUICK},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  found = json.loads(record.read_text())
  for kind in ("kills", "damages"):
    assert found[kind]["failures"] == []
    assert found[kind]["cases"] == found[kind]["passed"] == 2


COMMAND = """
import os, signal, time
from experiments import launch
def main(argv):
  os.kill(os.getpid(), signal.SIGTERM)
  time.sleep(60)
launch.run(main)
"""


def test_sigterm_ends_a_command_with_a_line() -> None:
  done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, check=False)
  assert done.returncode == 128 + signal.SIGTERM
  assert done.stderr.strip() == "stopped by SIGTERM; the same command goes on from here"
