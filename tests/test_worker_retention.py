"""Erasure end to end: real worker processes, the real Storage API, and files that are really there.

The stack's own database is used: Storage keeps its records there. What Storage may answer otherwise
is tried in this process.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import httpx
import pytest
from actors import User
from database import Database
from http_client import Client, SignedUp
from test_worker_units import ENVIRONMENT
from worker_process import Workers, eventually

import worker
from stack import Stack

pytest_plugins = ["http_fixtures"]

TINY = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\b\0\0\0\0:~\x9bU"
    b"\0\0\0\nIDATx\x9cc\xf8\x0f\0\1\1\1\0\x1b\xb6\xeeV\0\0\0\0IEND\xaeB`\x82"
)
GENERATIONS = 200


@pytest.fixture
def workers(stack: Stack, stack_db: Database, tmp_path: Path) -> Iterator[Workers]:
    """Starts workers on the stack's own database."""
    with Workers(stack_db, stack, tmp_path) as workers:
        yield workers


def with_files(user: SignedUp, db: Database, operator: Client, generations: int) -> list[str]:
    """Give a user finished generations, sources, and a file that no row speaks of, all stored."""
    files = [
        *(f"generations/{path}" for path in User(db, user.id).has_history(generations)),
        *(f"inputs/{user.id}/cats/{n}.png" for n in range(20)),
        f"generations/{user.id}/{uuid.uuid4()}/0.png",
    ]

    with ThreadPoolExecutor(8) as pool:
        uploads = pool.map(lambda path: operator.upload(path, TINY, upsert=True), files)
        assert all(each.is_success for each in uploads)
    return files


def stored(db: Database, user: SignedUp) -> int:
    """Return how many files are below the user's folder, whichever the bucket."""
    query = "select count(*) from storage.objects where starts_with(name, %s)"
    return int(db.value(query, f"{user.id}/"))


def tables_that_mention(db: Database, text: str) -> set[str]:
    return {name for name, rows in db.snapshot().items() for row in rows if text in row}


def test_a_deleted_user_is_gone_with_every_file_though_a_worker_dies_on_the_way(
    user, stranger, operator, workers
):
    db = workers.db
    files = with_files(user, db, operator, GENERATIONS)
    others = with_files(stranger, db, operator, 3)
    on_disk = list(workers.stack.folder.rglob(f"*{user.id}*"))
    db.execute("delete from auth.users where id = %s", user.id)
    marks = {"private.expired_files", "private.retention_walks"}  # pg_cron may be on its way
    assert tables_that_mention(db, user.id) <= marks
    assert stored(db, user) == len(files) == 2 * GENERATIONS + 21

    killed = workers.start()
    eventually(lambda: stored(db, user) <= len(files) * 3 // 4, within=60)
    killed.kill()
    assert stored(db, user) > 0
    db.execute("update private.expired_files set try_at = now()")
    workers.start()
    eventually(lambda: not tables_that_mention(db, user.id), within=60)

    assert stored(db, user) == 0
    assert [path for path in on_disk if any(each.is_file() for each in path.rglob("*"))] == []
    assert operator.download(files[0]).status_code == 400
    assert stored(db, stranger) == len(others)
    assert all(operator.download(path).content == TINY for path in others)


def test_deleted_generations_and_orphans_go_and_a_file_that_is_gone_holds_up_nothing(
    user, operator, stack_db, workers
):
    files = with_files(user, stack_db, operator, 2)
    gone = files[0].split("/")[2]
    deleted = "update public.generations set deleted_at = now() - interval '31 days' where id = %s"
    stack_db.execute(deleted, gone)
    stack_db.execute(
        "update storage.objects set created_at = created_at - interval '2 days',"
        " updated_at = updated_at - interval '2 days' where starts_with(name, %s)",
        f"{user.id}/",
    )
    stack_db.execute(
        "insert into private.expired_files (bucket, path, user_id) values ('inputs', %s, %s)",
        f"{user.id}/never-there.png",
        user.id,
    )

    workers.start()
    eventually(lambda: gone not in str(stack_db.execute("select id from public.generations")))
    eventually(lambda: "private.expired_files" not in tables_that_mention(stack_db, user.id))

    left = [path for path in files[:-1] if gone not in path]
    assert [path for path in files if operator.download(path).is_success] == left


# --- Storage that does not answer well ---


@pytest.fixture
def erase(db: Database, stack: Stack, caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """Has a worker erase what it can, once, from a Storage that answers so."""

    async def run(answer: Callable[[httpx.Request], httpx.Response]) -> None:
        settings = worker.Settings(ENVIRONMENT)
        database = worker.Database(stack.worker_database_url.replace("/postgres", f"/{db.name}"))
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
            storage = worker.Storage(settings, http, mock.Mock())
            await database.pool.open()
            await worker.Worker(settings, database, {}, storage, mock.Mock()).erase()
            await database.pool.close()

    def erased(answer: Callable[[httpx.Request], httpx.Response]) -> str:
        caplog.clear()
        db.execute("update private.expired_files set try_at = now()")
        with mock.patch("asyncio.sleep", mock.AsyncMock()):
            asyncio.run(run(answer))
        return caplog.text

    return erased


EXPIRED = "select coalesce(array_agg(path order by path), '{}') from private.expired_files"


@pytest.mark.parametrize("status", [500, 400, 401, 301, 0])
def test_while_storage_refuses_the_list_stays(db, bob, erase, status):
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        if not status:
            raise httpx.ReadError("gone")
        return httpx.Response(status)

    bob.has_history(1)
    db.execute("delete from auth.users where id = %s", bob.id)

    assert "files.kept error=" in erase(answer)

    assert len(asked) == (3 if status == 400 else 1)  # of these, each is tried alone
    assert len(db.value(EXPIRED)) == 2
    erase(lambda _: httpx.Response(200))
    assert db.value(EXPIRED) == []


def test_one_path_that_storage_refuses_keeps_no_other_file(db, bob, erase):
    paths = bob.has_history(3)
    db.execute("delete from auth.users where id = %s", bob.id)

    erase(lambda each: httpx.Response(400 if paths[2].encode() in each.content else 200))

    assert db.value(EXPIRED) == [paths[2]]


def test_a_yes_of_storage_that_deletes_nothing_is_not_believed(db, alice, erase):
    path = alice.has_history(1)[0]
    db.execute("insert into storage.objects values (default, 'generations', %s)", path)
    db.execute("delete from auth.users where id = %s", alice.id)

    said = erase(lambda _: httpx.Response(200))

    assert "files.kept error=1 of 2 are still there" in said
    assert db.value(EXPIRED) == [path]


def test_what_is_wrong_with_retention_itself_does_not_end_the_worker(db, erase):
    db.execute("alter table private.retention_walks rename to walks")

    assert "files.kept error=UndefinedTable" in erase(lambda _: httpx.Response(200))
