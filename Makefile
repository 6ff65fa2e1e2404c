# The front door. Each word works as the first one in a fresh clone: what it needs is set up in .venv on the way.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready-$(subst /,-,$(PYTHON))
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast check format bench bench-peers chaos docs wheel pins clean

help: ## this list
	@echo 'Sluiceway. make WORD, where WORD is one of'
	@echo
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-12s %s\n", $$1, $$2}'
	@echo
	@echo '  PYTHON=python3.12  use this Python (3.11 or newer)    JOBS=4  test in this many processes'
	@echo '  ARGS="-k drain"    hand these on to what is run'

setup: $(READY) ## only set up .venv

demo: $(READY) ## a year of flights through two worker processes, one of which is killed
	$(BIN)/python -m examples.flights $(ARGS)

test: $(READY) ## every test
	@scripts/servers
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)
	$(BIN)/python -m scripts.guarantees

test-fast: $(READY) ## the tests that neither kill processes nor take long
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup -m "not crash and not slow" $(ARGS)

check: $(READY) ## lint, format, types, floors
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

format: $(READY) ## let ruff tidy up
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(READY) ## measure against the floors; rows in bench/results/latest.json
	@scripts/servers
	$(BIN)/python -m bench $(ARGS)

bench-peers: $(READY) ## other libraries over the same brokers; rows in bench/results/peers.json
	@scripts/servers
	$(BIN)/python -m bench.peers $(ARGS)

chaos: $(READY) ## every broker through every fault; rows in chaos/results/latest.json
	@scripts/servers
	$(BIN)/python -m chaos $(ARGS)

docs: $(READY) ## run every code block of README and docs; write what is made from the code anew
	$(BIN)/python -m scripts.events
	$(BIN)/python -m scripts.reference
	$(BIN)/python -m scripts.guarantees
	$(BIN)/python -m pytest -m docs $(ARGS)

wheel: $(READY) ## build the wheel into dist/
	$(BIN)/python -m build --no-isolation --wheel

pins: ## resolve requirements-dev.txt anew
	scripts/pins $(PYTHON)

clean: ## remove what make made, .venv too
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis bench/results chaos/results
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(READY): pyproject.toml requirements-dev.txt scripts/setup
	@scripts/setup $(PYTHON) $(VENV)
	@touch $@
