# Every target sets up what it needs; nothing has to be installed by hand. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# Which tests `make lock` runs on the new locks: all of them ("slow or not slow").
SUITE ?= slow or not slow
# Test workers share the cores: one thread each is faster than all threads each.
export OMP_NUM_THREADS_TEST ?= 1
export TOKENIZERS_PARALLELISM := false
export PYTHON
# Another version of torch than that of constraints.txt, for trials: make test-oldest TORCH=2.5.0
export TORCH ?=
TEST = OMP_NUM_THREADS=$(OMP_NUM_THREADS_TEST) $(1)/bin/python -m pytest -n $(WORKERS) --dist worksteal
SET_UP_BY := constraints.txt pyproject.toml .ci/venv

.PHONY: help setup demo test test-all test-oldest test-newest lock wheel bench docs lint types clean

help:
	@echo "make demo         set up, then train and check a LoRA on a real model (about 6 minutes after set-up)"
	@echo "make test         set up, then run the tests (under 12 minutes on 2 cores)"
	@echo "make test-all     every test, the slow proofs included"
	@echo "make test-oldest  the tests with every dependency at its lower bound; make test-newest: with the newest versions of today"
	@echo "make lock         renew both locks, run the whole suite on them, and keep them only if it passes"
	@echo "make wheel        build the wheel, install it in an empty environment, use it there"
	@echo "make bench        the benchmarks, side by side with the reference library, and the arena (about four hours; it goes on where it stopped)"
	@echo "make docs         write the generated pages under docs/"
	@echo "make lint types clean"

$(VENV)/.ready: requirements.lock $(SET_UP_BY)
	@.ci/venv $(VENV) requirements.lock

.venv-oldest/.ready: requirements-oldest.lock $(SET_UP_BY)
	@.ci/venv .venv-oldest requirements-oldest.lock

setup: $(VENV)/.ready

demo: setup
	$(BIN)/slimtune demo

test: setup
	$(call TEST,$(VENV)) -m "not slow"

test-all: setup
	$(call TEST,$(VENV))

# What transformers 5.15 itself cannot do stands in .ci/oldest-known.txt: the Trainer of several CPU processes does not find its optimizer state
# again (it asks for the device cpu:0), and grouped products of experts do not compile.
test-oldest: .venv-oldest/.ready
	$(call TEST,.venv-oldest) -m "not slow" $(addprefix --deselect=,$(shell cat .ci/oldest-known.txt))

test-newest:
	@.ci/venv .venv-newest newest
	$(call TEST,.venv-newest) -m "not slow"

lock: setup
	$(BIN)/python .ci/lock.py build/locks
	@.ci/venv build/venv-newest build/locks/requirements.lock
	@.ci/venv build/venv-oldest build/locks/requirements-oldest.lock
	SLIMTUNE_LOCKS=build/locks $(call TEST,build/venv-newest) -m "$(SUITE)"
	SLIMTUNE_LOCKS=build/locks $(call TEST,build/venv-oldest) -m "$(SUITE)"
	cp build/locks/requirements.lock build/locks/requirements-oldest.lock .
	@echo "[lock] both locks renewed; the suite passed on both (had it not, they would be as they were)"

wheel: setup
	.ci/wheel

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
	rm -rf $(VENV) .venv-oldest .venv-newest runs out build dist src/*.egg-info
