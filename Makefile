# Two commands for everyone: `make demo` and `make test`. Both set everything up by themselves in .venv.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup test lint compatibility gpu demo demo-base clean

help:
	@echo "make setup      the environment, from requirements.lock"
	@echo "make test       lint, types and all tests"
	@echo "make compatibility  the table of docs/compatibility.md, written from its tests"
	@echo "make gpu        on a GPU: the tests that need one, and the benchmark of the training step (20 minutes, estimated)"
	@echo "make demo       train an adapter on a tiny world, load it in diffusers, draw before and after (about 10 minutes)"
	@echo "make demo-base  train the demo's base model anew (about an hour)"
	@echo "make clean      remove .venv and outputs/"

setup: $(VENV)/ready

$(VENV)/ready: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer: make PYTHON=/path/to/it")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint $(VENV)/img2dataset/ready
	$(BIN)/pytest -n 2 --dist worksteal

compatibility: setup
	$(BIN)/pytest tests/compatibility --write-table

STEP := $(BIN)/python -m benchmarks.step --device cuda --batch 32 8 --up-to 1024 --rounds 2 --steps 3
RESULTS := benchmarks/results

gpu: setup
	$(BIN)/pytest -m gpu
	$(STEP) --base sd15 --variant linear --out $(RESULTS)/step_cuda_sd15_linear.json
	$(STEP) --base sd15 --variant plus --out $(RESULTS)/step_cuda_sd15_plus.json
	$(STEP) --base sdxl --variant linear --batch 8 32 --out $(RESULTS)/step_cuda_sdxl_linear.json

# An environment of its own: it pins older packages than training needs. It is for the tests of `ipa data download`.
$(VENV)/img2dataset/ready: data_tools/img2dataset.lock $(VENV)/ready
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check -r $<
	touch $@

DEMO := outputs/demo
SEEDS := 0 1 2
TRAINED := $(SEEDS:%=$(DEMO)/seed%/export/ip_adapter.safetensors)

demo: setup
	$(BIN)/python -m examples.tiny_world.draw_shards --out $(DEMO)/shards
	$(BIN)/ipa data index $(DEMO)/shards
	@echo "Training three seeds, each on one core:"
	$(MAKE) --no-print-directory -j 2 $(TRAINED)
	$(BIN)/ipa export $(DEMO)/seed0/checkpoints/step-00000000 --dtype fp32 --out $(DEMO)/untrained
	$(BIN)/python -m examples.tiny_world.evaluate --out $(DEMO) \
		--trained $(TRAINED) \
		--untrained $(DEMO)/untrained/ip_adapter.safetensors

# Seeds that are done are not trained again, interrupted ones go on.
.SECONDARY:
$(DEMO)/seed%/finished:
	$(BIN)/ipa train experiment=tiny_world seed=$* run.name=demo-seed$* run.path=$(DEMO)/seed$* data.shards=$(DEMO)/shards
	touch $@

$(DEMO)/seed%/export/ip_adapter.safetensors: $(DEMO)/seed%/finished
	$(BIN)/ipa export $(DEMO)/seed$* --dtype fp32 --out $(@D)

demo-base: setup
	$(BIN)/python -m examples.tiny_world.train_base

clean:
	rm -rf $(VENV) outputs
