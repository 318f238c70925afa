# Every target sets up its own environment: .venv is made once and again whenever pyproject.toml changes.
# Needs Python >= 3.11 with pip and venv, make and git. Choose an interpreter with: make test PYTHON=/path/to/python

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-db lint types check bench zoo format clean

VENV  := .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.ready
BENCH := $(VENV)/.ready-bench
DB    := $(VENV)/.ready-db
# Two test processes with one thread each: small networks gain nothing from more threads, and two cores are enough.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY)  ## train, prune, verify, save and reload a small network (about two minutes)
	$(BIN)/attrim demo

test: $(READY)  ## everyday tests
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2

test-slow: $(READY)  ## long sweeps only
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m slow

test-db: $(DB)  ## searches shared through a real PostgreSQL, installed if missing, on loopback in a temporary folder
	$(ONE_THREAD) tests/db.sh $(BIN)/python -m pytest -m db

lint: $(READY)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## mypy --strict on src
	$(BIN)/mypy

check: lint types test  ## what has to pass before a change goes in

bench: $(BENCH)  ## side by side with Torch-Pruning 1.6.1; ARGS="--full --json FILE" for more
	$(ONE_THREAD) $(BIN)/python benchmarks/core_vs_peer.py $(ARGS)

zoo: $(READY)  ## trace, cut and verify the torchvision and timm classification models; ARGS="--models resnet18"
	$(BIN)/python benchmarks/zoo_torchvision.py $(ARGS)

format: $(READY)  ## rewrite the files as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and all caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# One resolver run for everything: torch, torchvision and timm only fit together when they are chosen together.
$(READY): pyproject.toml
	@$(find_python); \
	echo "attrim: setting up $(VENV) with $$("$$python" --version); the first time this downloads PyTorch"; \
	"$$python" -m venv $(VENV) || { echo "attrim: '$$python -m venv' failed; install the venv module of this Python (Debian, Ubuntu: python3-venv)." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

$(BENCH): $(READY)
	$(BIN)/python -m pip install --quiet -e ".[dev,bench]"
	@touch $@

$(DB): $(READY)
	$(BIN)/python -m pip install --quiet -e ".[dev,postgresql]"
	@touch $@

# The first interpreter that really runs and is new enough: a name on the path may be a shim without a Python behind it.
PYTHON ?=
define find_python
python=""; \
for candidate in $(PYTHON) python3.11 python3 python3.12 python3.13 python3.14 python; do \
  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python="$$candidate"; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "attrim: needs Python 3.11 or newer, and none was found as python3.11, python3, ... on the path." >&2; \
  echo "Install one, or name it: make $(or $(MAKECMDGOALS),test) PYTHON=/path/to/python3.11" >&2; exit 1; \
fi
endef
