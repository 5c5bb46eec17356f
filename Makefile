# Every target works on a machine that has Python >= 3.11 and make, and nothing else.

PYTHON ?= python3
VENV ?= .venv
# Exact versions for repeatable installs; `make install CONSTRAINTS=` takes the newest that pyproject.toml admits.
CONSTRAINTS ?= constraints.txt
HOST ?= 127.0.0.1
PORT ?= 8000

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEV_INSTALLED := $(VENV)/.installed-dev
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.PHONY: help install serve test check format demo-model demo-checkpoint reproduce clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("mat-steer needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) --editable .
	@touch $@

$(DEV_INSTALLED): pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@ $(INSTALLED)

install: $(INSTALLED)  ## make the virtual environment and install mat-steer into it

serve: $(INSTALLED)  ## serve the embedded demo on http://127.0.0.1:8000
	$(BIN)/matsteer serve --host $(HOST) --port $(PORT)

test: check  ## lint, types and tests: every check there is
	$(BIN)/python -m pytest

check: $(DEV_INSTALLED)  ## lint and types alone
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_INSTALLED)  ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the virtual environment, caches and runs
	rm -rf $(VENV) runs demo/data .mypy_cache .pytest_cache .ruff_cache .hypothesis
