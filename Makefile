.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# The releases in constraints.txt, for dependencies and for the build backend.
# Without compiling: pip takes a minute for all 23,000 modules, and Python compiles those that it imports.
INSTALL := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --no-compile
# Of the container image; the Dockerfile has the defaults of the last two.
CONTAINER_ENGINE ?= $(if $(shell command -v docker),docker,podman)
IMAGE ?= copra-fl
BASE_IMAGE ?=
TORCH_INDEX ?=

.PHONY: help install demo test test-slow soak test-gpu test-containers check lint types imports docs image defaults constraints clean

help:  ## show this help
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

install: .venv/installed  ## set up .venv

demo: .venv/installed  ## the main job: compare LoRA with CopRA and kept moments over 8 clients; ends in a report
	$(BIN)/copra-fl compare --recipe experiments/demo.toml --methods lora,copra,kept-moments --seeds 0,1,2 \
	  --output runs/demo --overwrite

test: .venv/developed  ## the tests
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder --durations 20 -m "not slow and not containers"

test-slow: .venv/developed  ## what `test` leaves out: the whole demo, a killed study, a deployment of processes
	$(BIN)/python -m pytest -m slow

soak: .venv/developed  ## kill random processes of a run again and again (ROUNDS=500); it must end bitwise equal
	$(BIN)/python -m pytest -s tests/test_soak.py --soak-rounds $(or $(ROUNDS),40) --soak-seed $(or $(SEED),0)

test-gpu: .venv/developed  ## tests that need a GPU
	$(BIN)/python -m pytest -m gpu tests/test_gpu.py

test-containers: .venv/developed  ## a deployment in real containers, and faults in it; needs docker or podman
	$(BIN)/python -m pytest -m containers tests/containers

check: lint types imports test  ## what CI runs

lint: .venv/developed  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/developed  ## mypy
	$(BIN)/mypy

imports: .venv/developed  ## who may import whom
	$(BIN)/lint-imports

docs: .venv/developed  ## build the documentation site into site/ (needs no network)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

image:  ## build the container image from constraints.txt; variables: IMAGE, BASE_IMAGE (with its digest), TORCH_INDEX
	$(CONTAINER_ENGINE) build -t $(IMAGE) $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) .

defaults: .venv/developed  ## renew the defaults in pyproject.toml, which Flower reads, from the configuration keys
	$(BIN)/python -m tests.support.defaults

constraints:  ## renew constraints.txt: newest releases that pyproject.toml allows, in a new .venv that passes `check`
	rm -rf .venv
	$(PYTHON) -m venv --upgrade-deps .venv
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch .venv/installed .venv/developed
	$(MAKE) check
	sed -i '/^[^#]/d' constraints.txt
	$(BIN)/python -m pip freeze --exclude-editable | sed -E '/==/!d; s/\+[A-Za-z0-9.]+$$//' >> constraints.txt
	touch .venv/installed .venv/developed

clean:  ## remove the virtual environment and caches; results in runs/ stay
	rm -rf .venv dist site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache *.egg-info

# With the newest pip: that of Python 3.11 takes 45 seconds longer to choose 190 releases.
.venv/bin/python:
	$(PYTHON) -m venv --upgrade-deps .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e .
	touch $@

.venv/developed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[dev]'
	touch .venv/installed $@
