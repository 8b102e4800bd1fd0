# Needs Python 3.11 and make; everything else is installed into $(VENV).
PYTHON ?= python3.11
VENV ?= .venv
PEERS_VENV ?= .venv-peers
JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
PYTEST := $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
SOURCES := graphq passes lowering tests examples benchmarks judges

# Tests start fifty processes that import graphq: its modules are compiled once.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test test-all check lint types golden judges bench-peers fmt clean

# A target's comment is what it does, then what it needs and takes: minutes of 2 cores, disk on its first run.
help: ## this list
	@awk -F ':.*## | [[]|[]]$$' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n%s", $$1, $$2, \
	  $$3 ? sprintf("  %16s %s\n", "", $$3) : ""}' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP) ## an environment with graphq and its tests' tools in $(VENV), made anew when its versions change [Python 3.11 and the network; 1.7 GB, 5 minutes; every target below makes it first]

# Built without isolation, so that the pinned setuptools builds graphq, kernels included where there is a C++ compiler.
$(STAMP): pyproject.toml constraints.txt $(wildcard graphq/runtime/kernels/native/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "graphq needs Python 3.11: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	$(INSTALL) setuptools
	$(INSTALL) --no-build-isolation --editable '.[test]'
	@$(BIN)/python -m compileall -qq -j $(JOBS) $(VENV)/lib || true # pip does it with one process; some files are no Python
	@touch $@

demo: $(STAMP) ## quantize the example model, emit every target, compare [2 minutes, 2 GB of memory]
	$(BIN)/python examples/demo.py

test: $(STAMP) ## the tests, without the slow ones [12 minutes, 4 GB of memory]
	$(PYTEST)

test-all: $(STAMP) ## all tests, and the properties on ten times as many random examples, new ones in every run [about 2 hours, 4 GB of memory]
	$(PYTEST) -m 'slow or not slow' --hypothesis-profile fuzz

check: $(STAMP) ## all that CI checks, types beside the tests: lint, types, test [14 minutes, 5 GB of memory]
	+$(MAKE) -f $(firstword $(MAKEFILE_LIST)) --no-print-directory --jobs 2 lint types test

lint: $(STAMP) ## style, imports, formatting [seconds]
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(STAMP) ## static types [2 minutes]
	$(BIN)/pyright --pythonpath $(BIN)/python

golden: $(STAMP) ## rewrite the expected texts in tests; read the diff before you keep it [hours, as it runs all tests]
	EXPECTTEST_ACCEPT=1 $(PYTEST) --numprocesses 0 -m 'slow or not slow'
	-@git diff --stat -- tests

# No part of check: they install clients. judges/README.md has what each takes. JUDGES are the names of some.
judges: $(STAMP) ## real clients load and run what graphq makes [network on their first run; 3 GB, 25 minutes]
	$(BIN)/python judges/judges.py $(JUDGES)

# No part of check: it installs 1.5 GB and needs the machine for itself. PEERS_ARGS are the script's arguments.
bench-peers: $(STAMP) $(PEERS_VENV)/.installed ## quality, time and memory beside llm-compressor, in an environment of its own [network and the machine for itself; 1.5 GB, 1 hour]
	$(BIN)/python benchmarks/vs_llm_compressor.py --peer $(PEERS_VENV)/bin/python $(PEERS_ARGS)

$(PEERS_VENV)/.installed: benchmarks/peers.txt
	$(PYTHON) -m venv --clear $(PEERS_VENV)
	$(PEERS_VENV)/bin/python -m pip install --quiet --constraint benchmarks/peers.txt llmcompressor
	@touch $@

fmt: $(STAMP) ## format the sources and fix what can be fixed [seconds]
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove what make made
	rm -rf $(VENV) $(PEERS_VENV) .judges build dist graphq.egg-info .hypothesis .pytest_cache .ruff_cache
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
