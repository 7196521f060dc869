"""Fixtures of the HTTP tests: `pytest_plugins = ["http_fixtures"]`.

Functions and tables are reached through PostgREST (stack_choice.py says which), and with
`through_both_gateways` also through Supabase Lite, the local gateway; where there is no PostgREST
for this machine, through Lite alone. Sign-up and Storage are Lite's in any case.
"""

from __future__ import annotations

import contextlib
import importlib
import secrets
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import stack_choice
from database import Database
from http_client import Client, Endpoints, SignedUp

from processes import Process, free_port, spawn
from stack import Gateway, Settings, Stack

START_SECONDS = 30
LITE, POSTGREST = "Supabase Lite", "PostgREST"
HAS_POSTGREST = bool(stack_choice.postgrest_binary() or stack_choice.postgrest_image())
GATEWAYS = [
    # The first of the two: with Lite's first request everybody is granted everything.
    pytest.param(
        POSTGREST,
        marks=pytest.mark.skipif(not HAS_POSTGREST, reason="no PostgREST for this machine"),
    ),
    LITE,
]
through_both_gateways = pytest.mark.parametrize("rpc_url", GATEWAYS, indirect=True, scope="session")

# Supabase's own definition. Lite's reads only the older setting, which PostgREST no longer makes.
SUPABASE_UID = """
create or replace function auth.uid() returns uuid language sql stable as $$
  select coalesce(
    nullif(current_setting('request.jwt.claim.sub', true), ''),
    nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub'
  )::uuid
$$
"""


@pytest.fixture(scope="session")
def stack_db(stack: Stack) -> Iterator[Database]:
    database = Database(stack.database_url, "postgres")
    yield database
    database.close()


@pytest.fixture(scope="session")
def postgrest_url(stack: Stack, stack_db: Database) -> Iterator[str]:
    if image := stack_choice.postgrest_image():
        settings = postgrest_settings(stack, stack_db, f"{stack_choice.ALIAS}:5432", (3000, 3001))
        with importlib.import_module("containers").postgrest(image, stack, settings) as url:
            yield url
    else:
        with gateway_before(stack_db, stack) as url:
            yield url


@pytest.fixture(scope="session")
def rpc_url(stack: Stack, request: pytest.FixtureRequest) -> str:
    if HAS_POSTGREST and getattr(request, "param", POSTGREST) == POSTGREST:
        return str(request.getfixturevalue("postgrest_url"))
    return f"{stack.api_url}/rest/v1"


@contextlib.contextmanager
def gateway_before(db: Database, stack: Stack) -> Iterator[str]:
    """Run a gateway of one's own before a database of the stack's, and yield its address.

    It is Lite where there is no program of PostgREST's.
    """
    if binary := stack_choice.postgrest_binary():
        process, url = start_postgrest(binary, stack, db)
        try:
            yield url
        finally:
            process.stop(signal.SIGTERM, 10)
        return
    folder = stack.folder / f"gateway-{db.name}"
    folder.mkdir()
    shutil.copy(stack.settings.file, folder / "env")
    lite = Gateway(folder, Settings(folder / "env"))
    try:
        lite.start(db.url)
        url = f"{lite.address()}/rest/v1"
        # Lite grants at its first request; several first ones trip over each other's grants.
        httpx.post(f"{url}/rpc/ping", json={}).raise_for_status()
        yield url
    finally:
        lite.stop()


def start_postgrest(
    binary: Path, stack: Stack, db: Database, environment: dict[str, str] | None = None
) -> tuple[Process, str]:
    """Start PostgREST in front of a database of the stack's; return it and its address."""
    environment = environment or postgrest_settings(
        stack, db, stack.cluster.address(), (free_port(), free_port())
    )
    port, admin_port = (environment[f"PGRST_{name}_PORT"] for name in ("SERVER", "ADMIN_SERVER"))
    log = stack.folder / "logs" / f"postgrest-{db.name}.log"

    def is_ready() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{admin_port}/ready").is_success
        except httpx.TransportError:
            return False

    own = environment | {"PGRST_SERVER_HOST": "127.0.0.1"}
    process = spawn([binary.resolve()], log=log, cwd=Path("/"), env=own)
    process.wait_until(is_ready, START_SECONDS, log)
    return process, f"http://127.0.0.1:{port}"


def postgrest_settings(
    stack: Stack, db: Database, address: str, ports: tuple[int, int]
) -> dict[str, str]:
    """Make the role PostgREST logs in as; return its environment, for the database there."""
    role, password = f"authenticator_of_{db.name}", secrets.token_hex(16)
    db.execute(SUPABASE_UID)
    db.execute(f"create role {role} noinherit login password '{password}'")
    db.execute(f"grant anon, authenticated, service_role to {role}")
    return {
        "PGRST_DB_URI": f"postgresql://{role}:{password}@{address}/{db.name}",
        "PGRST_DB_SCHEMAS": "public",
        "PGRST_DB_ANON_ROLE": "anon",
        "PGRST_JWT_SECRET": stack.jwt_secret,
        "PGRST_SERVER_PORT": str(ports[0]),
        "PGRST_ADMIN_SERVER_PORT": str(ports[1]),
    }


@pytest.fixture(scope="session")
def endpoints(stack: Stack, rpc_url: str) -> Iterator[Endpoints]:
    # Lite closes a connection after 5 idle seconds; ours goes first, so none is found closed.
    limits = httpx.Limits(keepalive_expiry=2)
    with httpx.Client(timeout=30, limits=limits) as http:
        yield Endpoints(http, f"{stack.api_url}/auth/v1", rpc_url, f"{stack.api_url}/storage/v1")


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
