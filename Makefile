.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

PYTHON := .venv/bin/python
APP_NODE = cd examples/expo && PATH="$$(echo $(CURDIR)/node_modules/node-linux-*/bin):$$PATH"
FORMAT := node_modules/.bin/deno fmt --no-config --line-width=100 --single-quote
APP_SOURCES := examples/expo/*.ts examples/expo/*.tsx examples/expo/src examples/expo/__tests__
MIGRATIONS := supabase/migrations
# Each pytest process has a cluster of its own. What is long goes file by file, as some count over a file.
SIDE_BY_SIDE = $(PYTHON) -m pytest --numprocesses=$(or $(JOBS),auto) --maxprocesses=4 \
	$(if $(LONG),--dist=loadfile,--dist=worksteal -m "not long")
QUICK_TESTS := $(patsubst %,tests/test_%.py,access batch breaker cancel catalog claim credits enqueue gating \
	input locks migrations money_model outcomes protocol recovery retry status worker_cancel worker_units)
# What asks the API over HTTP: once more where an entry stands before two cells.
HTTP_TESTS := $(patsubst %,tests/test_%.py,functions gateway http http_access http_input http_storage \
	limits_http own_function webhook_functions)
# What ONLY= names, where it is a bare word: no path and no option.
WORD = $(if $(word 2,$(ONLY))$(findstring /,$(ONLY))$(filter -%,$(ONLY)),,$(ONLY))
RELEASED := supabase/released.sha256

# Show this list.
help:
	@awk '/^## / {printf "\n%s\n", substr($$0, 4)} /^# / {text = substr($$0, 3)} \
		/^[a-z-]+:/ {sub(":.*", ""); if (text) printf "  %-14s %s\n", $$0, text; text = ""}' Makefile

## Use

# Install what is missing: system, Python and Node packages.
setup:
	@scripts/setup >&2

# Beside that what app, browser, bench, cells or other versions of PostgreSQL need: make setup-app-cells
setup-%:
	@scripts/setup $(subst -, ,$*) >&2

# Start database, API and worker; leaves alone what already runs.
up: setup
# Stop them; data, keys and ports stay.
down:
# Show what runs, where, and the log files.
status:
# Print URLs and keys for a shell: eval "$(make -s up env)"
env:
# Print a token of a throw-away user: TOKEN=$(make -s token)
token:
# Generate an image from start to end: make demo PROMPT="a lighthouse at dusk"
demo: setup
	@$(PYTHON) examples/demo.py $(if $(PROMPT),"$$PROMPT")

# Show the example app in a browser; DEV=1: on a phone with Expo Go, through this network.
app: setup-app
	@$(PYTHON) scripts/app.py show

# Stop everything and delete its data; asks, unless YES=1.
clean:

up down status env token check-worker clean:
	@$(PYTHON) scripts/stack.py $@

# Start two cells, an entry and a worker for both; draw a picture for a user of each.
cells: setup-cells
	@$(PYTHON) scripts/cells.py up
	@$(PYTHON) scripts/cells.py demo
	@echo 'Addresses and keys for this shell: eval "$$(make -s cells-env)". The end: make cells-down'

# Stop them; cells-clean also deletes their data. Further: cells-env, cells-status.
cells-down:

cells-down cells-clean cells-env cells-status:
	@$(PYTHON) scripts/cells.py $(@:cells-%=%)

## Operate

# Try all that the local worker needs, and say in one line each what is wrong.
check-worker:

# Show queue, workers, rates, errors and recent jobs, every 5 seconds: EVERY=2, JSON=1 for a script.
top:
	@$(PYTHON) scripts/watch.py top $(if $(EVERY),--every "$$EVERY") $(if $(JSON),--json)

# Print a key for the operator page: JWT_SECRET=... make monitor-key DAYS=30
monitor-key:
	@$(PYTHON) scripts/watch.py key $(if $(DAYS),--days "$$DAYS")

# Enter or renew a model: MODEL=owner/name PROVIDER=fal FILE=model.json CREDITS=1 ALLOW=a,b DRY_RUN=1
import-model: setup
	@$(PYTHON) scripts/import_model.py $(if $(MODEL),"$$MODEL") $(if $(FILE),--file "$$FILE") \
		$(if $(PROVIDER),--provider "$$PROVIDER") \
		$(if $(CREDITS),--credits "$$CREDITS") $(if $(PAID_CREDITS),--paid-credits "$$PAID_CREDITS") \
		$(if $(ALLOW),--allow "$$ALLOW") $(if $(SET),--set "$$SET") $(if $(DRY_RUN),--dry-run)

# Apply the migrations to a database: shows what, asks, does it. DATABASE_URL=… YES=1 WELCOME_CREDITS=0
migrate: setup
	@$(PYTHON) scripts/migrate.py

# Make deploy/.env for deploy/compose.yaml, with random secrets.
compose-env: setup
	@$(PYTHON) scripts/compose_env.py

# Install the worker on this machine, under systemd; needs root. Adds nothing that is in place.
install-worker:
	@scripts/install_worker

## Develop

# Check all but what needs a browser: ONLY=enqueue, ONLY="tests/test_locks.py -k wait", LONG=1 JOBS=4
ifeq ($(STACK),docker)
test: setup
	@[ -n "$(POSTGRES_IMAGE)" ] || docker build -q -t darkroom-postgres:15 -f deploy/postgres.Dockerfile deploy
	@[ -n "$(WORKER_IMAGE)" ] || docker build -q -t darkroom-worker -f deploy/worker.Dockerfile .
	@$(PYTHON) -m pytest tests/test_containers.py tests/test_gateway.py tests/test_http*.py tests/test_worker_*.py tests/test_migrate.py
else ifdef ONLY
test: setup-app-postgres-cells
	@$(PYTHON) -m pytest $(if $(WORD),$(or $(wildcard tests/test_$(WORD)*.py),-k $(WORD) --ignore=tests/browser),$(ONLY))
else
test: setup-app-postgres-cells lint lint-app
	@$(SIDE_BY_SIDE) --ignore=tests/browser
	@CELLS=1 $(SIDE_BY_SIDE) $(HTTP_TESTS)
	@$(APP_NODE) node node_modules/jest/bin/jest.js
	@echo 'The app in a browser: make test-app'
endif

# Check style, and run what notices most mistakes, in two minutes.
test-quick: setup lint
	@$(SIDE_BY_SIDE) $(QUICK_TESTS)

# Run app and operator page in a browser: SCREENSHOTS=folder keeps what it looks like.
test-app: setup-app-browser
	@$(PYTHON) -m pytest tests/browser

# Check style and types of SQL, Python and the gateway.
lint:
	@$(PYTHON) -m sqlfluff lint sql
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy worker.py scripts examples
	@node_modules/.bin/deno check --quiet --no-config scripts/*.ts
	@$(FORMAT) --check --quiet scripts/*.ts

# Check style and types of the app.
lint-app:
	@$(FORMAT) --check --quiet $(APP_SOURCES)
	@$(APP_NODE) node node_modules/typescript/bin/tsc --noEmit

# Build the app's types of the database from the migrations, in a stack of its own.
types: setup
	@$(PYTHON) scripts/app.py types

# Measure Darkroom beside other queues: make bench PART=enqueue ROUNDS=3 QUICK=1
bench: setup-bench
	@$(PYTHON) tests/bench/run.py $(PART) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(QUICK),--quick) \
		$(if $(HOLD),--hold $(HOLD)) $(if $(ONLY),--only "$$ONLY")

# Run workers on three hosts (network namespaces), cut one off and heal it; needs root.
scale-out: setup
	@$(PYTHON) tests/scale_out.py --durable $(if $(OPTIONS),$(OPTIONS))

# Break everything around real workers, and judge what is left: JOBS=5000 FAULTS=500 SEED=1
chaos: setup
	@$(PYTHON) tests/chaos/run.py $(if $(JOBS),--jobs $(JOBS)) $(if $(FAULTS),--faults $(FAULTS)) \
		$(if $(SEED),--seed $(SEED)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(OUT),--out "$$OUT") \
		$(if $(ONLY),--only "$$ONLY")

# Begin a migration, newer than all others: make migration NAME=what_changes
migration:
	@case "$$NAME" in ''|*[!a-z0-9_]*) echo 'NAME=what_changes: small letters, digits and _'; exit 1;; esac
	@now=$$(date -u +%Y%m%d%H%M%S) && last=$$(ls $(MIGRATIONS) | tail -1 | cut -d_ -f1) \
		&& file=$(MIGRATIONS)/$$((now > last ? now : last + 1))_$$NAME.sql \
		&& cp supabase/new_migration.sql "$$file" && echo "$$file"

# Record all migrations as released: from then on a change in any is refused.
freeze:
	@cd supabase && sha256sum --check --quiet $(notdir $(RELEASED)) \
		&& sha256sum migrations/*.sql > $(notdir $(RELEASED))

# Renew the Python lock files from pyproject.toml; versions stay, unless UPGRADE=1.
lock: setup
	@$(PYTHON) -m venv .venv/lock && .venv/lock/bin/python -m pip install --quiet uv
	@renew() { file=requirements/$$1.lock && shift && echo 'setuptools>=77' | \
		.venv/lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
			--no-header --no-annotate $(if $(UPGRADE),--upgrade) "$$@" --output-file $$file pyproject.toml -; } \
		&& renew worker && renew test --extra test && renew bench --extra test --extra bench

# Ask for known vulnerabilities in what the lock files pin; fails also where nobody answers.
audit: setup
	@$(PYTHON) -m venv .venv/audit && .venv/audit/bin/python -m pip install --quiet pip-audit==2.10.1
	@$(PYTHON) scripts/audit.py .venv/audit/bin/pip-audit

.PHONY: $(shell sed -n 's/^\([a-z][a-z -]*\):.*/\1/p' Makefile)
