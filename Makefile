# Users need two targets: `make demo` and `make test`.
# `make PIP=1 demo` installs with plain pip instead of uv; `make PYTHON=python3.12 demo` selects the Python.
PYTHON ?= python3
PIP ?=
BIN := .venv/bin
INPUTS := pyproject.toml constraints.txt scripts/setup.sh scripts/no-deps.txt

.PHONY: demo test test-slow docs clean
demo: .venv/.demo    ## run the whole pipeline at small scale and write a report (smallest size: DEMO_FLAGS="--recipe ci --run runs/ci")
	$(BIN)/blm demo --run demo $(DEMO_FLAGS)

test: .venv/.dev     ## run the linter, the type checker and the test suite
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -m "not slow"

test-slow: .venv/.dev ## run the tests marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

docs: .venv/.dev     ## build the documentation as a web site in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q

# The environment for `make test` (.venv/.dev) also satisfies the demo (.venv/.demo).
.venv/.demo: $(INPUTS)
	PIP=$(PIP) sh scripts/setup.sh demo $(PYTHON)
	@sh scripts/rendering.sh $(BIN)/python
	@touch $@

.venv/.dev: $(INPUTS)
	PIP=$(PIP) sh scripts/setup.sh dev $(PYTHON)
	@sh scripts/rendering.sh $(BIN)/python
	@touch $@ .venv/.demo

clean:               ## remove the output of the demo; keep the environment
	rm -rf demo runs
