# The front door. `make demo` and `make test` are all a newcomer needs; both
# build the environment first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# One thread a worker: two workers with two threads each fight for the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

.PHONY: demo claims test test-slow oracles lint format types doctest readme bench check clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

demo: $(READY)  ## train on digits with and without dropout, explain, write report.html
	$(BIN)/droplens demo -o report.html

claims: $(READY)  ## what the papers claim, at the smallest scale
	$(BIN)/droplens reproduce --scale test -o claims.html

test: $(READY)  ## the fast suite
	$(PYTEST) -m "not slow"

test-slow: $(READY)  ## the long statistical tests
	$(PYTEST) -m slow

oracles: $(READY)  ## other libraries that the tests compare ours with
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement oracles.txt

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

doctest: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --doctest-modules src

readme: $(READY)  ## the README's examples, the long ones too
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_readme.py

bench: $(READY)  ## speed, as ratios against peers and limits
	$(BIN)/python -m benchmarks

check: lint types doctest test

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache report.html report.json claims.html claims.json
