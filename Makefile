# Every target sets itself up once: .venv with the versions of constraints.txt. `make help` lists the targets.

MODEL ?= demo
PYTHON ?= python3
RESULTS := results/$(MODEL)
BIN := .venv/bin
INSTALLED := .venv/.installed

# CI runs the slow tests too.
MARKS := $(if $(filter true,$(CI)),not gpu,not gpu and not slow and not browser)

.DEFAULT_GOAL := help
.PHONY: help tune eval ui test check lint format clean

help: ## list the targets
	@echo 'make TARGET [MODEL=demo]'
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' Makefile | expand -t 12

tune: $(INSTALLED) ## search thresholds for MODEL; the best checkpoint goes to results/MODEL/checkpoint
	$(BIN)/sparsetune tune --model $(MODEL)

eval: $(INSTALLED) ## judge SpargeAttn's default thresholds, then the tuned checkpoint, and compare the two
	@test -d $(RESULTS)/checkpoint || \
		{ echo 'there must be a tuned checkpoint, but $(RESULTS)/checkpoint is missing; run: make tune MODEL=$(MODEL)' >&2; exit 1; }
	$(BIN)/sparsetune eval --model $(MODEL) --output-dir $(RESULTS)/before
	$(BIN)/sparsetune eval --model $(MODEL) --output-dir $(RESULTS)/after --checkpoint $(RESULTS)/checkpoint
	$(BIN)/sparsetune compare $(RESULTS)/before $(RESULTS)/after

ui: $(INSTALLED) ## open the MLflow UI on the recorded runs
	$(BIN)/sparsetune ui

test: $(INSTALLED) ## run the tests that need no GPU (CI=true: the slow ones too)
	$(BIN)/pytest -m "$(MARKS)"

check: lint test ## lint, types, layers, tests

lint: $(INSTALLED) ## ruff, mypy, import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## let ruff lay out the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove what tools and builds left; runs, results and .venv stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage
	find sparsetune tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed, as $(PYTHON); name another one: make PYTHON=python3.12' >&2; exit 1; }
	@echo 'setting up .venv (once; some minutes) ...' >&2
	@$(PYTHON) -m venv .venv || \
		{ echo 'python3 -m venv must work; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
