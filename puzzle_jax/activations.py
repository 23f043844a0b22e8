"""Stored parent activations (paper section 3): what each layer of the parent reads on held-out tokens, for scores.

Training tokens roll through the layers instead (`windows`). Token sets: `heldout` and, where there is one, `task`, kept
in the dtype of the residual stream so that scores start from exactly what the parent computed. The parent runs one
layer at a time: it never has to be on the device whole. `layer_07.safetensors` holds `x` [rows, T, D], the input of
layer 7; `layer_L` is what the head reads.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from puzzle_jax.arch import BlockSpec, ModelConfig
from puzzle_jax.data import PackedText
from puzzle_jax.mesh import fetch, place, rows_of_layers, rows_spec
from puzzle_jax.model import decoder, subblocks
from puzzle_jax.parents import Parent
from puzzle_jax.progress import Progress
from puzzle_jax.store import StageStore


class Batch(NamedTuple):
  """Rows of what layers read, fp32, with where their tokens stand.

  Attributes:
    x: [B, T, D] of one layer, or [G, B, T, D] of neighbouring ones.
    context: positions and document boundaries.
    real_BT: 1.0 for tokens, 0.0 for padding.
  """

  x: jax.Array
  context: subblocks.Context
  real_BT: jax.Array

  def layer(self, g: int) -> "Batch":
    """The same of one of the layers."""
    return self._replace(x=self.x[g])


def layer_file(name: str, layer: int) -> str:
  return f"{name}/layer_{layer:02d}.safetensors"


Where = tuple[subblocks.Context, jax.Array]  # a batch's, without what is read


def to_context(config: ModelConfig, packed: PackedText, rows: slice) -> subblocks.Context:
  """Positions and document boundaries of rows."""
  return decoder.context_of(
    config, jnp.asarray(packed.positions[rows]), segments_BT=jnp.asarray(packed.segment_ids[rows])
  )


@functools.partial(jax.jit, static_argnames=("config", "one_document"))
def _where(config: ModelConfig, positions_BT: jax.Array, segments_BT: jax.Array, one_document: bool) -> Where:
  segments = None if one_document else segments_BT
  return decoder.context_of(config, positions_BT, segments_BT=segments), (segments_BT > 0).astype(jnp.float32)


def where_of(config: ModelConfig, packed: PackedText, mesh: Mesh, *, one_document: bool = False) -> Where:
  """Where the tokens of some rows stand, on a mesh; without boundaries when a row shall count as one document."""
  positions = packed.positions
  if one_document:
    positions = np.broadcast_to(np.arange(positions.shape[1], dtype=np.int32), positions.shape)
  rows = rows_spec(mesh, packed.num_rows)
  return _where(config, place(mesh, positions, rows), place(mesh, packed.segment_ids, rows), one_document)


def batches(
  config: ModelConfig, packed: PackedText, inputs_RTD: Sequence[np.ndarray], mesh: Mesh, *, batch_rows: int
) -> Iterator[Batch]:
  """All rows of the stored inputs of some layers, in order; x [G, B, T, D]."""
  for start in range(0, packed.num_rows, batch_rows):
    rows = packed.rows(slice(start, start + batch_rows))
    x_GBTD = np.stack([x[start : start + batch_rows] for x in inputs_RTD]).astype(np.float32)
    spec = rows_of_layers(mesh, len(x_GBTD), rows.num_rows)
    yield Batch(place(mesh, x_GBTD, spec), *where_of(config, rows, mesh))


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def forward(spec: BlockSpec, config: ModelConfig, params: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The block's output [B, T, D], and by slot the summed magnitude of its features, [E]."""
  x, sums = batch.x, {}
  for subblock in spec.subblocks:
    p = params[subblock.slot]
    features = subblocks.features(subblock, config, p, x, context=batch.context).astype(jnp.float32)
    sums[subblock.slot] = jnp.einsum("bte,bt->e", jnp.abs(features), batch.real_BT)
    x = x + subblocks.apply(subblock, config, p, x, context=batch.context)[0]
  return x, sums


def write(
  store: StageStore,
  parent: Parent,
  packed: Mapping[str, PackedText],
  mesh: Mesh,
  *,
  batch_rows: int,
  progress: Progress,
) -> None:
  """Runs the parent layer by layer over the token sets and stores every layer's input; resumes after the last one."""
  architecture = parent.architecture
  config, last = architecture.config, architecture.num_layers
  if not all(layer_file(name, 0) in store for name in packed):
    table = np.asarray(parent.head()["embed"], np.float32)
    for name in packed:
      store.put_arrays(layer_file(name, 0), {"x": table[packed[name].tokens]})
  with progress.bar("activations", total=last, unit="layer") as bar:
    for layer, spec in enumerate(architecture.blocks):
      bar.update()
      if all(layer_file(name, layer + 1) in store for name in packed):
        continue
      params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), parent.layer(layer))
      for name in packed:
        inputs = batches(config, packed[name], [read(store, name, layer)], mesh, batch_rows=batch_rows)
        outputs = [fetch(forward(spec, config, params, batch.layer(0))[0]) for batch in inputs]
        store.put_arrays(layer_file(name, layer + 1), {"x": np.concatenate(outputs)})


def read(store: StageStore, name: str, layer: int) -> np.ndarray:
  """The input of a layer, [rows, T, D]; `layer` = L for what the final norm reads."""
  return store.get_arrays(layer_file(name, layer))["x"]
