# `make serve` and `make test` do everything on a fresh machine; the rest is for working here.
.DEFAULT_GOAL := help
.PHONY: help serve test unit longer faults compare check lint format install system clean

VENV   ?= .venv
PYTHON ?= python3
ARGS   ?=
N      ?= 100
BIN    := $(VENV)/bin
# Without a compiler the server still serves, more slowly, and says so when it starts.
BUILD_NATIVE := $(BIN)/python -m model.native.build || echo "the torch runner will serve instead"
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

help:     ## this list
	@sed -nE 's/^([a-z-]+): .*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 10

serve: $(VENV)/.installed  ## install, fetch the default model, serve it at http://127.0.0.1:8000
	$(BIN)/quire serve $(ARGS)

test: $(VENV)/.tested system check  ## install, then every check: lint, types, all tests
	$(BIN)/python -m pytest -m "not kernels and not faults" $(ARGS)

unit: $(VENV)/.tested  ## the fast tests alone
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not kernels and not faults" $(ARGS)

longer: $(VENV)/.tested system  ## what CI adds: fault tests in real processes, GPU kernels at length
	$(BIN)/python -m pytest -m "kernels or faults" $(ARGS)

check: lint  ## everything but the tests
	$(BIN)/python -m mypy

lint: $(VENV)/.tested  ## ruff
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .

faults: $(VENV)/.tested system  ## kill engines N times (N=3000) and check every answer
	$(BIN)/python -m tests.faults.kills --kills $(N) --lease 3

compare: $(VENV)/.tested system  ## Quire beside its peers on this machine: tables and a chart in results/
	$(BIN)/python -m loadtest.compare $(ARGS)

format: $(VENV)/.tested  ## rewrite the code in the house style
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

install: $(VENV)/.installed  ## the virtual environment alone

system:   ## what the tests need from the system: Redis, Chromium, promtool
	@missing=""; \
	for need in redis-server:redis-server chromium:chromium promtool:prometheus; do \
	  command -v $${need%%:*} >/dev/null || missing="$$missing $${need##*:}"; \
	done; \
	[ -z "$$missing" ] || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq $$missing >/dev/null; \
	  else \
	    echo "missing:$$missing (Debian: sudo apt-get install$$missing)"; \
	    echo "without them the tests of the queue, the page and the alerts cannot run"; exit 1; \
	  fi; }

clean:    ## remove what was built here; fetched models stay in ~/.cache/quire
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis results

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Quire needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --editable .
	@$(BUILD_NATIVE)
	touch $@

$(VENV)/.tested: pyproject.toml | $(VENV)/bin/python
	$(PIP) install --editable '.[test,loadtest]'
	@$(BUILD_NATIVE)
	touch $@ $(VENV)/.installed
