# make train   set up and train the default recipe (drawn scenes, minutes on a laptop)
# make test    set up and run every test
# make check   set up, lint, types and the fast tests: before each commit
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: train test check clean

train: $(READY)
	$(BIN)/capdist train --config scenes --resume

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not slow"

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
