"""Random children on disk for the tests of exports."""

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from puzzle_jax import checkpoint
from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig
from puzzle_jax.tokenizer import Tokenizer

MIXED = ("none/w300", "gqa1/w256", "none/linear", "linear/none", "none/none", "gqa2/w100")
LLAMACPP = ("gqa4/w300", "linear/w64", "none/w100", "none/none", "gqa1/w32")  # what llama.cpp runs


def letter_tokenizer() -> Tokenizer:
  """A token a letter, 30 tokens."""
  vocab = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz .")} | {"<end>": 28, "<turn>": 29}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
  backend.add_special_tokens(["<end>", "<turn>"])
  return Tokenizer(backend, {"eos_token": "<end>"}, "{{ messages[0]['content'] }}<turn>", frozenset({28, 29}))


def byte_tokenizer(*, add_bos: bool = False) -> Tokenizer:
  """Byte-level BPE with one merge, cut as GPT-2's; 259 tokens."""
  start, end, think = "<|start|>", "<|end|>", "<think>"
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  backend = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*letters, "th"])}, merges=[("t", "h")]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens([start, end])
  backend.add_tokens([think])
  if add_bos:
    backend.post_processor = tokenizers.processors.TemplateProcessing(
      single=[start, "$A"], special_tokens=[(start, backend.token_to_id(start))]
    )
  template = "{{ messages[0]['content'] }}<|end|>"
  return Tokenizer(backend, {"bos_token": start, "eos_token": end}, template, frozenset([backend.token_to_id(end)]))


def random_child(folder: Path, tokenizer: Tokenizer, blocks: tuple[str, ...], **config: Any) -> Architecture:
  """Writes a random child in fp32, scaled so that every block matters."""
  settings = {"vocab_size": 64, "hidden_size": 32, "num_heads": 4, "head_dim": 8, "max_context": 128}
  shared = ModelConfig(**(settings | config))
  architecture = Architecture(shared, tuple(map(BlockSpec.parse, blocks)))
  rng = np.random.default_rng(0)

  def arrays(tensors):
    return {
      k: (rng.standard_normal(t.shape) / t.shape[-1] ** 0.5 + (k == "norm")).astype(np.float32)
      for k, t in tensors.items()
    }

  folder.mkdir(parents=True)
  layers = [{s.slot: arrays(s.tensors(shared)) for s in b.subblocks} for b in architecture.blocks]
  head = arrays(architecture.head_tensors())
  metadata = {"parent": "Tiny", "license": "apache-2.0"}
  checkpoint.write_checkpoint(folder, architecture, head, layers, tokenizer=tokenizer, metadata=metadata)
  return architecture


def load(folder: Path, **options: Any) -> Any:
  """An export in Transformers."""
  from transformers import AutoModelForCausalLM

  return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()
