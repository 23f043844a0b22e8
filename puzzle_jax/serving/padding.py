"""The child as serving engines take it: equal outputs in shapes that they can say.

FFNs get zero channels up to a multiple of what a reader rounds up to, or quantises by: down(silu(gate) · up) of a zero
channel is zero. Biases, which readers know everywhere in attention or nowhere, are completed with zeros.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from puzzle_jax import weights
from puzzle_jax.arch import Architecture, BlockSpec, Subblock, SwiGLU, Tensor
from puzzle_jax.weights import StoredModel


def padded_architecture(architecture: Architecture, *, ffn_multiple: int, untie: bool = False) -> Architecture:
  """The architecture with FFN widths rounded up to a multiple and biases everywhere or nowhere.

  Args:
    architecture: the child's.
    ffn_multiple: 1 keeps widths.
    untie: give the LM head its own copy of a tied embedding.
  """
  bias = architecture.config.qkv_bias or architecture.config.o_bias
  tied = architecture.config.tie_embeddings and not untie
  config = dataclasses.replace(architecture.config, qkv_bias=bias, o_bias=bias, tie_embeddings=tied)

  def padded(ffn: Subblock) -> Subblock:
    return SwiGLU(-(-ffn.width // ffn_multiple) * ffn_multiple) if isinstance(ffn, SwiGLU) else ffn

  return Architecture(config, tuple(BlockSpec(b.attention, padded(b.ffn)) for b in architecture.blocks))


def padded_layers(
  model: StoredModel, padded: Architecture, *, dtype: np.typing.DTypeLike
) -> Iterator[dict[str, dict[str, np.ndarray]]]:
  """The model's layers one by one, with the zeros that `padded` has beyond its own architecture."""

  def fitted(array: np.ndarray | None, tensor: Tensor) -> np.ndarray:
    if array is not None and array.shape == tensor.shape:
      return array
    full = np.zeros(tensor.shape, dtype)
    if array is not None:
      full[tuple(slice(n) for n in array.shape)] = array
    return full

  for i, block in enumerate(padded.blocks):
    layer = model.layer(i, dtype)
    yield {
      subblock.slot: {
        name: fitted(layer[subblock.slot].get(name), tensor) for name, tensor in subblock.tensors(padded.config).items()
      }
      for subblock in block.subblocks
    }


def padded_tensors(
  model: StoredModel, padded: Architecture, *, dtype: np.typing.DTypeLike
) -> Iterator[tuple[str, np.ndarray]]:
  """All tensors of the padded model by full checkpoint name, one layer in memory at a time."""
  head = model.head(dtype)
  if "head" not in head and not padded.config.tie_embeddings:
    head["head"] = head["embed"]
  return weights.named_tensors(padded, head, padded_layers(model, padded, dtype=dtype))
