# `make train` and `make test` need Python 3.10 or newer and make; everything else goes into .venv.

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_PIP_ARGS ?=  # for example where another build of torch is to come from

VENV := .venv
PY := $(VENV)/bin/python
# Two at a time: while one test waits for a script to start, another computes. A file's tests stay together, as they share
# what they have prepared; kernels have one thread each, or they would wait for each other's.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile
INSTALLED := $(VENV)/.installed

.PHONY: install train test test-all bench lint

install: $(INSTALLED)

# torch goes first and alone: nothing that is installed later may replace the build that was chosen here.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH_PIP_ARGS) '$(TORCH)'
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

train: install
	$(PY) tutorial/prepare.py qwen
	$(PY) tutorial/train_qwen.py
	$(PY) tutorial/inference_qwen.py --max-new-tokens 32

lint: install
	$(PY) -m ruff check src tests tutorial benchmarks
	$(PY) -m ruff format --check src tests tutorial benchmarks
	$(PY) -m mypy

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(PYTEST)

bench: install
	$(PY) -m benchmarks.capture
	$(PY) -m benchmarks.lowering
	$(PY) -m benchmarks.search
	$(PY) -m benchmarks.memory
	$(PY) -m benchmarks.regret
	$(PY) -m benchmarks.pipeline
	$(PY) -m benchmarks.generation
	$(PY) -m benchmarks.fits
	$(PY) -m benchmarks.numerics
	$(PY) -m benchmarks.compile_time
	$(PY) -m benchmarks.peers
