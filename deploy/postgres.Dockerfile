# PostgreSQL with pg_cron, for deploy/compose.yaml and for `make test STACK=docker`.
ARG BASE=postgres:15.10-bookworm
FROM ${BASE}
RUN apt-get update \
 && apt-get install -y --no-install-recommends "postgresql-${PG_MAJOR:-15}-cron" \
 && rm -rf /var/lib/apt/lists/*
CMD ["postgres", "-c", "shared_preload_libraries=pg_cron", "-c", "cron.use_background_workers=on"]
