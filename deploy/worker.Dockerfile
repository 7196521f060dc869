# Darkroom's worker, built from the checkout's root. docs/deploy.md says how to build and run it. It
# holds no secret: they are variables, or files in the folder that CREDENTIALS_DIRECTORY names.
ARG BASE=python:3.12.12-slim-bookworm

FROM ${BASE} AS build
WORKDIR /opt/darkroom
RUN python3 -m venv .venv
COPY requirements/worker.lock requirements/
RUN .venv/bin/pip install --no-cache-dir --only-binary :all: --require-hashes -r requirements/worker.lock
COPY pyproject.toml worker.py outbox.py pictures.py ./
RUN .venv/bin/pip install --no-deps --no-build-isolation . \
 && .venv/bin/pip uninstall --yes setuptools pip

FROM ${BASE}
COPY --from=build /opt/darkroom/.venv /opt/darkroom/.venv
ENV PATH=/opt/darkroom/.venv/bin:$PATH
# Docker and others start again what has ended, not what hangs: so a worker that hangs ends by itself.
ENV WORKER_WATCHDOG_SECONDS=180
USER 10001:10001
# Each time half a second of a core, 65 MB for two seconds, and a file in Storage.
HEALTHCHECK --interval=2m --timeout=60s CMD ["python", "-m", "worker", "check"]
ENTRYPOINT ["python", "-m", "worker"]
