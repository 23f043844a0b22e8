"""One model in vLLM: a process of its own, started by `vllm_process`, perhaps in another environment than JAX's.

    python -P vllm_worker.py JOB.json

Needs vLLM and nothing of puzzle_jax. The model is loaded once; a job's points are measured one by one, and each is
appended to the job's file of results as one JSON line, so that a worker that was killed goes on behind the last.

What is timed is from token ids to token ids, with the engine's own process and scheduler, from the moment at which all
requests are there: a closed batch. Requests are random tokens, each another: equal prompts would share their KV cache.
`prefill`: a batch of new prompts until all have their first token. `decode`: of prompts that the engine remembers
(prefix caching), `steps` of the whole batch, behind `settle` others: from when the tokens of one come to when those of
another do. `scenario`: a whole one, from new prompts to the last token. `continue`: the greedy continuation of given
prompts, no timing.
"""

import importlib.util
import itertools
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any


class Engine:
  """vLLM with a model."""

  def __init__(self, settings: dict[str, Any], oldest: str):
    try:
      import vllm  # type: ignore[import-not-found, unused-ignore]
      from vllm.platforms import current_platform  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError as e:
      sys.exit(f"error: vLLM is not installed here ({e}): run `pip install vllm` (tested: {oldest})")
    if _numbers(vllm.__version__) < _numbers(oldest):
      sys.exit(f"error: vLLM {vllm.__version__} is too old; {oldest} is the one that was tested")
    begin = time.perf_counter()
    _plug_in()  # before the engine's own process is forked; puzzle_jax need not be installed here
    if settings["load_format"] == "dummy":
      _fill_8_bits()
    self._llm, self._params = vllm.LLM(**settings), vllm.SamplingParams
    config, ranks = self._llm.llm_engine.vllm_config, settings.get("tensor_parallel_size", 1)
    cache = config.cache_config
    self.about = {
      "name": "vLLM",
      "version": vllm.__version__,
      "python": sys.version.split()[0],
      "hardware": f"{ranks} x {current_platform.get_device_name()}",
      "kv_cache_tokens": getattr(cache, "kv_cache_size_tokens", None) or cache.num_gpu_blocks * cache.block_size,
      "kv_block_tokens": cache.block_size,
      "max_batched_tokens": config.scheduler_config.max_num_batched_tokens,
      "load_s": time.perf_counter() - begin,
    }

  def generate(self, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], list[float]]:
    """The likeliest continuation of each prompt, so many tokens; and the seconds from when all are there to when each
    step's tokens come."""
    params = self._params(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    self._llm.sleep(level=0)
    self._llm.enqueue([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    assert self._llm.llm_engine.is_sleeping()  # answered behind the requests, which are hashed on their way
    engine, outputs, came = self._llm.llm_engine, [], []
    begin = time.perf_counter()
    self._llm.wake_up(["scheduling"])
    while engine.has_unfinished_requests():  # as LLM.wait_for_completion does
      outputs += [output for output in engine.step() if output.finished]
      came.append(time.perf_counter() - begin)
    outputs.sort(key=lambda output: int(output.request_id))
    return [list(o.outputs[0].token_ids) for o in outputs], came

  def close(self) -> None:
    """Ends vLLM's own process: the next model finds the GPU's memory free."""
    self._llm.llm_engine.engine_core.shutdown()


def _plug_in() -> None:
  """`vllm_plugin.register`, from beside this file."""
  spec = importlib.util.spec_from_file_location("vllm_plugin", Path(__file__).with_name("vllm_plugin.py"))
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  module.register()


def _fill_8_bits() -> None:
  """Has vLLM draw 8-bit weights from -1 to 1: nearly all of its own, a thousandth of that, are 0, which is faster."""
  from vllm.model_executor.model_loader import weight_utils  # type: ignore[import-not-found, unused-ignore]

  draw = weight_utils.initialize_single_dummy_weight

  def filled(param: Any, *args: Any, **options: Any) -> None:
    if param.is_floating_point() and param.element_size() == 1:
      draw(param, -1.0, 1.0)
    else:
      draw(param, *args, **options)

  weight_utils.initialize_single_dummy_weight = filled


def _numbers(version: str) -> tuple[int, ...]:
  return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())


class Prompts:
  """Random ones; those of a batch and mark begin alike whatever their length, those of another mark do not."""

  def __init__(self, vocab_size: int):
    self._vocab, self._streams = vocab_size, list[list[int]]()

  def __call__(self, batch: int, tokens: int, mark: int) -> list[list[int]]:
    while len(self._streams) < batch or len(self._streams[0]) < tokens:
      longest = max(tokens, len(self._streams[0]) if self._streams else 0)
      draws = [random.Random(i) for i in range(max(batch, len(self._streams)))]
      self._streams = [rng.choices(range(self._vocab), k=longest) for rng in draws]
    high, low = divmod(mark, self._vocab)
    return [[low, high, i % self._vocab, *s[3:tokens]][:tokens] for i, s in enumerate(self._streams[:batch])]


def measure(engine: Any, prompts: Prompts, point: dict[str, Any], mark: int) -> dict[str, Any]:
  """A point's seconds by round (of `decode`: of a step), or tokens; what does not fit the KV cache is said to.

  Args:
    engine: with `about` and `generate`.
    prompts: random.
    point: `kind` and its numbers.
    mark: unlike any other point's by at least its rounds and one.
  """
  if point["kind"] == "continue":
    return {"tokens": engine.generate(point["prompts"], point["output"])[0]}
  batch, length = point["batch"], point["tokens"]
  tokens = point.get("output", 1) + point.get("settle", 0) + point.get("steps", 0)
  block, room = engine.about["kv_block_tokens"], engine.about["kv_cache_tokens"]
  need = batch * -(-(length + tokens) // block) * block
  if need > room:
    return {"unreachable": f"the KV cache holds {room} tokens, {need} are needed"}
  if point["kind"] == "decode":
    repeated = prompts(batch, length, 0)  # shorter contexts of the batch come first: their tokens are remembered
    engine.generate(repeated, 1)
    return _step_seconds([engine.generate(repeated, tokens)[1] for _ in range(point["rounds"])], tokens, point)
  if point["kind"] == "prefill":  # warms up; a scenario comes behind a prefill
    engine.generate(prompts(batch, length, mark), 1)
  times = [engine.generate(prompts(batch, length, mark + 1 + i), tokens)[1] for i in range(point["rounds"])]
  return {"seconds": [came[-1] for came in times]}


def _step_seconds(rounds: list[list[float]], tokens: int, point: dict[str, Any]) -> dict[str, Any]:
  """Of a step in which all requests decode: behind the last prompt and before the first answer's end.

  By round, the mean without the quarters of the fastest and the slowest, which something else had held up, and of all.
  """
  found, means = [], []
  for came in rounds:
    first = len(came) - tokens + point["settle"]  # all prompts are read in so many steps more than the answers have
    if tokens - 1 - first < point["steps"] / 2:
      return {"unreachable": f"{len(came) - tokens + 1} steps read the prompts, which leaves too few for all to decode"}
    steps = sorted(after - before for before, after in itertools.pairwise(came[first:tokens]))
    quarter = len(steps) // 4
    found.append(statistics.fmean(steps[quarter : len(steps) - quarter]))
    means.append(statistics.fmean(steps))
  return {"seconds": found, "mean_s": means}


def work(job: dict[str, Any], make: Any = Engine) -> None:
  """Measures what the job's results do not hold yet."""
  with open(job["results"], "a+") as results:
    results.seek(0)
    text = results.read()
    whole = text[: text.rfind("\n") + 1]  # a worker that was killed may have left half a line
    results.truncate(len(whole.encode()))
    lines = [json.loads(line) for line in whole.splitlines()]
    done = [line.get("point") for line in lines]
    engine, prompts = make(job["settings"], job["oldest"]), Prompts(job["vocab_size"])
    for before in (line["engine"] for line in lines if "engine" in line):
      for key in ("hardware", "version"):
        if before[key] != engine.about[key]:
          here = f"here it is {engine.about[key]}: name another folder"
          sys.exit(f"error: {results.name} was begun with {key} {before[key]}, {here}")

    def tell(line: dict[str, Any]) -> None:
      print(json.dumps(line), file=results, flush=True)

    tell({"engine": engine.about})
    for i, point in enumerate(job["points"]):
      if point in done:
        continue
      if os.getppid() != job["parent"]:
        sys.exit("error: whoever started this worker is gone")
      begin = time.perf_counter()
      found = measure(engine, prompts, point, 1 + 100 * (i + 1))
      tell({"point": point, "wall_s": time.perf_counter() - begin} | found)
  engine.close()


if __name__ == "__main__":
  with open(sys.argv[1]) as given:
    work(json.load(given))
