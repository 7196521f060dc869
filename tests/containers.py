"""A stack whose PostgreSQL and PostgREST run in containers: stack_choice.py says when."""

from __future__ import annotations

import os
from pathlib import Path

from stack_choice import postgrest_image
from testcontainers.community.postgres import PostgresContainer
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network
from testcontainers.core.wait_strategies import HttpWaitStrategy

from stack import Cluster, PostgREST, Settings, Stack

ALIAS = "db"  # of PostgreSQL, for a PostgREST in its network
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


class ContainerPostgREST(PostgREST):
    """A PostgREST in the network of the stack's PostgreSQL."""

    container: DockerContainer | None = None

    def __init__(self, cluster: ContainerCluster, folder: Path, settings: Settings) -> None:
        super().__init__(folder, settings)
        self.cluster = cluster

    def start(self, database_url: str) -> None:
        """Start it, and wait until it is ready."""
        settings = self.prepare(database_url) | {"PGRST_ADMIN_SERVER_PORT": "3001"}
        uri = settings["PGRST_DB_URI"].replace(self.cluster.address(), f"{ALIAS}:5432")
        container = (
            DockerContainer(postgrest_image())
            .with_network(self.cluster.network)
            .with_exposed_ports(3000, 3001)
            .waiting_for(HttpWaitStrategy(3001, "/ready").for_status_code(200))
        )
        for name, value in (settings | {"PGRST_DB_URI": uri}).items():
            container.with_env(name, value)
        self.container = container.start()

    def address(self) -> str:
        assert self.container
        host = self.container.get_container_host_ip()
        return f"http://{host}:{self.container.get_exposed_port(3000)}"

    def is_running(self) -> bool:
        return self.container is not None

    def stop(self) -> None:
        if self.container:
            self.container.stop()
        self.container = None


class ContainerStack(Stack):
    """A stack whose PostgreSQL is in a container, and PostgREST, if its image can be had."""

    def make_cluster(self, *, fsync: bool) -> Cluster:
        assert not fsync, "see OPTIONS"
        return ContainerCluster(self.folder, self.settings)

    def make_postgrest(self, folder: Path, settings: Settings) -> PostgREST | None:
        assert isinstance(self.cluster, ContainerCluster)
        return ContainerPostgREST(self.cluster, folder, settings) if postgrest_image() else None
