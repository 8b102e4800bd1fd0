# Needs Python 3.11 and make; everything else is installed into $(VENV).
PYTHON ?= python3.11
VENV ?= .venv
PEERS_VENV ?= .venv-peers
JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile
SOURCES := graphq passes lowering tests examples benchmarks

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-all check lint types golden bench-peers fmt clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## a virtual environment with graphq and its tests' tools, made anew when its versions change

# Built without isolation, so that the pinned setuptools builds graphq.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "graphq needs Python 3.11: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable '.[test]'
	@touch $@

demo: $(STAMP) ## quantize the example model, emit every target, compare
	$(BIN)/python examples/demo.py

test: $(STAMP) ## the tests, without the slow ones
	$(PYTEST)

test-all: $(STAMP) ## all tests, and the properties on many more random examples
	$(PYTEST) -m 'slow or not slow' --hypothesis-profile fuzz

check: lint types test ## all that CI checks

lint: $(STAMP) ## style, imports, formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP) ## static types
	$(BIN)/pyright --pythonpath $(BIN)/python

golden: $(STAMP) ## rewrite the expected texts in tests; read the diff before you keep it
	EXPECTTEST_ACCEPT=1 $(PYTEST) --numprocesses 0 -m 'slow or not slow'
	-@git diff --stat -- tests

# No part of check: it installs 1.5 GB and needs the machine for itself. PEERS_ARGS are the script's arguments.
bench-peers: $(STAMP) $(PEERS_VENV)/.installed ## quality, time and memory beside llm-compressor, in an environment of its own
	$(BIN)/python benchmarks/vs_llm_compressor.py --peer $(PEERS_VENV)/bin/python $(PEERS_ARGS)

$(PEERS_VENV)/.installed: benchmarks/peers.txt
	$(PYTHON) -m venv --clear $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet --constraint benchmarks/peers.txt llmcompressor
	@touch $@

fmt: $(STAMP) ## format the sources and fix what can be fixed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove what make made
	rm -rf $(VENV) $(PEERS_VENV) build dist graphq.egg-info .hypothesis .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
