# Two commands: `make demo` sets everything up and trains, `make test` sets everything up and passes the tests.
# Needs Python 3.11 or 3.12 and make. With a GPU, pip's default torch build uses it; for a smaller CPU-only torch give
# TORCH_INDEX=<PyTorch's CPU wheel index>.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
TRAIN := $(BIN)/python -m train
READY := $(VENV)/.plumbline-ready

.PHONY: setup provers demo test test-slow lint bench clean-cache help
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up, then train a small Llama, continue it on mathematics, evaluate it (under 5 minutes after set-up)"
	@echo "make test       set up, then lint, type-check and run the default tests (under 12 minutes after set-up)"
	@echo "make test-slow  the tests marked slow"
	@echo "make bench      speed against HF Trainer and litgpt, each in a virtual environment of its own"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[llemma,corpus,games,marl,vmas,rlhf,dev]"
	@touch $(READY)

# Proof assistants and the sandbox launcher are Debian packages; without them the tests that need them say so and skip.
provers:
	@if command -v coqc >/dev/null && command -v metamath >/dev/null && command -v bwrap >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	    coq libcoq-coquelicot metamath bubblewrap >/dev/null; \
	else echo "note: for formal proving install the packages coq libcoq-coquelicot metamath bubblewrap"; fi

demo: setup
	$(TRAIN) fit -c llemma/base_laptop
	$(TRAIN) fit -c llemma/laptop
	$(TRAIN) test -c llemma/evaluate_laptop
	@echo "curves: $(BIN)/tensorboard --logdir runs"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: setup provers lint
	$(BIN)/pytest -n 2 --dist loadgroup

test-slow: setup provers
	$(BIN)/pytest -m slow

bench: setup
	$(BIN)/python benchmarks/train_tokens.py

clean-cache:
	rm -rf .cache
