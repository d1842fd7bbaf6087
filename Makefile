# Two commands from a fresh clone; each sets up what it needs.
#   make demo    build the demo bundle and let it write a story
#   make test    style, types and every test
PYTHON ?= python3
VENV := .venv
KVEXPORT := $(VENV)/bin/kvexport

.PHONY: demo test clean

demo: $(VENV)/ready
	$(KVEXPORT) build --demo -o demo --force
	$(KVEXPORT) run demo --prompt "Once upon a time"

test: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest -q

$(VENV)/ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("kvexport needs Python 3.10 or later; set PYTHON=... (this is " + sys.version + ")")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo
