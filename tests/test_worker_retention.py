"""Erasure end to end: real worker processes, the real Storage API, and files that are really there.

The stack's own database is used: Storage keeps its records there.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from actors import User
from database import Database
from http_client import Client, SignedUp
from test_worker_units import ENVIRONMENT
from worker_process import Workers, eventually

from stack import Stack
from worker import Settings, Storage, StorageRefused

pytest_plugins = ["http_fixtures"]

TINY = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\b\0\0\0\0:~\x9bU"
    b"\0\0\0\nIDATx\x9cc\xf8\x0f\0\1\1\1\0\x1b\xb6\xeeV\0\0\0\0IEND\xaeB`\x82"
)
GENERATIONS = 1000
SMALL = {"width": 64, "height": 64}


@pytest.fixture
def workers(stack: Stack, stack_db: Database, tmp_path: Path) -> Iterator[Workers]:
    """Starts workers on the stack's own database."""
    with Workers(stack_db, stack, tmp_path) as workers:
        yield workers


@pytest.fixture
def own_workers(db: Database, stack: Stack, tmp_path: Path) -> Iterator[Workers]:
    """Starts workers on the test's database."""
    with Workers(db, stack, tmp_path) as workers:
        yield workers


def upload(operator: Client, files: list[str]) -> None:
    """Store a tiny picture at each of these places, bucket first."""

    def store(path: str) -> bool:
        return operator.upload(path, TINY, upsert=True).is_success

    def insist(path: str) -> None:  # Lite refuses some that come at once after its start
        eventually(lambda: store(path))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(insist, files))


def with_files(user: SignedUp, db: Database, operator: Client, generations: int) -> list[str]:
    """Give a user finished generations, sources, and a file that no row speaks of, all stored."""
    outputs = User(db, user.id).has_history(generations)
    files = [
        *(f"generations/{path}" for path in outputs),
        *(f"inputs/{user.id}/cats/{n}.png" for n in range(20)),
        f"generations/{user.id}/{uuid.uuid4()}/0.png",
    ]
    upload(operator, files)
    return files


def stored(db: Database, user: SignedUp) -> int:
    """Return how many files are below the user's folder, whichever the bucket."""
    query = "select count(*) from storage.objects where starts_with(name, %s)"
    return int(db.value(query, f"{user.id}/"))


def tables_that_mention(db: Database, text: str) -> set[str]:
    return {name for name, rows in db.snapshot().items() for row in rows if text in row}


def let_leases_end(db: Database) -> None:
    db.execute("update private.expired_files set try_at = now()")


def test_a_deleted_user_is_gone_with_every_file_though_workers_die_on_the_way(
    user, stranger, operator, workers
):
    stack_db = workers.db
    files = with_files(user, stack_db, operator, GENERATIONS)
    others = with_files(stranger, stack_db, operator, 3)
    on_disk = list(workers.stack.folder.rglob(f"*{user.id}*"))
    stack_db.execute("delete from auth.users where id = %s", user.id)
    marks = {"private.expired_files", "private.retention_walks"}  # pg_cron may be on its way
    assert tables_that_mention(stack_db, user.id) <= marks
    assert stored(stack_db, user) == len(files) == 2 * GENERATIONS + 21

    for left in (len(files) * 2 // 3, len(files) // 3):
        first = workers.start()
        eventually(lambda most=left: stored(stack_db, user) <= most, within=60)
        first.kill()
        assert stored(stack_db, user) > 0
        let_leases_end(stack_db)
    workers.start()
    eventually(lambda: not tables_that_mention(stack_db, user.id), within=60)

    assert stored(stack_db, user) == 0
    assert [path for path in on_disk if any(each.is_file() for each in path.rglob("*"))] == []
    assert operator.download(files[0]).status_code == 400
    assert stored(stack_db, stranger) == len(others)
    assert all(operator.download(path).content == TINY for path in others)


def test_a_generation_its_user_deleted_goes_from_rows_and_storage(
    user, operator, stack_db, workers
):
    files = with_files(user, stack_db, operator, 2)
    gone = files[0].split("/")[2]
    stack_db.execute(
        "update public.generations set deleted_at = now() - interval '31 days' where id = %s", gone
    )

    workers.start()
    erased = "select 1 where not exists (select from public.generations where id = %s)"
    eventually(lambda: stack_db.execute(erased, gone))

    left = [path for path in files if operator.download(path).is_success]
    assert left == [path for path in files if gone not in path]


def test_orphans_are_swept_and_a_file_that_is_gone_already_holds_up_nothing(
    user, operator, stack_db, workers
):
    files = with_files(user, stack_db, operator, 1)
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
    eventually(lambda: stored(stack_db, user) == len(files) - 1)
    eventually(lambda: "private.expired_files" not in tables_that_mention(stack_db, user.id))

    assert not operator.download(files[-1]).is_success
    assert all(operator.download(path).is_success for path in files[:-1])


# --- Storage that does not answer well ---


class MoodyStorage(ThreadingHTTPServer):
    """Takes uploads, and answers deletions with a status; or closes the connection for 0.

    Of what has `refused` in it, only those.
    """

    def __init__(self, status: int, refused: str = "") -> None:
        self.status, self.refused = status, refused
        super().__init__(("127.0.0.1", 0), Mood)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.deletions = 0


class Mood(BaseHTTPRequestHandler):
    server: MoodyStorage

    def do_POST(self) -> None:
        self._answer(200)

    def do_DELETE(self) -> None:
        self.server.deletions += 1
        if self.server.status:
            self._answer(self.server.status)

    def _answer(self, status: int) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.server.refused.encode() not in body:
            status = 200
        self.send_response(status)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def moody_storage() -> Iterator[Callable[..., MoodyStorage]]:
    """Starts a Storage that answers deletions with this status."""
    servers: list[MoodyStorage] = []

    def start(*mood: Any) -> MoodyStorage:
        server = MoodyStorage(*mood)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [500, 400, 401, 0])
def test_while_storage_refuses_the_list_stays_and_jobs_go_on(
    alice, bob, own_workers, moody_storage, status
):
    db, storage = alice.db, moody_storage(status)
    bob.has_history(1)
    db.execute("delete from auth.users where id = %s", bob.id)
    process = own_workers.start(SUPABASE_URL=storage.url)
    process.logged(r"files\.kept")

    own_workers.until(alice.enqueued(params=SMALL), "completed")

    assert storage.deletions == 1  # the next try is a minute away
    assert db.value("select count(*) from private.expired_files") == 2
    storage.status = 200
    let_leases_end(db)
    own_workers.start(SUPABASE_URL=storage.url)
    eventually(lambda: db.value("select count(*) from private.expired_files") == 0)


def test_one_path_that_storage_refuses_keeps_no_other_file(bob, own_workers, moody_storage):
    db = bob.db
    paths = bob.has_history(3)
    db.execute("delete from auth.users where id = %s", bob.id)

    own_workers.start(SUPABASE_URL=moody_storage(400, paths[2]).url)

    left = "select array_agg(path) from private.expired_files"
    eventually(lambda: db.value(left) == [paths[2]], within=30)


def test_a_yes_of_storage_that_deletes_nothing_is_not_believed(
    alice, bob, own_workers, moody_storage
):
    path = alice.has_history(1)[0]
    alice.db.execute("insert into storage.objects values (default, 'generations', %s)", path)
    alice.db.execute("delete from auth.users where id = %s", alice.id)

    process = own_workers.start(SUPABASE_URL=moody_storage(200).url)

    process.logged(r"files\.kept error=1 of 2 are still there")
    assert alice.db.value("select path from private.expired_files") == path


def test_what_is_wrong_with_retention_itself_does_not_end_the_worker(db, alice, own_workers):
    db.execute("alter table private.retention_walks rename to walks")
    process = own_workers.start()
    process.logged(r"files\.kept error=UndefinedTable")

    own_workers.until(alice.enqueued(params=SMALL), "completed")


@pytest.mark.parametrize("status", [301, 400, 403, 500])
def test_remove_takes_success_only_for_deleted(status):
    async def remove() -> None:
        transport = httpx.MockTransport(lambda _: httpx.Response(status))
        async with httpx.AsyncClient(transport=transport) as http:
            storage = Storage(Settings(ENVIRONMENT), http, mock.Mock())
            await storage.remove("inputs", ["a/b.png"])

    with pytest.raises(StorageRefused, match=str(status)):
        asyncio.run(remove())
