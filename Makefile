# What needs doing from a checkout. Needs only make and Python 3.11 or newer; everything else is set up on first use.
PYTHON ?= python3
# Options of dspark for `make demo`, for example ARGS="experiment=smoke draft=[none,lookup]".
ARGS ?=
# Extra options of pytest for `make test`, for example TESTS="tests/pipelines -k lock".
TESTS ?=
# Worker processes of the test suite; 0 runs it in one process.
JOBS ?= 2
# One thread per process: the suite is already parallel, and results do not depend on the machine's cores.
TEST_ENV = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=offline

BIN = .venv/bin

.DEFAULT_GOAL := help
.PHONY: help env demo test check engines kills format clean

help:  ## show this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env:  ## create .venv and install the locked dependencies (does nothing when it is up to date)
	@$(PYTHON) .ci/environment.py

demo: env  ## run the whole loop on the embedded target: corpus, build, score, select, publish
	$(BIN)/dspark $(ARGS)

test: env  ## run the whole test suite
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q $(TESTS)

check: env  ## lint, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

engines:  ## vLLM (CPU) and llama.cpp in .engines, to measure published drafts in them: dspark engines
	@$(PYTHON) .ci/engines.py

kills: env  ## kill -9 a small run ten times, and compare what it ends with (about 20 minutes)
	$(BIN)/python .ci/kills.py $(ARGS)

format: env  ## mend formatting and what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, caches and build products (artifacts and registry stay)
	rm -rf .venv .engines build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
