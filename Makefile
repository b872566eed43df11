# Every target works on a fresh clone: the environment is made on first use and kept until the lock changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo ui up down status stack stack-down pictures test test-fast test-docs test-lowest test-newest test-terraform docs reference dist bench-serving bench-export bench-export-range bench-ingest bench-training-set bench-served-set bench-freshness bench-live bench-barriers bench-statistics lint format lock clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/installed: requirements.lock infra/locks/uv.txt pyproject.toml
	@echo "making $(VENV) from requirements.lock"
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r infra/locks/uv.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode --require-hashes -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

venv: $(VENV)/installed ## make or update the environment from the lock

demo: $(VENV)/installed ## start the services, deploy, load events, publish, export, print a summary
	@$(BIN)/prefs demo

ui: $(VENV)/installed ## open the Dagster UI and the console on the demo's state
	@$(BIN)/prefs ui

up: $(VENV)/installed ## start the embedded services
	@$(BIN)/prefs up

down: ## stop what was started
	@if [ -x $(BIN)/prefs ]; then $(BIN)/prefs down; fi

status: $(VENV)/installed ## show services, lag and freshness
	@$(BIN)/prefs status

# Made at the first start, for this user alone.
STACK_TOKEN := .prefs/stack-token

stack: ## start RisingWave, Kafka, DynamoDB Local and the platform in containers (needs Docker)
	@docker compose version >/dev/null 2>&1 || { echo "make stack needs Docker with its compose plugin: install both, or use make demo" >&2; exit 1; }
	@if [ -z "$$PREFS_TOKENS" ] && ! grep -qs '^PREFS_TOKENS=.' .env; then \
	  umask 077 && mkdir -p .prefs && { [ -s $(STACK_TOKEN) ] || od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > $(STACK_TOKEN); } \
	  && hash=$$({ sha256sum $(STACK_TOKEN) || shasum -a 256 $(STACK_TOKEN); } 2>/dev/null | cut -c 1-64) \
	  && export PREFS_TOKENS="stack:domains+shop+inspect+send:sha256:$$hash" || exit 1; \
	fi; docker compose up --build --detach --wait
	@echo "Dagster UI      http://127.0.0.1:3000"
	@echo "console         http://127.0.0.1:3001, with the token in $(STACK_TOKEN), or your own of PREFS_TOKENS"
	@echo "feature server  curl -H \"Authorization: Bearer \$$(cat $(STACK_TOKEN))\" http://127.0.0.1:8080/v1/profiles/1"
	@echo "RisingWave      psql -h 127.0.0.1 -p 4566 -d dev -U root"

stack-down: ## stop the containers; their data stays in volumes
	@docker compose down

# Each process runs one test file at a time, in the order of tests/longest.py. One process more than CI's cores, because
# tests wait for a fifth of their time.
WORKERS ?= 3
# Processes of a run share compiled bytecode, even if the shell disables writing it.
PYTEST = PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

pictures: $(VENV)/installed ## photograph the console and the asset graph of the demo's state for the README
	@$(BIN)/python docs/images/take.py

test: $(VENV)/installed ## the whole test suite, a file at a time in three processes
	@$(PYTEST)

test-fast: $(VENV)/installed ## the tests that take no longer than a few seconds each
	@$(PYTEST) -m "not slow"

test-docs: $(VENV)/installed ## type every command of the documentation, which takes minutes
	@$(BIN)/python -m pytest tests/documentation

# What depends on the versions of Dagster, dbt and pyiceberg most. RANGE_TESTS=tests is everything.
RANGE_TESTS ?= tests/test_definitions.py tests/test_own_projects.py tests/dbt/test_lifecycle.py tests/dbt/test_plan_and_apply.py \
  tests/offline_store/test_export.py tests/offline_store/test_training_set.py tests/freshness/test_freshness_definitions.py \
  tests/end_to_end/test_demo.py tests/end_to_end/test_ui.py
PYTHON_LOWEST ?= 3.11
PYTHON_NEWEST ?= 3.13
ranged = $(BIN)/uv venv --quiet --clear --no-python-downloads --python $(2) $(1) \
  && $(BIN)/uv pip install --quiet --python $(1)/bin/python --no-deps --compile-bytecode --require-hashes -r $(3) \
  && $(BIN)/uv pip install --quiet --python $(1)/bin/python --no-deps --no-build-isolation -e .

.lowest/bin/pytest: $(VENV)/installed infra/locks/lowest.txt
	@$(call ranged,.lowest,$(PYTHON_LOWEST),infra/locks/lowest.txt)

.newest/bin/pytest: $(VENV)/installed requirements.lock
	@$(call ranged,.newest,$(PYTHON_NEWEST),requirements.lock)

test-lowest: .lowest/bin/pytest ## a part of the suite with the lowest versions on the oldest Python
	@$(subst $(BIN),.lowest/bin,$(PYTEST)) $(RANGE_TESTS)

test-newest: .newest/bin/pytest ## a part of the suite with the newest versions on the newest Python
	@$(subst $(BIN),.newest/bin,$(PYTEST)) $(RANGE_TESTS)

test-terraform: $(VENV)/installed ## the infrastructure's tests alone
	@$(BIN)/python -m pytest tests/terraform

# Feast's dependencies do not agree with ours, so the peer has an environment of its own.
.feast/bin/feast: $(VENV)/installed infra/locks/feast.txt
	@$(BIN)/uv venv --quiet --clear .feast
	@$(BIN)/uv pip install --quiet --python .feast/bin/python --require-hashes -r infra/locks/feast.txt

bench-serving: $(VENV)/installed .feast/bin/feast ## reads and rankings against their peers
	@$(BIN)/prefs up
	@$(BIN)/python benchmarks/serving.py --feast .feast/bin/python --json bench-serving.json

.dlt/bin/dlt: $(VENV)/installed infra/locks/dlt.txt
	@$(BIN)/uv venv --quiet --clear .dlt
	@$(BIN)/uv pip install --quiet --python .dlt/bin/python --require-hashes -r infra/locks/dlt.txt

bench-export: $(VENV)/installed .dlt/bin/dlt ## a day of tiles to Iceberg against the bare limit and dlt
	@$(BIN)/prefs up
	@$(BIN)/python benchmarks/export.py --dlt .dlt/bin/python --json bench-export.json

bench-export-range: $(VENV)/installed ## a range of small days to Iceberg, day by day, at once, and by the command
	@$(BIN)/prefs up
	@$(BIN)/python benchmarks/export_range.py --json bench-export-range.json

bench-ingest: $(VENV)/installed ## ingestion against a plain COPY
	@$(BIN)/python benchmarks/ingest.py

bench-freshness: $(VENV)/installed ## a full evaluation at 1,000 and 1,000,000 viewers
	@$(BIN)/python benchmarks/freshness.py

bench-live: $(VENV)/installed ## how soon an event can be read on the embedded engine, and what following it costs
	@$(BIN)/python benchmarks/live.py

bench-barriers: $(VENV)/installed ## what the barrier interval does to freshness and write units; needs real servers
	@$(BIN)/python benchmarks/barriers.py

bench-training-set: $(VENV)/installed ## a training set of a million labels against DuckDB's bare join
	@$(BIN)/python benchmarks/training_set.py

bench-served-set: $(VENV)/installed ## a training set as served of a million labels against a bare as-of join
	@$(BIN)/python benchmarks/served_set.py

bench-statistics: $(VENV)/installed ## statistics of 5,000,000 tile rows against a bare scan
	@$(BIN)/python benchmarks/value_statistics.py

.docs/bin/sphinx-build: $(VENV)/installed infra/locks/docs.txt
	@$(BIN)/uv venv --quiet --clear .docs
	@$(BIN)/uv pip install --quiet --python .docs/bin/python --require-hashes -r infra/locks/docs.txt
	@touch $@

docs: .docs/bin/sphinx-build ## build the documentation site into site/; a dead link fails
	@$(BIN)/python docs/reference/generate.py --check
	@.docs/bin/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky -c docs -b html . site
	@echo "site/index.html"

reference: $(VENV)/installed ## write the reference pages of the documentation from the code
	@$(BIN)/python docs/reference/generate.py

dist: $(VENV)/installed ## build the wheel and the source package into dist/, and check them
	@rm -rf dist
	@$(BIN)/hatchling build -d dist
	@$(BIN)/twine check --strict dist/*

lint: $(VENV)/installed ## style, types, and that what is generated is current
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/prefs generate --check

format: $(VENV)/installed ## let ruff rewrite the style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

EVERYTHING = --extra platform --extra production --extra server --extra console --extra telemetry --extra lineage --extra avro --group dev --override overrides.txt

lock: $(VENV)/installed ## resolve the dependencies into requirements.lock and the images' and tools' locks
	@$(BIN)/uv pip compile pyproject.toml $(EVERYTHING) --universal \
	  --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate -q -o requirements.lock
	@cp requirements.lock infra/locks/lowest.txt
	@$(BIN)/uv pip compile pyproject.toml $(EVERYTHING) --constraint infra/locks/lowest.in \
	  --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate -q -o infra/locks/lowest.txt
	@for image in code-location feature-server; do \
	  $(BIN)/uv pip compile infra/docker/$$image.in --constraint requirements.lock --override overrides.txt \
	  --python-platform linux --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate -q -o infra/docker/$$image.lock || exit 1; \
	done
	@$(BIN)/uv pip compile --group docs --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate -q -o infra/locks/docs.txt
	@for tool in uv feast dlt checkov; do \
	  $(BIN)/uv pip compile infra/locks/$$tool.in --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate -q -o infra/locks/$$tool.txt || exit 1; \
	done

clean: ## stop everything and delete the environment and all local state
	@if [ -x $(BIN)/prefs ]; then $(BIN)/prefs down --delete-state; fi
	@rm -rf $(VENV) .feast .dlt .checkov .docs .lowest .newest site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis dbt_project/target dbt_project/logs
