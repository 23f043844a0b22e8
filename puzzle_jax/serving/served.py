"""Parent and child in a serving engine, side by side: what a user wants to know before deploying (imports no JAX)."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from puzzle_jax import checkpoint, weights
from puzzle_jax.arch import Architecture
from puzzle_jax.costs import Scenario
from puzzle_jax.costs.differences import quiet_mean
from puzzle_jax.errors import PuzzleError
from puzzle_jax.parents import Parent, open_parent
from puzzle_jax.progress import Progress
from puzzle_jax.serving import engines, hf_export, vllm_process
from puzzle_jax.serving.vllm_process import VLLM, Measured, Point
from puzzle_jax.store import temporary_folder

_KV_BYTES = 2  # a value, in the engines' caches: bfloat16


@dataclasses.dataclass(frozen=True)
class Figures:
  """A model in a scenario at a batch of requests that come at once.

  Attributes:
    throughput: tokens a second, in and out.
    output_throughput: tokens a second, out.
    first_token_s: until every request of the batch has its first token.
    token_s: from token to token behind that.
  """

  throughput: float
  output_throughput: float
  first_token_s: float
  token_s: float


@dataclasses.dataclass(frozen=True)
class Served:
  """A model as the engine holds it.

  Attributes:
    weight_bytes: of its files.
    kv_bytes_per_token: of the KV cache, copies for tensor parallelism included.
    kv_cache_tokens: that the engine found room for; 0 where it does not say.
    max_batch: requests that fit the cache, by scenario; empty where the engine does not say.
    figures: by scenario and batch.
    engine: as it described itself.
  """

  weight_bytes: int
  kv_bytes_per_token: int
  kv_cache_tokens: int
  max_batch: dict[str, int]
  figures: dict[str, dict[str, Figures]]
  engine: dict[str, Any]


def export_parent(parent: Parent, out: Path, *, dtype: str, engine: str) -> None:
  """A parent of any format as a directory that the engine reads."""
  with temporary_folder() as folder:
    layers = (parent.layer(i) for i in range(parent.architecture.num_layers))
    metadata = {"parent": parent.name, "license": parent.license}
    checkpoint.write_checkpoint(
      Path(folder), parent.architecture, parent.head(), layers, tokenizer=parent.tokenizer(), metadata=metadata
    )
    hf_export.export_hf(Path(folder), out, dtype=dtype, engine=engine)


def serve(
  models: Mapping[str, Path],
  *,
  scenarios: Sequence[Scenario],
  batches: Sequence[int],
  rounds: int,
  engine: VLLM,
  folders: Mapping[str, Path],
  progress: Progress,
) -> dict[str, Served]:
  """Measures exported models in vLLM, one after the other; what their `folders` hold of the same weights already is not
  measured again.

  Raises:
    PuzzleError: vLLM is missing or fails, a model that it does not run or that does not fit the memory, or one that was
      measured on another machine than the first.
  """
  opened = {name: open_parent(str(path)).architecture for name, path in models.items()}
  for name, architecture in opened.items():
    engines.check_ranks("vllm", architecture, engine.tensor_parallel, what=name)
  points: list[Point] = []
  for batch in batches:
    for scenario in scenarios:
      both = (_prefill(scenario, batch, rounds), _whole(scenario, batch, rounds))
      points += [point for point in both if point not in points]
  longest, found = max(s.tokens for s in scenarios), dict[str, Served]()
  with progress.bar("serving", total=len(models) * len(points), unit="point") as bar:
    for name, path in models.items():
      bar.set_postfix_str(name)
      settings = engine.settings(path, max_length=longest, batches=batches, dummy=False)
      made_of = weights.fingerprint([path / "config.json", *sorted(path.glob("*.safetensors"))])
      vocab, kept = opened[name].config.vocab_size, folders[name] / name / made_of[:12]
      measured = vllm_process.measure(engine, settings, points, vocab_size=vocab, folder=kept, tick=bar.update)
      if not measured.engine:
        raise PuzzleError(f"{name}: it does not fit the memory of the GPU; the log is in {kept}")
      for before, key in itertools.product(found.values(), ("hardware", "version")):
        if before.engine[key] != measured.engine[key]:
          raise PuzzleError(
            f"{name} was measured with {key} {measured.engine[key]}, another model with {before.engine[key]}: measure "
            "both here, into another folder"
          )
      room, block = measured.engine["kv_cache_tokens"], measured.engine["kv_block_tokens"]
      found[name] = Served(
        weight_bytes=weight_bytes(path),
        kv_bytes_per_token=kv_bytes_per_token(opened[name], engine.tensor_parallel),
        kv_cache_tokens=room,
        max_batch={s.name: room // block // math.ceil(s.tokens / block) for s in scenarios},
        figures={
          s.name: {str(b): f for b in batches if (f := _figures(measured, s, b, rounds)) is not None} for s in scenarios
        },
        engine=measured.engine,
      )
  return found


def weight_bytes(model: Path) -> int:
  """Of an export's files."""
  return sum(file.stat().st_size for file in model.glob("*.safetensors"))


def kv_bytes_per_token(architecture: Architecture, ranks: int) -> int:
  """Of the KV cache on all GPUs together."""
  return sum(
    b.kv_bytes_per_token(architecture.config, bytes_per_value=_KV_BYTES) * engines.kv_copies(b.name, ranks)
    for b in architecture.blocks
  )


def _prefill(scenario: Scenario, batch: int, rounds: int) -> Point:
  return {"kind": "prefill", "batch": batch, "tokens": scenario.input_tokens, "rounds": rounds}


def _whole(scenario: Scenario, batch: int, rounds: int) -> Point:
  return _prefill(scenario, batch, rounds) | {"kind": "scenario", "output": scenario.output_tokens}


def _figures(measured: Measured, scenario: Scenario, batch: int, rounds: int) -> Figures | None:
  """None where the engine could not reach it."""
  first, whole = (measured.seconds(p(scenario, batch, rounds)) for p in (_prefill, _whole))
  if not first or not whole:
    return None
  first_s, whole_s = quiet_mean(first), quiet_mean(whole)
  return Figures(
    throughput=batch * scenario.tokens / whole_s,
    output_throughput=batch * scenario.output_tokens / whole_s,
    first_token_s=first_s,
    token_s=max(whole_s - first_s, 0.0) / max(scenario.output_tokens - 1, 1),
  )


def table(parent: Served, child: Served) -> str:
  """Both in a table for a terminal, with ratios."""
  rows = [("", "parent", "child", "ratio")]

  def row(label: str, a: float, b: float, form: str, scale: float = 1.0) -> None:
    rows.append((label, format(a * scale, form), format(b * scale, form), f"{b / a:.2f}x" if a else ""))

  row("weights (GiB)", parent.weight_bytes, child.weight_bytes, ".2f", 2**-30)
  row("KV cache (KiB a token)", parent.kv_bytes_per_token, child.kv_bytes_per_token, ".1f", 2**-10)
  for scenario in parent.figures:
    if scenario in parent.max_batch:
      row(f"{scenario}: most requests at once", parent.max_batch[scenario], child.max_batch[scenario], ",.0f")
    for batch, a in parent.figures[scenario].items():
      if (b := child.figures[scenario].get(batch)) is None:
        continue
      head = f"{scenario}, batch {batch}: "
      row(f"{head}tokens/s, in and out", a.throughput, b.throughput, ",.0f")
      row(f"{head}tokens/s, out", a.output_throughput, b.output_throughput, ",.0f")
      row(f"{head}first token (ms)", a.first_token_s, b.first_token_s, ",.1f", 1e3)
      row(f"{head}each token (ms)", a.token_s, b.token_s, ",.2f", 1e3)
  widths = [max(len(r[i]) for r in rows) for i in range(4)]
  return "\n".join(
    "  ".join([r[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(r[1:], widths[1:], strict=True))]) for r in rows
  )
