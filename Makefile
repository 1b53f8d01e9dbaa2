# make demo      distil the built-in pipeline on this machine: five to ten minutes on two cores, once installed
# make test      install, check, and run the tests on as many cores as there are, up to four
# make check     lint and type checks
# make bench     the benchmarks, each a ratio measured side by side in one run, and whether every method learns: hours
# make builtin   rebuild the built-in pipeline and everything measured with it (needs its data package; hours)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check bench builtin install clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m ddil_dist.launch

test: $(STAMP) check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist worksteal --durations 15

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks.replay all
	$(BIN)/python -m tests.benchmarks.engine
	$(BIN)/python -m tests.benchmarks.weights
	$(BIN)/python -m tests.benchmarks.learner
	$(BIN)/python -m tests.benchmarks.objectives
	$(BIN)/python -m tests.benchmarks.methods

builtin: $(STAMP)
	$(BIN)/python -m ddil_dist.builtin.build

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
