"""Fixtures: one cluster for the session, a fresh database for each test, and the actors.

`db` is a clone of a template with Supabase Lite's schemas, and Darkroom installed from sql/.
"""

from __future__ import annotations

import lzma
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import partitioned
import pytest
import stack_choice
from actors import Anon, Monitor, Service, User, Worker
from database import SEED, Database, Server

import migrate
from stack import Stack, interrupt

FIRST_EDITION = Path(__file__).with_name("first_edition.sql.xz")
MEMORY = Path("/dev/shm")
MEMORY_BYTES = 2 * 1024**3


def pytest_configure() -> None:
    stack_choice.refuse_unusable(os.environ)


@pytest.fixture(scope="session")
def stopped_stack() -> Iterator[Stack]:
    """A stack in a temporary folder, of which nothing runs yet; all of it is gone afterwards."""
    signal.signal(signal.SIGTERM, interrupt)
    # Each test makes a database, some 400 files: much faster in memory.
    in_memory = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_BYTES
    parent = MEMORY if in_memory and os.access(MEMORY, os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="darkroom-tests-", dir=parent))
    folder.chmod(0o711)
    stack = stack_choice.make_stack(folder)
    try:
        yield stack
    finally:
        stack.clean()
        shutil.rmtree(folder, ignore_errors=True)  # nothing was started: not yet a stack's


@pytest.fixture(scope="session")
def server(stopped_stack: Stack) -> Iterator[Server]:
    """The cluster, with Supabase Lite's schemas in the database `postgres`."""
    stopped_stack.cluster.start()
    stopped_stack.lite.start(stopped_stack.database_url)
    server = Server(stopped_stack.cluster)
    yield server
    server.close()


@pytest.fixture(scope="session")
def supabase_template(server: Server, stopped_stack: Stack) -> str:
    """Name of a database with schemas auth and storage as Supabase Lite makes them."""
    lite = Database(stopped_stack.database_url, "postgres")
    database = server.create()
    done = database.psql(script=lite.dump("--schema=auth", "--schema=storage"))
    assert done.returncode == 0, done.stderr
    return database.name


@pytest.fixture(scope="session")
def template(server: Server, supabase_template: str) -> str:
    """Name of a database with Darkroom and its seed installed; with PARTITIONED=1 in partitions."""
    database = server.create(supabase_template)
    if os.environ.get("PARTITIONED"):
        script = partitioned.edited(*partitioned.around(datetime.now(UTC))) + SEED.read_text()
        done = database.psql(script=script)
        assert done.returncode == 0, done.stderr
    else:
        database.install(SEED)
    return database.name


@pytest.fixture(scope="session")
def stack(stopped_stack: Stack, template: str) -> Stack:
    """Everything but a worker: database with pg_cron, migrations, auth, RPC and Storage."""
    return stopped_stack.up()


@pytest.fixture
def supabase_db(server: Server, supabase_template: str) -> Iterator[Database]:
    """A database of the test's own without Darkroom."""
    database = server.create(supabase_template)
    yield database
    server.drop(database)


@pytest.fixture
def db(server: Server, template: str) -> Iterator[Database]:
    database = server.create(template)
    yield database
    server.drop(database)


@pytest.fixture(scope="session")
def first_template(server: Server, supabase_template: str) -> str:
    """Name of a database with the first edition in it, as `make migrate` left it."""
    database = server.create(supabase_template)
    text = lzma.decompress(FIRST_EDITION.read_bytes()).decode()
    done = database.psql(script=text)
    assert done.returncode == 0, done.stderr
    create = migrate.read_migrations()[0]
    database.execute(migrate.HISTORY)
    database.execute(
        "insert into supabase_migrations.schema_migrations (version, name, statements)"
        " values (%s, %s, %s)",
        create.version,
        create.name,
        [text],
    )
    database.close()
    return database.name


@pytest.fixture
def first(server: Server, first_template: str) -> Iterator[Database]:
    """A database of the first edition."""
    database = server.create(first_template)
    yield database
    server.drop(database)


@pytest.fixture
def alice(db: Database) -> User:
    return User(db)


@pytest.fixture
def bob(db: Database) -> User:
    return User(db)


@pytest.fixture
def anon(db: Database) -> Anon:
    return Anon(db)


@pytest.fixture
def service(db: Database) -> Service:
    return Service(db)


@pytest.fixture
def monitor(db: Database) -> Monitor:
    return Monitor(db)


@pytest.fixture
def worker(db: Database) -> Worker:
    return Worker(db)
