# Every target sets up what it needs: a fresh clone and Python 3.11 or newer are enough.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := build/demo
RATE ?= 1000

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The environment is made once, and again when what it should hold has changed.
$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11: install a newer one, or name it: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,test]'
	@touch $@

.PHONY: demo
demo: $(READY) ## Generate a stream with a known truth, learn from it, stream its new users and report
	$(BIN)/coldstream generate --out $(DEMO) --overwrite
	rm -rf $(DEMO)/state
	$(BIN)/coldstream backtest --config $(DEMO)/config.yaml --baselines --state $(DEMO)/state \
	  --save-model $(DEMO)/model --json $(DEMO)/result.json --predictions $(DEMO)/predictions.parquet \
	  --report $(DEMO)/report.html
	$(BIN)/coldstream verify --state $(DEMO)/state --config $(DEMO)/config.yaml
	@echo
	@echo "Open $(DEMO)/report.html in a browser."
	@echo "Next: ask about a user: $(BIN)/coldstream query u1500 --state $(DEMO)/state --top 5"
	@echo "      run it on your own file, see 'Your own data' in README.md; it takes ten lines of YAML."
	@echo "      $(BIN)/coldstream backtest --model $(DEMO)/model --config $(DEMO)/config.yaml streams again without training."

.PHONY: test
test: lint types unit ## Everything CI checks: lint, types, import rules, tests

.PHONY: lint
lint: $(READY) ## Style (ruff) and the direction of imports (import-linter)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

.PHONY: types
types: $(READY) ## Types (mypy strict)
	$(BIN)/mypy

.PHONY: live
live: $(READY) kafka ## Start a broker, two workers and a stream of new users, and watch them adapt; RATE=1000 events a second
	$(BIN)/python -m deploy.live --rate $(RATE)

.PHONY: unit
unit: $(READY) browser kafka ## Tests (pytest); narrow them with PYTEST='tests/unit/test_x.py -k name'
	$(BIN)/pytest $(PYTEST)

.PHONY: soak
soak: $(READY) kafka ## Longer campaigns, not repeatable: property tests with many more examples, and more faults
	$(BIN)/pytest tests/property tests/faults --hypothesis-profile soak --campaign soak $(PYTEST)

.PHONY: bench
bench: $(VENV)/.bench kafka ## Benchmarks, with the peers they compare against
	$(BIN)/python -m benchmarks

$(VENV)/.bench: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

# The report is tested in a real browser. Debian's package is installed only where this may be done without asking.
.PHONY: browser
browser:
	@if command -v chromium chromium-browser google-chrome >/dev/null; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing chromium for the report's tests" >&2; \
	  apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; \
	else \
	  echo "the report's tests need a browser: install chromium (Debian: sudo apt-get install chromium)" >&2; exit 1; \
	fi

# Tests and `make live` run a real broker: that of KAFKA_BOOTSTRAP, or Docker's, or Kafka's jars under Java. Debian's
# packages are installed only where this may be done without asking.
.PHONY: kafka
kafka:
	@if [ -z "$${KAFKA_BOOTSTRAP:-}" ] && ! docker info >/dev/null 2>&1 && ! { command -v java && command -v mvn; } >/dev/null \
	  && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Java and Maven for Kafka" >&2; \
	  apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
	    openjdk-17-jre-headless maven >/dev/null; \
	fi
	@$(PYTHON) deploy/kafka/broker.py check

.PHONY: clean
clean: ## Remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
