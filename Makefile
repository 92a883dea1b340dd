# Read the book with `make book`, check everything with `make test`.
# Both need only Python 3.11 or newer, git and make; all else goes into the folder .venv.

PYTHON ?= python3
PORT ?= 8000
JOBS ?= 2
# The exact versions that the stored outputs were made with. `make test PIN=` takes the newest ones.
PIN ?= --constraint constraints.txt

BIN := .venv/bin
STAMP := .venv/.installed

# nbgrader and jupyter start further programs by name; they must be the ones of this environment.
export PATH := $(CURDIR)/$(BIN):$(PATH)

ifeq ($(OS),Windows_NT)
$(error On Windows, run make inside WSL (Windows Subsystem for Linux): the commands here need a Unix shell)
endif

.PHONY: help book html test lint bench clean
help:
	@echo "make book    build the book, serve it on this computer and print the address"
	@echo "make html    build the book and stop"
	@echo "make test    lint, then run all tests and all notebooks"
	@echo "make lint    check style and types"
	@echo "make bench   measure speed"
	@echo "make clean   remove what was built; the environment in .venv stays"

# The stamp holds the folder and the versions asked for. A copied or moved clone, and a change from pinned
# to newest versions, need a new environment: its scripts name the old folder, its packages the old versions.
WANTED := $(strip $(CURDIR) $(PIN))
ifneq ($(wildcard $(STAMP)),)
ifneq ($(shell cat $(STAMP)),$(WANTED))
$(STAMP): outdated
endif
endif
.PHONY: outdated
outdated:
	@rm -rf .venv

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "Python 3.11 or newer is needed, but there is no command '$(PYTHON)': install Python, or name yours, as in 'make book PYTHON=/path/to/python3'." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, but '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1): install a newer one, or name it, as in 'make book PYTHON=python3.12'." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "This Python has no venv module: install it (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@echo "Preparing the environment in .venv. The first time takes some minutes."
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIN) --editable '.[book,grading,test]'
	@echo "$(WANTED)" > $@

# Warnings are errors. After a failed build Sphinx remembers the pages as read, and a second run would not
# warn about them again; so its memory goes.
html: $(STAMP)
	@echo "Building the book."
	@mkdir -p _build
	@$(BIN)/jupyter-book build . -W -n --keep-going --quiet >_build/log 2>&1 || { cat _build/log >&2; rm -rf _build/.doctrees; exit 1; }
	@echo "The book is built: _build/html/index.html"

book: html
	@$(BIN)/dianlib serve _build/html --port $(PORT)

lint: $(STAMP)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

test: lint
	@$(BIN)/python -m pytest --numprocesses $(JOBS) --nbval tests book

bench: $(STAMP)
	@$(BIN)/python -m pytest --dist=no --benchmark-enable --override-ini python_files='bench_*.py' tests/benchmarks

clean:
	@rm -rf _build .benchmarks .mypy_cache .pytest_cache .ruff_cache
