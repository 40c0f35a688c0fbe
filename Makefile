# TinoMail agent: `make run` shows it at work, `make test` tests it. Both need only Python.

PYTHON ?= python3
VENV ?= .venv
API ?= v1
BESIDE := -n 3 --dist loadfile --no-loadscope-reorder
PY := $(VENV)/bin/python
VERSION = $(shell sed -n 's/^VERSION = "\(.*\)"/\1/p' tinomail_agent.py)
BUNDLE = dist/tinomail-agent-$(VERSION).tar.gz

.PHONY: run test unit lint bench dist pins deploy status clean

# A stand-in dashboard and the agent, side by side on this machine; Ctrl-C ends both.
# API=tinomail-monitor: both use the other dialect. PORT=9000: another port than 8080.
run: $(VENV)/.run
	@$(PY) tests/demo.py $(if $(PORT),--port $(PORT)) --api $(API)

test: lint unit

# First the tests that compare this machine's numbers, with nothing beside them. All others
# mostly wait: three files at a time. The last ones start real daemons, which others would see.
unit: $(VENV)/.test
	@$(PY) tests/prospects.py
	@$(PY) -m pytest -m alone
	@$(PY) -m pytest -m "not alone and not service and not long" $(BESIDE)
	@$(PY) -m pytest -m "service or long" $(BESIDE)

lint: $(VENV)/.test
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/shellcheck install.sh packaging/*.sh tests/*.sh .ci/run

# Measures what the agent costs, in ten minutes; QUICK=1: roughly, in two. Best as root.
bench: $(VENV)/.test
	@PYTHONPATH=tests:. $(PY) -m bench $(if $(QUICK),--quick)

# The bundle for nodes: agent, installer, documents and libraries, for x86_64 and aarch64.
dist: $(BUNDLE)
	@echo $(BUNDLE)

$(BUNDLE): tinomail_agent.py tinomail-agent.service install.sh agent.env.example README.md \
    CHANGELOG.md LICENSE $(wildcard docs/*.md packaging/*) | $(VENV)/bin/python
	@echo "building $@"
	@$(PY) packaging/bundle.py >/dev/null

# Pins the newest versions of the bundle's libraries in packaging/requirements*.txt.
pins: $(VENV)/bin/python
	@$(PY) packaging/bundle.py --renew-pins
	@git --no-pager diff --stat packaging

# make deploy HOSTS="mta-01 mta-02" [KEY_FILE=key] [CA_FILE=ca.pem] [INSTALL_ARGS="--url URL"]
# HOSTS may name a file with a line for each node: HOST NAME=VALUE ...
deploy: $(BUNDLE)
	@packaging/fleet.sh deploy $(BUNDLE) $(HOSTS)

# make status HOSTS="mta-01 mta-02": version and state of the agent on each node
status:
	@packaging/fleet.sh status $(HOSTS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) is missing: apt-get install python3 python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$$($(PYTHON) -V) is too old: the agent needs Python 3.10 or later;" \
	         "install one (apt-get install python3.11 python3.11-venv)" \
	         "and name it: make PYTHON=python3.11" >&2; exit 1; }
	@echo "making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV) >$(VENV).log 2>&1 && rm -f $(VENV).log || \
	  { rm -rf $(VENV) $(VENV).log; \
	    echo "$(PYTHON) cannot make a virtual environment: apt-get install python3-venv" >&2; exit 1; }

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	@echo "installing what the agent needs (half a minute)"
	@$(PY) -m pip install -q --disable-pip-version-check -e .
	@touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	@echo "installing what the tests need (a minute)"
	@$(PY) -m pip install -q --disable-pip-version-check -e '.[test,lint]'
	@touch $@ $(VENV)/.run
