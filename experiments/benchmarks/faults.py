"""What a run loses when it is killed, its files are damaged or its disk is full (docs/reliability.md):

    python -m experiments.benchmarks.faults --workdir=runs/faults --kills=160 --kills_of_two=40 --damages=500 \
      --full_disks=50

A case takes the tiny run to the beginning of a stage, injects one fault, starts again and holds what comes out
against the undisturbed run. Kills: SIGKILL before each write, rename and removal in turn, and at random moments; those
of two kill one of two processes that are one run (`jax.distributed`), and hold against such a run of two. Damages: a
file is cut, one of its bits is flipped, or it is replaced by another. Full disks: a small tmpfs, for root. Each case is
added to WORKDIR/tally.jsonl when it is over: started again, the drill goes on. Writes experiments/results/faults.json.
"""

import collections
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import app, flags

import puzzle_jax
from configs import tiny
from experiments import RESULTS, tiny_parent
from puzzle_jax import distributed
from puzzle_jax.config import RunConfig
from puzzle_jax.costs import jax_timing
from puzzle_jax.pipeline import STAGES
from puzzle_jax.progress import Progress
from puzzle_jax.runs import versions
from puzzle_jax.store import MANIFEST, Workdir, write_json

_WORKDIR = flags.DEFINE_string("workdir", "runs/faults", "Where the runs and the tally are kept.")
_COUNTS = {
  kind: flags.DEFINE_integer(kind, 0, f"Cases of {kind.replace('_', ' ')} to have in the tally.", lower_bound=0)
  for kind in ("kills", "kills_of_two", "damages", "full_disks")
}
_RECORD = flags.DEFINE_string("record", str(RESULTS / "faults.json"), "The record.")

NAMES = [stage.name for stage in STAGES]
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
_HEARTBEAT_S = 10  # of two processes
_LIMIT_S = 300.0  # for a start to end by itself
_STUCK = 255


@dataclasses.dataclass(frozen=True)
class Ended:
  """How a start ended.

  Attributes:
    codes: exit status of each process; minus the signal's number where one ended it, `_STUCK` where nothing did.
    said: what they printed.
    seconds: until then.
  """

  codes: tuple[int, ...]
  said: str
  seconds: float

  @property
  def code(self) -> int:
    """The first that is no success."""
    return next((code for code in self.codes if code), 0)


class Watch:
  """Counts changes to files below a folder from within the process, and kills it before one of them.

  Python's audit events are used: what compiled libraries write by themselves (orbax's arrays) is not seen.

  Args:
    root: the folder.
    kill_before: number of the change, from 0; None: never.
  """

  def __init__(self, root: Path, *, kill_before: int | None = None):
    self._root, self._kill_before = os.fspath(root.absolute()), kill_before
    self.changes = 0
    self.read: set[str] = set()
    self._lock = threading.Lock()

  def __call__(self, event: str, args: tuple[Any, ...]) -> None:
    if event != "open" and event not in _CHANGES:
      return
    if not isinstance(args[0], str | os.PathLike) or not os.path.abspath(args[0]).startswith(self._root):
      return
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
      self.read.add(os.path.relpath(args[0], self._root))
      return
    with self._lock:
      if self.changes == self._kill_before:
        os.kill(os.getpid(), signal.SIGKILL)
      self.changes += 1


class Drill:
  """The undisturbed run, and cases beside it.

  Args:
    root: for all files; what is there is used again.
    processes: of a run.
  """

  def __init__(self, root: Path, *, processes: int = 1):
    self.root, self.processes = root.absolute(), processes
    self.root.mkdir(parents=True, exist_ok=True)
    self.reference = self.root / "reference"
    self._config = self._tiny(table=str(self.root / "costs.json"))  # given, since times are never the same twice
    notes = self.root / "reference.json"
    if not notes.exists():
      shutil.rmtree(self.reference, ignore_errors=True)
      self._note(notes)
    self._notes = json.loads(notes.read_text())
    self.contents = {name: Workdir(self.reference).stage(name).content() for name in NAMES}

  def _tiny(self, *, table: str) -> RunConfig:
    values = tiny.get_config()
    values.parent = str(self.root / "parent")
    values.evaluation.prompts = ()
    values.costs.table = table
    if self.processes > 1:
      values.mesh.data = self.processes
      values.activations.tier = "disk"  # each writes its own rows
    return RunConfig.from_dict(values.to_dict())

  def _note(self, path: Path) -> None:
    """Makes parent and reference, with each stage's seconds, changes and reads; twice, the second time compiled."""
    if not (self.root / "parent").exists():
      self.start(lambda _: tiny_parent.write(self.root / "parent"))  # elsewhere: JAX's threads do not survive a fork
      costs = self.root / "costs"
      self.start(lambda _: puzzle_jax.run(self._tiny(table=""), costs, stages=["costs"]))
      shutil.copy(costs / "costs" / "costs.json", self.root)
    for _ in range(2):
      shutil.rmtree(self.reference, ignore_errors=True)
      notes = {}
      for name in NAMES:
        aside = [self.root / f"watched_{i}.json" for i in range(self.processes)]

        def watched(process: int, name: str = name, aside: list[Path] = aside) -> None:
          watch = Watch(self.reference)
          sys.addaudithook(watch)
          self.run(self.reference, name)
          aside[process].write_text(json.dumps({"changes": watch.changes, "read": sorted(watch.read)}))

        ended = self.start(watched)
        if ended.code:
          raise RuntimeError(f"the undisturbed run fails at {name}: {ended.said}")
        found = [json.loads(file.read_text()) for file in aside]
        changes = [watch["changes"] for watch in found]
        notes[name] = {"changes": changes, "read": found[0]["read"], "seconds": ended.seconds}
    write_json(path, notes)

  def run(self, workdir: Path, *names: str) -> None:
    puzzle_jax.run(self._config, workdir, stages=names)

  def running(self, workdir: Path, *names: str) -> Callable[[int], None]:
    """`run`, for `start`."""
    return lambda _: self.run(workdir, *names)

  def start(self, work: Callable[[int], object], *, kill: tuple[int, float] | None = None) -> Ended:
    """Does `work` in processes of their own, which have imported everything already.

    Args:
      work: gets the process's number.
      kill: a process, and after how many seconds.
    """
    begin, port = time.perf_counter(), _free_port()
    out = [self.root / f"said_{i}.txt" for i in range(self.processes)]
    children = []
    for i in range(self.processes):
      if not (child := os.fork()):

        def join_and_work(i: int = i) -> None:
          if self.processes > 1:
            distributed.start(
              coordinator=f"127.0.0.1:{port}", processes=self.processes, process=i, heartbeat_s=_HEARTBEAT_S
            )
          work(i)

        _child(join_and_work, out[i], cache=self.root / "compiled")
      children.append(child)
    if kill is not None:
      process, after = kill
      time.sleep(after)
      os.kill(children[process], signal.SIGKILL)
    codes = tuple(_end(child, begin + _LIMIT_S) for child in children)
    said = "".join(file.read_text() for file in out if file.exists())
    return Ended(codes, said, time.perf_counter() - begin)

  def up_to(self, name: str, workdir: Path) -> Path:
    """A copy of the reference as it is before a stage."""
    shutil.rmtree(workdir, ignore_errors=True)
    later = NAMES[NAMES.index(name) :] + ["datasets"] * (name == "data")
    shutil.copytree(self.reference, workdir, ignore=lambda at, _: later if Path(at) == self.reference else ())
    return workdir

  def same(self, workdir: Path, *names: str) -> str:
    """Empty, or the stages that are not what the undisturbed run made."""
    different = [n for n in names if n != "report" and Workdir(workdir).stage(n).content() != self.contents[n]]
    undone = [n for n in names if not Workdir(workdir).stage(n).done]
    return ", ".join([*(f"{n} differs" for n in different), *(f"{n} is not done" for n in undone)])

  # Cases: each returns where the fault was, and what went wrong or nothing

  def kill(self, case: int) -> tuple[str, str]:
    """SIGKILL before a change to the files, or at a moment; then a start to the end of the stage."""
    changes = [
      (name, process, i) for name in NAMES for process, n in enumerate(self._notes[name]["changes"]) for i in range(n)
    ]
    ended = Ended((), "", 0.0)
    if case % 2 == 0 and case // 2 < len(changes):
      # Every second case, the changes in an order in which any number of them is spread over all.
      name, victim, change = changes[int(np.random.default_rng(0).permutation(len(changes))[case // 2])]
      workdir, when = self.up_to(name, self.root / "case"), f"before change {change}"

      def watched(process: int) -> None:
        if process == victim:
          sys.addaudithook(Watch(workdir, kill_before=change))
        self.run(workdir, name)

      ended = self.start(watched)
    rng = np.random.default_rng(case)
    seconds = np.array([self._notes[name]["seconds"] for name in NAMES])
    while not ended.code:  # the stage may be over before its end is due, and a slow reference saved more often
      name, victim = str(rng.choice(NAMES, p=seconds / seconds.sum())), int(rng.integers(self.processes))
      after = float(rng.uniform(0, self._notes[name]["seconds"]))
      workdir, when = self.up_to(name, self.root / "case"), f"after {after:.2f} s"
      ended = self.start(self.running(workdir, name), kill=(victim, after))
    where = f"{name}, {when}" + (f", process {victim}" if self.processes > 1 else "")
    if ended.codes[victim] != -signal.SIGKILL or _STUCK in ended.codes:
      return where, f"ended with {ended.codes}: {ended.said[-500:]}"
    return where, self._again(workdir, name)

  def _again(self, workdir: Path, *names: str) -> str:
    ended = self.start(self.running(workdir, *names))
    if ended.code:
      return f"the next start ended with {ended.code}: {ended.said[-500:]}"
    return self.same(workdir, *names)

  def damage(self, case: int) -> tuple[str, str]:
    """A damaged file; then a start of its stage and the others to the first that reads it."""
    rng = np.random.default_rng([1, case])
    kind = ("cut", "bit flipped", "swapped")[case % 3]
    if case % 10 == 9:
      return self._damaged_checkpoint(rng, kind)
    readers = {
      file: reader
      for reader in reversed(NAMES)
      for file in self._notes[reader]["read"]
      if file.partition("/")[0] in NAMES[: NAMES.index(reader)] and Path(file).name != MANIFEST
    }
    file = sorted(readers)[int(rng.integers(len(readers)))]
    stage = file.partition("/")[0]
    names = NAMES[NAMES.index(stage) : NAMES.index(readers[file]) + 1]
    workdir = self.up_to(readers[file], self.root / "case")
    where = f"{file}: {_damage(workdir / file, kind, rng)}"
    ended = self.start(self.running(workdir, *names))
    if ended.code:
      return where, f"the start ended with {ended.code}: {ended.said[-500:]}"
    if file.partition("/")[2] not in ended.said:
      return where, f"not named: {ended.said[-500:]}"
    return where, self.same(workdir, *names)

  def _damaged_checkpoint(self, rng: np.random.Generator, kind: str) -> tuple[str, str]:
    workdir = self.root / "case"
    while True:
      self.up_to("gkd", workdir)
      change = int(rng.integers(self._notes["gkd"]["changes"][0]))

      def watched(_: int, change: int = change) -> None:
        sys.addaudithook(Watch(workdir, kill_before=change))
        self.run(workdir, "gkd")

      self.start(watched)
      files = [
        p for p in sorted((workdir / "gkd" / "checkpoints").glob("[0-9]*/**/*")) if p.is_file() and p.stat().st_size
      ]
      if files:
        break
    file = files[int(rng.integers(len(files)))]
    where = f"{file.relative_to(workdir)}: {_damage(file, kind, rng)}"
    ended = self.start(self.running(workdir, "gkd"))
    if ended.code:
      return where, f"the start ended with {ended.code}: {ended.said[-500:]}"
    if "checkpoint" not in ended.said:
      return where, f"not named: {ended.said[-500:]}"
    return where, self.same(workdir, "gkd")

  def full_disk(self, case: int) -> tuple[str, str]:
    """A stage on a disk that has room for a part of it; then with more room."""
    rng = np.random.default_rng([2, case])
    size = {name: _bytes(self.reference / name) for name in NAMES}
    name = str(rng.choice([name for name in NAMES if size[name] > 2**16]))
    disk = self.root / "disk"
    disk.mkdir(exist_ok=True)
    mount = ("mount", "-t", "tmpfs", "tmpfs", disk, "-o")
    subprocess.run([*mount, "size=1g"], check=True)
    try:
      workdir, room = self.up_to(name, disk / "run"), float(rng.uniform(0, 1)) * size[name]
      used = shutil.disk_usage(disk).used
      subprocess.run([*mount, f"remount,size={used + room:.0f}"], check=True)
      where = f"{name}, with room for {room / size[name]:.0%} of it"
      ended = self.start(self.running(workdir, name))
      subprocess.run([*mount, "remount,size=1g"], check=True)
      if ended.code != 1 or not ("no space left" in ended.said or "are free" in ended.said):
        return where, f"ended with {ended.code}: {ended.said[-800:]}"
      return where, self._again(workdir, name)
    finally:
      subprocess.run(["umount", disk], check=True)


def _bytes(folder: Path) -> int:
  return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return int(s.getsockname()[1])


def _end(process: int, deadline: float) -> int:
  """A child's exit status; `_STUCK`, and its end, if there is none until then."""
  while time.perf_counter() < deadline:
    found, status = os.waitpid(process, os.WNOHANG)
    if found:
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.01)
  os.kill(process, signal.SIGKILL)
  os.waitpid(process, 0)
  return _STUCK


def _child(work: Callable[[], object], out: Path, *, cache: Path) -> NoReturn:
  """What a forked process does: never returns into the drill."""
  code = 3
  try:
    sys.stdout.flush()
    with out.open("w") as f:
      os.dup2(f.fileno(), 1)
      os.dup2(f.fileno(), 2)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    work()
    if distributed.count() > 1:
      jax.distributed.shutdown()  # as at the end of an interpreter
    code = 0
  except puzzle_jax.PuzzleError as e:
    print("error:", e, file=sys.stderr)
    code = 1
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stderr.flush()
    os._exit(code)


def _damage(path: Path, kind: str, rng: np.random.Generator) -> str:
  """Damages a file and says how; a kind that would leave it as it is becomes another."""
  data = bytearray(path.read_bytes())
  others = [p for p in sorted(path.parent.glob(f"*{path.suffix}")) if p.is_file() and p.read_bytes() != data]
  if kind == "swapped" and others:
    other = others[int(rng.integers(len(others)))]
    path.write_bytes(other.read_bytes())
    return f"replaced by {other.name}"
  if kind == "cut":
    size = int(rng.integers(len(data)))
    path.write_bytes(data[:size])
    return f"cut to {size} of {len(data)} bytes"
  at, bit = int(rng.integers(len(data))), int(rng.integers(8))
  data[at] ^= 1 << bit
  path.write_bytes(data)
  return f"bit {bit} of byte {at} flipped"


def _recorded(tally: list[dict[str, Any]]) -> dict[str, Any]:
  record: dict[str, Any] = {
    "command": "python -m experiments.benchmarks.faults " + " ".join(sys.argv[1:]),
    "date": time.strftime("%F"),
    "hardware": jax_timing.hardware(),
    "versions": versions(),
  }
  for kind in _COUNTS:
    cases = [case for case in tally if case["kind"] == kind]
    record[kind] = {
      "cases": len(cases),
      "passed": sum(not case["wrong"] for case in cases),
      "by_stage": dict(collections.Counter(re.split(r"[,/]", case["where"])[0] for case in cases)),
      "failures": [f"{case['where']}: {case['wrong']}" for case in cases if case["wrong"]],
    }
  return record


def main(argv: list[str]) -> None:
  del argv
  root = Path(_WORKDIR.value)
  drill, path, progress = Drill(root), root / "tally.jsonl", Progress()
  of_two = Drill(root / "two", processes=2) if _COUNTS["kills_of_two"].value else drill
  cases = {"kills": drill.kill, "kills_of_two": of_two.kill, "damages": drill.damage, "full_disks": drill.full_disk}
  tally = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  for kind, count in _COUNTS.items():
    done = sum(case["kind"] == kind for case in tally)
    with progress.bar(kind, total=max(count.value, done), unit="case", done=done) as bar:
      for number in range(done, count.value):
        where, wrong = cases[kind](number)
        tally.append({"kind": kind, "number": number, "where": where, "wrong": wrong})
        with path.open("a") as f:
          print(json.dumps(tally[-1]), file=f)
        if wrong:
          progress.say(f"{kind} {number}: {where}: {wrong}")
        bar.update()
  write_json(Path(_RECORD.value), _recorded(tally))


if __name__ == "__main__":
  app.run(main)
