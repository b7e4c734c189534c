# Every target sets up what it needs in .venv: the run-time packages, and for all but the demo the development packages too.
PYTHON ?= python3
BIN := .venv/bin
# A test process a core, of which each keeps to its own; more than eight would need more memory than most machines have.
WORKERS := -n logical --maxprocesses 8 --dist loadgroup --no-loadscope-reorder

.PHONY: help demo test test-quick test-gpu lint types format clean
.DEFAULT_GOAL := help

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/ready ## train and evaluate a small network on embedded images
	$(BIN)/python -m tools.demo

test: lint ## check style and types, run all tests
	$(BIN)/python -m pytest $(WORKERS)

test-quick: lint ## check style, run the fast tests: for the loop while editing
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

test-gpu: .venv/ready ## check this machine's GPU and measure it, in 8 minutes
	$(BIN)/python -m tools.gpu

lint: .venv/ready-dev ## check style (ruff)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready-dev ## check types (mypy)
	$(BIN)/mypy

format: .venv/ready-dev ## format the code and sort its imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, runs/ and data/ with all that is in them
	rm -rf .venv runs data

# An environment that works is kept, with what its user has added.
.venv/ready: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "error: $(PYTHON) is older than Python 3.11: name another, as in make demo PYTHON=python3.12" >&2; exit 2; }
	@$(BIN)/python -c "import pip, sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
