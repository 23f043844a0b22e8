"""Stored parent activations (paper section 3): what each layer of the parent reads, for training and for scores.

Token sets: `train`, kept in the config's dtype, for distillation; `heldout` and, where there is one, `task`, kept in
the dtype of the residual stream so that scores start from exactly what the parent computed. The parent runs one layer
at a time: it never has to be on the device whole. `layer_07.safetensors` holds `x` [rows, T, D], the input of layer 7;
`layer_L` is what the head reads. Alongside: the mean absolute value of what each subblock's last matrix multiplies (for
channel contribution).
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig
from puzzle_jax.data import PackedText
from puzzle_jax.model import decoder, subblocks
from puzzle_jax.parents import Parent
from puzzle_jax.progress import Progress
from puzzle_jax.store import StageStore

SETS = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows of a layer's input, fp32 compute dtype, with where their tokens stand."""

  x_BTD: jax.Array
  context: subblocks.Context
  real_BT: jax.Array  # 1.0 for tokens, 0.0 for padding


def layer_file(name: str, layer: int) -> str:
  return f"{name}/layer_{layer:02d}.safetensors"


def to_context(config: ModelConfig, packed: PackedText, rows: slice) -> subblocks.Context:
  """Positions and document boundaries of rows."""
  return decoder.context_of(
    config, jnp.asarray(packed.positions[rows]), segments_BT=jnp.asarray(packed.segment_ids[rows])
  )


def batches(
  config: ModelConfig, packed: PackedText, x_RTD: np.ndarray, *, batch_rows: int, dtype: Any
) -> Iterator[Batch]:
  """All rows of a stored layer input, in order."""
  for start in range(0, len(x_RTD), batch_rows):
    rows = slice(start, start + batch_rows)
    real = jnp.asarray(packed.segment_ids[rows] > 0, jnp.float32)
    yield Batch(jnp.asarray(x_RTD[rows], dtype), to_context(config, packed, rows), real)


@functools.partial(jax.jit, static_argnames=("spec", "config"))
def _forward(
  spec: BlockSpec, config: ModelConfig, params: Any, x_BTD: jax.Array, context: subblocks.Context, real_BT: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The block's output, and the summed magnitude of each subblock's features."""
  sums = {}
  for subblock in spec.subblocks:
    p = params[subblock.slot]
    features = subblocks.features(subblock, config, p, x_BTD, context=context).astype(jnp.float32)
    sums[subblock.slot] = jnp.einsum("bte,bt->e", jnp.abs(features), real_BT)
    x_BTD = x_BTD + subblocks.apply(subblock, config, p, x_BTD, context=context)[0]
  return x_BTD, sums


def write(
  store: StageStore,
  parent: Parent,
  packed: Mapping[str, PackedText],
  *,
  batch_rows: int,
  compute_dtype: Any,
  train_dtype: Any,
  progress: Progress,
) -> None:
  """Runs the parent layer by layer over the token sets and stores every layer's input; resumes after the last one."""
  architecture = parent.architecture
  config, last = architecture.config, architecture.num_layers
  dtypes = {name: train_dtype if name == "train" else compute_dtype for name in packed}
  if not all(layer_file(name, 0) in store for name in packed):
    table = np.asarray(parent.head()["embed"], np.float32)
    for name in packed:
      store.put_arrays(layer_file(name, 0), {"x": table[packed[name].tokens].astype(dtypes[name])})
  with progress.bar("activations", total=last, unit="layer") as bar:
    for layer, spec in enumerate(architecture.blocks):
      bar.update()
      if all(layer_file(name, layer + 1) in store for name in packed):
        continue
      params = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), parent.layer(layer))
      for name in packed:
        x = store.get_arrays(layer_file(name, layer))["x"]
        out, sums, tokens = np.empty_like(x), None, float(np.sum(packed[name].segment_ids > 0))
        for i, batch in enumerate(batches(config, packed[name], x, batch_rows=batch_rows, dtype=compute_dtype)):
          y, added = _forward(spec, config, params, batch.x_BTD, batch.context, batch.real_BT)
          out[i * batch_rows : (i + 1) * batch_rows] = np.asarray(y, x.dtype)
          sums = added if sums is None else jax.tree.map(jnp.add, sums, added)
        if name == "train":
          means = {slot: np.asarray(s) / tokens for slot, s in (sums or {}).items()}
          store.put_arrays(statistics_file(layer), {k: v for k, v in means.items() if v.size})
        store.put_arrays(layer_file(name, layer + 1), {"x": out})


def statistics_file(layer: int) -> str:
  return f"statistics/layer_{layer:02d}.safetensors"


def read(store: StageStore, name: str, layer: int) -> np.ndarray:
  """The input of a layer, [rows, T, D]; `layer` = L for what the final norm reads."""
  return store.get_arrays(layer_file(name, layer))["x"]


def read_statistics(store: StageStore, architecture: Architecture, layer: int) -> dict[str, np.ndarray]:
  """Mean absolute features by slot, [E]; empty for a subblock without weights."""
  found = store.get_arrays(statistics_file(layer))
  return {s.slot: found.get(s.slot, np.zeros(0, np.float32)) for s in architecture.blocks[layer].subblocks}
