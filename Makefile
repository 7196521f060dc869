.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

PYTHON := .venv/bin/python
STACK := $(PYTHON) scripts/stack.py
MIGRATION := supabase/migrations/20261121000000_create_darkroom.sql

# Show this list.
help:
	@awk '/^# /{text=substr($$0, 3)} /^[a-z-]+:/{sub(":.*", ""); printf "%-13s %s\n", $$0, text}' Makefile

# Install what is missing: system, Python and Node packages.
setup:
	@scripts/setup

# Start database, HTTP gateway and worker; leaves alone what already runs.
up: setup
	@$(STACK) up

# Stop them; data, keys and ports stay.
down:
	@$(STACK) down

# Show what runs, where, and the log files.
status:
	@$(STACK) status

# Print URLs and keys for a shell: eval "$(make -s env)"
env:
	@$(STACK) env

# Stop everything and delete its data.
clean:
	@$(STACK) clean

# Generate an image from start to end: make demo PROMPT="a lighthouse at dusk"
demo: setup
	@$(PYTHON) examples/demo.py $(if $(PROMPT),"$$PROMPT")

# Enter or renew a model: MODEL=owner/name FILE=model.json CREDITS=1 PAID_CREDITS=0 ALLOW=a,b DRY_RUN=1
import-model: setup
	@$(PYTHON) scripts/import_model.py $(if $(MODEL),"$$MODEL") $(if $(FILE),--file "$$FILE") \
		$(if $(CREDITS),--credits "$$CREDITS") $(if $(PAID_CREDITS),--paid-credits "$$PAID_CREDITS") \
		$(if $(ALLOW),--allow "$$ALLOW") $(if $(SET),--set "$$SET") $(if $(DRY_RUN),--dry-run)

# Run all checks and tests.
test: setup lint
	@$(PYTHON) -m pytest

# Check style and types of SQL and Python.
lint:
	@$(PYTHON) -m sqlfluff lint sql
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy worker.py scripts examples

# Build the one migration of the first release from sql/.
migration:
	@mkdir -p supabase/migrations
	@{ echo '-- Built from sql/ by `make migration`: edit there, not here.'; cat sql/*.sql; } > $(MIGRATION)

.PHONY: help setup up down status env clean demo import-model test lint migration
