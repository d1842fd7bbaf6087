# From a fresh clone; each command sets up what it needs.
#   make demo       build the demo bundle and let it write a story
#   make check      style, types, import contracts and the fast tests: three minutes on two cores
#   make test       and every behaviour once, C++ and documents included: what CI runs
#   make test-all   and every combination: before a release
# tests/README.md says what each tier tests. WORKERS=N runs the tests in N processes of one thread each.
# The first interpreter that ONNX Runtime has wheels for; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
KVEXPORT := $(VENV)/bin/kvexport
WORKERS ?= 2
# All tests of a file run in one process; long files start first (tests/conftest.py), so that processes end together.
PYTEST := $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations=25

.PHONY: demo style check test test-all docs clean

demo: $(VENV)/ready
	$(KVEXPORT) build --demo -o demo --force
	$(KVEXPORT) run demo --prompt "Once upon a time"

style: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

check: style
	$(PYTEST) -m "not slow and not exhaustive"

test: style docs
	$(PYTEST) -m "not exhaustive"

test-all: style docs
	$(PYTEST)

$(VENV)/ready: setup.cfg pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "kvexport needs Python 3.11 or later; name one with PYTHON=..." >&2; exit 2; }
	@echo "Installing about 2 GB of packages into $(VENV), once; this takes minutes"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat --editable ".[dev]"
	touch $@

# The documentation as a site, build/site/index.html; a warning is an error.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) demo build
