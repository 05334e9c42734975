# One command for each act; every line also works by hand. `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
EXTRAS := fast,parquet,zstd,hf,torch,trl,mlx,tinker,gguf,tensorboard,wandb,server,dev
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
# More arguments for the one install of torch, for instance an index that has the build for this machine.
TORCH_ARGS ?=
# The engine of `make genrm`.
ENGINE ?= torch
# More arguments for pytest, for instance ARGS="-k mask".
ARGS ?=
WORKERS ?= 2
# Where `make test-clients` keeps the environments that it installs clients into.
CLIENTS ?= $(HOME)/.cache/luthier/clients
# Compiled once, not again by each of the hundreds of processes that the tests start.
export PYTHONDONTWRITEBYTECODE :=
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo genrm crafter crafter-server test test-fast test-clients check lint fix golden docs docs-check constraints bench-data bench-train-cpu bench-service bench-tinker bench-tenants soak

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make the environment in .venv/ (skipped while it is up to date)

# torch comes first and by name, so that no other package decides which build of it is installed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Luthier needs Python 3.11 to 3.13; name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV)/ with $$($(PYTHON) --version)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch as constraints.txt pins it (the largest part, some minutes the first time)"
	@$(PIP) install -c constraints.txt $(TORCH_ARGS) torch
	@echo "installing luthier[$(EXTRAS)]"
	@$(PIP) install -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
	@echo "ready: $(BIN)/luthier --help"

demo: setup  ## the main job on the practice model: check data, show what is trained, fine-tune by QLoRA, certify, compare, report
	@PATH="$(abspath $(BIN)):$$PATH" bash scripts/demo.sh

genrm: setup  ## a judge of answers on the practice model, from raw rows to certificate; ENGINE=mlx for that engine
	@PATH="$(abspath $(BIN)):$$PATH" bash examples/genrm/run.sh $(ENGINE)

crafter: setup  ## the Crafter example: an expert plays, a model learns from it, and held-out games say how well
	@PATH="$(abspath $(BIN)):$$PATH" bash scripts/crafter.sh

crafter-server: setup  ## the same through a server: two jobs, and their results play by their `ft:` ids
	@PATH="$(abspath $(BIN)):$$PATH" bash scripts/crafter_server.sh

test: setup lint  ## everything: linters, types, layers, generated docs, then all tests
	@$(PYTEST) $(ARGS)

test-fast: setup  ## the tests that take under a minute together
	@$(PYTEST) -m 'not slow and not browser' $(ARGS)

test-clients: setup  ## the published clients of OpenAI, Synth and Tinker, installed and run against a server of ours
	@LUTHIER_CLIENTS=$(CLIENTS) $(BIN)/python -m pytest tests/clients/test_clients.py tests/clients/test_tinker_clients.py $(ARGS)

check: test  ## before a push: the same as `make test`

lint: setup docs-check
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.txt || { cat $(VENV)/lint-imports.txt; exit 1; }

fix: setup  ## repair what ruff can repair
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

golden: setup  ## record the golden files again; the change says why
	@RECORD_GOLDEN=1 $(PYTEST) -m 'not slow and not browser' $(ARGS)

docs: setup  ## write the generated pages, the README tree and the outputs in the guides again
	@$(BIN)/python scripts/make_docs.py

docs-check: setup
	@$(BIN)/python scripts/make_docs.py --check

constraints:  ## pin what is installed in .venv/
	@{ head -n 1 constraints.txt; $(BIN)/python -m pip freeze --all --exclude luthier --exclude pip \
		| sed -e 's/+cpu$$//' | LC_ALL=C sort -f; } > $(VENV)/constraints.txt
	@mv $(VENV)/constraints.txt constraints.txt

bench-data: setup  ## the data benchmark beside TRL, one table
	@$(BIN)/python benchmarks/data.py $(ARGS)

bench-train-cpu: setup  ## the training benchmark beside TRL, one table a row
	@$(BIN)/python benchmarks/train_cpu.py $(ARGS)

bench-service: setup  ## the job service under load, one table
	@$(BIN)/python benchmarks/service.py $(ARGS)

bench-tinker: setup  ## the Tinker service under its own SDK: clients at a time, and what a request costs
	@$(BIN)/python benchmarks/tinker_service.py $(ARGS)

bench-tenants: setup  ## many adapters over one base, joined against one after another, one table
	@$(BIN)/python benchmarks/tenants.py $(ARGS)

soak: setup  ## all tests, with many more examples for each property, races by the thousand, and 50 random kills of each kind of run
	@HYPOTHESIS_PROFILE=thorough LUTHIER_KILLS=50 LUTHIER_SOAK=1 $(PYTEST) $(ARGS)
