# Two commands for everyone: `make demo` and `make test`. Both set everything up by themselves in .venv.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup test lint demo demo-base clean

help:
	@echo "make setup      the environment, from requirements.lock"
	@echo "make test       lint, types and all tests"
	@echo "make demo       train an adapter on a tiny world, load it in diffusers, draw before and after (about 10 minutes)"
	@echo "make demo-base  train the demo's base model anew (about an hour)"
	@echo "make clean      remove .venv and outputs/"

setup: $(VENV)/ready

$(VENV)/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest

DEMO := outputs/demo
SEEDS := 0 1 2

demo: setup
	$(BIN)/python -m examples.tiny_world.draw_shards --out $(DEMO)/shards
	$(BIN)/ipa data index $(DEMO)/shards
	@echo "Training three seeds, each on one core:"
	$(MAKE) --no-print-directory -j 2 $(SEEDS:%=$(DEMO)/seed%/export)
	$(BIN)/ipa export $(DEMO)/seed0/checkpoints/step-00000000 --dtype fp32 --out $(DEMO)/untrained
	$(BIN)/python -m examples.tiny_world.evaluate --out $(DEMO) \
		--trained $(SEEDS:%=$(DEMO)/seed%/export/ip_adapter.safetensors) \
		--untrained $(DEMO)/untrained/ip_adapter.safetensors

$(DEMO)/seed%/export: setup
	$(BIN)/ipa train experiment=tiny_world seed=$* run.name=demo-seed$* run.path=$(DEMO)/seed$* data.shards=$(DEMO)/shards
	$(BIN)/ipa export $(DEMO)/seed$* --dtype fp32 --out $@

demo-base: setup
	$(BIN)/python -m examples.tiny_world.train_base

clean:
	rm -rf $(VENV) outputs
