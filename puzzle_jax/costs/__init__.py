"""What each subblock variant costs where the child will run (paper section 4): seconds, and bytes by arithmetic.

A `CostTable` holds seconds by subblock, scenario and batch, and a fixed part that no block owns (embedding, LM head,
the host's work). `block_table` joins it with scores to the table that the search reads.
"""

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle_jax.arch import Architecture, BlockSpec, Subblock
from puzzle_jax.errors import PuzzleError
from puzzle_jax.json_input import costs_of, mapping, number, read_object
from puzzle_jax.serving import engines
from puzzle_jax.space import Space

FORMAT = "puzzle-costs/1"
# Of `serving.engines`, by backend; JAX stands in for any.
_ENGINES = {
  "llamacpp": "llama_cpp",
  "vllm": "vllm",
  "torch": "torch",
  "tensorrt_llm": "tensorrt_llm",
}
_PACKAGES = {"jax": "jax", "llamacpp": "llama-cpp-python"} | {name: name for name in ("vllm", "torch", "tensorrt_llm")}

Seconds = dict[str, float]  # prefill_s and decode_s of a whole scenario for a whole batch


@dataclasses.dataclass(frozen=True)
class Scenario:
  """Requests of `input_tokens` that are answered with `output_tokens`."""

  name: str
  input_tokens: int
  output_tokens: int

  def __post_init__(self) -> None:
    tokens = (self.input_tokens, self.output_tokens)
    if not all(type(t) is int and 1 <= t < 2**31 for t in tokens) or not isinstance(self.name, str):
      raise PuzzleError(f"scenario {self.name}: input and output tokens must be whole numbers from 1, got {self}")

  @property
  def tokens(self) -> int:
    return self.input_tokens + self.output_tokens


def outer_params(architecture: Architecture) -> int:
  """Parameters in no block: embedding, LM head, norm."""
  return architecture.num_params() - sum(b.num_params(architecture.config) for b in architecture.blocks)


def head_bytes(parent: Architecture, *, engine: str, width: int) -> int:
  """Of what is in no block, at `width` bytes a value; an engine without tied embeddings holds a copy of a tied one."""
  c = parent.config
  copied = c.tie_embeddings and not engines.by_name(engine).tied_embeddings
  return width * (outer_params(parent) + copied * c.vocab_size * c.hidden_size)


@dataclasses.dataclass(frozen=True)
class CostTable:
  """Measured seconds.

  Attributes:
    backend: what measured them: `jax`, `llamacpp`, `vllm`, `torch` or `tensorrt_llm`.
    hardware: the machine.
    versions: of the software.
    bytes_per_value: of weights as deployed, on average; of those of the blocks where `head_bytes` is known.
    scenarios: measured.
    subblocks: by variant name, scenario and batch.
    fixed: by scenario and batch.
    floor: by scenario and batch, what the engine's host takes whatever the model: no phase takes less. {}: not known.
    details: how it was measured: raw times, spreads, residuals.
    kv_bytes_per_value: of the KV cache; 0: as of the weights.
    tensor_parallel: GPUs that each model was split over; bytes are of all of them together.
    head_bytes: of what is in no block (embedding, LM head, norm), as deployed; 0: `bytes_per_value` of each value.
  """

  backend: str
  hardware: str
  versions: dict[str, str]
  bytes_per_value: float
  scenarios: tuple[Scenario, ...]
  subblocks: dict[str, dict[str, dict[str, Seconds]]]
  fixed: dict[str, dict[str, Seconds]]
  details: dict[str, Any]
  kv_bytes_per_value: int = 0
  tensor_parallel: int = 1
  floor: dict[str, dict[str, Seconds]] = dataclasses.field(default_factory=dict)
  head_bytes: int = 0

  def block_bytes(self, params: int) -> int:
    """Of so many parameters of blocks, as deployed."""
    return round(params * self.bytes_per_value)

  def outer_bytes(self, architecture: Architecture) -> int:
    """Of a model's weights in no block, as deployed."""
    return self.head_bytes or self.block_bytes(outer_params(architecture))

  def weight_bytes(self, architecture: Architecture) -> int:
    """Of a whole model, as deployed."""
    blocks = (self.block_bytes(b.num_params(architecture.config)) for b in architecture.blocks)
    return self.outer_bytes(architecture) + sum(blocks)

  @property
  def kv_width(self) -> int:
    """Bytes of a value in the KV cache."""
    return self.kv_bytes_per_value or int(self.bytes_per_value)

  def to_json(self) -> dict[str, Any]:
    return {"format": FORMAT} | dataclasses.asdict(self)

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> "CostTable":
    """Inverse of `to_json`.

    Raises:
      PuzzleError: another format, missing keys, or values that are none of a cost table (names them).
    """
    if data.get("format") != FORMAT:
      raise PuzzleError(f"cost table: format {data.get('format')!r} is not {FORMAT!r}")
    fields = {k: v for k, v in data.items() if k != "format"}
    try:
      table = cls(**fields | {"scenarios": tuple(Scenario(**s) for s in fields["scenarios"])})
    except (KeyError, TypeError) as e:
      raise PuzzleError(f"cost table: {e}; expected the keys that CostTable.to_json writes") from e
    table._check()
    return table

  @classmethod
  def read(cls, path: Path) -> "CostTable":
    """From a JSON file; errors name it."""
    remedy = "name a file that experiments.profile wrote"
    try:
      data = read_object(path, remedy)
    except OSError as e:
      raise PuzzleError(f"cost table {path} cannot be read ({e.strerror}); {remedy}") from e
    try:
      return cls.from_json(data)
    except PuzzleError as e:
      raise PuzzleError(f"{path}: {e}") from e

  def _check(self) -> None:
    """What is read need not be what its types say."""
    for name, kind in (("backend", str), ("hardware", str), ("versions", dict), ("details", dict)):
      if not isinstance(getattr(self, name), kind):
        raise PuzzleError(f"cost table: {name} is {getattr(self, name)!r}, not of type {kind.__name__}")
    if not all(isinstance(version, str) for version in self.versions.values()):
      raise PuzzleError(f"cost table: versions {self.versions!r} are not all texts")
    for name, least, most in (("kv_bytes_per_value", 0, 64), ("tensor_parallel", 1, 2**16), ("head_bytes", 0, 2**50)):
      value = getattr(self, name)
      if type(value) is not int or not least <= value <= most:
        raise PuzzleError(f"cost table: {name} is {value!r}, not a whole number from {least} to {most}")
    if not 0 < number(self.bytes_per_value, "cost table: bytes_per_value") <= 64:
      raise PuzzleError(f"cost table: bytes_per_value is {self.bytes_per_value}, not above 0 and at most 64")
    scenarios = [s.name for s in self.scenarios]
    if not scenarios or len(set(scenarios)) < len(scenarios):
      raise PuzzleError(f"cost table: scenarios {scenarios}; there must be some, each once")
    fixed = costs_of(self.fixed, "cost table: fixed", scenarios)
    if missing := set(scenarios) - {scenario for scenario, _ in fixed}:
      raise PuzzleError(f"cost table: fixed has no seconds of scenario {min(missing)}; measure the costs anew")
    if odd := costs_of(self.floor, "cost table: floor", scenarios).keys() - fixed.keys():
      scenario, batch = min(odd)
      raise PuzzleError(f"cost table: floor has scenario {scenario}, batch {batch}, `fixed` has not; measure anew")
    if not mapping(self.subblocks, "cost table: subblocks"):
      raise PuzzleError("cost table: it has no subblocks; measure the costs anew")
    for name, value in self.subblocks.items():
      if odd := costs_of(value, f"cost table: {name}", scenarios).keys() ^ fixed.keys():
        scenario, batch = min(odd)
        raise PuzzleError(
          f"cost table: {name} and `fixed` do not both have scenario {scenario}, batch {batch}; measure the costs anew"
        )

  def seconds(self, subblock: Subblock, scenario: str, batch: str) -> Seconds:
    """Of a subblock.

    Raises:
      PuzzleError: it was not measured (names what was).
    """
    name = subblock.id
    if name not in self.subblocks:
      raise PuzzleError(f"cost table has no {name}; it has {', '.join(sorted(self.subblocks))}: measure the costs anew")
    return self.subblocks[name][scenario][batch]

  def predict(self, blocks: Iterable[BlockSpec], scenario: str, batch: str) -> Seconds:
    """Seconds of a whole model of these blocks: the fixed part and the sum of its subblocks, or the floor."""
    total = dict(self.fixed[scenario][batch])
    for block in blocks:
      for subblock in block.subblocks:
        for phase, value in self.seconds(subblock, scenario, batch).items():
          total[phase] += value
    least = self.floor.get(scenario, {}).get(batch, {})
    return {phase: max(value, least.get(phase, 0.0)) for phase, value in total.items()}


def check_target(table: CostTable, *, hardware: str, engine: str) -> None:
  """Refuses a table that was measured elsewhere than where the child shall run.

  Args:
    table: measured.
    hardware: of the target, as tables name it.
    engine: of `serving.engines`, or empty: any.

  Raises:
    PuzzleError: another machine or another engine, with the remedy.
  """
  if table.hardware != hardware:
    raise PuzzleError(
      f"the cost table was measured on {table.hardware}, the target is {hardware}: measure it there, or say that the "
      f"child will run on the former: --config.costs.hardware='{table.hardware}'"
    )
  measured = _ENGINES.get(table.backend)
  if measured and engine not in ("", "portable", measured):
    raise PuzzleError(
      f"the cost table was measured in {measured}, the child shall run in {engine}: measure it there, or set "
      f"--config.search.engine={measured}"
    )


def other_version(table: CostTable) -> str:
  """What to warn of where the engine that a table was measured in is installed here in another version, or nothing."""
  package = _PACKAGES.get(table.backend, "")
  with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError):
    here, then = importlib.metadata.version(package), table.versions.get(package, "an unknown version")
    if here != then:
      return f"the cost table was measured in {package} {then}, {here} is installed here; seconds may differ"
  return ""


def block_table(
  parent: Architecture, space: Space, scores: Sequence[Mapping[str, tuple[float, float]]], costs: CostTable
) -> dict[str, Any]:
  """The `puzzle-block-table/1` that the search reads; a block without a score is left out.

  Args:
    parent: the parent's architecture.
    space: the search space.
    scores: a layer each: score and standard error by block name.
    costs: of every subblock of the space.
  """
  config = parent.config
  batches = {s.name: sorted(costs.fixed[s.name], key=int) for s in costs.scenarios}
  layers = []
  for layer, layer_scores in zip(space.layers, scores, strict=True):
    variants = []
    for block in layer.blocks:
      if block.name not in layer_scores:
        continue
      score, stderr = layer_scores[block.name]
      seconds = {
        scenario: {
          batch: {
            phase: sum(costs.seconds(s, scenario, batch)[phase] for s in block.subblocks)
            for phase in ("prefill_s", "decode_s")
          }
          for batch in scenario_batches
        }
        for scenario, scenario_batches in batches.items()
      }
      variants.append(
        {
          "attention": block.attention.name,
          "ffn": block.ffn.name,
          "parent": block == layer.parent,
          "score": score,
          "score_stderr": stderr,
          "params": block.num_params(config),
          "param_bytes": costs.block_bytes(block.num_params(config)),
          "kv_bytes_per_token": engines.kv_copies(block.name, costs.tensor_parallel)
          * block.kv_bytes_per_token(config, bytes_per_value=costs.kv_width),
          "costs": seconds,
        }
      )
    layers.append({"variants": variants})
  return {
    "format": "puzzle-block-table/1",
    **({"floor": costs.floor} if costs.floor else {}),
    "scenarios": {s.name: {"input_tokens": s.input_tokens, "output_tokens": s.output_tokens} for s in costs.scenarios},
    "fixed": {"params": outer_params(parent), "param_bytes": costs.outer_bytes(parent), "costs": costs.fixed},
    "layers": layers,
  }
