# The commands of a newcomer. Each makes the virtual environment first, if it is not there yet.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
# Most of the tests wait for servers. A file's tests stay together: they share what it takes long to start.
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile
SLOWEST := --durations=15 --durations-min=5

.DEFAULT_GOAL := help
.PHONY: help venv serve test test-cluster test-all check format gpu study bench-peers clean

help:  ## Show the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# A stamp, so that a change of the dependencies or of the C++ sources installs again.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard amoe/kernels/native/src/*)
	@echo "installing into $(VENV): some minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed tests/clients/node/package.json
	@echo "installing what development needs"
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@if command -v npm >/dev/null; then \
		echo "installing the openai package for Node, for its test"; \
		mkdir -p $(VENV)/node && cp tests/clients/node/package.json $(VENV)/node/ && \
		npm install --prefix $(VENV)/node --no-audit --no-fund --no-package-lock --loglevel=error; \
	fi
	touch $@

venv: $(VENV)/installed-dev  ## Make .venv with everything that development needs

serve: $(VENV)/installed  ## Serve the built-in model on port 8000 (PORT=..., ARGS="--colocated 2 ...")
	$(BIN)/amoe serve --port $(PORT) $(ARGS)

test: $(VENV)/installed-dev  ## Run the tests
	$(BIN)/python -m pytest -m "not cluster and not matrix and not gpu" $(SIDE_BY_SIDE) $(SLOWEST)

test-cluster: $(VENV)/installed-dev  ## Run the tests of clusters: Ray, hosts, workers that die under load, several API processes
	$(BIN)/python -m pytest -m "cluster and not matrix" $(SIDE_BY_SIDE) $(SLOWEST)

test-all: $(VENV)/installed-dev  ## Run the tests with the whole token-exactness matrix and more random examples
	$(BIN)/python -m pytest -m "not gpu" --hypothesis-profile=thorough

check: $(VENV)/installed-dev  ## Run formatter, linter and type checker
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/installed-dev  ## Format the code and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

study: $(VENV)/installed-dev  ## Run the study of schedules, tables and plots in benchmarks/results/study (about half an hour on two quiet cores)
	$(BIN)/python -m benchmarks.study --again $(ARGS)

bench-peers: $(VENV)/installed-dev  ## Measure amoe beside llama.cpp, transformers and vLLM, those that are here (ARGS="--help" says how)
	$(BIN)/python -m benchmarks.peers $(ARGS)

# On a GPU machine the environment is often a given one: whichever python has a torch that sees the GPU is taken.
gpu:  ## Run tests/gpu and a short benchmark, where there is a GPU
	@for python in $(PYTHON) $(BIN)/python; do \
		if $$python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then \
			$$python -m pytest tests/gpu -m gpu && exec $$python -m benchmarks.step_time --device cuda; \
			exit; \
		fi; \
	done; \
	echo "no GPU here that $(PYTHON) or $(BIN)/python can use: nothing to do"

clean:  ## Remove the virtual environment and what tools have left
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info amoe/kernels/native/*.so
