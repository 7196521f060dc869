"""Fixtures of the HTTP tests: `pytest_plugins = ["http_fixtures"]`.

All goes through the local stack's one address, as an app's requests do.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator

import httpx
import pytest
from database import Database
from http_client import Client, Endpoints, SignedUp

from stack import Lite, Settings, Stack


@pytest.fixture(scope="session")
def stack_db(stack: Stack) -> Iterator[Database]:
    database = Database(stack.database_url, "postgres")
    yield database
    database.close()


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
    with httpx.Client(timeout=30) as http:
        yield endpoints_of(stack, http)


@contextlib.contextmanager
def signed_up(endpoints: Endpoints, stack_db: Database) -> Iterator[SignedUp]:
    """Sign up a user, who is deleted afterwards together with all jobs still queued."""
    user = SignedUp(endpoints)
    yield user
    stack_db.execute("delete from auth.users where id = %s", user.id)


@pytest.fixture
def user(endpoints: Endpoints, stack_db: Database) -> Iterator[SignedUp]:
    with signed_up(endpoints, stack_db) as user:
        yield user


@pytest.fixture
def stranger(endpoints: Endpoints, stack_db: Database) -> Iterator[SignedUp]:
    with signed_up(endpoints, stack_db) as user:
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
