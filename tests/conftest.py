"""Shared by the tests: tiny random models and packed rows."""

import math
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend import core
from xla_flags import QUICK

from puzzle_jax import preemption
from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig
from puzzle_jax.data import PackedText
from puzzle_jax.model import decoder
from puzzle_jax.progress import Progress

if "PYTEST_XDIST_WORKER" not in os.environ:
  # What several tests compile is compiled once, by whichever process of this session comes first: half of all the time.
  _programs = tempfile.TemporaryDirectory(prefix="puzzle_jax_tests_")
  for name, value in (("compilation_cache_dir", _programs.name), ("persistent_cache_min_compile_time_secs", 0.05)):
    jax.config.update(f"jax_{name}", value)
    os.environ[f"JAX_{name.upper()}"] = str(value)  # of all other processes
  os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()  # one's own come last and win
  os.environ.setdefault("OMP_NUM_THREADS", "1")  # as below, of all other processes
jax.config.update("jax_numpy_rank_promotion", "raise")
torch.set_num_threads(1)  # the oracles are tiny, and the tests run in parallel

TINY = {"vocab_size": 67, "hidden_size": 32, "num_heads": 4, "head_dim": 8, "max_context": 256, "rope_theta": 100.0}


def _architecture(*blocks: str, **config: Any) -> Architecture:
  return Architecture(ModelConfig(**(TINY | config)), tuple(map(BlockSpec.parse, blocks)))


@pytest.fixture(scope="session")
def architecture() -> Callable[..., Architecture]:
  """Makes a tiny one of block names; keywords change its ModelConfig."""
  return _architecture


@pytest.fixture(scope="session")
def model() -> Callable[..., tuple[Architecture, decoder.Tree]]:
  """Makes a tiny architecture and random parameters, norms and biases included (NumPy's: nothing is compiled)."""

  def make(*blocks: str, seed: int = 0, **config: Any) -> tuple[Architecture, decoder.Tree]:
    architecture, rng = _architecture(*blocks, **config), np.random.default_rng(seed)

    def draw(w: jax.ShapeDtypeStruct) -> np.ndarray:
      z = rng.standard_normal(w.shape, np.float32)
      return 1 + 0.3 * z if len(w.shape) == 1 else z * np.float32(w.shape[-1]) ** -0.5

    shapes = jax.eval_shape(lambda: decoder.init(architecture, jax.random.key(0)))
    return architecture, jax.tree.map(lambda w: jnp.asarray(draw(w)), shapes)

  return make


@pytest.fixture(scope="session")
def packed() -> PackedText:
  """Eight rows of 24 tokens: documents of 9, 12 and 3 in the even rows, of 20 and padding in the odd ones."""
  rows = [[1] * 9 + [2] * 12 + [3] * 3, [1] * 20 + [0] * 4] * 4
  positions = [[*range(9), *range(12), *range(3)], [*range(20), *[0] * 4]] * 4
  tokens = np.random.default_rng(0).integers(0, TINY["vocab_size"], (8, 24))
  return PackedText(*(np.array(x, np.int32) for x in (tokens, rows, positions)))


def _matmul_flops(jaxpr: core.Jaxpr) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    total += sum(_matmul_flops(sub) for sub in core.jaxprs_in_params(eqn.params))
    if eqn.primitive.name == "dot_general":
      ((contracted, _), _), lhs = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
      total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[i] for i in contracted)
  return total


@pytest.fixture(scope="session")
def matmul_flops() -> Callable[[core.Jaxpr], int]:
  """Counts those of all dot products of a program, in its subprograms too."""
  return _matmul_flops


@pytest.fixture
def listening() -> Iterator[Callable[[], None]]:
  """SIGTERM is taken for preemption; call it to begin anew."""
  before = signal.getsignal(signal.SIGTERM)
  preemption.listen()
  yield preemption.listen
  preemption.listen()
  signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def quiet() -> Progress:
  return Progress(quiet=True)


@pytest.fixture(scope="session")
def modelling_files_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
  """Transformers copies modelling files of checkpoints to a cache before it runs them: to a fresh one."""
  import transformers

  with pytest.MonkeyPatch.context() as patch:
    cache = str(tmp_path_factory.mktemp("modules"))
    patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", cache)
    yield
