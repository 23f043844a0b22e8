"""Children of SmolLM2 with many kinds of blocks, put together from a quickstart's library and mean-pooled KV heads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from puzzle_jax import surgery
from puzzle_jax.arch import GQA, Architecture, BlockSpec
from puzzle_jax.checkpoint import write_checkpoint
from puzzle_jax.runs import Run

CHANGED = {  # from the parent's gqa3/w1536
  "every kind": {
    4: "gqa1/w1152",
    7: "linear/w768",
    9: "none/w1152",
    12: "gqa3/linear",
    14: "gqa3/none",
    16: "none/none",
    18: "linear/linear",
    20: "none/linear",
    22: "linear/none",
    24: "gqa1/w384",
  },
  "llama.cpp's": {
    4: "gqa1/w1152",
    6: "linear/w1536",
    7: "linear/w1152",
    9: "none/w1536",
    12: "gqa1/w768",
    15: "none/none",
    17: "gqa1/w1536",
    20: "linear/w384",
    23: "none/none",
    25: "none/w768",
  },
  "parent": {},
}
VLLM = {  # every kind that it runs
  7: "gqa3/w768",
  9: "none/w1152",
  12: "gqa1/w1152",
  16: "none/none",
  18: "none/w1536",
  20: "gqa3/none",
  24: "gqa1/w384",
}


def write_child(run: Run, changed: Mapping[int, str], folder: Path) -> None:
  """The parent with some of its blocks replaced, by the library's or by mean-pooled KV heads."""
  parent, config = run.parent, run.parent.architecture.config
  blocks = [BlockSpec.parse(changed.get(i, b.name)) for i, b in enumerate(parent.architecture.blocks)]

  def layer(i: int) -> dict[str, Any]:
    weights, library, own = parent.layer(i, np.float32), run.library.load_layer(i), parent.architecture.blocks[i]
    made = {}
    for spec, before in zip(blocks[i].subblocks, own.subblocks, strict=True):
      if spec != before and isinstance(spec, GQA):
        none = np.zeros(0, np.float32)
        made[spec.slot] = surgery.from_parent(
          spec, before, weights[spec.slot], config=config, channel_mean=none, truncate=False
        )
      elif spec == before:
        made[spec.slot] = weights[spec.slot]
      else:
        made[spec.slot] = library[spec.id] if spec.tensors(config) else {}
    return made

  folder.mkdir()
  write_checkpoint(
    folder,
    Architecture(config, tuple(blocks)),
    parent.head(np.float32),
    map(layer, range(len(blocks))),
    tokenizer=run.tokenizer,
    metadata={"parent": parent.name, "license": parent.license},
  )
