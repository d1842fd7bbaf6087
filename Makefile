# Two commands from a fresh clone; each sets up what it needs.
#   make demo    build the demo bundle and let it write a story
#   make test    style, types and every test
# The first interpreter that ONNX Runtime has wheels for; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
KVEXPORT := $(VENV)/bin/kvexport

.PHONY: demo test docs clean

demo: $(VENV)/ready
	$(KVEXPORT) build --demo -o demo --force
	$(KVEXPORT) run demo --prompt "Once upon a time"

test: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
	$(VENV)/bin/python -m pytest -q

$(VENV)/ready: setup.cfg pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "kvexport needs Python 3.11 or later; name one with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat --editable ".[dev]"
	touch $@

# The documentation as a site, build/site/index.html; a warning is an error.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

clean:
	rm -rf $(VENV) demo build
