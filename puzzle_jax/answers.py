"""The parent's answers to training rows, kept on disk, so that it need not run beside the child (`gkd.teacher`).

At each token the likeliest next tokens and their log-probabilities at the KL's temperature: what the KL with top-k
needs of the parent, to the last bit. Written once, in parts; a killed run goes on with the first part that is missing.
"""

import functools
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh

from puzzle_jax import data, divergence
from puzzle_jax import mesh as mesh_lib
from puzzle_jax.arch import Architecture
from puzzle_jax.divergence import TopTokens
from puzzle_jax.gkd_config import GKDConfig
from puzzle_jax.gkd_losses import Answered, forward
from puzzle_jax.model import decoder
from puzzle_jax.progress import Progress
from puzzle_jax.store import StageStore, Workdir

_PART_TOKENS = 1 << 18


def bytes_per_token(vocabulary: int, k: int) -> int:
  """On the disk."""
  return min(k, vocabulary) * (_id_type(vocabulary).itemsize + 4)


def _id_type(vocabulary: int) -> np.dtype[Any]:
  return np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.int32)


class AnsweredRows:
  """Rows that can be asked for with the parent's answers, which stay on the disk until then."""

  def __init__(self, packed: data.PackedText, files: list[Path], part_rows: int):
    self._packed, self._part_rows = packed, part_rows
    self._parts = [safetensors.safe_open(file, framework="numpy") for file in files]

  @property
  def num_rows(self) -> int:
    return self._packed.num_rows

  def rows(self, index: np.ndarray) -> Answered:
    """Some of the rows."""

    def read(name: str) -> np.ndarray:
      at = (divmod(int(row), self._part_rows) for row in index)
      return np.concatenate([self._parts[part].get_slice(name)[row : row + 1] for part, row in at])

    return Answered(self._packed.rows(index), TopTokens(read("ids"), read("log_p")))  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames=("architecture", "config", "mesh"))
def _answer(
  architecture: Architecture, params: Any, batch: data.PackedText, config: GKDConfig, mesh: Mesh
) -> TopTokens:
  hidden_BTD = forward(architecture, params, batch, config, mesh).hidden_BTD
  found = divergence.top_tokens(
    hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
    decoder.head_weights(params),
    k=config.kl_top_k,
    temperature=config.kl_temperature,
  )
  return jax.tree.map(lambda x: x.reshape(*batch.tokens.shape, -1), found)


def keep(
  parent: tuple[Architecture, Any],
  packed: data.PackedText,
  *,
  config: GKDConfig,
  folder: Path,
  mesh: Mesh,
  progress: Progress,
) -> AnsweredRows:
  """Has the parent answer all rows, or what is missing of them.

  Args:
    parent: architecture and parameters, these on the mesh.
    packed: the rows.
    config: of global distillation.
    folder: for the answers alone; says first how much they take.
    mesh: the devices.
    progress: for the bar.

  Raises:
    PuzzleError: too little room on the disk.
  """
  vocabulary, length = parent[0].config.vocab_size, packed.tokens.shape[1]
  part_rows = max(_PART_TOKENS // length // config.batch_rows, 1) * config.batch_rows
  names = [f"part_{i:05d}.safetensors" for i in range(-(-packed.num_rows // part_rows))]
  store = StageStore(folder)
  store.begin(
    {
      "tokens": hashlib.sha256(packed.tokens.tobytes()).hexdigest(),
      "part_rows": part_rows,
      "k": config.kl_top_k,
      "temperature": config.kl_temperature,
      "dtype": config.dtype,
      "attention": config.attention,
    }
  )
  size = packed.tokens.size * bytes_per_token(vocabulary, config.kl_top_k)
  Workdir(folder).require_space(size - store.size)
  progress.say(
    f"gkd: the parent's answers to {packed.tokens.size:,} tokens, {config.kl_top_k} likeliest each, take "
    f"{size / 2**30:.2f} GiB in {folder} until the child is trained"
  )
  with progress.bar("parent's answers", total=len(names), unit="part") as bar:
    for part, name in enumerate(names):
      if name not in store:
        found = []
        for start in range(part * part_rows, min((part + 1) * part_rows, packed.num_rows), config.batch_rows):
          batch = packed.rows(slice(start, start + config.batch_rows))
          placed = mesh_lib.put(mesh, batch, mesh_lib.rows_spec(mesh, batch.num_rows))
          found.append(mesh_lib.fetch(_answer(*parent, placed, config, mesh)))
        ids, log_p = (np.concatenate(arrays) for arrays in zip(*((f.ids_TK, f.log_p_TK) for f in found), strict=True))
        store.put_arrays(name, {"ids": ids.astype(_id_type(vocabulary)), "log_p": log_p.astype(jnp.float32)})
      bar.update()
  store.finish({})
  return AnsweredRows(packed, [store.path(name) for name in names], part_rows)
