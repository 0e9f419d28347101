# The two commands of the README. Everything lands in .venv and runs/, and nothing outside this folder changes.
PYTHON ?= python3
VENV   ?= .venv
# test files at a time: each of them keeps about one core busy
JOBS   ?= 2
BIN    := $(VENV)/bin

.PHONY: install demo test test-full lint clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$($(PYTHON) --version 2>&1); \
	expected Python 3.11 or newer; to mend: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install -q -e '.[cpu,test]'
	@touch $@

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m slurm.demo runs/demo

test: install lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

# every fault at every place; the quick selection of `make test` tries some of them
test-full: PYTEST_ARGS += --full
test-full: test

lint: install
	$(BIN)/ruff check .

clean:
	rm -rf runs build *.egg-info
