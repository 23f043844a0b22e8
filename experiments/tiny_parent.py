"""Writes the random four-layer parent of configs/tiny.py: python -m experiments.tiny_parent --out=runs/tiny_parent."""

from pathlib import Path

import jax
import tokenizers
from absl import app, flags
from tokenizers import decoders, models, pre_tokenizers

from puzzle_jax.arch import Architecture, BlockSpec, ModelConfig
from puzzle_jax.checkpoint import write_checkpoint
from puzzle_jax.model import decoder
from puzzle_jax.store import replacing
from puzzle_jax.tokenizer import Tokenizer

_OUT = flags.DEFINE_string("out", "runs/tiny_parent", "Folder to write; replaced if it is there.")


def byte_tokenizer() -> Tokenizer:
  """One token a byte, and an end token."""
  end = "<|end|>"
  vocabulary = {token: i for i, token in enumerate([end, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
  backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  backend.add_special_tokens([end])
  template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
  return Tokenizer(backend, {"eos_token": end}, template, frozenset([0]))


def write(folder: Path, *, layers: int = 4, seed: int = 0) -> None:
  """Layers of hidden size 32; the blocks differ in scale, so that some matter more than others."""
  tokenizer = byte_tokenizer()
  config = ModelConfig(
    vocab_size=tokenizer.vocab_size, hidden_size=32, num_heads=4, head_dim=8, max_context=256, tie_embeddings=True
  )
  architecture = Architecture(config, (BlockSpec.parse("gqa2/w64"),) * layers)
  params = jax.device_get(decoder.init(architecture, jax.random.key(seed)))
  for i, layer in enumerate(params["layers"]):
    for subblock in layer.values():
      for name in ("o", "down"):
        if name in subblock:
          subblock[name] = subblock[name] * (0.3 + 0.3 * i)
  with replacing(folder) as aside:
    aside.mkdir()
    write_checkpoint(aside, architecture, decoder.head_of(params), params["layers"], tokenizer=tokenizer)


def main(argv: list[str]) -> None:
  del argv
  write(Path(_OUT.value))


if __name__ == "__main__":
  app.run(main)
