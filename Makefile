# Each target is complete on a fresh machine with git, make and Python 3.11+. CONTRIBUTING.md describes the checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all coverage docs docs-pages format install clean

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" sh sample_data/demo.sh

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -m "not slow" -n 2 --dist worksteal

test-all: install
	$(BIN)/pytest -n 2

coverage: install
	$(BIN)/pytest -m "not slow" -n 2 --dist worksteal --cov --cov-report=term

# The pages of docs/ as a site in site/; any warning is an error.
docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --config-file docs/mkdocs/mkdocs.yml

# The parts of docs/ that are generated from the declarations.
docs-pages: install
	$(BIN)/python -m tests.docs.generate

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/installed

# torch first and by its exact version, so that an index with a smaller CPU build can serve it.
$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dpocli needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

$(VENV)/docs-installed: docs/mkdocs/requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r docs/mkdocs/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) demo-run demo-losses site
