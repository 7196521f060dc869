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

SCRIPT = PROJECT / "deploy/cells/cells"
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

    def start_http(self) -> None:
        """Start what answers over HTTP; what is behind it first."""
        for name in ("two", "entry"):
            cluster = self.clusters[name]
            if not cluster.is_running():
                cluster.folder.mkdir(exist_ok=True)
                cluster.folder.chmod(0o711)
                cluster.start()
        self._make()  # ports may be others than the last time
        super().start_http()

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
