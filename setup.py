"""Packaging of puzzle_jax. Minor ranges hold on JAX 0.10 / Python 3.11 and JAX 0.11 / Python 3.12."""

from setuptools import find_packages, setup

setup(
  name="puzzle_jax",
  version="0.1.0",
  description="Puzzle in JAX: distillation-based architecture search for inference-optimised language models",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["puzzle_jax", "puzzle_jax.*"]),
  package_data={"puzzle_jax": ["py.typed", "report/*.html", "serving/hf/*.py"]},
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
    "tensorflow-datasets>=4.9.9,<4.10",
    "tokenizers>=0.22,<0.24",
    "tqdm>=4.66,<5",
  ],
  extras_require={
    "cuda": ["jax[cuda13]>=0.10,<0.12"],
    "export": ["torch>=2.11,<2.14", "transformers>=5.17,<5.24"],
    "dev": [
      "hypothesis>=6.100,<7",
      "mypy>=2.0,<3",
      "playwright>=1.50,<2",
      "pytest>=9,<10",
      "pytest-xdist>=3.6,<4",
      "ruff>=0.17,<0.18",
      "torch==2.13.0",
      "transformers>=5.17,<5.24",
    ],
  },
)
