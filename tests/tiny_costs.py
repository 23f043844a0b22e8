"""What the tiny run can be given, costs and text: runs can be compared, and nothing has to be timed or looked for."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from configs import tiny
from puzzle_jax import space
from puzzle_jax.config import RunConfig
from puzzle_jax.costs import CostTable, Scenario, jax_timing
from puzzle_jax.parents import open_parent


def write_costs(path: Path, parent: str, config: RunConfig | None = None) -> None:
  """A given cost table, so that runs can be compared: seconds by parameters, attention dearer than FFNs.

  For the tiny config's space and scenario, or another's.
  """
  architecture = open_parent(parent).architecture
  config = config or RunConfig.from_dict(tiny.get_config().to_dict())
  layers = space.build(architecture, **dataclasses.asdict(config.space)).layers
  scenario = config.costs.scenario

  def seconds(params: int, weight: float = 1.0) -> dict[str, dict[str, dict[str, float]]]:
    return {scenario.name: {"1": {"prefill_s": weight * 1e-7 * params, "decode_s": weight * 1e-5 * params}}}

  subblocks = {s.id: s for layer in layers for s in (*layer.attention, *layer.ffn)}
  table = CostTable(
    backend="given",
    hardware=jax_timing.hardware(),
    versions={},
    bytes_per_value=4,
    scenarios=(Scenario(scenario.name, scenario.input_tokens, scenario.output_tokens),),
    subblocks={
      name: seconds(s.num_params(architecture.config), 4.0 if s.slot == "attention" else 1.0)
      for name, s in subblocks.items()
    },
    fixed=seconds(5_000),
    details={},
  )
  path.write_text(json.dumps(table.to_json()))


def write_text(path: Path) -> None:
  """A hundred documents of 300 random letters."""
  rng = np.random.default_rng(0)
  texts = [bytes(rng.integers(32, 127, 300, np.uint8)).decode() for _ in range(100)]
  path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
