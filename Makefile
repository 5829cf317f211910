# Each target that needs .venv/ sets it up by itself. Needed beforehand: make, curl, and Python 3.11+ with venv (PYTHON names another).

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SECONDS ?= 180
# What is measured, all of it by default: make bench PEERS=openssh,yamux COLUMNS=bulk,requests
PEERS ?=
COLUMNS ?=
REPEATS ?= 3
# Another tree of konnektor that is measured beside this one: make bench AGAINST=before=../before
AGAINST ?=
# What is measured is what a wheel has: compiled, where that can be.
ifneq (,$(filter bench bench-quick,$(MAKECMDGOALS)))
HEADERS := $(shell "$(PYTHON)" -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null)/Python.h
COMPILED := $(if $(shell command -v cc 2>/dev/null),$(if $(wildcard $(HEADERS)),build/compiled/.ready))
OURS := $(if $(COMPILED),--konnektor=build/compiled --against=pure=.)
endif
# What is tested compiled, all of it by default: make test-compiled TESTS=tests/session
TESTS ?= tests
# What is profiled, all of it by default: make profile CASES=up,requests
CASES ?=
CUTS ?= 200
# How often the property tests run at night, a thousand new examples each time.
RUNS ?= 10
FUZZ ?= decoder sessions
FUZZ_SECONDS ?= 60
# The files of the pure core, as pyproject.toml lists them: tests/unit and tests/property cover their every branch.
PURE_FILES = $(shell $(BIN)/python -c 'import tomllib; c = tomllib.load(open("pyproject.toml", "rb"))["tool"]["importlinter"]["contracts"]; print(",".join(m.replace(".", "/") + ".py" for k in c if k["id"] == "pure-core" for m in k["source_modules"]))')
# Seconds of traffic, frame by frame: counting branches would take four times as long, and every one is covered without.
SIMULATED := tests/unit/test_mux_paths.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check nightly fuzz compiled test-compiled bench bench-quick bench-micro profile isolation soak faults clean curl

help: ## say what the targets do
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1  \2/p' $(firstword $(MAKEFILE_LIST)) | awk '{ $$2 = sprintf("%-13s", $$2); print }'

demo: curl $(READY) ## show the tunnel at work between real processes
	@$(BIN)/konnektor demo

test: curl $(READY) ## run every test; the pure core must be covered to the last branch
	$(BIN)/coverage run -m pytest tests/unit tests/property --ignore=$(SIMULATED)
	$(BIN)/coverage report --include='$(PURE_FILES)' --fail-under=100
	$(BIN)/pytest $(SIMULATED)
	$(BIN)/pytest tests --ignore=tests/unit --ignore=tests/property -m 'not slow'

check: $(READY) ## lint, formatting, types, and the rings of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

nightly: $(READY) ## the property tests with thousands of examples, and the tests that are slow (an hour)
	@for run in $$(seq $(RUNS)); do \
		echo "Run $$run of $(RUNS) of the property tests:"; \
		$(BIN)/pytest tests/property --hypothesis-profile nightly --timeout 1800 || exit; \
	done
	$(BIN)/pytest tests -m slow

fuzz: .venv/.ready-fuzz ## fuzz the decoder, then whole sessions, for FUZZ_SECONDS (60) each; FUZZ="decoder" names one
	@for target in $(FUZZ); do \
		$(BIN)/python -m fuzz run $$target --seconds $(FUZZ_SECONDS) || { echo "Found something. To see it again: $(BIN)/python -m fuzz replay build/fuzz/$$target/crashes/*" >&2; exit 1; }; \
	done

compiled: build/compiled/.ready ## build/compiled/: this tree as a wheel has it, its hot modules compiled (needs a C compiler)

test-compiled: build/compiled/.ready ## run the tests on build/compiled/ (TESTS="tests/session" names some)
	cd build/compiled && PYTHONPATH='$(CURDIR)/build/compiled' ../../$(BIN)/pytest $(TESTS) --ignore=tests/docs --ignore=tests/packaging -m 'not slow'

bench: .venv/.ready-bench $(COMPILED) ## measure beside every peer that is there (40 minutes; PEERS=openssh,yamux COLUMNS=bulk,requests)
	@$(BIN)/python -m bench $(OURS) --peers='$(PEERS)' --columns='$(COLUMNS)' $(if $(AGAINST),--against='$(AGAINST)') --repeats=$(REPEATS) --json=build/bench/bench.json --svg=build/bench

bench-quick: .venv/.ready-bench $(COMPILED) ## measure bulk and requests beside OpenSSH and yamux (three minutes)
	@$(BIN)/python -m bench $(OURS) --peers=openssh,yamux --columns=bulk,requests --seconds=1 --json=build/bench/quick.json

bench-micro: .venv/.ready-bench ## measure the core alone, in memory
	@$(BIN)/pytest bench/micro -o addopts=--import-mode=importlib --benchmark-only --benchmark-group-by=func --benchmark-sort=name --benchmark-columns=median,iqr,ops,rounds

profile: .venv/.ready-bench ## where both ends' time goes under each kind of load, and flame graphs in docs/bench/ (three minutes; CASES=up,requests)
	@$(BIN)/python -m bench.profiles --cases='$(CASES)' --svg=docs/bench

isolation: $(READY) ## measure what a small stream notices of stalled streams, a peer that never reads, and bulk (five minutes)
	@$(BIN)/python -m bench.isolation

soak: $(READY) ## load the tunnel for SECONDS (180) with iperf3, wrk, curl and openssl; fails on any error or leak
	@$(BIN)/python -m bench.soak --seconds $(SECONDS)

faults: $(READY) ## cut the tunnel's connection CUTS (200) times during a gigabyte of traffic; fails on any lost byte or leak
	@$(BIN)/python -m bench.faults --cuts $(CUTS)

# What more than the tests need: .venv/.ready-bench and .venv/.ready-fuzz, by the extras of that name.
.venv/.ready-%: $(READY)
	@echo "Adding what $* needs to .venv (once) ..."
	@KONNEKTOR_COMPILE=never PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip install --quiet --editable '.[dev,$*]' \
		|| { echo "The packages of constraints.txt could not be installed: pip says why above." >&2; exit 1; }
	@touch $@

build/compiled/.ready: build/wheel/.ready $(shell find tests bench examples contrib fuzz -type f -not -name '*.pyc')
	@rm -rf build/compiled
	@mkdir build/compiled
	@cp -r tests bench examples contrib fuzz README.md pyproject.toml build/compiled/
	@$(BIN)/python -m zipfile -e build/wheel/*.whl build/compiled
	@touch $@

build/wheel/.ready: $(READY) hatch_build.py $(shell find konnektor -type f -not -name '*.pyc')
	@$(BIN)/python -c 'import hatch_build, sys; sys.exit(hatch_build.missing())'
	@rm -rf build/wheel
	@echo "Compiling (about a minute) ..."
	@KONNEKTOR_COMPILE=always PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	@touch $@

clean: ## remove .venv/ and everything built or cached
	rm -rf .venv .coverage .coverage.* htmlcov .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

curl:
	@command -v curl >/dev/null || { echo "curl is missing: please install it." >&2; exit 1; }

$(READY): pyproject.toml constraints.txt | curl
	@command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) is missing: please install Python 3.11 or newer, or name one with PYTHON=." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d, but 3.11 or newer is needed: please name one with PYTHON=." % v[:2])'
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "The venv module of $(PYTHON) is missing: please install it (Debian's package is python3-venv)." >&2; exit 1; }
	@rm -f $@
	@echo "Setting up .venv (once) ..."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear .venv
	@KONNEKTOR_COMPILE=never PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip install --quiet --editable '.[dev]' \
		|| { echo "The packages of constraints.txt could not be installed: pip says why above." >&2; exit 1; }
	@touch $@
