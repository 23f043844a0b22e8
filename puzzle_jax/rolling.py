"""Windows of training tokens, and in each the layers in turn, while the parent's activations roll through (section 3).

For each group of neighbouring layers the parent's forward pass makes what the next layer reads; the group's turn uses
what it reads itself; then that is dropped. Turns that were finished before are passed over.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from puzzle_jax import distributed, memory, windows
from puzzle_jax.data import PackedText
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import Parent
from puzzle_jax.progress import Progress
from puzzle_jax.windows import Window


@dataclasses.dataclass(frozen=True)
class ActivationsConfig:
  """Of the parent's activations.

  Attributes:
    batch_rows: rows of a forward pass over held-out tokens.
    dtype: of what is stored for training: float32, bfloat16, or float8 with a scale a token.
    attention: for training, "exact" keeps the documents of a row apart, by a mask; "fast" does not, and reads none.
    window_tokens: training tokens that are stored at once; 0: all.
    tier: where: device, host or disk; auto: the first that holds them.
    location: folder or bucket (gs://…, s3://…) of the disk tier; empty: the work directory.
  """

  batch_rows: int = 8
  dtype: str = "bfloat16"
  attention: str = "exact"
  window_tokens: int = 0
  tier: str = dataclasses.field(default="auto", metadata={"result": False})
  location: str = dataclasses.field(default="", metadata={"result": False})

  def __post_init__(self) -> None:
    for name, known in (("dtype", windows.DTYPES), ("attention", windows.ATTENTION), ("tier", windows.TIERS)):
      if getattr(self, name) not in known:
        raise PuzzleError(f"activations.{name}={getattr(self, name)!r} is not one of {', '.join(known)}")
    for name, least in (("batch_rows", 1), ("window_tokens", 0)):
      if getattr(self, name) < least:
        raise PuzzleError(f"activations.{name}={getattr(self, name)} must be at least {least}")


@dataclasses.dataclass(frozen=True)
class Turn:
  """A group of layers with what they read in one window.

  Attributes:
    index: of the window.
    layers: the group; they have one shape.
    window: batches of what they read.
    statistics: for each layer, by slot, [E]: the mean magnitude of what the parent's last matrix multiplies there.
  """

  index: int
  layers: range
  window: Window
  statistics: list[dict[str, np.ndarray]]


def cut(packed: PackedText, window_tokens: int, batch_rows: int) -> list[PackedText]:
  """The windows of a training set, each of whole batches; 0 tokens: one.

  Raises:
    PuzzleError: there are not as many rows as a batch has.
  """
  count = packed.num_rows // batch_rows
  if not count:
    raise PuzzleError(
      f"bld.batch_rows={batch_rows} is more than the {packed.num_rows} rows of data.train_tokens; lower it, or ask for "
      "more tokens"
    )
  batch_tokens = batch_rows * packed.tokens.shape[1]
  each = max(1, window_tokens // batch_tokens) if window_tokens else count
  stops = [*range(0, count, each), count]
  return [packed.rows(slice(a * batch_rows, b * batch_rows)) for a, b in itertools.pairwise(stops)]


def turns(
  parent: Parent,
  groups: Sequence[range],
  parts: Sequence[PackedText],
  config: ActivationsConfig,
  mesh: Mesh,
  *,
  rows: int,
  dtype: str,
  folder: str,
  key: str,
  done: Callable[[int, range], bool],
  progress: Progress,
) -> Iterator[Turn]:
  """The turns that are not done, in order.

  Args:
    parent: read one layer at a time.
    groups: of layers.
    parts: the windows' rows.
    config: how they are stored.
    mesh: the devices.
    rows: of a training batch, which is what is stored and read at once.
    dtype: of the matrix products of the parent's forward pass.
    folder: of the disk tier.
    key: of what the activations are made of; those of another key on the disk are forgotten.
    done: whether the turn of a window and group is over.
    progress: where to say what is done.
  """
  architecture = parent.architecture

  def advance(window: Window, layer: int) -> dict[str, np.ndarray]:
    params = jax.tree.map(jnp.asarray, parent.layer(layer, np.float32))
    return window.advance(layer, architecture.blocks[layer], params)

  for index, packed in enumerate(parts):
    todo = [layers for layers in groups if not done(index, layers)]
    if not todo:
      continue
    shape = windows.Shape(
      shards=packed.num_rows // rows,
      rows=rows,
      tokens=packed.tokens.shape[1],
      width=architecture.config.hidden_size,
      dtype=config.dtype,
    )
    size = shape.size * (1 + max(map(len, groups)))
    tier = distributed.by_first(functools.partial(memory.tier_for, size)) if config.tier == "auto" else config.tier
    part = f"window {index + 1} of {len(parts)}: " if len(parts) > 1 else ""
    progress.say(f"library: {part}activations of {packed.num_tokens:,} tokens, {size / 2**30:.2f} GiB ({tier})")
    window = Window(
      architecture.config,
      packed,
      mesh,
      tier=windows.open_tier(tier, shape, mesh, folder=folder, key=f"{key} {index} {shape} {config.attention} {dtype}"),
      shape=shape,
      attention=config.attention,
      dtype=dtype,
    )
    for layers in todo:
      at = window.latest(layers[0])
      if at is None:
        window.start(parent.head(np.float32)["embed"])
        at = 0
      for layer in range(at, layers[0]):
        advance(window, layer)
        window.drop(layer)
      yield Turn(index, layers, window, [advance(window, layer) for layer in layers])
      for layer in layers:
        window.drop(layer)
    window.clear()
