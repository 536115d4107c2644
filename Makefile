# kvstore: the commands for people. `make` alone lists them.
#
#   PYTHON=python3.12   the interpreter that .venv is made with (3.11 or newer)
#   BENCH_ARGS="..."    passed on, for example BENCH_ARGS=--quick or BENCH_ARGS="--only restore save"
#   PYTEST_ARGS="..."   passed on, for example PYTEST_ARGS="tests/test_layout.py -x"

PYTHON ?=
BIN := .venv/bin
MAKE_ENV := $(or $(PYTHON),python3) .ci/make_env.py $(if $(PYTHON),--explicit)

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test test-slow test-all lint format types imports check wheel clean \
  bench bench-docs

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# A finished environment is recognised by its stamp, in some 50 ms.
setup:  ## .venv with torch, ExecuTorch and kvstore in editable mode
	@command -v $(or $(PYTHON),python3) >/dev/null || { \
	  echo "setup: expected $(or $(PYTHON),python3), found none;" \
	    "on Debian and Ubuntu: sudo apt install git make python3 python3-venv" >&2; exit 1; }
	@$(MAKE_ENV)

setup-dev: setup
	@$(MAKE_ENV) --dev

demo: setup  ## the main job: save a session in one process, resume it in another
	@$(BIN)/kvstore demo

# The tests export what they need by themselves; beforehand it goes on all cores at once.
PROGRAMS = $(if $(PYTEST_ARGS),,$(BIN)/python -m tests.programs)

test: setup  ## the fast tests
	@$(if $(PROGRAMS),$(PROGRAMS) --fast)
	@$(BIN)/python -m pytest -n auto -m "not slow" $(PYTEST_ARGS)

test-slow: setup  ## the tests that `make test` leaves out
	@$(PROGRAMS)
	@$(BIN)/python -m pytest -n auto -m slow $(PYTEST_ARGS)

test-all: setup  ## all tests
	@$(PROGRAMS)
	@$(BIN)/python -m pytest -n auto $(PYTEST_ARGS)

# The peers are installed once an environment; those that cannot be are left out.
PEERS := .venv/kvstore-bench-setup
$(PEERS): pyproject.toml | setup
	@$(BIN)/python benchmarks/setup_peers.py
	@touch $@

bench: setup $(PEERS)  ## measure, beside llama.cpp and others: tables, JSON, plots in .cache/bench/results
	@$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

bench-docs: setup  ## refresh docs/benchmarks.md from the last `make bench`
	@$(BIN)/python benchmarks/report.py --docs

lint: setup-dev  ## ruff: rules and formatting
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: setup-dev  ## ruff: repair what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

types: setup-dev  ## mypy, strict
	@$(BIN)/mypy

imports: setup-dev  ## who may import whom
	@$(BIN)/lint-imports

wheel: setup-dev  ## build the wheel and prove it in a clean environment
	@$(BIN)/python .ci/check_wheel.py

check:  ## everything that CI runs
	@bash .ci/run

clean:  ## remove environments, caches and builds
	rm -rf .venv .venv-* .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis \
	  .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
