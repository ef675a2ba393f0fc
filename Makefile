# make demo and make test do all set-up on a Linux machine with Python >= 3.11, make and git.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# What is installed is compiled when it is first imported: where this is set, each of many processes would compile it again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow soak coverage lint replication slurm-up slurm-down clean

help:  ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo "  With another Python than python3: make demo PYTHON=python3.12"

demo: $(VENV)/installed  ## the embedded study: real models, real text, a table and figures
	$(BIN)/python launch.py

# Those mostly wait for processes, so each runs in parallel with the others; what they print comes at the end. The others
# run in two processes, a file in one; those that take long come first, so that neither waits long for the other's last file.
BESIDE := tests/slurm tests/sweeps/commands/test_run.py
FIRST := tests/sweeps tests/kbit
test: $(VENV)/installed  ## the tests, but for the slow ones
	@logs=$$(mktemp -d); status=0; waiting=; \
	for group in $(BESIDE); do \
	  $(BIN)/python -m pytest $$group -m 'not slow' >$$logs/$$(basename $$group) 2>&1 & waiting="$$waiting $$!"; \
	done; \
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(FIRST) tests $(BESIDE:%=--ignore %) -m 'not slow' || \
	  status=$$?; \
	for process in $$waiting; do wait $$process || status=$$?; done; \
	for log in $$logs/*; do echo "Tests of $${log##*/}:"; cat $$log; done; rm -rf $$logs; exit $$status

test-slow: $(VENV)/installed  ## nodes that fail, walltimes, a controller that stops: minutes of waiting
	$(BIN)/python -m pytest -m slow

soak: $(VENV)/installed  ## thousands of cells on a SLURM of their own while all is killed at random: 20 minutes, then mode=audit
	$(BIN)/python -m tests.slurm.soak

coverage: $(VENV)/installed-dev  ## the lines that the tests reach; fails below what pyproject.toml says
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist loadfile -m 'not slow' --ignore tests/slurm
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

lint: $(VENV)/installed-dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -n 2

KEPT := docs/replication
replication: $(VENV)/installed  ## docs/replication: the page, the figures and the findings, from its results.parquet alone
	$(BIN)/python -m analysis report $(KEPT)/results.parquet --page-only --to $(KEPT) --title "The paper's shape on 13 small models"
	$(BIN)/python -m analysis findings $(KEPT)/results.parquet --to $(KEPT)/findings.json
	$(BIN)/python -m analysis findings $(KEPT)/results.parquet --to $(KEPT)/findings.md
	$(BIN)/python -m analysis findings $(KEPT)/results.parquet --bits-of quantized --to $(KEPT)/findings-quantized.md
	$(BIN)/python -m analysis figures $(KEPT)/results.parquet --columns 2 --formats svg --to $(KEPT)/figures
	$(BIN)/python -m analysis figures $(KEPT)/results.parquet --columns 2 --formats svg --to $(KEPT)/figures/quantized \
	  --bits-of quantized --names bit_scaling
	$(BIN)/python -m analysis laws $(KEPT)/results.parquet > $(KEPT)/laws.txt

slurm-up:  ## a test SLURM cluster on this host: real daemons, fake GPUs (tests/slurm)
	@$(PYTHON) -m tests.slurm.cluster up

slurm-down:  ## end it, its jobs too
	@$(PYTHON) -m tests.slurm.cluster down

clean:  ## remove what make made; results stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
	find . -name __pycache__ -not -path './results/*' -type d -prune -exec rm -rf {} +

# The stamps are made last, so an installation that was cut off is done again. Most modules are never imported, so pip
# compiles none; those that many processes would import at once are compiled by importing them here.
IMPORTED := torch, transformers, accelerate, datasets, lm_eval, lm_eval.tasks, pandas, pyarrow.parquet, matplotlib.pyplot, \
  hydra, submitit, wandb, rich.table
$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[test]'
	@HF_HUB_OFFLINE=1 $(BIN)/python -W ignore -c 'import $(IMPORTED)'
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/installed
	$(BIN)/pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) was not found: install Python >= 3.11, or name one with PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python >= 3.11 is needed, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	    "Name a newer one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into $(VENV) (the first time only; torch is large)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$(PYTHON) can't make a virtual environment: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
