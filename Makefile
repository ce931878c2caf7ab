# megapints. `make` alone says what can be made; each target builds the virtual environment that it needs.

# Interpreter for a new environment (3.11 or later; another one than VENV has rebuilds it) and its folder.
PYTHON ?=
VENV ?= .venv
# Parallel test processes; more arguments for the program that a target runs.
JOBS ?= 2
ARGS ?=

BIN := $(VENV)/bin
SCRIPTS := .ci/run .ci/venv.sh $(wildcard slurm/*.sbatch slurm/*.sh)

.PHONY: help demo test check format bench doctor venv venv-dev clean
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "  PYTHON=python3.12 chooses the interpreter, VENV=.venv312 the environment's folder,"
	@echo "  ARGS='...' passes arguments on: make test ARGS='tests/unit -k launch'"

demo: venv  ## the whole way in minutes: text, tokenizer, training on two processes, Hugging Face export
	@$(BIN)/python tools/demo.py $(ARGS)

test: venv-dev  ## the tests, without the slow ones
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(ARGS)

# Runs every check, and shows what each failing one said.
define step
printf '  %-22s' '$(1)'; if output=$$($(2) 2>&1); then echo ok; else echo FAILED; echo "$$output"; status=1; fi;
endef

check: venv-dev  ## lint, format, types, layers, shell scripts, generated docs
	@status=0; \
	$(call step,ruff check,$(BIN)/ruff check) \
	$(call step,ruff format,$(BIN)/ruff format --check) \
	$(call step,mypy,$(BIN)/python -m mypy) \
	$(call step,import-linter,$(BIN)/lint-imports) \
	$(call step,shellcheck,$(BIN)/shellcheck $(SCRIPTS)) \
	$(call step,docs/CONFIG.md,$(BIN)/python tools/generate_config_docs.py --check) \
	exit $$status

format: venv-dev  ## rewrite the sources as `make check` wants them
	@$(BIN)/ruff check --fix --quiet || true
	@$(BIN)/ruff format

bench: venv  ## what the training loop costs, and how it compares with transformers' model (CPU)
	@$(BIN)/python bench/loop_overhead.py $(ARGS)
	@$(BIN)/python bench/vs_hf_trainer.py $(ARGS)

doctor: venv  ## what works on this machine, and what each missing part would give
	@$(BIN)/python tools/doctor.py $(ARGS)

venv:
	@.ci/venv.sh "$(VENV)" "$(PYTHON)" requirements.txt

venv-dev:
	@.ci/venv.sh "$(VENV)" "$(PYTHON)" requirements.txt requirements-dev.txt

clean:  ## remove caches and build outputs; environments and runs stay
	@rm -rf build .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache *.egg-info
	@find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
