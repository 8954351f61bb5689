# `make serve` and `make test` do everything on a fresh machine; the rest is for working here.
.DEFAULT_GOAL := help
.PHONY: help serve test test-clients test-clients-openai2 test-clients-openai3 test-triton $(TRITON_RUNS) unit longer faults fuzz loadtest soak peers compare check docs lint format install constraints system clean

VENV   ?= .venv
PYTHON ?= python3
ARGS   ?=
N      ?= 100
MINUTES ?= 10
BIN    := $(VENV)/bin
CLIENTS ?= .venv-clients
TRITONS ?= 3.6.0
# Two environments: some clients need version 2 of openai, some version 3.
CLIENT_RUNS := test-clients-openai2 test-clients-openai3
TRITON_RUNS := $(TRITONS:%=test-triton-%)
# pip has built it, if need be with the package ziglang (setup.py); this prints why if it could not.
BUILD_NATIVE := $(BIN)/python -m model.native.build \
  || echo "the torch runner will serve instead, at a quarter of the speed or less (docs/benchmarks.md)"
# The versions that are tested together; `CONSTRAINTS=` takes the newest that pyproject.toml allows.
CONSTRAINTS ?= deploy/constraints.txt
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL := $(PIP) install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
# If there is no compiler, and pip does not find the package ziglang, either.
WITHOUT_ZIGLANG := ! { command -v g++ || command -v clang++ || command -v c++; } >/dev/null && WITHOUT_ZIGLANG=1
NO_INSTALL = { echo "pip failed; if a version has no wheel here, try: make $(MAKECMDGOALS) CONSTRAINTS="; exit 1; }
# llama.cpp without what the comparison does not need; it detects the instructions by itself. GCC would
# remove stores to its AMX configuration as dead: an illegal instruction at the first product.
LLAMA_CPP := -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
  -DLLAMA_BUILD_APP=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF \
  -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'
# Each process that tests start, and pytest itself, would compile every module again.
export PYTHONDONTWRITEBYTECODE :=
# Tests run in one process per core, at most eight: each starts servers and loads models of its own.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PARALLEL := -n logical --maxprocesses 8 --dist worksteal

help:     ## this list
	@sed -nE 's/^([a-z-]+): .*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

serve: $(VENV)/.installed  ## install, fetch the default model, serve it at http://127.0.0.1:8000
	exec $(BIN)/quire serve $(ARGS)

test: $(VENV)/.tested system lint  ## install, then every check: lint, types, all tests
	$(PYTEST) $(PARALLEL) -m "not longer and not kernels and not faults" $(ARGS)

test-clients: $(CLIENT_RUNS)  ## other people's clients, by their own packages

$(CLIENT_RUNS): test-clients-%: $(VENV)/.installed $(CLIENTS)/%/.installed $(CLIENTS)/.npm
	OMP_NUM_THREADS=1 $(CLIENTS)/$*/bin/python -m pytest -c tests/clients/pytest.ini \
	  --rootdir tests/clients --confcutdir tests/clients \
	  tests/clients/test_openai.py tests/clients/test_embeddings.py tests/clients/$* --quire $(BIN)/quire $(ARGS)

# The constraints have the newest release that torch requires; these are tested beside it.
test-triton: $(TRITON_RUNS)  ## the GPU kernels with other releases of Triton (TRITONS="3.6.0 3.7.1")

$(TRITON_RUNS): test-triton-%: $(VENV)/.tested build/triton-%/.installed
	PYTHONPATH=$(CURDIR)/build/triton-$* $(PYTEST) $(PARALLEL) -m "not kernels and not longer" \
	  -W "ignore:Conversion of an array with ndim:DeprecationWarning" $(wildcard tests/model/test_kernels*.py) $(ARGS)
	PYTHONPATH=$(CURDIR)/build/triton-$* $(PYTEST) $(PARALLEL) -m kernels \
	  tests/model/test_kernels_compile.py tests/model/test_kernels_hopper.py $(ARGS)

# The interpreter of Triton 3.6 converts arrays to numbers, which NumPy 2.4 no longer allows.
build/triton-%/.installed: | $(VENV)/.tested
	$(PIP) install --no-deps --target $(@D) triton==$* $(if $(filter 3.6.%,$*),'numpy<2.4')
	touch $@

unit: $(VENV)/.tested  ## the fast tests alone
	$(PYTEST) $(PARALLEL) -m "not slow and not longer and not kernels and not faults" $(ARGS)

longer: $(VENV)/.tested system  ## what CI adds: faults in real processes, laws and kernels at length
	$(BIN)/python -m pytest -m faults $(ARGS)
	$(PYTEST) $(PARALLEL) -m "(kernels or longer) and not faults" $(ARGS)

check: lint  ## everything but the tests
	$(BIN)/python -m mypy

lint: $(VENV)/.tested  ## ruff
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .

faults: $(VENV)/.tested system  ## kill engines N times (N=3000) and check every response
	$(BIN)/python -m tests.faults.kills --kills $(N) --lease 3

loadtest: $(VENV)/.tested  ## Locust users that stream from HOST, or from a server of its own
	$(BIN)/python -m loadtest.load $(ARGS)

soak: $(VENV)/.tested system  ## random faults for MINUTES under load: no loss, no leak
	$(BIN)/python -m loadtest.soak --minutes $(MINUTES) $(ARGS)

fuzz: $(VENV)/.tested  ## Schemathesis on the API (ARGS="--max-examples 1000"): is its document true?
	$(BIN)/python -m tests.api.fuzz $(ARGS)

peers: $(VENV)/.tested  ## install the servers that `make compare` compares with; builds llama.cpp
	CMAKE_ARGS="$(LLAMA_CPP)" LLAMA_CPP_BUILD_JOBS=$$(nproc) \
	  $(INSTALL) --requirement loadtest/bench/peers/requirements.txt

compare: $(VENV)/.tested system  ## Quire and its peers on this machine: tables and a chart in results/
	$(BIN)/python -m loadtest.bench.compare $(ARGS)

docs: $(VENV)/.tested  ## regenerate the reference tables in docs/
	$(BIN)/python -m tests.project.reference

format: $(VENV)/.tested  ## rewrite the code in the house style
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

install: $(VENV)/.installed  ## the virtual environment alone

constraints:  ## deploy/constraints.txt anew: the newest versions that pyproject.toml allows
	rm -rf build/constraints && $(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install --quiet '.[test,loadtest,otel,gpu]'
	{ grep '^#' deploy/constraints.txt; \
	  build/constraints/bin/python -m pip freeze --all --exclude pip --exclude quire-llm | sed 's/+cpu$$//'; } > build/constraints.txt
	mv build/constraints.txt deploy/constraints.txt

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
	rm -rf $(VENV) $(CLIENTS) tests/clients/node/node_modules tests/clients/agents/node_modules build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis results

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Quire needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(INSTALL) --editable . || { $(WITHOUT_ZIGLANG) $(INSTALL) --editable .; } || $(NO_INSTALL)
	@$(BUILD_NATIVE)
	touch $@

$(VENV)/.tested: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	$(INSTALL) --editable '.[test,loadtest,otel]' \
	  || { $(WITHOUT_ZIGLANG) $(INSTALL) --editable '.[test,loadtest,otel]'; } || $(NO_INSTALL)
	@$(BUILD_NATIVE)
	touch $@ $(VENV)/.installed

# Apart from ours: what other people's packages need must not decide what the server needs.
$(CLIENT_RUNS:test-clients-%=$(CLIENTS)/%/.installed): $(CLIENTS)/%/.installed: tests/clients/%/requirements.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install --no-compile --requirement $< \
	  || { echo "missing: packages of $<, from PyPI"; exit 1; }
	touch $@

$(CLIENTS)/.npm: tests/clients/node/package-lock.json tests/clients/agents/package-lock.json
	@command -v npm >/dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get install -y -qq nodejs npm >/dev/null; \
	} || { echo "missing: Node.js 20 or newer, with npm"; exit 1; }
	npm ci --prefix tests/clients/node --no-audit --no-fund --silent \
	  || { echo "missing: packages of tests/clients/node/package.json, from the npm registry"; exit 1; }
	npm ci --prefix tests/clients/agents --ignore-scripts --no-audit --no-fund --silent \
	  || { echo "missing: packages of tests/clients/agents/package.json, from the npm registry"; exit 1; }
	mkdir -p $(@D)
	touch $@
