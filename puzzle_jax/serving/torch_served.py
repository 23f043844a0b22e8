"""Exported models in the built-in PyTorch engine, for parent and child side by side (imports no JAX)."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from puzzle_jax.costs import Scenario
from puzzle_jax.costs.differences import quiet_mean
from puzzle_jax.errors import why_no_memory
from puzzle_jax.parents import open_parent
from puzzle_jax.progress import Progress
from puzzle_jax.serving import served, torch_engine
from puzzle_jax.serving.served import Figures, Served
from puzzle_jax.serving.torch_engine import Cache, Session


def serve(
  models: Mapping[str, Path],
  *,
  scenarios: Sequence[Scenario],
  batches: Sequence[int],
  rounds: int,
  progress: Progress,
) -> dict[str, Served]:
  """Measures exported models in bfloat16, one after the other, as `served.serve` does in vLLM.

  A batch that does not fit the memory is left out.
  """
  found = {}
  about = {"name": "PyTorch", "version": torch.__version__, "hardware": torch_engine.gpu() or "CPU"}
  with progress.bar("serving", total=len(models) * len(scenarios) * len(batches), unit="point") as bar:
    for name, path in models.items():
      opened = open_parent(str(path))
      model = torch_engine.load(opened, dtype="bfloat16")
      figures: dict[str, dict[str, Figures]] = {s.name: {} for s in scenarios}
      for scenario in scenarios:
        for batch in batches:
          try:
            figures[scenario.name][str(batch)] = _figures(model, scenario, batch, rounds)
          except RuntimeError as e:
            if not why_no_memory(str(e)):
              raise
            torch.cuda.empty_cache()
          bar.update()
      found[name] = Served(
        weight_bytes=served.weight_bytes(path),
        kv_bytes_per_token=served.kv_bytes_per_token(opened.architecture, 1),
        kv_cache_tokens=0,
        max_batch={},
        figures=figures,
        engine=about,
      )
  return found


def _figures(model: torch_engine.Model, scenario: Scenario, batch: int, rounds: int) -> Figures:
  """Whole scenarios, every token of them."""
  config, dtype = model.architecture.config, model.head["embed"].dtype
  heads = torch_engine.kv_heads(model.architecture)
  session = Session(model, Cache(config, heads, batch=batch, length=scenario.tokens, dtype=dtype))
  session.capture()
  prompts = torch.randint(config.vocab_size, (batch, scenario.input_tokens), device=torch_engine.device())
  first, whole = [], []
  for i in range(rounds + 1):
    torch_engine.wait()
    begin = time.perf_counter()
    session.prefill(prompts)
    torch_engine.wait()
    prefill = time.perf_counter() - begin
    session.decode(scenario.output_tokens - 1)
    torch_engine.wait()
    if i:  # the first warms up
      first.append(prefill)
      whole.append(time.perf_counter() - begin)
  first_s, whole_s = quiet_mean(first), quiet_mean(whole)
  return Figures(
    throughput=batch * scenario.tokens / whole_s,
    output_throughput=batch * scenario.output_tokens / whole_s,
    first_token_s=first_s,
    token_s=max(whole_s - first_s, 0.0) / max(scenario.output_tokens - 1, 1),
  )
