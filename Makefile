# TinoMail agent: `make run` shows it at work, `make test` tests it. Both need nothing but Python.

PYTHON ?= python3
VENV ?= .venv
API ?= v1
PORT ?= 8080
PY := $(VENV)/bin/python
VERSION = $(shell sed -n 's/^VERSION = "\(.*\)"/\1/p' tinomail_agent.py)

.PHONY: run test unit lint bench dist deploy clean

# The stand-in dashboard and the agent, side by side on this machine; Ctrl-C ends both.
# API=tinomail-monitor: both speak the other dialect.
run: $(VENV)/.run
	@$(PY) tests/demo.py --port $(PORT) --api $(API)

test: lint unit

# First what compares this machine's numbers, with nothing beside it; then what mostly waits.
unit: $(VENV)/.test
	@$(PY) -m pytest -m "not service and not long"
	@$(PY) -m pytest -m "service or long" -n 3 --dist loadfile

lint: $(VENV)/.test
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

# What the agent costs, against budgets, in ten minutes; QUICK=1: a rough look in two. Best as root.
bench: $(VENV)/.test
	@PYTHONPATH=tests:. $(PY) -m bench $(if $(QUICK),--quick)

# The bundle for nodes: agent, installer and dependencies, for x86_64 and aarch64.
dist: $(VENV)/bin/python
	@$(PY) packaging/bundle.py

# make deploy HOSTS="mta-01 mta-02" [KEY_FILE=key] [INSTALL_ARGS="--url https://..."]
deploy: dist
	@packaging/deploy.sh dist/tinomail-agent-$(VERSION).tar.gz $(HOSTS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) is missing: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$$($(PYTHON) -V) is too old: the agent needs Python 3.10 or later;" \
	         "install one (apt-get install python3.11 python3.11-venv)" \
	         "and name it: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) >$(VENV).log 2>&1 && rm -f $(VENV).log || \
	  { rm -rf $(VENV) $(VENV).log; \
	    echo "$(PYTHON) cannot make a virtual environment: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	@$(PY) -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	@$(PY) -m pip install -q --disable-pip-version-check -e '.[test,lint]'
	@touch $@ $(VENV)/.run
