"""A stack of cells on this machine: home, one more cell, and an entry, each a cluster of its own.

    python scripts/cells.py up | down | clean | status | env

It is the stack of stack.py, whose cluster is home (Auth and Storage are there). PostgREST stands
before home and before the entry, and the gateway asks the entry for all that the entry has. What
each database has is in deploy/cells. Its folder is `.local-cells`, or `$DARKROOM_STATE`.
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
    run,
    show_environment,
    show_status,
)

SCRIPT = PROJECT / "deploy/cells/cells"
CELLS = ("home", "two")
LOGICAL = {"wal_level": "logical"}


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
        if not self.postgrest:
            raise StackError("cells need PostgREST, and there is none for this machine")
        entry = self.clusters["entry"]
        self.entry = PostgREST(entry.folder, entry.settings)  # beside the one before home
        self.http.insert(1, self.entry)
        self.services = [*self.clusters.values(), self.entry, *self.services]
        self.clusters["home"] = self.cluster

    def make_cluster(self, *, fsync: bool) -> Cluster:
        """Return home's cluster, which sends its catalogue and directory to the others."""
        return Cluster(self.folder, self.settings, fsync=fsync, tuning=LOGICAL)

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
        self._make()  # ports may be others than the last time
        if not self.entry.is_running():
            self.entry.settings.keep("JWT_SECRET", self.jwt_secret)
            self.entry.start(self.url_of("entry"))
        super().start_http()

    def upstream(self) -> dict[str, str]:
        """Return what is behind the gateway: the entry, and home for what the entry has not."""
        with psycopg.connect(self.url_of("entry")) as entry:
            ((names,),) = entry.execute(
                "select string_agg(name, '|') from ("
                " select proname from pg_proc where pronamespace = 'public'::regnamespace"
                " union select relname from pg_class where relnamespace = 'public'::regnamespace"
                ") as has (name)"
            ).fetchall()
        has = {"REST_URL": self.entry.address(), "ENTRY_HAS": names}
        return super().upstream() | has | {"HOME_URL": super().upstream()["REST_URL"]}

    def clean(self) -> None:
        """Stop everything and delete the state."""
        if self._is_ours():
            self.down()
            for name in ("two", "entry"):
                self.clusters[name].delete()
        super().clean()

    def _make(self) -> None:
        """Make home, the other cell and the entry, or tell them where they are now."""
        passwords = self.folder / "pgpass"
        passwords.touch(mode=0o600)
        passwords.write_text(
            "".join(
                f"{cluster.address()}:postgres:postgres:{urlsplit(cluster.url()).password}\n"
                for cluster in self.clusters.values()
            )
        )
        urls = {name: f"postgresql://postgres@{self.clusters[name].address()}/postgres" for name in self.clusters}
        environment = os.environ | {"HOME_URL": urls["home"], "PGPASSFILE": str(passwords)}
        for command in (["home"], ["add", "two", urls["two"]], ["entry", urls["entry"]]):
            run([SCRIPT, *command], env=environment)


def main() -> None:
    """Run one command from the command line."""
    parser = argparse.ArgumentParser(description="Run a stack of two cells and an entry.")
    parser.add_argument("command", choices=["up", "down", "clean", "status", "env"])
    command = parser.parse_args().command
    stack = CellStack(os.environ.get("DARKROOM_STATE", PROJECT / ".local-cells"))
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
