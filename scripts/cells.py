"""A stack of cells on this machine: home, one more cell, and an entry, each a cluster of its own.

    python scripts/cells.py up | down | clean | status | env

It is the stack of stack.py, whose cluster is home (Auth and Storage are there), but PostgREST
stands before the entry. What each database has is in deploy/cells. Its folder is `.local-cells`, or
`$DARKROOM_STATE`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from processes import StackError
from stack import (
    PROJECT,
    START_SECONDS,
    SUPABASE,
    Cluster,
    PostgREST,
    Settings,
    Stack,
    postgres_program,
    postgrest,
    run,
    show_environment,
    show_status,
)

SQL = PROJECT / "deploy/cells"
CELLS = ("home", "two")
LOGICAL = {"wal_level": "logical"}


class Entry(PostgREST):
    """PostgREST before the entry, whichever database it is said to stand before."""

    def __init__(self, folder: Path, settings: Settings, cluster: Cluster) -> None:
        super().__init__(folder, settings)
        self.cluster = cluster

    def start(self, database_url: str) -> None:
        """Start it before the entry."""
        super().start(self.cluster.url())


class CellStack(Stack):
    """A stack whose API is an entry before two cells."""

    def __init__(
        self, folder: Path | str, *, fsync: bool = True, with_worker: bool = False
    ) -> None:
        self.clusters = {
            name: Cluster(place, Settings(place / "env"), fsync=fsync, tuning=LOGICAL)
            for name in ("two", "entry")
            for place in [Path(folder).resolve() / name]
        }
        super().__init__(folder, fsync=fsync, with_worker=with_worker)
        self.services = [*self.clusters.values(), *self.services]
        self.clusters["home"] = self.cluster

    def make_cluster(self, *, fsync: bool) -> Cluster:
        """Return home's cluster, which sends its catalogue and directory to the others."""
        return Cluster(self.folder, self.settings, fsync=fsync, tuning=LOGICAL)

    def make_postgrest(self, folder: Path, settings: Settings) -> PostgREST | None:
        """Return PostgREST, before the entry."""
        if not postgrest():
            raise StackError("cells need PostgREST, and there is none for this machine")
        return Entry(folder, settings, self.clusters["entry"])

    def url_of(self, name: str) -> str:
        """Return the address of home, two or entry, as its superuser."""
        return self.clusters[name].url()

    def worker_environment(self) -> dict[str, str]:
        """Return what one worker of all cells needs to know, and let it into each."""
        urls = []
        for cluster in map(self.clusters.__getitem__, CELLS):
            secret = cluster.settings.secret("DARKROOM_WORKER_PASSWORD")
            with psycopg.connect(cluster.url()) as connection:
                query = sql.SQL("alter role darkroom_worker password {}")
                connection.execute(query.format(sql.Literal(secret)))
            urls.append(cluster.url("darkroom_worker"))
        return super().worker_environment() | {"DATABASE_URL": " ".join(urls)}

    def start_http(self) -> None:
        """Start what answers over HTTP; what is behind it first."""
        for name in ("two", "entry"):
            cluster = self.clusters[name]
            if not cluster.is_running():
                cluster.folder.mkdir(exist_ok=True)
                cluster.folder.chmod(0o711)
                cluster.start()
        with psycopg.connect(self.database_url) as home:
            made = home.execute("select to_regnamespace('cells') is not null").fetchone()
        if made != (True,):
            self._make()
            self._tell_addresses()
            self._subscribe()
        self._tell_addresses()  # ports may be others than the last time
        super().start_http()

    def clean(self) -> None:
        """Stop everything and delete the state."""
        if self._is_ours():
            self.down()
            for name in ("two", "entry"):
                self.clusters[name].delete()
        super().clean()

    def _make(self) -> None:
        """Make home, the other cell and the entry of four databases' worth of SQL."""
        two, home, entry = (self.url_of(name) for name in ("two", "home", "entry"))
        parts = urlsplit(home)
        password = self.settings.secret("DARKROOM_ENTRY_PASSWORD")
        variables = {
            "host": str(parts.hostname), "port": str(parts.port),
            "dbname": parts.path[1:], "password": password,
        }  # fmt: skip
        files = sorted((PROJECT / "sql").glob("[0-9]*.sql"))
        psql(home, *(SQL / f"{name}.sql" for name in ("directory", "cell", "home", "share")))
        psql(home, SQL / "move.sql", variables={"number": "0"})
        psql(two, SQL / "directory.sql", SQL / "auth.sql", *files, SUPABASE / "seed.sql")
        psql(two, SQL / "cell.sql", SQL / "storage.sql", variables=variables)
        psql(two, SQL / "move.sql", variables={"number": "1"})
        psql(entry, SQL / "directory.sql", SQL / "entry.sql")
        for url in (home, two):
            with psycopg.connect(url) as connection:
                query = sql.SQL("alter role darkroom_entry password {}")
                connection.execute(query.format(sql.Literal(password)))

    def _tell_addresses(self) -> None:
        """Write where the cells are into the directory."""
        password = self.settings.secret("DARKROOM_ENTRY_PASSWORD")
        with psycopg.connect(self.database_url) as home:
            for name in CELLS:
                at = urlsplit(self.url_of(name))
                home.execute(
                    "insert into cells.cells (name, address) values (%s, %s)"
                    " on conflict (name) do update set address = excluded.address",
                    [name, address(at.hostname, at.port, at.path[1:], password)],
                )

    def _subscribe(self) -> None:
        """Have home send its catalogue to the cell, and its directory to the entry; make doors."""
        with psycopg.connect(self.database_url) as home:
            ((catalogue,),) = home.execute(
                "select string_agg(format('%I.%I', schemaname, tablename), ', ')"
                " from pg_publication_tables where pubname = 'darkroom_catalogue'"
            ).fetchall()
        sent = [
            ("home", "darkroom_catalogue", "two"),
            ("home", "darkroom_directory", "entry"),
            ("two", "darkroom_files", "home"),
        ]
        for source, publication, target in sent:
            with psycopg.connect(self.url_of(target), autocommit=True) as connection:
                if target == "two":  # what the installation wrote is home's to say
                    connection.execute(f"truncate {catalogue} cascade")
                query = sql.SQL("create subscription {} connection {} publication {}")
                name = sql.Identifier(publication)
                connection.execute(query.format(name, sql.Literal(self.url_of(source)), name))
                wait_until(connection, "select every(srsubstate = 'r') from pg_subscription_rel")
        with psycopg.connect(self.url_of("entry")) as connection:
            connection.execute("select cells.make_doors('two'), cells.make_tables('two')")


def wait_until(connection: psycopg.Connection[tuple[bool]], question: str) -> None:
    """Ask until the answer is yes. Raises StackError."""
    deadline = time.monotonic() + START_SECONDS
    while connection.execute(question).fetchone() != (True,):
        if time.monotonic() > deadline:
            raise StackError(f"still not so: {question}")
        time.sleep(0.05)


def address(host: str | None, port: int | None, database: str, password: str) -> str:
    """Return how darkroom_entry connects to a cell."""
    return (
        f"host={host} port={port} dbname={database} user=darkroom_entry password={password}"
        " connect_timeout=3 tcp_user_timeout=5000"
    )


def psql(url: str, *files: Path, variables: Mapping[str, str] | None = None) -> None:
    """Run files in one transaction."""
    options = [
        word for name, value in (variables or {}).items() for word in ("-v", f"{name}={value}")
    ]
    names = [word for file in files for word in ("-f", file)]
    run([postgres_program("psql"), url, "-qX1", "-v", "ON_ERROR_STOP=1", *options, *names])


def main() -> None:
    """Run one command from the command line."""
    parser = argparse.ArgumentParser(description="Run a stack of two cells and an entry.")
    parser.add_argument("command", choices=["up", "down", "clean", "status", "env"])
    command = parser.parse_args().command
    folder = os.environ.get("DARKROOM_STATE", PROJECT / ".local-cells")
    stack = CellStack(folder, with_worker=True)
    try:
        match command:
            case "up":
                show_status(stack.up(), sys.stderr)
            case "down":
                stack.down()
            case "clean":
                stack.clean()
            case "status":
                show_status(stack)
            case "env":
                show_environment(stack)
    except StackError as error:
        sys.exit(f"cells: {error}")


if __name__ == "__main__":
    main()
