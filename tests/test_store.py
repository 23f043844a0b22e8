"""A work directory survives kills, full disks and flipped bits: whole files or none, and every damage has a name."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors

from puzzle_jax import store
from puzzle_jax.errors import PuzzleError
from puzzle_jax.store import CorruptFileError, StageStore, Workdir

KEY = {"seed": 1}
ARRAYS = {"w": np.arange(12.0).reshape(3, 4), "v": np.ones(2, np.float32)}


@pytest.fixture
def stage(tmp_path) -> StageStore:
  made = StageStore(tmp_path / "stage")
  made.begin(KEY)
  return made


def leftovers(root: Path) -> list[str]:
  return [p.name for p in root.rglob(".*")]


def test_round_trip(stage):
  stage.put_json("a.json", {"x": 1})
  stage.put_arrays("deep/b.safetensors", ARRAYS | {"t": ARRAYS["w"].T})
  with stage.put_folder("model") as folder:
    (folder / "sub").mkdir()
    (folder / "sub" / "c.txt").write_text("hello")
  stage.put_text("d.html", "½")
  stage.finish({"timing": {"seconds": 1.0}})
  again = StageStore(stage.root)
  assert (again.key, again.done, again.record) == (KEY, True, {"timing": {"seconds": 1.0}})
  assert again.names == ["a.json", "d.html", "deep/b.safetensors", "model/sub/c.txt"]
  assert again.get_json("a.json") == {"x": 1}
  assert again.path("model/sub/c.txt").read_text() == "hello"
  found = again.get_arrays("deep/b.safetensors")
  np.testing.assert_array_equal(found.pop("t"), ARRAYS["w"].T)
  np.testing.assert_equal(found, ARRAYS)
  assert again.size == sum((again.root / name).stat().st_size for name in again.names)
  assert again.missing() == []


def test_putting_a_folder_again_replaces_it(stage):
  for names in (["a", "b"], ["b", "c"]):
    with stage.put_folder("model") as folder:
      for name in names:
        (folder / name).write_text(name)
  assert StageStore(stage.root).names == ["model/b", "model/c"]
  assert sorted(p.name for p in (stage.root / "model").iterdir()) == ["b", "c"]


# Each writes `a` whole and dies while `b` is on its way.
KILLS = {
  "in the middle of a file": """
with store.replacing(s.root / "b.json") as aside:
  aside.write_text('{"half')
  die()""",
  "in the middle of an array": """
(s.root / ".tmpA1b2C3").write_bytes(b"half")  # what safetensors writes to before it renames
die()""",
  "in the middle of a folder": """
with s.put_folder("b") as folder:
  (folder / "weights").write_text("half")
  die()""",
  "between the file and its record": """
store.StageStore._record = lambda *args: die()
s.put_json("b.json", {})""",
  "between a file that was whole and its new record": """
s.put_json("b.json", {"old": 1})
store.StageStore._record = lambda *args: die()
s.put_json("b.json", {"new": 1})""",
}


@pytest.mark.parametrize("kill", KILLS)
def test_a_killed_writer_leaves_nothing_that_counts(tmp_path, kill):
  script = f"""
import os, signal
from pathlib import Path
from puzzle_jax import store
def die():
  os.kill(os.getpid(), signal.SIGKILL)
s = store.StageStore(Path({str(tmp_path)!r}))
s.begin({KEY})
s.put_json("a.json", {{}})
{KILLS[kill]}
"""
  assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
  after = StageStore(tmp_path)
  assert after.names == ["a.json"]
  assert "b.json" not in after
  assert not after.done
  after.begin(KEY)
  assert leftovers(tmp_path) == []
  assert after.get_json("a.json") == {}


def test_an_error_keeps_the_old_file(stage):
  stage.put_json("a.json", {"x": 1})
  with pytest.raises(ValueError, match="Out of range float"):
    stage.put_json("b.json", {"x": float("nan")})
  with pytest.raises(ZeroDivisionError), stage.put_folder("model") as folder:
    (folder / "weights").write_text(str(1 / 0))
  assert StageStore(stage.root).names == ["a.json"]
  assert leftovers(stage.root) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_by_name_and_the_file_made_anew(stage, damage):
  stage.put_json("a.json", {})
  stage.put_arrays("b.safetensors", ARRAYS)
  stage.finish({})
  path = stage.root / "b.safetensors"
  whole = bytearray(path.read_bytes())
  whole[-1] ^= 1
  path.unlink()
  if damage != "remove":
    path.write_bytes(whole if damage == "flip" else whole[:-8])
  damaged = StageStore(stage.root)
  assert damaged.missing() == ([] if damage == "flip" else ["b.safetensors"])
  with pytest.raises(CorruptFileError, match=r"stage/b.safetensors is missing or corrupt \(checksum\); start again"):
    damaged.get_arrays("b.safetensors")
  after = StageStore(stage.root)
  assert (after.names, after.done) == (["a.json"], False)
  after.put_arrays("b.safetensors", ARRAYS)
  np.testing.assert_equal(after.get_arrays("b.safetensors"), ARRAYS)


def test_a_folder_is_whole_or_not_used(stage):
  with stage.put_folder("model") as folder:
    for name in ("a.txt", "b.txt"):
      (folder / name).write_text(name)
  assert stage.folder("model") == stage.root / "model"
  (stage.root / "model" / "b.txt").write_text("c.txt")
  with pytest.raises(CorruptFileError, match=r"model/b\.txt is missing or corrupt"):
    stage.folder("model")
  with pytest.raises(CorruptFileError, match="other is missing or corrupt"):
    stage.folder("other")


def test_manifest_that_is_not_json(stage):
  (stage.root / store.MANIFEST).write_text("{")
  with pytest.raises(CorruptFileError, match=r"stage/manifest.json is not JSON .*delete it and start again"):
    StageStore(stage.root)


def test_another_key_wipes_and_the_same_keeps(stage):
  stage.put_json("a.json", {})
  stage.finish({})
  stage.begin(KEY)
  assert (stage.names, stage.done) == (["a.json"], False)
  (stage.root / "stray").write_text("of a killed run")
  stage.begin(KEY | {"seed": 2})
  assert (stage.names, stage.key) == ([], {"seed": 2})
  assert [p.name for p in stage.root.iterdir()] == [store.MANIFEST]


def test_content_is_all_but_timing(tmp_path):
  def content(name: str, data: dict, arrays: dict) -> str:
    stage = StageStore(tmp_path / name)
    stage.begin(KEY)
    stage.put_json("a.json", data)
    stage.put_arrays("b.safetensors", arrays)
    return stage.content()

  base = content("base", {"x": [1], "timing": {"seconds": 1.0}}, ARRAYS)
  assert content("slower", {"x": [1], "timing": {"seconds": 9.0}}, ARRAYS) == base
  assert content("untimed", {"x": [1]}, ARRAYS) == base
  assert content("value", {"x": [2], "timing": {"seconds": 1.0}}, ARRAYS) != base
  assert content("nested", {"x": [1], "y": {"timing": 1.0}}, ARRAYS) != base
  assert content("array", {"x": [1]}, ARRAYS | {"v": -ARRAYS["v"]}) != base


def test_the_lock_is_of_one_process_and_dies_with_it(tmp_path):
  script = f"""
from puzzle_jax.store import Workdir
with Workdir({str(tmp_path)!r}).lock():
  print("held", flush=True)
  input()
"""
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
  with subprocess.Popen([sys.executable, "-c", script], **pipes) as holder:
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(PuzzleError, match=rf"is in use by process {holder.pid} on .* since .*; wait for it"):
      Workdir(tmp_path).lock().__enter__()
    holder.kill()
  with Workdir(tmp_path).lock():
    assert f"process {os.getpid()} on" in (tmp_path / "lock").read_text()


def test_a_work_directory_that_cannot_be(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(PuzzleError, match=r"file/run cannot be written \(Not a directory\); choose another --workdir"):
    Workdir(tmp_path / "file" / "run").lock().__enter__()
  with pytest.raises(PuzzleError, match=r"needs about 1048576.0 GiB, .* are free; make room"):
    Workdir(tmp_path / "not" / "yet").require_space(2**50)


def put_folder(stage: StageStore) -> None:
  with stage.put_folder("b") as folder:
    (folder / "weights").write_text("")


@pytest.mark.parametrize(
  "put",
  [lambda s: s.put_json("b.json", {}), lambda s: s.put_arrays("b.safetensors", ARRAYS), put_folder],
  ids=["json", "arrays", "folder"],
)
def test_a_full_disk_says_so(stage, monkeypatch, put):
  stage.put_json("a.json", {})

  def full(self: Path, *args: object, **kwargs: object) -> None:
    self.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")

  def full_safetensors(tensors: object, path: Path) -> None:
    path.write_bytes(b"half")
    raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

  monkeypatch.setattr(Path, "write_text", full)
  monkeypatch.setattr(store.safetensors.numpy, "save_file", full_safetensors)
  with pytest.raises(PuzzleError, match=r"no space left while writing .*/stage/b.* MiB free\); make room and start"):
    put(stage)
  assert leftovers(stage.root) == []
  assert StageStore(stage.root).names == ["a.json"]
