# Two commands on a fresh machine with python3, make and a C compiler:  make demo   make test
# Both first do the set-up, which does nothing where it is done.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready

.PHONY: help setup demo test test-slow test-gpu bench bench-quick lint plant format clean

help:
	@echo "make demo       set up, then: SmolLM2-135M learns to add with DRPO on this machine's CPU"
	@echo "make test       set up, then: all tests that need no special hardware"
	@echo "make test-slow  the slow ones: the demo's three seeds"
	@echo "make test-gpu   those that need a CUDA GPU"
	@echo "make bench      measure this project beside TRL, vLLM, Liger and plain PyTorch on this machine (hours)"
	@echo "make bench-quick  the same with tiny sizes: does every competitor run here?"
	@echo "make plant      plant known bugs one by one and see that a test fails for each"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff put the code in order"
	@echo "make clean      remove the virtual environment and caches (runs/ stays)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== making $(VENV) and installing drpo into it (once; minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: setup
	@echo "== drpo train demo"
	$(BIN)/drpo train demo

test: setup
	@echo "== tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not vllm and not gpu and not interpreted and not adapters"

test-slow: setup
	$(BIN)/python -m pytest -m slow tests

test-gpu: setup
	$(BIN)/python -m pytest -m gpu tests

bench: setup
	$(BIN)/python -m benchmarks

bench-quick: setup
	$(BIN)/python -m benchmarks --quick

plant: setup
	$(BIN)/python tests/plant_bugs.py

lint: setup
	@echo "== ruff, mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
