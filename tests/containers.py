"""A stack whose PostgreSQL and PostgREST run in containers: stack_choice.py says when."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from stack_choice import ALIAS
from testcontainers.community.postgres import PostgresContainer
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network
from testcontainers.core.wait_strategies import HttpWaitStrategy

from stack import Cluster, Stack

OPTIONS = (
    "-c shared_preload_libraries=pg_cron -c cron.database_name=postgres"
    " -c cron.use_background_workers=on -c max_connections=200 -c fsync=off -c full_page_writes=off"
)


class ContainerCluster(Cluster):
    """A stack's PostgreSQL, in a container of its own network."""

    network: Network | None = None
    container: PostgresContainer | None = None

    def start(self) -> None:
        """Start it, and wait for the first answer."""
        # No reaper, which would be one more image: `stop` is called in any case.
        os.environ.setdefault("TESTCONTAINERS_RYUK_DISABLED", "true")
        image = os.environ.get("POSTGRES_IMAGE") or "darkroom-postgres:15"
        self.network = Network().create()
        self.container = (
            PostgresContainer(
                image,
                username="postgres",
                password=self.settings.secret("POSTGRES_PASSWORD"),
                dbname="postgres",
                driver=None,
            )
            .with_command(OPTIONS)
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
    container.start()
    try:
        yield f"http://{container.get_container_host_ip()}:{container.get_exposed_port(port)}"
    finally:
        container.stop()
