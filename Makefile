# Every target sets up what it needs; nothing has to be installed by hand. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= 2
# Test workers share the cores: one thread each is faster than all threads each.
export OMP_NUM_THREADS_TEST ?= 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test test-all bench docs lint types clean

help:
	@echo "make demo      set up, then train and check a LoRA on a real model (about 6 minutes after set-up)"
	@echo "make test      set up, then run the tests (under 12 minutes on 2 cores)"
	@echo "make test-all  every test, the slow proofs included"
	@echo "make bench     the benchmarks, side by side with the reference library, and the arena (about four hours; it goes on where it stopped)"
	@echo "make docs      write the generated pages under docs/"
	@echo "make lint types clean"

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "[set-up 1/3] virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "[set-up 2/3] torch, the version of constraints.txt"
	@$(PIP) install -qq -c constraints.txt torch
	@echo "[set-up 3/3] slimtune with its development extras (a few minutes the first time)"
	@$(PIP) install -qq -c constraints.txt -e ".[dev]"
	@touch $@

setup: $(VENV)/.ready

demo: setup
	$(BIN)/slimtune demo

test: setup
	OMP_NUM_THREADS=$(OMP_NUM_THREADS_TEST) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-all: setup
	OMP_NUM_THREADS=$(OMP_NUM_THREADS_TEST) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

bench: setup
	$(BIN)/python -m benchmarks.run
	$(BIN)/slimtune bench methods --out docs/arena

docs: setup
	$(BIN)/python -m slimtune.testing.matrix --write docs/support-matrix.md
	$(BIN)/python -m slimtune.testing.architectures --write docs/architectures.md
	$(BIN)/python -m slimtune.testing.method_pages --write docs/methods

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs out build dist src/*.egg-info
