"""Tokens/s at which a parent writes text: batched with rows refilled, against one prompt after the other.

    python -m experiments.benchmarks.sampling                                        (two CPU cores)
    python -m experiments.benchmarks.sampling --batch_rows=512 --dtype=bfloat16      (one H100)

Both draw at temperature 1 from the bare start token, to `max_tokens` or a stop. Compilation is left out. Writes
experiments/results/sampling_DEVICE.json.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import RESULTS
from puzzle_jax.costs import jax_timing
from puzzle_jax.model import generation
from puzzle_jax.model.generation import Request
from puzzle_jax.model.language_model import LanguageModel
from puzzle_jax.parents import EMBEDDED
from puzzle_jax.store import write_json

_PARENT = flags.DEFINE_string("parent", EMBEDDED, "Who writes.")
_BATCH = flags.DEFINE_integer("batch_rows", 64, "Documents at once.", lower_bound=1)
_TOKENS = flags.DEFINE_integer("max_tokens", 256, "Longest document.", lower_bound=2)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Documents a row of the batch writes.", lower_bound=1)
_ALONE = flags.DEFINE_integer("alone", 2, "Documents that are written one after the other.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the batched side; alone it is float32.")


def main(argv: list[str]) -> None:
  del argv
  model = LanguageModel.open(_PARENT.value)
  start = model.tokenizer.eos_id if model.tokenizer.bos_id is None else model.tokenizer.bos_id
  dtype = jnp.dtype(_DTYPE.value)
  params = jax.tree.map(lambda w: w.astype(dtype), model.params)

  def together(seeds: range) -> int:
    requests = [Request((start,), _TOKENS.value - 1, 1.0, seed) for seed in seeds]
    stops, rows = model.tokenizer.stop_ids, _BATCH.value
    answers = generation.generate(model.architecture, params, requests, stop_ids=stops, batch_rows=rows, dtype=dtype)
    return sum(map(len, answers))

  def alone(seeds: range) -> int:
    return sum(
      len(model.generate_ids([start], max_new_tokens=_TOKENS.value - 1, temperature=1.0, seed=seed)) for seed in seeds
    )

  record: dict[str, Any] = {"date": time.strftime("%F"), "hardware": jax_timing.hardware()}
  record |= {flag.name: flag.value for flag in (_PARENT, _BATCH, _TOKENS, _ROUNDS, _DTYPE)}
  for name, write, count in (("batched", together, _ROUNDS.value * _BATCH.value), ("alone", alone, _ALONE.value)):
    write(range(_BATCH.value if name == "batched" else 1))  # compiles
    begin = time.perf_counter()
    tokens = write(range(1000, 1000 + count))
    seconds = time.perf_counter() - begin
    record[name] = {"documents": count, "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds}
    print(name, record[name], flush=True)
  record["ratio"] = record["batched"]["tokens_per_s"] / record["alone"]["tokens_per_s"]
  write_json(RESULTS / f"sampling_{jax.default_backend()}.json", record | {"versions": jax_timing.versions()})


if __name__ == "__main__":
  app.run(main)
