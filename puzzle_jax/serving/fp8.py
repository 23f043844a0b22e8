"""Weights of 8-bit floats (E4M3) in ModelOpt's layout, which vLLM, SGLang and TensorRT-LLM load.

`float8_tensor` (ModelOpt's FP8): one scale a matrix, and one for its input, from calibration.
`float8_channel` (FP8_PER_CHANNEL_PER_TOKEN): one scale an output channel; engines scale each token as it comes.

The compressed-tensors layout would do for vLLM, but TensorRT-LLM reads only its scales by channel. Embeddings, norms,
biases and the LM head stay in bfloat16. Needs neither JAX nor PyTorch.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from puzzle_jax.arch import Architecture
from puzzle_jax.errors import PuzzleError

MAX = 448.0  # the largest E4M3 number
MULTIPLE = 16  # of which the sides of matrices must be multiples: the engines' kernels
ALGORITHMS = {"float8_tensor": "FP8", "float8_channel": "FP8_PER_CHANNEL_PER_TOKEN"}
# Engines put these matrices one under the other and keep one scale for all: with one from the start, nothing is rounded
# a second time.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def quantization_config(dtype: str) -> dict[str, Any]:
  """`quantization_config` of config.json."""
  group: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
  inputs, weights = dict(group), dict(group)
  if dtype == "float8_channel":
    inputs, weights = group | {"dynamic": True, "strategy": "token"}, group | {"strategy": "channel"}
  return {
    "quant_method": "modelopt",
    "quant_algo": ALGORITHMS[dtype],
    "config_groups": {"group_0": {"input_activations": inputs, "weights": weights, "targets": ["Linear"]}},
    "ignore": ["lm_head"],
    "producer": {"name": "modelopt"},
  }


def legacy_config(dtype: str) -> dict[str, Any]:
  """hf_quant_config.json: the same for older readers."""
  quantization = {"quant_algo": ALGORITHMS[dtype], "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
  return {"producer": {"name": "modelopt"}, "quantization": quantization}


def check_shapes(architecture: Architecture) -> None:
  """Raises PuzzleError where a matrix has a side that engines cannot multiply in 8 bits."""
  for name, shape in architecture.checkpoint_shapes().items():
    if _is_quantised(name, shape) and any(n % MULTIPLE for n in shape):
      raise PuzzleError(
        f"tensor {name} has shape {shape}; in 8 bits engines need multiples of {MULTIPLE}. Export in bfloat16"
      )


def quantised(
  tensors: Iterable[tuple[str, np.ndarray]], *, input_scales: Mapping[str, float] | None
) -> Iterator[tuple[str, np.ndarray]]:
  """Named tensors with the matrices of the layers in 8 bits and their scales behind them, the rest in bfloat16.

  Args:
    tensors: all of a model by checkpoint name, layer by layer, fp32.
    input_scales: by module name, such as `model.layers.0.mlp.up_proj`; then matrices get one scale each too. None: a
      scale for each output channel.
  """
  for _, group in itertools.groupby(tensors, key=lambda item: item[0].split(".")[:3]):
    layer = dict(group)
    largest = {name: np.abs(array).max() for name, array in layer.items() if _is_quantised(name, array.shape)}
    for name, array in layer.items():
      if name not in largest:
        yield name, array.astype(ml_dtypes.bfloat16)
        continue
      module = name.removesuffix(".weight")
      if input_scales is None:
        scale = _scale(np.abs(array).max(axis=1))
        yield name, _rounded(array / scale[:, None])
      else:
        scale = _scale(np.array(max(largest[n] for n in _fused_with(name) if n in largest)))
        yield name, _rounded(array / scale)
        yield f"{module}.input_scale", np.array(input_scales[module], np.float32)
      yield f"{module}.weight_scale", scale


def _is_quantised(name: str, shape: tuple[int, ...]) -> bool:
  return len(shape) == 2 and name.startswith("model.layers.")


def _fused_with(name: str) -> list[str]:
  prefix, module, kind = name.rsplit(".", 2)
  return next(([f"{prefix}.{m}.{kind}" for m in fused] for fused in _FUSED if module in fused), [name])


def _scale(largest: np.ndarray) -> np.ndarray:
  """What maps the largest magnitude to `MAX`; 1 where all is zero."""
  return np.where(largest > 0, largest / MAX, 1).astype(np.float32)


def _rounded(array: np.ndarray) -> np.ndarray:
  return np.clip(array, -MAX, MAX).astype(ml_dtypes.float8_e4m3fn)
