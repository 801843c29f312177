# Verbs only; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA ?=
SWEEP ?=

# Two processes on two cores with OpenMP's spinning threads run ten times slower than without.
export OMP_WAIT_POLICY ?= passive

.PHONY: help setup demo test lint types tests slow test-stack stack-up stack-down sweep prove-model prove-segment prove-training clean

help: ## list the verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## make .venv and install repsep with the pinned versions

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## the whole pipeline on this machine; DATA=<folder> for your own images and masks
	$(BIN)/repsep demo $(if $(DATA),--data "$(DATA)")

test: lint types tests ## lint, types and the fast tests

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

tests: setup
	$(BIN)/pytest

slow: setup ## the tests that take minutes
	$(BIN)/pytest -m slow

test-stack: setup ## train, register and segment on live services: PostgreSQL, MLflow, S3, Ray with tokens
	infra/dev/stack.sh install
	$(BIN)/pytest -m slow tests/test_stack.py

stack-up: setup ## start those services for yourself; then: . .repsep/stack/env.sh
	infra/dev/stack.sh install
	BIN=$(BIN) infra/dev/stack.sh up

stack-down: ## end them
	infra/dev/stack.sh down

sweep: setup ## search loss weights and models; DATA=<folder> as CamVid's, SWEEP=<recipe> for your own
	$(BIN)/repsep sweep $(if $(SWEEP),--config "$(SWEEP)",$(if $(DATA),--config sweep-camvid)) $(if $(DATA),--set "prepare.source=$(DATA)")

prove-model: setup ## check what the model library claims: families, cost, exports, memory; prints a table
	PYTHONPATH=. $(BIN)/python benchmarks/model.py

prove-segment: setup ## kill, starve and poison bulk segmentation on a real S3 store; prints planned, injected, lost
	infra/dev/ceph-rgw.sh install
	PYTHONPATH=. $(BIN)/python benchmarks/survive.py

prove-training: setup ## kill, starve and poison training on real Ray clusters; prints injected and outcome
	infra/dev/ceph-rgw.sh install
	PYTHONPATH=. $(BIN)/python benchmarks/training.py

clean: ## remove what demo and tests left (not .venv)
	rm -rf .repsep .pytest_cache .mypy_cache .ruff_cache
