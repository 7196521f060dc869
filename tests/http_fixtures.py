"""Fixtures of the HTTP tests: `pytest_plugins = ["http_fixtures"]`.

All goes through the local stack's one address, as an app's requests do.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from database import Database
from http_client import Client, Endpoints, SignedUp
from worker_process import eventually

from cells import CELLS, CellStack
from stack import Lite, Settings, Stack


class Home(Database):
    """Home of a stack of cells, which knows where each user lives."""

    def __init__(self, stack: CellStack) -> None:
        super().__init__(stack.database_url, "home")
        self.cells = {name: Database(stack.url_of(name), name) for name in CELLS if name != "home"}

    def execute(self, query: str, *arguments: Any) -> list[dict[str, Any]]:
        """Run one statement; what it writes for all cells is there when this returns."""
        found = super().execute(query, *arguments)
        if not found:
            ((now,),) = (row.values() for row in super().execute("select pg_current_wal_lsn()"))
            behind = "select 1 from pg_stat_replication where replay_lsn < %s"
            eventually(lambda: super(Home, self).execute(behind, now) == [])
        return found

    def snapshot(self) -> dict[str, list[str]]:
        """Return the rows of all cells."""
        found = super().snapshot()
        for name, cell in self.cells.items():
            found |= {f"{name}: {table}": rows for table, rows in cell.snapshot().items()}
        return found

    def of(self, user: SignedUp) -> Database:
        [*elsewhere] = self.execute("select cell from cells.users where user_id = %s", user.id)
        return self.cells[elsewhere[0]["cell"]] if elsewhere else self

    def close(self) -> None:
        for cell in self.cells.values():
            cell.close()
        super().close()


@pytest.fixture(scope="session")
def stack_db(stack: Stack) -> Iterator[Database]:
    is_home = isinstance(stack, CellStack)
    database = Home(stack) if is_home else Database(stack.database_url, "postgres")
    yield database
    database.close()


def database_of(user: SignedUp, stack_db: Database) -> Database:
    """Return the database that has a user's rows: of cells, the one where the user lives."""
    return stack_db.of(user) if isinstance(stack_db, Home) else stack_db


def endpoints_of(stack: Stack, http: httpx.Client) -> Endpoints:
    return Endpoints(http, *(f"{stack.api_url}/{part}/v1" for part in ("auth", "rest", "storage")))


@contextlib.contextmanager
def gateway_before(db: Database, stack: Stack) -> Iterator[str]:
    """Answer RPC in front of a database of the stack's own making, and yield the address."""
    folder = stack.folder / f"gateway-{db.name}"
    folder.mkdir()
    stack.settings.secret("AUTHENTICATOR_PASSWORD")  # the role is one for all databases
    shutil.copy(stack.settings.file, folder / "env")
    settings = Settings(folder / "env")
    service = stack.make_postgrest(folder, settings) or Lite(folder, settings)
    try:
        service.start(db.url)
        url = f"{service.address()}/rest/v1" if isinstance(service, Lite) else service.address()
        # Lite grants at its first request; several first ones trip over each other's grants.
        httpx.post(f"{url}/rpc/ping", json={}).raise_for_status()
        yield url
    finally:
        service.stop()


@pytest.fixture(scope="session")
def endpoints(stack: Stack) -> Iterator[Endpoints]:
    # With fewer kept than are used, many threads close each other's under their hands (EBADF).
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    with httpx.Client(timeout=30, limits=limits) as http:
        yield endpoints_of(stack, http)


@contextlib.contextmanager
def signed_up(endpoints: Endpoints, stack_db: Database, cell: str = "two") -> Iterator[SignedUp]:
    """Sign up a user, who is deleted afterwards together with all jobs still queued.

    If there are cells, in one of them.
    """
    if isinstance(stack_db, Home):
        stack_db.execute("update cells.cells set weight = (name = %s)::integer", cell)
    user = SignedUp(endpoints)
    yield user
    stack_db.execute("delete from auth.users where id = %s", user.id)


@pytest.fixture
def user(endpoints: Endpoints, stack_db: Database) -> Iterator[SignedUp]:
    with signed_up(endpoints, stack_db) as user:
        yield user


@pytest.fixture
def stranger(endpoints: Endpoints, stack_db: Database) -> Iterator[SignedUp]:
    with signed_up(endpoints, stack_db, "home") as user:
        yield user


@pytest.fixture
def nobody(endpoints: Endpoints) -> Client:
    return Client(endpoints)


@pytest.fixture(params=["without token", "with anon key"])
def visitor(endpoints: Endpoints, stack: Stack, request: pytest.FixtureRequest) -> Client:
    """Somebody who has not signed in: the app may send its anon key, or nothing."""
    return Client(endpoints, stack.anon_key if request.param == "with anon key" else None)


@pytest.fixture
def operator(endpoints: Endpoints, stack: Stack) -> Client:
    return Client(endpoints, stack.service_role_key)
