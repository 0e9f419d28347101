# The two commands of the README. Everything lands in .venv and runs/, and nothing outside this folder changes.
PYTHON ?= python3
VENV   ?= .venv
# test files at a time: each keeps about one core busy, except those that wait for SLURM
JOBS   ?= 3
BIN    := $(VENV)/bin
# what pip says, as a few lines: its errors go to standard error, and a failure of pip is one of make
SHELL  := bash
.SHELLFLAGS := -o pipefail -c
PIP_PROGRESS = awk ' \
	/^(Requirement already|Collecting )/ { if (++found % 25 == 0) print "   " found " requirements looked up" } \
	/^ *(Downloading|Using cached) / && !/\.metadata/ && (/\([0-9][0-9]+(\.[0-9]+)? MB\)/ || / GB\)/) { \
		sub(/^ */, "   "); sub(/-cp[0-9].*\(|-py[23].*\(|-[a-z0-9]*-manylinux.*\(/, " ("); print } \
	/^Installing collected packages/ { print "   unpacking " NF - 3 " packages" } \
	/^Successfully installed/ { print "   " NF - 2 " packages installed" } { fflush() }'

.PHONY: install demo test test-full test-variations lint docs clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON): $$($(PYTHON) --version 2>&1) \
	(expected Python 3.11 or newer). Fix: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 2; }
	@echo "== 1 of 3: environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "== 2 of 3: pip"
	@$(BIN)/python -m pip install -q --upgrade pip
	@echo "== 3 of 3: hpcssl, PyTorch and what the tests and docs need, some GB (see docs/install.md for less)"
	@PYTHONWARNINGS=ignore $(BIN)/python -m pip install --progress-bar off -e '.[cpu,test]' | $(PIP_PROGRESS)
	@echo "== done: . $(BIN)/activate"
	@touch $@

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m slurm.demo runs/demo

test: install lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# every fault at every place; the quick selection of `make test` tries some of them
test-full: PYTEST_ARGS += --full
test-full: test

# the parts of the suite that could depend on the machine, as if on others: fewer instructions, fewer or busier cores,
# another order. VARIATIONS="avx2 busy" runs some of them; tests/variations.py --list prints their names
test-variations: install
	$(BIN)/python tests/variations.py $(VARIATIONS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

# the documentation as web pages: docs/_build/html/index.html; a warning is an error
docs: install
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d docs/_build/doctrees docs docs/_build/html

clean:
	rm -rf runs build docs/_build *.egg-info
