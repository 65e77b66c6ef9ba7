PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 2
DEMO := demo-runs

.PHONY: help demo test test-slow lint format clean
help:
	@echo "make demo       set up, then train with the penalty, estimate the trace, compare"
	@echo "make test       set up, then lint, check types and run the tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make format     format the code"

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[test]"
	touch $@

demo: $(VENV)/.installed
	rm -rf $(DEMO)
	$(BIN)/hesstrace train --reg trace --lambda 0.01 --out $(DEMO)/train
	$(BIN)/hesstrace estimate-trace $(DEMO)/train/last.pt --per-layer
	$(BIN)/hesstrace compare --reg none --reg trace=0.01 --epochs 30 --seeds 0,1 --out $(DEMO)/compare

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-slow: lint
	$(BIN)/pytest -m slow

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(DEMO)
