# Python 3.11 or newer, make and git are all that is needed; everything else goes into $(VENV).
PYTHON ?= python3
VENV ?= .venv
EXTRAS ?= gpu,test,dev
WORKERS ?= 2
PYTEST_ARGS ?=
ZOO_ARGS ?=

BIN := $(VENV)/bin
PY := $(BIN)/python
# The stamp is named after what it was installed from, so that a changed pyproject.toml or
# constraints.txt installs again, and a checkout that only touches the files does not.
STAMP := $(VENV)/.lora_fx-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)

.DEFAULT_GOAL := help
.PHONY: help env demo test check format bench zoo clean

help:  ## what can be made
	@echo "make TARGET, with TARGET one of:"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "%-10s %s\n", $$1, $$2 }'
	@echo "Variables: PYTHON (now $(PYTHON)), VENV (now $(VENV)), WORKERS, PYTEST_ARGS"

env: $(STAMP)  ## the virtual environment with the tested versions (a first time takes minutes)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lora_fx needs Python 3.11 or newer; set PYTHON=...")'
	@test -x $(PY) || { echo "Making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	PYTHONWARNINGS=ignore $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@rm -f $(VENV)/.lora_fx-*
	@touch $@

demo: export OMP_NUM_THREADS ?= 1
demo: $(STAMP)  ## adapt a model to shifted digits, export it, prove it, and show what was done
	$(PY) examples/digits_shift.py

test: export OMP_NUM_THREADS ?= 1
test: $(STAMP)  ## the test suite, less what needs a GPU, a quiet machine or the whole zoo
	$(PY) -m pytest -q -n $(WORKERS) $(PYTEST_ARGS)

check: $(STAMP)  ## lint, formatting, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(PY)
	$(BIN)/lint-imports --no-logo

format: $(STAMP)  ## format the code and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: export OMP_NUM_THREADS ?= 1
bench: $(STAMP)  ## time and memory, one test at a time: a table and a plot in artifacts/bench (some 25 minutes)
	$(PY) -m pytest -q -s -m bench tests/benchmarks $(PYTEST_ARGS)

zoo: export OMP_NUM_THREADS ?= 1
zoo: $(STAMP)  ## every model of the zoo (some hours; what is measured already is kept in artifacts/zoo)
	$(PY) -W ignore -m tests.zoo.run --out artifacts/zoo/rows.jsonl --workers $(WORKERS) $(ZOO_ARGS)
	$(PY) -W ignore -m tests.zoo.run --onnx --out artifacts/zoo/onnx.jsonl --workers $(WORKERS) --limit 1200 $(ZOO_ARGS)
	$(PY) -W ignore -m tests.zoo.run --roles --out artifacts/zoo/roles.jsonl --workers $(WORKERS) --limit 600 $(ZOO_ARGS)
	$(PY) -W ignore -m tests.zoo.perturbation_table artifacts/zoo/roles.jsonl > artifacts/zoo/PERTURBATION.md
	$(PY) -W ignore -m tests.zoo.table artifacts/zoo/rows.jsonl artifacts/zoo/onnx.jsonl > artifacts/zoo/RESULTS.md
	$(PY) -m pytest -q -n $(WORKERS) -m 'zoo or zoo_full' $(PYTEST_ARGS)

clean:  ## remove the environment, caches, builds and what the examples wrote
	rm -rf $(VENV) build dist *.egg-info artifacts .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
