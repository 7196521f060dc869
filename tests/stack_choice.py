"""Which stack the tests run on. With STACK=docker, PostgreSQL and PostgREST are in containers.

    without it:
    POSTGREST_BIN     the one among the packages     PostgREST's program
    with it:
    POSTGRES_IMAGE    darkroom-postgres:15           PostgreSQL with pg_cron: deploy/
    POSTGREST_IMAGE   postgrest/postgrest:v12.2.3    `none`: functions and tables by Supabase Lite
    WORKER_IMAGE      darkroom-worker                the worker (tests of it in a container)

Sign-up and files stay with Supabase Lite, and pg_dump and psql with the local PostgreSQL, which
must not be older than the image's. What containers need is imported only where they are wanted.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from cells import CellStack
from stack import Stack


def is_wanted(environment: Mapping[str, str] = os.environ) -> bool:
    return environment.get("STACK") == "docker"


def postgrest_image(environment: Mapping[str, str] = os.environ) -> str | None:
    """Name of PostgREST's image; None where Supabase Lite is to do its part."""
    image = environment.get("POSTGREST_IMAGE") or "postgrest/postgrest:v12.2.3"
    return image if is_wanted(environment) and image != "none" else None


def refuse_unusable(environment: Mapping[str, str]) -> None:
    """Say before the first test what is wrong with the variables that choose the stack."""
    if (stack := environment.get("STACK", "")) not in ("", "docker"):
        raise pytest.UsageError(f"STACK: {stack!r} is not docker; without it the stack is local")
    binary = environment.get("POSTGREST_BIN")
    if binary and not os.access(binary, os.X_OK):
        raise pytest.UsageError(f"POSTGREST_BIN: {binary} is not a program")
    if binary and is_wanted(environment):
        raise pytest.UsageError("POSTGREST_BIN: with STACK=docker, POSTGREST_IMAGE names PostgREST")
    if is_wanted(environment):
        docker = importlib.import_module("docker")
        try:
            docker.from_env(environment=dict(environment)).ping()
        except docker.errors.DockerException as error:
            reason = f"no Docker daemon answers: {error}"
            raise pytest.UsageError(f"STACK=docker: {reason} (DOCKER_HOST?)") from None


def make_stack(folder: Path) -> Stack:
    if os.environ.get("CELLS"):  # the API is an entry before two cells
        return CellStack(folder, fsync=False)
    if not is_wanted():
        return Stack(folder, fsync=False)
    stack: Stack = importlib.import_module("containers").ContainerStack(folder, fsync=False)
    return stack
