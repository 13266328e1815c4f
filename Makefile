# Needs Python 3.11 or newer and make, nothing else: the virtual environment is made and filled here.
#   make quickstart   train a small model on Python's own standard library, and see what it writes (10 minutes, 2 cores)
#   make test         the test suite
#   make lint         ruff and the import contract

PYTHON  ?= python3
VENV    ?= .venv
WORKDIR ?= runs/quickstart
WORKERS ?= 2
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
# What the tests hold jaxllm against (torch, transformers, lm_eval) and XLA's CUDA compiler. Large, so quickstart does
# without.
TESTED  := $(VENV)/.ready_to_test

.PHONY: quickstart test lint clean

quickstart: $(READY)
	$(BIN)/jaxllm train --config configs/quickstart.py --workdir $(WORKDIR)
	@echo; echo '--- what the model writes after "def read_" ---'
	$(BIN)/jaxllm generate --workdir $(WORKDIR) --prompt 'def read_' --max_new_tokens 120 --temperature 0.7 --seed 1

# The workers, and the runs that tests start, share what XLA compiles; the folder may be deleted at any time.
test: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
test: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0.3
test: $(TESTED)
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) .jax_cache .pytest_cache .ruff_cache .import_linter_cache

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'jaxllm needs Python 3.11 or newer; name one with: make PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

# torch first and alone: what depends on it would choose another one.
$(TESTED): $(READY)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[test,hf,eval,plan]'
	@touch $@
