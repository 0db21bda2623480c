# The project's errands. `make demo` and `make test` set up what they need by themselves, with nothing but
# Python 3.10 to 3.13, git and make. pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS,
# pip.conf) decide where packages come from.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
DEMO_READY := $(VENV)/.demo-ready
TEST_READY := $(VENV)/.test-ready
# Test workers share the processor; more threads than cores would make each of them slower.
ONE_THREAD := OMP_NUM_THREADS=1

.DELETE_ON_ERROR:
.PHONY: help demo test lint format venv clean

help:
	@echo "make demo    clone the voice of a bundled clip and speak with it; the result is in demo-output/"
	@echo "make test    style, types, import rules and all tests but the slow ones"
	@echo "make lint    style, types and import rules only"
	@echo "make format  put the style right"
	@echo "make venv    only set up $(VENV), with everything for development"
	@echo "make clean   delete $(VENV) and what was made"

demo: $(DEMO_READY)
	@$(BIN)/revox demo --out demo-output

test: lint
	@echo "== tests ($(JOBS) at a time)"
	@$(ONE_THREAD) $(BIN)/python -m pytest -n $(JOBS) -m "not slow"

lint: $(TEST_READY)
	@echo "== style"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== types"
	@$(BIN)/mypy
	@echo "== import rules"
	@$(BIN)/lint-imports --no-logo

format: $(TEST_READY)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

venv: $(TEST_READY)

$(DEMO_READY): pyproject.toml constraints.txt
	@echo "revox: voice cloning for Voxtral-4B-TTS-2603, tried here on a small model that comes with it"
	@echo "Setting up $(VENV) (once; one to ten minutes, by the network)"
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "$(PYTHON) is `$(PYTHON) --version 2>&1`; revox needs Python 3.10 to 3.13." \
	    "Name one that you have: make demo PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Python's venv module is not complete; on Debian and Ubuntu it is in the package python3-venv." >&2; \
	  exit 1; }
	@echo "  1/3 torch, the largest part (about 200 MB for CPUs, several GB with CUDA)"
	@$(PIP) torch
	@echo "  2/3 revox and what it uses"
	@$(PIP) --editable '.[eval]'
	@echo "  3/3 Resemblyzer, which judges speakers"
	@$(PIP) --no-deps resemblyzer
	@touch $@

$(TEST_READY): $(DEMO_READY)
	@echo "Adding the tools for tests to $(VENV)"
	@$(PIP) --editable '.[test]'
	@echo "  and vllm-omni and SpeechBrain, with which the networks are compared (their own modules only)"
	@$(PIP) --no-deps vllm-omni speechbrain
	@touch $@

clean:
	rm -rf $(VENV) build demo-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
