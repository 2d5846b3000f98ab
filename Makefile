# The two commands a user needs: `make demo` and `make test`. Everything else is a part of them.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test test-slow docs setup clean
demo: setup          ## the whole loop at small scale, ends with a report (DEMO_FLAGS="--recipe ci --run runs/ci" for the smallest)
	$(BIN)/blm demo --run demo $(DEMO_FLAGS)

test: setup          ## lint, types and the test suite
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: setup     ## the tests marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

docs: setup          ## the documentation as a web site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

setup: $(STAMP)
	@sh scripts/rendering.sh $(BIN)/python

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	sh scripts/setup.sh $(PYTHON)
	touch $(STAMP)

clean:               ## remove what the demo made; the environment stays
	rm -rf demo runs
