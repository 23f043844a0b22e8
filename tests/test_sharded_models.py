"""Models that are cut over devices say and write what they do on one."""

from typing import Any

import eight_devices
import pytest

PROGRAM = """
import json, sys
import jax
import numpy as np
from children import byte_tokenizer
from puzzle_jax import mesh
from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig
from puzzle_jax.costs import Scenario, jax_timing
from puzzle_jax.data import PackedText
from puzzle_jax.evaluation import likelihood, quality
from puzzle_jax.mesh import MeshConfig
from puzzle_jax.model import decoder
from puzzle_jax.model.language_model import LanguageModel

config = ModelConfig(vocab_size=264, hidden_size=32, num_heads=8, head_dim=8, max_context=128)
architectures = [
  Architecture(config, tuple(map(BlockSpec.parse, blocks)))
  for blocks in (("gqa4/w64", "linear/w64"), ("gqa1/w40", "none/linear"))
]
weights = [jax.device_get(decoder.init(a, jax.random.key(i))) for i, a in enumerate(architectures)]
rng = np.random.default_rng(0)
segments = np.repeat(np.array([[1] * 20 + [2] * 12]), 6, axis=0)
positions = np.repeat(np.array([[*range(20), *range(12)]]), 6, axis=0)
packed = PackedText(*(np.array(x, np.int32) for x in (rng.integers(0, 260, (6, 32)), segments, positions)))
requests = [likelihood.Request(tuple(rng.integers(0, 260, n).tolist()), s) for n, s in ((9, 4), (30, 7), (34, 33))]

found = {}
for sizes in ((1, 1, 1), (2, 4, 1)):
  on = mesh.build(MeshConfig(*sizes))
  lay = jax.device_put if on.size == 1 else lambda w: mesh.shard_weights(on, w)
  models = [(a, lay(w)) for a, w in zip(architectures, weights)]
  parent = LanguageModel(*models[0], byte_tokenizer())
  timing = jax_timing.TimingConfig(rounds=1, decode_steps=2)
  timed = jax_timing.time_models({"parent": models[0]}, scenario=Scenario("x", 8, 8), batch=2, config=timing)
  leaves = jax.tree.leaves(models[0][1])
  found[",".join(map(str, sizes))] = {
    "quality": quality.compare(models[1], models[0], packed, batch_rows=4),
    "likelihoods": [[x.log_p, x.greedy] for x in likelihood.score_all(models[0], requests, batch_tokens=64)],
    "answer": parent.generate_ids([5, 6, 7], max_new_tokens=8),
    "drawn": parent.generate_ids([5, 6, 7], max_new_tokens=8, temperature=1.0, seed=1),
    "timed": sorted(timed["parent"]),
    "share": sum(x.addressable_shards[0].data.size for x in leaves) / sum(x.size for x in leaves),
  }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> Any:
  return eight_devices.run(f"import sys; sys.path.append('tests')\n{PROGRAM}")


def test_the_evaluation_is_that_of_one_device(found: Any) -> None:
  expected, here = found["1,1,1"], found["2,4,1"]
  assert here["quality"] == pytest.approx(expected["quality"], rel=1e-5, abs=1e-7)
  for (log_p, greedy), (ours, ours_greedy) in zip(expected["likelihoods"], here["likelihoods"], strict=True):
    assert (ours, ours_greedy) == (pytest.approx(log_p, rel=1e-5), greedy)
  assert (here["answer"], here["drawn"], here["timed"]) == (expected["answer"], expected["drawn"], expected["timed"])


def test_weights_are_cut_over_model(found: Any) -> None:
  """All but norms and linear maps, which are a twentieth of this model and less of large ones."""
  assert found["1,1,1"]["share"] == 1
  assert found["2,4,1"]["share"] == pytest.approx(0.25, abs=0.05)
