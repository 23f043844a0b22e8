"""Exports a child for a serving engine (docs/serving.md).

python -m experiments.export --child=runs/quickstart --engine=vllm --out=exports/quickstart
python -m experiments.export --child=runs/quickstart --engine=llama_cpp --dtype=Q4_1 --out=exports/quickstart.gguf

What the engine would reject or change is refused, with the layers and the restriction to give to the search.
"""

import sys

from absl import app, flags, logging

from puzzle_jax.errors import PuzzleError
from puzzle_jax.serving import engines
from puzzle_jax.serving.export import FORMATS, export

_CHILD = flags.DEFINE_string("child", None, "A run's work directory, or a child's own.", required=True)
_OUT = flags.DEFINE_string("out", None, "A new folder (hf) or file (gguf).", required=True)
_FORMAT = flags.DEFINE_enum(
  "format", None, list(FORMATS), "nemotron-nas for Hugging Face and its readers, or llama.cpp's; the engine's if empty."
)
_ENGINE = flags.DEFINE_enum(
  "engine", None, list(engines.ENGINES), "What shall run it; any reader of the format if empty."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", None, [dtype for dtypes in FORMATS.values() for dtype in dtypes], "Of the weights; bfloat16 or F16 if empty."
)
_PARENT = flags.DEFINE_string(
  "parent", None, "The parent, if a GGUF file: its tokenizer's metadata are copied into a GGUF. A run's is known."
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  logging.set_verbosity(logging.ERROR)
  options = {flag.name: flag.value or "" for flag in (_FORMAT, _DTYPE, _ENGINE, _PARENT)}
  try:
    export(_CHILD.value, _OUT.value, **options)
  except PuzzleError as e:
    sys.exit(f"error: {e}")
  print(f"exported {_CHILD.value} to {_OUT.value}")


if __name__ == "__main__":
  app.run(main)
