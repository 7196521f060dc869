"""A stack of cells on this machine: home, one more cell, and an entry, each a cluster of its own.

    python scripts/cells.py up | demo | down | clean | status | env

It is the stack of stack.py, whose cluster is home (Auth and Storage are there). PostgREST stands
before home and before the entry, and the gateway asks the entry for all that the entry has. What
each database has is in deploy/cells; one worker serves both. `demo` draws a picture for a user of
each. Its folder is `.local-cells`, or `$DARKROOM_STATE`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import uuid
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
from psycopg import sql

from processes import StackError
from stack import (
    PROJECT,
    Cluster,
    PostgREST,
    Settings,
    Stack,
    confirm_clean,
    interrupt,
    run,
    show_environment,
    show_status,
)

sys.path.insert(0, str(PROJECT / "examples"))

from demo import App, make_picture

SCRIPT = PROJECT / "deploy/cells/cells"
CELLS = ("home", "two")
LOGICAL = {"wal_level": "logical"}


class CellStack(Stack):
    """A stack whose API is an entry before two cells."""

    def __init__(
        self, folder: Path | str, *, fsync: bool = True, with_worker: bool = False
    ) -> None:
        self.clusters = {
            name: self.make_other(Path(folder).resolve() / name, fsync=fsync)
            for name in ("two", "entry")
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

    def make_other(self, folder: Path, *, fsync: bool) -> Cluster:
        """Return a cluster beside home's."""
        return Cluster(folder, Settings(folder / "env"), fsync=fsync, tuning=LOGICAL)

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
            self.start_other(name)
        self.script("home")  # again, too: ports may be others than the last time
        self.script("add", "two", self.owner_of("two"))
        self.script("entry", self.owner_of("entry"))
        if not self.entry.is_running():
            self.entry.settings.keep("JWT_SECRET", self.jwt_secret)
            self.entry.start(self.url_of("entry"))
        super().start_http()

    def start_other(self, name: str) -> None:
        """Start a cluster beside home's, if it does not run."""
        cluster = self.clusters[name]
        if not cluster.is_running():
            cluster.folder.mkdir(exist_ok=True)
            cluster.folder.chmod(0o711)
            cluster.start()

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

    def owner_of(self, name: str) -> str:
        """Return the address of a database as its superuser, without the password."""
        return f"postgresql://postgres@{self.clusters[name].address()}/postgres"

    def script(self, *command: str) -> str:
        """Run deploy/cells/cells; it finds the passwords where psql looks for them."""
        passwords = self.folder / "pgpass"
        passwords.touch(mode=0o600)
        lines = [
            f"{cluster.address()}:postgres:postgres:{urlsplit(cluster.url()).password}\n"
            for cluster in self.clusters.values()
        ]
        passwords.write_text("".join(lines))
        places = {"HOME_URL": self.owner_of("home"), "PGPASSFILE": str(passwords)}
        return run([SCRIPT, *command], env=os.environ | places)


def demo(stack: CellStack) -> None:
    """Sign up users until each cell has one, and draw a picture for that one, as an app does."""
    without = list(CELLS)
    while without:
        app = App(stack.api_url)
        email = f"demo-{uuid.uuid4().hex[:8]}@example.com"
        app.sign_up(email, password=uuid.uuid4().hex)
        with psycopg.connect(stack.database_url) as home:
            query = "select cell from cells.users join auth.users on id = user_id where email = %s"
            (cell,) = home.execute(query, [email]).fetchone() or ["home"]
        if cell in without:
            without.remove(cell)
            print(f"\n{email} lives in {cell}\n", flush=True)
            make_picture(app, f"a lighthouse in {cell}")


def main() -> None:
    """Run one command from the command line."""
    parser = argparse.ArgumentParser(description="Run a stack of two cells and an entry.")
    parser.add_argument("command", choices=["up", "demo", "down", "clean", "status", "env"])
    command = parser.parse_args().command
    signal.signal(signal.SIGTERM, interrupt)
    folder = os.environ.get("DARKROOM_STATE", PROJECT / ".local-cells")
    stack = CellStack(folder, with_worker=True)
    try:
        match command:
            case "up":
                show_status(stack.up(), sys.stderr)
            case "demo":
                demo(stack)
            case "down":
                stack.down()
            case "clean":
                if stack.folder.exists():
                    confirm_clean(stack.folder)
                stack.clean()
            case "status":
                show_status(stack)
            case "env":
                show_environment(stack)
    except StackError as error:
        sys.exit(f"cells: {error}")
    except KeyboardInterrupt:
        sys.exit("cells: interrupted")


if __name__ == "__main__":
    main()
