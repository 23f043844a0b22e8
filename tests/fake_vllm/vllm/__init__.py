"""Stands in for vLLM in tests: seconds are those of the blocks that a model's config.json has, on a clock of its own.

Set FAKE_VLLM to `missing`, `old`, `small` (a GPU too small for any model), `taken` (memory that another process has),
`dies:FILE` (killed in its fifth call, once) or `batch:N` (an error at so many requests).
"""

import dataclasses
import json
import os
import signal
import time
import types
from pathlib import Path

MODE, _, ARGUMENT = os.environ.get("FAKE_VLLM", "").partition(":")
if MODE == "missing":
  raise ModuleNotFoundError("No module named 'vllm'")
__version__ = "0.9.1" if MODE == "old" else "0.25.1"
TABLE = json.loads((Path(__file__).parent / "seconds.json").read_text())
NOW = [0.0]
time.perf_counter = lambda: NOW[0]


@dataclasses.dataclass
class SamplingParams:
  temperature: float
  max_tokens: int
  ignore_eos: bool
  detokenize: bool


class LLM:
  def __init__(self, model: str, **settings: object):
    if MODE == "taken":
      raise ValueError("Free memory on device (1/80 GiB) on startup is less than desired GPU memory utilization (0.9)")
    if MODE == "small":
      raise ValueError("No available memory for the cache blocks.")
    print("GPUs", os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert settings["skip_tokenizer_init"]
    assert Path(model, "configuration_puzzle.py").is_file()
    config = json.loads(Path(model, "config.json").read_text())
    self.names = []
    for block in config["block_configs"]:
      attention, ffn = block["attention"], block["ffn"]
      heads = 0 if attention["no_op"] else config["num_attention_heads"] // attention["n_heads_in_group"]
      width = (
        0 if ffn["no_op"] else ffn.get("intermediate_size") or int(2 * ffn["ffn_mult"] * config["hidden_size"] / 3)
      )
      self.names += [f"gqa{heads}" if heads else "none", f"w{width}" if width else "none"]
    self.longest, self.calls, self.remembered, self.vocab = settings["max_model_len"], 0, {}, config["vocab_size"]
    cache = types.SimpleNamespace(kv_cache_size_tokens=TABLE["kv_cache_tokens"], block_size=16)
    scheduler = types.SimpleNamespace(max_num_batched_tokens=settings["max_num_batched_tokens"])
    self.llm_engine = types.SimpleNamespace(
      is_sleeping=lambda: self.asleep,
      has_unfinished_requests=lambda: bool(self.queued),
      step=self.step,
      engine_core=types.SimpleNamespace(shutdown=lambda: None),
      vllm_config=types.SimpleNamespace(cache_config=cache, scheduler_config=scheduler),
    )

  def sleep(self, *, level: int) -> None:
    assert level == 0
    self.queued, self.asleep = [], True

  def wake_up(self, tags: list[str]) -> None:
    assert tags == ["scheduling"]
    self.asleep = False

  def enqueue(self, prompts: list[dict], params: SamplingParams, *, use_tqdm: bool) -> None:
    assert not use_tqdm
    assert params.ignore_eos
    assert self.asleep
    self.queued = [prompts, params, 0]

  def step(self) -> list:
    """Reads all prompts at first; then a token of each."""
    assert not self.asleep
    prompts, params, k = self.queued
    if k == 0:
      self.begin([p["prompt_token_ids"] for p in prompts], params)
    else:
      context = len(prompts[0]["prompt_token_ids"]) + k
      NOW[0] += TABLE["fixed"] + len(prompts) * sum(
        TABLE["step"][n] + TABLE["per_token"].get(n, 0.0) * context for n in self.names
      )
    self.queued[2] += 1
    if k + 1 < params.max_tokens:
      return []
    self.queued = []
    answers = [
      [(sum(p["prompt_token_ids"]) + i) % self.vocab for i in range(params.max_tokens)] for p in reversed(prompts)
    ]
    return [
      types.SimpleNamespace(
        finished=True, request_id=str(len(answers) - i), outputs=[types.SimpleNamespace(token_ids=answer)]
      )
      for i, answer in enumerate(answers)
    ]

  def begin(self, prompts: list[list[int]], params: SamplingParams) -> None:
    self.calls += 1
    if MODE == "dies" and self.calls == 5 and not Path(ARGUMENT).exists():
      Path(ARGUMENT).touch()
      os.kill(os.getpid(), signal.SIGKILL)
    if MODE == "batch" and len(prompts) >= int(ARGUMENT):
      raise RuntimeError("CUDA out of memory")
    for prompt in prompts:
      assert len(prompt) + params.max_tokens <= self.longest
      known = self.remembered.get(tuple(prompt[:3]), 0)
      NOW[0] += max(len(prompt) - known, 0) * (TABLE["fixed"] + sum(TABLE["step"][n] for n in self.names))
      self.remembered[tuple(prompt[:3])] = max(known, len(prompt))
