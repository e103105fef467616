# From a bare clone: `make scan` or `make test`. Each sets up what it needs, and can be run again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/installed

.PHONY: help setup scan test test-all test-gpu lint clean

help:
	@echo "make scan      set up, measure EMC of four MLP widths, write emc.h5 (replaces it)"
	@echo "make setup     set up only"
	@echo "make test      set up, run the fast tests, and the GPU kernels under Triton's interpreter"
	@echo "make test-all  also the slow ones: reference cases, long simulations, all kernels compiled"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make lint      ruff (rules and format) and mypy"
	@echo "make clean     remove the virtual environment, caches and build output (not emc.h5)"
	@echo "PYTHON=python3.12 make ... takes another interpreter for the virtual environment"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[test,lint]"
	@touch $@

scan: $(READY)
	$(BIN)/fasttrain scan --arch mlp --widths 4,8,16,24 --out emc.h5 --overwrite

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not alone"
	$(BIN)/python -m pytest -m "alone and not slow and not gpu"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/interpreter

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not alone"
	$(BIN)/python -m pytest -m "alone and not gpu"
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/interpreter

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
