"""With STACK=docker in the environment: PostgreSQL and PostgREST of the stack run in containers.

    POSTGRES_IMAGE    darkroom-postgres:15           PostgreSQL with pg_cron: deploy/
    POSTGREST_IMAGE   postgrest/postgrest:v12.2.3    `none`: functions and tables by Supabase Lite

Sign-up and Storage stay with Supabase Lite, and pg_dump and psql with the local PostgreSQL, which
must not be older than the image's. Without STACK, nothing here is used.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import docker
import pytest
from docker.errors import DockerException
from testcontainers.community.postgres import PostgresContainer
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network
from testcontainers.core.wait_strategies import HttpWaitStrategy

from stack import Cluster, Stack

OPTIONS = {
    "shared_preload_libraries": "pg_cron",
    "cron.database_name": "postgres",
    "cron.use_background_workers": "on",
    "max_connections": "200",
    "fsync": "off",
    "full_page_writes": "off",
}
ALIAS = "db"  # of PostgreSQL, for PostgREST


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
        try:
            docker.from_env(environment=dict(environment)).ping()
        except DockerException as error:
            reason = f"no Docker daemon answers: {error}"
            raise pytest.UsageError(f"STACK=docker: {reason} (DOCKER_HOST?)") from None


class ContainerCluster(Cluster):
    """A stack's PostgreSQL, in a container of its own network."""

    network: Network | None = None
    container: PostgresContainer | None = None

    def start(self) -> None:
        """Start it, and wait for the first answer."""
        # No reaper, which would be one more image: `stop` is called in any case.
        os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
        options = " ".join(f"-c {name}={value}" for name, value in OPTIONS.items())
        self.network = Network().create()
        self.container = (
            PostgresContainer(
                os.environ.get("POSTGRES_IMAGE") or "darkroom-postgres:15",
                username="postgres",
                password=self.settings.secret("POSTGRES_PASSWORD"),
                dbname="postgres",
                driver=None,
            )
            .with_command(options)
            .with_network(self.network)
            .with_network_aliases(ALIAS)
        )
        self.container.start()

    def address(self) -> str:
        """Return host and port, as this machine reaches them."""
        assert self.container
        host = self.container.get_container_host_ip()
        return f"{host}:{self.container.get_exposed_port(5432)}"

    def is_running(self) -> bool:
        return self.container is not None

    def stop(self) -> None:
        """Remove the container and its network, with all data."""
        if self.container:
            self.container.stop()
        if self.network:
            self.network.remove()
        self.container = self.network = None

    def delete(self) -> None:
        self.stop()


class ContainerStack(Stack):
    """A stack whose PostgreSQL is in a container."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, fsync=False)
        self.cluster: ContainerCluster = ContainerCluster(self.folder, self.settings)
        self.services[0] = self.cluster


@contextlib.contextmanager
def postgrest(image: str, stack: Stack, environment: Mapping[str, str]) -> Iterator[str]:
    """Run PostgREST in the network of the stack's PostgreSQL; yield its address."""
    assert isinstance(stack.cluster, ContainerCluster)
    port, admin_port = (int(environment[f"PGRST_{each}SERVER_PORT"]) for each in ("", "ADMIN_"))
    container = (
        DockerContainer(image)
        .with_network(stack.cluster.network)
        .with_exposed_ports(port, admin_port)
        .waiting_for(HttpWaitStrategy(admin_port, "/ready").for_status_code(200))
    )
    for name, value in environment.items():
        container.with_env(name, value)
    with container:
        yield f"http://{container.get_container_host_ip()}:{container.get_exposed_port(port)}"
