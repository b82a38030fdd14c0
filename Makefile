# The first target creates .venv with the versions in constraints.txt; ui, test, lint and docs add what they need to it.
# `make help` lists the targets.

MODEL ?= demo
# A run id or its first characters; latest is the newest tuning of MODEL that has a winner.
RUN ?= latest
LANGUAGE ?= en
PYTHON ?= python3
# What installs: uv where there is one, else pip; `make UV=` uses pip, which reads pip's configuration.
UV ?= $(shell command -v uv)
RESULTS := results/$(MODEL)
BIN := .venv/bin
INSTALLED := .venv/.installed
SERVED := .venv/.served
DEVELOPED := .venv/.developed
comma := ,
TESTS := not gpu$(if $(filter true,$(CI)),, and not slow and not browser)

.DEFAULT_GOAL := help
.PHONY: help tune eval report figures runs compare review promote rollback ui test torture check lint options docs docs-serve format clean

help: ## list the targets
	@echo 'make TARGET [MODEL=demo] [RUN=latest]'
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 14

tune: $(INSTALLED) ## tune thresholds for MODEL; save the best checkpoint in results/MODEL/checkpoint
	$(BIN)/sparsetune tune --model $(MODEL)

eval: $(INSTALLED) ## evaluate SpargeAttn's default thresholds and the tuned checkpoint, and compare them
	@test -d $(RESULTS)/checkpoint || \
		{ echo 'no tuned checkpoint in $(RESULTS)/checkpoint; run: make tune MODEL=$(MODEL)' >&2; exit 1; }
	$(BIN)/sparsetune eval --model $(MODEL) --output-dir $(RESULTS)/before
	$(BIN)/sparsetune eval --model $(MODEL) --output-dir $(RESULTS)/after --checkpoint $(RESULTS)/checkpoint
	$(BIN)/sparsetune compare $(RESULTS)/before $(RESULTS)/after

report: $(INSTALLED) ## write RUN as one HTML file, report-RUN.html; LANGUAGE=zh for Chinese
	$(BIN)/sparsetune report $(RUN) --model $(MODEL) --lang $(LANGUAGE)

figures: $(INSTALLED) ## measure MODEL with fixed prompts and seeds; write a JSON and a row for docs/benchmarks.md
	$(BIN)/python benchmarks/main_job.py --model $(MODEL)

runs: $(INSTALLED) ## list the recorded runs of MODEL, best first
	$(BIN)/sparsetune runs --model $(MODEL)

compare: $(INSTALLED) ## compare RUN before and after tuning, or two runs: A=RUN_A B=RUN_B
	$(BIN)/sparsetune compare --model $(MODEL) $(if $(A)$(B),$(A) $(B),--before-after $(RUN))

review: $(INSTALLED) ## review the videos of RUN and record the result
	$(BIN)/sparsetune review $(RUN) --model $(MODEL)

promote: $(INSTALLED) ## promote the checkpoint of RUN if it passes the checks
	$(BIN)/sparsetune promote $(RUN) --model $(MODEL)

rollback: $(INSTALLED) ## restore the previously promoted checkpoint
	$(BIN)/sparsetune rollback --model $(MODEL)

ui: $(SERVED) ## open the MLflow UI
	$(BIN)/sparsetune ui

test: $(DEVELOPED) ## run the tests that need no GPU (CI=true: slow ones too)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m "$(TESTS)"

SEED ?= 0
torture: $(DEVELOPED) ## damage 2,000 inputs and kill 100 commands by SEED; takes hours, writes only to a temporary folder
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture --seed $(SEED)

check: lint docs test ## run everything that CI checks: lint, docs, tests

lint: $(DEVELOPED) ## ruff, mypy, import-linter, hadolint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile

options: $(DEVELOPED) ## write the table of options for --help, after a change to a setting
	$(BIN)/python -m tools.options_table

docs: $(DEVELOPED) ## build the documentation site in build/site; a broken link or reference fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

docs-serve: $(DEVELOPED) ## serve the documentation and rebuild it on changes
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

format: $(DEVELOPED) ## format the code with ruff
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove build and cache files; keep runs, results and .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage
	find sparsetune tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo '$(PYTHON) is missing or older than Python 3.11; select another one: make PYTHON=python3.12' >&2; exit 1; }
	@echo 'creating .venv (once; takes a few minutes) ...' >&2
	@$(PYTHON) -m venv .venv || \
		{ echo '$(PYTHON) -m venv failed; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	@$(call install,report)
	@touch $@

# MLflow's server and UI.
$(SERVED): $(INSTALLED)
	@$(call install,report$(comma)ui)
	@touch $@

# What tests, lint and docs need beside.
$(DEVELOPED): $(INSTALLED)
	@$(call install,dev)
	@touch $@

# A PyTorch that is there stays, since SpargeAttn is compiled for it. Bytecode is compiled when a module is first
# imported, as with uv: most of the installed ones never are.
define install
{ grep -v '^torch==' constraints.txt; \
	$(BIN)/python -c 'from importlib.metadata import version as of; print("torch==" + of("torch"))' 2>/dev/null || \
	grep '^torch==' constraints.txt; } >.venv/constraints.txt && \
$(if $(UV),$(UV) pip install -q --python $(BIN)/python,\
	$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check) \
	-c .venv/constraints.txt -e '.[$(1)]'
endef
