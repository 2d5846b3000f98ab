# The two commands a user needs: `make demo` and `make test`. Everything else is a part of them.
# `make PIP=1 demo` installs with plain pip in place of uv; `make PYTHON=python3.12 demo` chooses the Python.
PYTHON ?= python3
PIP ?=
BIN := .venv/bin
INPUTS := pyproject.toml constraints.txt scripts/setup.sh scripts/no-deps.txt

.PHONY: demo test test-slow docs clean
demo: .venv/.demo    ## the whole loop at small scale, ends with a report (DEMO_FLAGS="--recipe ci --run runs/ci" for the smallest)
	$(BIN)/blm demo --run demo $(DEMO_FLAGS)

test: .venv/.dev     ## lint, types and the test suite
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow"

test-slow: .venv/.dev ## the tests marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

docs: .venv/.dev     ## the documentation as a web site, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

# What `make test` installs is enough for the demo too.
.venv/.demo: $(INPUTS)
	PIP=$(PIP) sh scripts/setup.sh demo $(PYTHON)
	@sh scripts/rendering.sh $(BIN)/python
	@touch $@

.venv/.dev: $(INPUTS)
	PIP=$(PIP) sh scripts/setup.sh dev $(PYTHON)
	@sh scripts/rendering.sh $(BIN)/python
	@touch $@ .venv/.demo

clean:               ## remove what the demo made; the environment stays
	rm -rf demo runs
