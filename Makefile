# `make demo` and `make test` do all the set-up they need. `make help` lists the rest.

ARGS ?=
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
# The first interpreter that really runs: version managers leave commands on PATH that do not.
CANDIDATES := $(if $(ACTIVE),'$(ACTIVE)/bin/python') python3 python3.12 python3.11 python3.10 python
FOUND := $(shell for python in $(CANDIDATES); do \
	"$$python" -c '$(SUPPORTED)' >/dev/null 2>&1 && { echo "$$python"; break; }; done)
# Without one, python3 gets to say what is wrong with it.
PYTHON := $(or $(PYTHON),$(FOUND),python3)
# The interpreter with everything installed, known when `setup` is done.
RUN = "$$('$(PYTHON)' tools/setup_env.py --print-python)"

.PHONY: help setup demo test test-onedl lint format benchmark report clean distclean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12
	@echo 'Options for the command that runs: make test ARGS="-k loss -x"'

setup:  ## create or complete the environment (nothing to do the second time)
	@'$(PYTHON)' -c '' 2>/dev/null || \
		{ echo 'error: "$(PYTHON)" does not run: install Python 3.10 to 3.12, or name one with make PYTHON=...' >&2; exit 1; }
	@'$(PYTHON)' tools/setup_env.py

demo: setup  ## train, evaluate and draw a small long-tail example
	@$(RUN) tools/demo.py $(ARGS)

test: setup  ## run the tests (slow and gpu ones: ARGS="-m slow", ARGS="-m gpu")
	@$(RUN) -m pytest -q $(ARGS)

test-onedl:  ## run the tests on the onedl forks, in an environment of its own
	@'$(PYTHON)' tools/setup_env.py --onedl
	@"$$('$(PYTHON)' tools/setup_env.py --onedl --print-python)" -m pytest -q $(ARGS)

lint: setup  ## check style and formatting
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

format: setup  ## fix style and formatting
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

benchmark: setup  ## run every script in benchmarks/, or ONE=benchmarks/name.py
	@for script in $(or $(ONE),$(wildcard benchmarks/[a-z]*.py)); do \
		echo "== $$script"; $(RUN) "$$script" $(ARGS) || exit 1; done

report: setup  ## HTML report of a work directory: make report ARGS=work_dirs/name
	@$(RUN) tools/analysis/report.py $(ARGS)

clean:  ## remove caches and builds
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## remove the environment, too
	@rm -rf .venv .venv-onedl
