"""Packaging of puzzle_jax. Minor ranges hold on JAX 0.10 / Python 3.11 and JAX 0.11 / Python 3.12.

A wheel holds the library, and inside of it the commands and configs that its users need: what is `python -m
experiments.run --config=configs/…` in a checkout is `python -m puzzle_jax.experiments.run --config=configs/…` where
only the wheel is installed. At the top level, packages called `experiments` and `configs` would collide with those that
many projects have of their own. The commands that make this repository's records stay out.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
FOR_THIS_REPOSITORY = {
  "ablation_table",
  "ablations",
  "arms",
  "block_library",
  "compare",
  "flagship",
  "flagship_tables",
  "golden",
  "interactions",
  "keep_record",
  "paired",
  "pictures",
  "readme",
  "record",
  "tiny_parent",
}
COMMANDS = sorted(path.stem for path in (HERE / "experiments").glob("*.py") if path.stem not in FOR_THIS_REPOSITORY)

setup(
  name="puzzle_jax",
  version="0.1.0",
  description="Puzzle in JAX: distillation-based architecture search for inference-optimised language models",
  long_description=(HERE / "README.md").read_text(encoding="utf-8"),
  long_description_content_type="text/markdown",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=[*find_packages(include=["puzzle_jax", "puzzle_jax.*"]), "puzzle_jax.configs"],
  py_modules=[f"puzzle_jax.experiments.{name}" for name in COMMANDS],
  package_dir={"puzzle_jax.configs": "configs", "puzzle_jax.experiments": "experiments"},
  package_data={"puzzle_jax": ["py.typed", "report/*.html", "serving/hf/*.py"]},
  entry_points={"vllm.general_plugins": ["puzzle_jax = puzzle_jax.serving.vllm_plugin:register"]},
  install_requires=[
    "absl-py>=2.1,<3",
    "array_record>=0.8,<0.9",
    "cvxpy>=1.7,<1.10",
    "flax>=0.12,<0.13",
    "gguf>=0.17,<0.20",
    "grain>=0.2.12,<0.3",
    "highspy>=1.10,<2",
    "huggingface_hub>=1.0,<3",
    "importlib_resources>=6,<8",
    "jax>=0.10,<0.12",
    "jinja2>=3.1,<4",
    "ml_collections>=1.1,<1.2",
    "numpy>=2.1,<3",
    "optax>=0.2.5,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "plotly>=6,<8",
    "safetensors>=0.6,<0.9",
    "tensorboard>=2.20,<3",  # its event files and their reader; neither needs TensorFlow
    "tensorflow-datasets>=4.9.9,<4.10",
    "tokenizers>=0.22,<0.24",
    "tqdm>=4.66,<5",
  ],
  extras_require={
    "colab": ["ipykernel>=6.29,<8", "ipywidgets>=8,<9", "nbformat>=5.10,<6"],
    "cuda": ["jax[cuda13]>=0.10,<0.12"],
    "export": ["torch>=2.11,<2.14", "transformers>=5.17,<5.24"],
    "lm-eval": ["lm_eval>=0.4.13,<0.5"],  # so spelt: pip before 23.3 knows no extra with an underscore
    "tpu": ["jax[tpu]>=0.10,<0.12"],
    "wandb": ["wandb>=0.24,<1"],
    "dev": [
      "hypothesis>=6.100,<7",
      "ipykernel>=6.29,<8",
      "ipywidgets>=8,<9",
      "mypy>=2.0,<3",
      "nbclient>=0.10,<0.12",
      "nbformat>=5.10,<6",
      "playwright>=1.50,<2",
      "pytest>=9,<10",
      "pytest-xdist>=3.7,<4",
      "pyyaml>=6,<7",
      "ruff>=0.17,<0.18",
      "setuptools>=77",
      "torch==2.13.0",
      "transformers>=5.17,<5.24",
    ],
  },
)
