# Everything runs from .venv, which is made on first use and again whenever requirements*.lock or pyproject.toml change.

PYTHON ?= python3
EXP ?=
CKPT ?=
ARGS ?=
BENCH ?= cpu
TEST_WORKERS ?= 2
TASKS ?= paper6
ARMS ?= dense linear:global_impact@0.55 linear:norm@0.55 linear:recency@0.55

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
STORAGE ?= sqlite:///runs/sweeps/$(EXP)/study.db
SWEEPS := $(basename $(notdir $(wildcard sweeps/*.yaml)))

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup sweep report eval tasks bench bench-table doctor dashboard test test-gpu soak audit lock clean check-python

help:  ## print this list
	@echo "make TARGET [EXP=sweep] [CKPT=checkpoint] [ARGS='further arguments']"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' Makefile
	@echo "sweeps: $(SWEEPS)"

setup: $(STAMP)  ## make .venv and install the pinned dependencies and this checkout

sweep: require-sweep $(STAMP)  ## run sweeps/$(EXP).yaml; again to continue, e.g. make sweep EXP=hierarchy_ablation
	@$(BIN)/simba-lab sweep --config sweeps/$(EXP).yaml $(ARGS)

dashboard: require-sweep  ## watch the trials of a sweep in the browser; STORAGE=postgresql://... for a shared study
	@test -x $(BIN)/optuna-dashboard || { \
	  echo "make: optuna-dashboard is not installed: $(BIN)/python -m pip install 'optuna-dashboard<1'" >&2; exit 2; }
	@case "$(STORAGE)" in sqlite:///*) test -f "$(patsubst sqlite:///%,%,$(STORAGE))" || { \
	  echo "make: $(patsubst sqlite:///%,%,$(STORAGE)) does not exist yet: make sweep EXP=$(EXP) makes it" >&2; exit 2; };; esac
	@$(BIN)/optuna-dashboard "$(STORAGE)" $(ARGS)

report: require-sweep $(STAMP)  ## write the table and report.html of a sweep again from its results
	@$(BIN)/simba-lab report runs/sweeps/$(EXP) $(ARGS)

eval: require-checkpoint $(STAMP)  ## six benchmarks, dense beside pruned, of CKPT=runs/base; TASKS= takes held-out windows
	@$(BIN)/simba-lab eval --checkpoint $(CKPT) $(if $(TASKS),--tasks $(TASKS)) --arms $(ARMS) $(ARGS)

tasks: $(STAMP)  ## write the six benchmarks for the evaluation harness to runs/tasks; no network
	@$(BIN)/simba-lab tasks build $(ARGS)

bench: $(STAMP)  ## time ours beside others: BENCH=cpu (default), or with a GPU kernels, prefill, train, decode
	@$(BIN)/simba-lab bench $(BENCH) $(ARGS)

bench-table: $(STAMP)  ## write the GPU tables again from experiments/bench/*.json: the README's, and all lines beside them
	@$(BIN)/simba-lab bench table $(sort $(wildcard experiments/bench/*.json)) --aimed --into README.md
	@$(BIN)/simba-lab bench table $(sort $(wildcard experiments/bench/*.json)) --into experiments/bench/README.md

doctor: $(STAMP)  ## say what is installed and which backends work here
	@$(BIN)/simba-lab doctor $(ARGS)

test: $(STAMP)  ## lint and run the tests that need no GPU
	@$(BIN)/ruff check .
	@$(BIN)/python -m pytest -m "not gpu and not soak" -n $(TEST_WORKERS) $(ARGS)

test-gpu: $(STAMP)  ## run the whole suite where there is a CUDA device: Triton kernels compiled, not interpreted
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { \
	  echo "make: torch sees no CUDA device here" >&2; exit 2; }
	@$(BIN)/python -m pytest -m "not soak" -n $(TEST_WORKERS) $(ARGS)

soak: $(STAMP)  ## the kill and fuzz tests at full size, with their counts; takes hours, what passed is not fuzzed again
	@$(BIN)/python -m pytest -m soak -s -n 0 $(wildcard tests/test_kills.py tests/test_fuzz.py) $(ARGS)

# In a folder of its own, so that the auditor's own dependencies are not among those that are audited.
audit: $(STAMP)  ## look for known vulnerabilities in the pinned dependencies, where the index can be reached
	@test -x .audit-venv/bin/pip-audit || { $(PYTHON) -m venv .audit-venv && \
	  .audit-venv/bin/python -m pip install --quiet 'pip-audit>=2.7,<3'; } || { rm -rf .audit-venv; \
	  echo "make: pip-audit cannot be installed here: nothing was audited"; exit 0; }
	@status=0; .audit-venv/bin/pip-audit --progress-spinner off --disable-pip --no-deps --requirement requirements.lock \
	  $(ARGS) > .audit-venv/found 2> .audit-venv/said || status=$$?; \
	known=$$(grep -cE '^[A-Za-z0-9]' requirements.lock); left=$$(grep -c 'could not be audited' .audit-venv/found || true); \
	if grep -qE 'ConnectionError|ServiceError|Max retries|timed out|Name or service' .audit-venv/said; then \
	  echo "make: the index of vulnerabilities cannot be reached from here: nothing was audited"; \
	elif [ "$$left" -ge "$$known" ]; then \
	  echo "make: the index that answers here has no vulnerabilities on record for anything: nothing was audited"; \
	else cat .audit-venv/found; tail -n 1 .audit-venv/said >&2; \
	  echo "make: $$((known - left)) of $$known pinned dependencies audited"; exit $$status; fi

clean:  ## remove .venv and caches, keep runs/
	rm -rf $(VENV) .lock-venv .audit-venv .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find simba_lab tests -type d -name __pycache__ -prune -exec rm -rf {} +

# torch brings the packages left out here in exactly the versions its own build wants: none on a CPU-only machine.
lock: check-python  ## resolve pyproject.toml afresh and pin the outcome in requirements.lock
	rm -rf .lock-venv
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/python -m pip install --upgrade pip
	.lock-venv/bin/python -m pip install --editable '.[dev]'
	{ sed -n '/^#/p' requirements.lock; \
	  .lock-venv/bin/python -m pip freeze --all --exclude pip --exclude simba-lab \
	  | sed 's/+[a-z0-9.]*$$//' | sed 's/^triton==.*/& ; platform_system == "Linux"/' | grep -viE '^(nvidia-|cuda-)'; } > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf .lock-venv

NEEDED_MB ?= 3300
PIP := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off
INSTALL_LOG := $(VENV)/install.log

$(STAMP): requirements.lock requirements-data.lock pyproject.toml | check-python
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "make: $(PYTHON) cannot make a virtual environment: install its venv module (Debian: python3-venv)" >&2; exit 1; }
	@free=$$(df -Pm $(VENV) | awk 'NR == 2 {print $$4}'); test "$$free" -ge $(NEEDED_MB) || { \
	  echo "make: $$free MB are free here and the installation takes $(NEEDED_MB): free some" >&2; exit 1; }
	@echo "Installing requirements.lock into $(VENV), once (everything pip says: $(INSTALL_LOG)); large downloads:"
	@{ $(PIP) --requirement requirements.lock && $(PIP) --no-deps --requirement requirements-data.lock \
	  && $(PIP) --no-deps --no-build-isolation --editable .; } 2>&1 \
	  | tee $(INSTALL_LOG) \
	  | { grep --line-buffered -oE '(Downloading|Using cached) [^ ]+ \([0-9.]+ MB\)|^Installing collected' || true; } \
	  || { tail -n 15 $(INSTALL_LOG) >&2; echo "make: pip failed; run the same command again to continue" >&2; exit 1; }
	@touch $@

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
	  echo "make: $(PYTHON) is no Python of 3.11 to 3.13; name one, e.g. make setup PYTHON=python3.12" >&2; \
	  exit 1; }

.PHONY: require-sweep require-checkpoint
require-sweep:
	@test -n "$(EXP)" -a -f "sweeps/$(EXP).yaml" || { \
	  echo "make: EXP='$(EXP)' names no file in sweeps/: choose one of $(SWEEPS)" >&2; exit 2; }

require-checkpoint:
	@test -n "$(CKPT)" || { echo "make: say which checkpoint, e.g. make eval CKPT=runs/base" >&2; exit 2; }
