# Two commands: `make demo` sets everything up and trains, `make test` sets everything up and passes the tests.
# Needs Python 3.11 or 3.12 and make. With a GPU, pip's default torch build uses it; for a smaller CPU-only torch give
# TORCH_INDEX=<PyTorch's CPU wheel index>.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
TRAIN := $(BIN)/python -m train
READY := $(VENV)/.plumbline-ready

.PHONY: setup provers browser demo rlhf-demo test test-slow lint bench clean-cache help
.DEFAULT_GOAL := help

help:
	@echo "make demo       set up, then train a small Llama, continue it on mathematics, evaluate it (under 5 minutes after set-up)"
	@echo "make rlhf-demo  set up, then the whole RLHF chain on generated dialogues, or RLHF_LAYER='-c rlhf/dailydialog'"
	@echo "make test       set up, then lint, type-check and run the default tests (under 12 minutes after set-up)"
	@echo "make test-slow  the tests marked slow"
	@echo "make bench      speed against HF Trainer and litgpt, each in a virtual environment of its own"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[llemma,corpus,games,marl,vmas,rlhf,routing,lkh,control,rci,dev]"
	@touch $(READY)

# Proof assistants and the sandbox launcher are Debian packages; without them the tests that need them say so and skip.
provers:
	@if command -v coqc >/dev/null && command -v metamath >/dev/null && command -v bwrap >/dev/null; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
	    coq libcoq-coquelicot metamath bubblewrap >/dev/null; \
	else echo "note: for formal proving install the packages coq libcoq-coquelicot metamath bubblewrap"; fi

# The browser is a system package too; without it the tests that need it say so and skip.
browser:
	@if command -v chromium >/dev/null || command -v google-chrome >/dev/null || [ -n "$$PLUMBLINE_CHROMIUM" ]; then :; \
	elif command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium >/dev/null; \
	else echo "note: for browser tasks install the package chromium, or set PLUMBLINE_CHROMIUM to a Chrome or Chromium"; fi

demo: setup
	$(TRAIN) fit -c llemma/base_laptop
	$(TRAIN) fit -c llemma/laptop
	$(TRAIN) test -c llemma/evaluate_laptop
	@echo "curves: $(BIN)/tensorboard --logdir runs"

# Start model, reward models, fixed-weight runs, proxy points fitted to them, a constrained run, comparison. Each line is a
# command of its own; RLHF_FLAGS go to every training, RLHF_STEPS is the length of the reinforcement learning.
RLHF_LAYER ?=
RLHF_STEPS ?= 60
RLHF_FLAGS ?=
RLHF_RUN = $(TRAIN) fit -c rlhf/dialogue $(RLHF_LAYER) --trainer.max_steps=$(RLHF_STEPS) $(RLHF_FLAGS)
RLHF_FIXED = $(RLHF_RUN) --vars.variant=ppo --vars.beta=0.02 --experiment=rlhf-fixed
rlhf-demo: setup
	$(TRAIN) fit -c rlhf/sft $(RLHF_LAYER) $(RLHF_FLAGS)
	$(TRAIN) fit -c rlhf/intent $(RLHF_LAYER) $(RLHF_FLAGS)
	$(TRAIN) fit -c rlhf/reward_model $(RLHF_LAYER) $(RLHF_FLAGS)
	$(RLHF_FIXED) --model.init_args.weights='{meteor: 1.0, intent: 0.0}'
	$(RLHF_FIXED) --model.init_args.weights='{meteor: 0.0, intent: 1.0}'
	$(RLHF_FIXED) --model.init_args.weights='{meteor: 2.0, intent: 0.5}'
	$(TRAIN) test -c rlhf/proxy_fit --data.init_args.runs='["runs/rlhf-fixed/run-*"]'
	$(RLHF_RUN) --vars.variant=xi_ppo --vars.thresholds=runs/proxy_points.json --model.init_args.constraints='{}' --experiment=rlhf-xi
	$(BIN)/python -m callbacks.compare --metric val/score --out runs/rlhf_score.png fixed='runs/rlhf-fixed/run-*' xi='runs/rlhf-xi/run-*'
	@echo "curves: $(BIN)/tensorboard --logdir runs; comparison: runs/rlhf_score.png"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: setup provers browser lint
	$(BIN)/pytest -n 2 --dist loadgroup

test-slow: setup provers browser
	$(BIN)/pytest -m slow

bench: setup
	$(BIN)/python benchmarks/train_tokens.py

clean-cache:
	rm -rf .cache
