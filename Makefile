# `make demo` and `make test` set everything up on a fresh machine; nothing else is needed but Python 3.11-3.13.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

# Two processes, one thread each: tests/conftest.py says so to torch and numba.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo test slow lint bench clean

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/digits.py

test: $(VENV)/test.stamp
	$(PYTEST) -m "not slow"

slow: $(VENV)/test.stamp
	$(PYTEST) -m slow --timeout 600

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/bench.stamp
	$(BIN)/python -m benchmarks

$(VENV)/venv.stamp:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/demo.stamp: $(VENV)/venv.stamp pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo]'
	touch $@

$(VENV)/test.stamp: $(VENV)/venv.stamp pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,test,lint]'
	touch $@

$(VENV)/bench.stamp: $(VENV)/venv.stamp pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
