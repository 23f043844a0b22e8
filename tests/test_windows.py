"""Training activations in every tier: the same numbers, checked when read, gone on from where a run ended."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puzzle_jax import mesh, rolling, windows
from puzzle_jax.arch import Architecture
from puzzle_jax.build_library import layer_groups, order
from puzzle_jax.data import PackedText
from puzzle_jax.errors import PuzzleError
from puzzle_jax.model import decoder
from puzzle_jax.rolling import ActivationsConfig
from puzzle_jax.store import CorruptFileError
from puzzle_jax.windows import DiskTier, Shape, Window

SHAPE = Shape(shards=2, rows=4, tokens=24, width=32, dtype="float32")
ONE_DEVICE = mesh.build(mesh.MeshConfig())


@dataclasses.dataclass(frozen=True)
class Parent:
  architecture: Architecture
  params: decoder.Tree
  packed: PackedText

  def window(self, tier: windows.Tier, shape: Shape = SHAPE, attention: str = "exact") -> Window:
    return Window(
      self.architecture.config, self.packed, ONE_DEVICE, tier=tier, shape=shape, attention=attention, dtype="float32"
    )

  def rolled(self, window: Window, to: int) -> dict[str, np.ndarray]:
    """Statistics of the last layer that the window was taken through."""
    window.start(np.asarray(self.params["embed"]))
    for layer in range(to):
      statistics = window.advance(layer, self.architecture.blocks[layer], self.params["layers"][layer])
    return statistics

  def layer_inputs(self, **context: np.ndarray) -> np.ndarray:
    apply = jax.jit(decoder.apply, static_argnums=0)
    out = apply(self.architecture, self.params, self.packed.tokens, **context).layers_L
    return np.stack([self.params["embed"][self.packed.tokens], *out])


@pytest.fixture(scope="module")
def parent(model, packed) -> Parent:
  return Parent(*model("gqa2/w48", "gqa2/w48", "none/linear"), packed)


@pytest.fixture
def tier(request, tmp_path) -> windows.Tier:
  return windows.open_tier(request.param, SHAPE, ONE_DEVICE, folder=str(tmp_path), key="a")


def read(window: Window, layer: int) -> np.ndarray:
  return np.concatenate([batch.x[0] for batch in window.batches([layer], range(SHAPE.shards))])


@pytest.mark.parametrize("tier", ["device", "host", "disk"], indirect=True)
def test_every_tier_holds_what_the_parent_computes(parent, tier):
  window = parent.window(tier)
  statistics = parent.rolled(window, 3)
  expected = parent.layer_inputs(positions_BT=parent.packed.positions, segments_BT=parent.packed.segment_ids)
  for layer in range(4):
    np.testing.assert_allclose(read(window, layer), expected[layer], rtol=1e-5, atol=1e-5)
  (pair,) = window.batches([1, 2], [1])
  np.testing.assert_array_equal(pair.x, np.stack([read(window, i)[4:] for i in (1, 2)]))
  np.testing.assert_array_equal(pair.real_BT, parent.packed.segment_ids[4:8] > 0)
  x = expected[2][parent.packed.segment_ids > 0]
  scale = np.asarray(parent.params["layers"][2]["ffn"]["norm"])
  normed = x / np.sqrt(np.mean(np.square(x), axis=1, keepdims=True) + 1e-5) * scale
  np.testing.assert_allclose(statistics["ffn"], np.abs(normed).mean(axis=0), rtol=1e-5)  # of a linear FFN
  assert statistics["attention"].size == 0
  assert window.latest(3) == 3
  window.drop(3)
  assert window.latest(3) == 2


def test_fast_attention_lets_a_row_be_one_document(parent, tmp_path):
  window = parent.window(windows.HostTier(SHAPE, ONE_DEVICE), attention="fast")
  parent.rolled(window, 2)
  np.testing.assert_allclose(read(window, 2), parent.layer_inputs()[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, error", [("bfloat16", 2**-8), ("float8", 2**-4)])
def test_rounded_storage(dtype, error):
  """float8 keeps three bits of each value down to a 2^15th of its token's largest, however large that is."""
  x = np.random.default_rng(0).standard_normal((2, 24, 32)).astype(np.float32)
  x[0, 0] *= 24_116
  shape = dataclasses.replace(SHAPE, shards=1, rows=2, dtype=dtype)
  for tier in (windows.HostTier(shape, ONE_DEVICE), windows.DeviceTier(shape)):
    tier.write(0, 0, windows.encode(jnp.asarray(x), dtype))
    found = windows.decode(tier.read(0, 0))
    largest = np.abs(x).max(axis=-1, keepdims=True)
    np.testing.assert_array_less(np.abs(found - x), error * np.abs(x) + largest * 2.0**-15)
  assert shape.size == 2 * 24 * (32 * (2 if dtype == "bfloat16" else 1) + (4 if dtype == "float8" else 0))


# On disk


def disk(folder: Path, key: str = "a") -> DiskTier:
  tier = windows.open_tier("disk", SHAPE, ONE_DEVICE, folder=str(folder), key=key)
  assert isinstance(tier, DiskTier)
  return tier


def test_a_killed_run_goes_on_from_the_disk(parent, tmp_path):
  window = parent.window(disk(tmp_path))
  parent.rolled(window, 2)
  expected = read(window, 2)
  again = parent.window(disk(tmp_path))
  assert again.latest(3) == 2
  np.testing.assert_array_equal(read(again, 2), expected)
  assert parent.window(disk(tmp_path, key="b")).latest(3) is None  # made of something else


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "swap"])
def test_corrupt_shards_are_named_and_not_used(parent, tmp_path, damage):
  parent.rolled(parent.window(disk(tmp_path)), 2)
  folder = tmp_path / "window" / "process_0" / "layer_02"
  first, second = (folder / shard / "x" / "c" / "0" / "0" / "0" for shard in "01")
  if damage == "flip":
    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
  elif damage == "truncate":
    first.write_bytes(first.read_bytes()[:-9])
  elif damage == "delete":
    first.unlink()
  else:
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(whole)
  window = parent.window(disk(tmp_path))
  with pytest.raises(CorruptFileError, match=r"layer_02: shard 0 is missing or corrupt \(.*start again"):
    read(window, 2)
  assert window.latest(2) == 1
  assert parent.window(disk(tmp_path)).latest(2) == 1


def test_bucket_urls_go_the_same_way():
  """Another of tensorstore's stores in a bucket's place."""
  tier = windows.open_tier("disk", SHAPE, ONE_DEVICE, folder="memory://bucket/run", key="a")
  x = np.random.default_rng(0).standard_normal((8, 24, 32)).astype(np.float32)
  for i in range(2):
    tier.write(5, i, {"x": jnp.asarray(x[4 * i : 4 * i + 4])})
  np.testing.assert_array_equal(tier.read(5, 1)["x"], x[4:])
  tier.clear()
  assert not tier.has(5)
  with pytest.raises(PuzzleError, match=r"activations.location='nfs://x/window/process_0' cannot be opened"):
    windows.open_tier("disk", SHAPE, ONE_DEVICE, folder="nfs://x", key="a")


# The order of things


def test_windows_groups_and_batches(packed):
  assert [part.num_rows for part in rolling.cut(packed, 0, 3)] == [6]  # two rows fill no batch
  assert [part.num_rows for part in rolling.cut(packed, 5 * 24, 2)] == [4, 4]
  assert [part.num_rows for part in rolling.cut(packed, 1, 2)] == [2] * 4
  with pytest.raises(PuzzleError, match=r"bld\.batch_rows=9 is more than the 8 rows of data.train_tokens"):
    rolling.cut(packed, 0, 9)
  assert layer_groups("aaaba", at_most=2) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
  batches = order(3, steps=7, seed=(0,))
  assert sorted(batches[:3]) == sorted(batches[3:6]) == [0, 1, 2]
  assert len(batches) == 7


def test_what_is_read_ahead_comes_in_order_and_errors_come_through():
  assert list(windows.ahead(lambda i: i * i, range(7))) == [0, 1, 4, 9, 16, 25, 36]

  def load(i: int) -> int:
    if i == 3:
      raise CorruptFileError("third")
    return i

  found = []
  with pytest.raises(CorruptFileError, match="third"):
    found += windows.ahead(load, range(7))
  assert found == [0, 1, 2]


@pytest.mark.parametrize(
  "change, message",
  [
    ({"dtype": "int8"}, "activations.dtype='int8' is not one of float32, bfloat16, float8"),
    ({"attention": "dense"}, "activations.attention='dense' is not one of exact, fast"),
    ({"tier": "tape"}, "activations.tier='tape' is not one of auto, device, host, disk"),
    ({"window_tokens": -1}, "activations.window_tokens=-1 must be at least 0"),
  ],
)
def test_refuses(change, message):
  with pytest.raises(PuzzleError, match=message):
    ActivationsConfig(**change)
