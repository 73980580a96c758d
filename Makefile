# What a contributor types. Everything is installed into .venv, from the lock files, with hashes.
# A second call installs nothing unless a lock file or pyproject.toml has changed.

PYTHON ?= python3
ARGS ?=
# Two files at a time. A file's tests stay together and in order: most start servers once for all of
# their tests, and some look at what the ones before have left. The long files come first.
SHARED ?= -n 2 --dist loadfile --no-loadscope-reorder
UPGRADE ?= --upgrade

venv := .venv
python := $(venv)/bin/python
# Wheels alone: nothing is compiled, so no compiler is needed and no build tool is fetched unlocked.
pip := $(python) -m pip --disable-pip-version-check --no-input --quiet
# The lock names every package, so nothing is resolved: a resolver would look at newer releases of a
# package that another one wants with an extra, and refuse them for want of a hash.
locked := $(pip) install --no-deps --require-hashes --only-binary :all: -r
package := $(pip) install --no-deps --no-build-isolation --editable .
compile := uv pip compile pyproject.toml --quiet --universal --python-version 3.11 \
	--generate-hashes --no-header --no-emit-index-url --no-emit-find-links

# Debian keeps mosquitto in a directory that is not on everybody's path.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check bench soak mutate lock clean servers

help: ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s%s\n", $$1, $$2 }' Makefile
	@echo '  ARGS="…" is handed on: make demo ARGS="--crash", make test ARGS="tests/unit -x"'

demo: $(venv)/demo.stamp ## Run everything on this machine for a minute and check the sums.
	@$(python) -m meterd demo $(ARGS)

test: $(venv)/dev.stamp servers ## Run all tests but the long ones.
	@$(python) -m pytest $(SHARED) $(ARGS)

check: $(venv)/dev.stamp servers ## Run what must pass before a change is offered: style, types, tests.
	@$(python) -m ruff check
	@$(python) -m ruff format --check
	@$(python) -m mypy
	@$(python) -m pytest $(SHARED)

bench: $(venv)/dev.stamp servers ## Measure on this machine.
	@$(python) -m bench $(ARGS)

soak: $(venv)/dev.stamp servers ## Run the long tests.
	@$(python) -m pytest -m soak $(ARGS)

mutate: $(venv)/dev.stamp ## See whether the tests of the core notice mistakes in it (an hour or more).
	@$(python) -m tests.mutation.mutate $(ARGS)

lock: ## Choose the newest fitting packages anew (needs uv; UPGRADE= keeps what can be kept).
	$(compile) $(UPGRADE) --extra demo --extra mcp --extra plot --group test --group build -o requirements-dev.lock
	$(compile) $(UPGRADE) --extra demo --extra mcp --group build -c requirements-dev.lock -o requirements.lock

clean: ## Remove what make, the tests and the tools have made.
	rm -rf $(venv) build dist .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

servers:
	@sh tests/install-servers

# Begun anew until it is whole: a half-made one looks like one to everybody but pip.
$(venv)/created.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'meterd needs Python 3.11 or newer. Name one: make $(MAKECMDGOALS) PYTHON=python3.11' >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo 'This Python cannot make virtual environments. On Debian and Ubuntu:' \
			'sudo apt-get install python3-venv, then: make $(MAKECMDGOALS)' >&2; \
		exit 1; }
	@$(PYTHON) -m venv --clear $(venv)
	@touch $@

$(venv)/demo.stamp: $(venv)/created.stamp requirements.lock pyproject.toml
	@echo "Installing what the demo needs into $(venv) …"
	@$(locked) requirements.lock
	@$(package)
	@touch $@

$(venv)/dev.stamp: $(venv)/created.stamp requirements-dev.lock pyproject.toml
	@echo "Installing what the tests need into $(venv) …"
	@$(locked) requirements-dev.lock
	@$(package)
	@touch $@
