# Every target makes what it needs; `make demo` and `make test` are all a newcomer has to know.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/ready

.PHONY: demo test check soak bench lock clean

demo: $(READY)  ## embed, index and search a collection drawn on the spot
	$(BIN)/lookalike demo

test: $(READY)  ## the tests, and the coverage that is asked of serving and transforms
	$(BIN)/python -m pytest -m "not soak" --cov --cov-report=term:skip-covered --cov-fail-under=90

check: $(READY)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(READY)  ## the long tests: SOAK="-k small" takes some
	$(BIN)/python -m pytest -m soak -s $(SOAK)

bench: $(READY)  ## each prints one table
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.lookup --vectors 10000

lock: $(READY)  ## pin what CI installs, from the ranges in pyproject.toml
	$(BIN)/pip install --quiet "uv<1"
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-annotate \
	  --custom-compile-command "make lock" --output-file requirements.lock

clean:  ## remove what the targets above made
	rm -rf $(VENV) demo-out test-output build dist *.egg-info

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable ".[pipeline,dev]"
	@touch $@
