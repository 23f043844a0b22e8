"""Talks to a parent or a child.

python -m experiments.generate --model=runs/quickstart --prompt="What is the capital of France?"
"""

import os
import sys
from typing import Any

from absl import app, flags

import puzzle_jax
from puzzle_jax.model.language_model import LanguageModel

_MODEL = flags.DEFINE_string(
  "model", "smollm2-135m", "A run (its child), a model's directory, a GGUF file, or a hub id."
)
_PROMPT = flags.DEFINE_string("prompt", None, "What to say; without it, an interactive chat.")
_RAW = flags.DEFINE_bool("raw", False, "Continue the prompt as plain text, without the chat template.")
_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Longest answer.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token.", lower_bound=0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  settings: dict[str, Any] = {"max_new_tokens": _TOKENS.value, "temperature": _TEMPERATURE.value, "seed": _SEED.value}
  try:
    is_run = os.path.isfile(os.path.join(_MODEL.value, "gkd", "manifest.json"))
    model = puzzle_jax.open_run(_MODEL.value).child if is_run else LanguageModel.open(_MODEL.value)
    if _PROMPT.value is not None:
      print(model.generate(_PROMPT.value, **settings) if _RAW.value else model.chat(_PROMPT.value, **settings))
      return
    messages: list[dict[str, str]] = []
    while prompt := input("you: "):
      messages.append({"role": "user", "content": prompt})
      messages.append({"role": "assistant", "content": model.chat(messages, **settings)})
      print("model:", messages[-1]["content"])
  except EOFError:
    return
  except puzzle_jax.PuzzleError as e:
    sys.exit(f"error: {e}")


if __name__ == "__main__":
  app.run(main)
