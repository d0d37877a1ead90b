# Every entry point of the project. Each target does the set-up it needs; see `make help`.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

EXTRA ?=
CONFIG ?= deploy/configs/demo.yaml
SERVE_CONFIG ?= deploy/configs/serve-cpu.yaml
ARGS ?=
KIND ?= cpu
BIN := .venv/bin
# The test process itself needs no thread pool; engines bind their own cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	HF_HUB_OFFLINE=1 MPLBACKEND=Agg RAY_USAGE_STATS_ENABLED=0

.PHONY: help setup run serve calibrate docs test test-fast proof faults-weights chaos chaos-training fuzz lint types fmt bench gpu-check image clean

help: ## This list
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: ## Create .venv, everything pinned (EXTRA=cuda for GPUs); does nothing when it is up to date
	@deploy/install.sh $(EXTRA)

run: setup ## Serve and train on this machine: speculation, weight pushes, plots and a report (CONFIG=...)
	@$(BIN)/slipstream run --config $(CONFIG) $(ARGS)

serve: setup ## Only the rollout server (SERVE_CONFIG=...)
	@$(BIN)/slipstream serve --config $(SERVE_CONFIG) $(ARGS)

calibrate: setup ## Measure step times on this machine for the scheduler, minutes (CONFIG=..., ARGS=...)
	@$(BIN)/slipstream calibrate --config $(CONFIG) $(ARGS)

docs: setup ## The site of docs/*.md in build/docs, from the code where pages are written from it
	$(BIN)/python -m shared.config.reference
	$(BIN)/python -m shared.cli.reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -f docs/site/mkdocs.yml

test: lint types ## Lint, types and every test that needs no GPU
	$(TEST_ENV) $(BIN)/python -m pytest -m "not gpu" $(ARGS)

test-fast: lint types ## Lint, types and the quick unit tests
	$(TEST_ENV) $(BIN)/python -m pytest tests/unit -m "not gpu and not slow and not engine" $(ARGS)

proof: setup ## The long tests: real engines and statistics; writes docs/proof.md
	PROOF=1 $(TEST_ENV) $(BIN)/python -m pytest -m "not gpu and (slow or engine)" $(ARGS)
	$(BIN)/python -m tests.support.proof_page

faults-weights: setup ## Hundreds of damaged pushes and 60 kills inside the update window, half an hour
	$(TEST_ENV) $(BIN)/python -m tests.chaos.faults $(ARGS)

fuzz: setup ## Schemathesis, raw bodies and clients that leave, against the server: no 5xx, no leak (ARGS=...)
	$(TEST_ENV) $(BIN)/python -m tests.fuzz $(ARGS)

chaos: setup ## Thousands of engines in memory, 90 real processes and 12 nodes die under rollouts, an hour
	$(TEST_ENV) $(BIN)/python -m tests.chaos.chaos $(ARGS)

chaos-training: setup ## Training whose engines are killed against training that is left alone, 3 seeds
	$(TEST_ENV) $(BIN)/python -m tests.chaos.training $(ARGS)

lint: setup ## ruff, no changes made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## mypy, strict
	$(BIN)/mypy

fmt: setup ## Format and apply the safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## Every benchmark, one after the other
	@$(BIN)/slipstream bench --all

bench-%: setup ## One benchmark: make bench-NAME (ARGS=...)
	@$(BIN)/slipstream bench $(subst -,_,$*) $(ARGS)

gpu-check: EXTRA := cuda
gpu-check: setup ## On a CUDA machine: every gpu test and the GPU benchmarks, one JSON (ARGS=...)
	$(BIN)/python -m benchmarks.gpu_check --require-cuda $(ARGS)

image: ## Build the container image with docker, podman or buildah (KIND=cuda); lint it where none works
	@deploy/docker/build.sh $(KIND)

clean: ## Remove caches (not .venv, runs/ or models)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
