"""Scales of what the child's matrices multiply, for 8-bit floats, from the activations that its run has stored.

Each of the child's layers reads what the parent's layer read on held-out text, so that layers stand alone: one is in
memory at a time, however large the model. The layers are those of the modelling files that travel with an export.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from puzzle_jax.arch import Architecture
from puzzle_jax.errors import PuzzleError
from puzzle_jax.serving import fp8
from puzzle_jax.serving.hf.configuration_puzzle import PuzzleConfig
from puzzle_jax.serving.hf.modeling_puzzle import LlamaRotaryEmbedding, PuzzleDecoderLayer
from puzzle_jax.serving.padding import padded_layers
from puzzle_jax.store import StageStore
from puzzle_jax.weights import StoredModel

_ROWS = 4  # at once


@torch.inference_mode()
def input_scales(
  model: StoredModel, padded: Architecture, config: dict[str, Any], *, workdir: Path
) -> dict[str, float]:
  """The largest magnitude that each matrix of the layers reads, over the largest 8-bit float, by module name.

  Args:
    model: the child.
    padded: its architecture as exported.
    config: the export's config.json.
    workdir: of the run that the child is of; its stages `data` and `activations` are read.

  Raises:
    PuzzleError: the run has not stored what its layers read, or not of this model.
  """
  packed = _stored(workdir, "data", "heldout.safetensors")
  positions, segments = (torch.from_numpy(packed[key]).long() for key in ("positions", "segment_ids"))
  settings = PuzzleConfig(**config, attn_implementation="sdpa")
  rotary = LlamaRotaryEmbedding(settings)
  causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
  scales: dict[str, float] = {}
  for i, arrays in enumerate(padded_layers(model, padded, dtype=np.float32)):
    x = torch.from_numpy(_stored(workdir, "activations", f"heldout/layer_{i:02d}.safetensors")["x"]).float()
    if x.shape != (*segments.shape, padded.config.hidden_size):
      raise PuzzleError(
        f"{workdir}: activations of layer {i} are of shape {tuple(x.shape)}; is this child of that run?"
      )
    layer = _layer(settings, padded, i, arrays)
    largest: dict[str, float] = {}
    for start in range(0, len(x), _ROWS):
      rows = slice(start, start + _ROWS)
      same = segments[rows, :, None] == segments[rows, None, :]
      watch = _watch(layer, largest, segments[rows] > 0)
      layer(x[rows], attention_mask=(same & causal)[:, None], position_embeddings=rotary(x, positions[rows]))
      for handle in watch:
        handle.remove()
    scales |= {f"model.layers.{i}.{name}": value / fp8.MAX if value else 1.0 for name, value in largest.items()}
  return scales


def _watch(layer: torch.nn.Module, largest: dict[str, float], real: torch.Tensor) -> list[Any]:
  """Notes the largest magnitude at real tokens that each matrix of a layer reads."""

  def note(name: str) -> Callable[[Any, tuple[torch.Tensor]], None]:
    def hook(module: Any, inputs: tuple[torch.Tensor]) -> None:
      largest[name] = max(largest.get(name, 0.0), float(inputs[0][real].abs().amax()))

    return hook

  linears = [(name, m) for name, m in layer.named_modules() if isinstance(m, torch.nn.Linear)]
  return [module.register_forward_pre_hook(note(name)) for name, module in linears]


def _layer(config: PuzzleConfig, padded: Architecture, i: int, arrays: Any) -> PuzzleDecoderLayer:
  with torch.device("meta"):
    layer = PuzzleDecoderLayer(config, i)
  tensors = {
    tensor.checkpoint_name: torch.from_numpy(arrays[subblock.slot][name])
    for subblock in padded.blocks[i].subblocks
    for name, tensor in subblock.tensors(padded.config).items()
  }
  layer.load_state_dict(tensors, assign=True)
  return layer.eval()


def _stored(workdir: Path, stage: str, name: str) -> dict[str, np.ndarray]:
  store = StageStore(workdir / stage)
  if name not in store:
    raise PuzzleError(
      f"{workdir} has no {stage}/{name}, which float8_tensor takes its scales from; run its stage {stage} again, or "
      "export as float8_channel"
    )
  return store.get_arrays(name)
