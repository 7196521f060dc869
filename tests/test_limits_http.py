"""The API at its limits: a prompt of 100 MB, and thousands of idle clients that poll.

Against PostgREST, or the local gateway where there is none. A thousand clients share connections,
as behind a proxy; with `LIMITS=10 pytest tests/test_limits_http.py` they are ten thousand.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpcore
import httpx
import psycopg
import pytest
from actors import PREVIEW, User, outcome
from database import Database, Server, unchanged
from http_client import Client, Endpoints, answer, refusal
from http_fixtures import gateway_before
from worker_process import Workers

from stack import Stack, sign_jwt

pytest_plugins = ["http_fixtures"]

TIMES = int(os.environ.get("LIMITS", "1"))
CLIENTS = 1000 * TIMES
CONNECTIONS = 200
FLOW = 5  # jobs that are made meanwhile
HUGE = 100_000_000  # bytes
SMALL = {"width": 64, "height": 64}


# --- a prompt of 100 MB ---


def test_a_prompt_of_100_mb_is_refused_over_http_and_the_next_request_is_answered(user, stack_db):
    with unchanged(stack_db):
        refused = user.enqueue("x" * HUGE)

    if refused.status_code != 413:  # a gateway's own limit, where it has one
        assert refusal(refused).message == "invalid_input"
        assert refusal(refused).details == "prompt: longer than 4000 characters"
    assert len(refused.content) < 1000
    assert user.enqueue().status_code == 200


def memory(connection: psycopg.Connection[object], what: str) -> int:
    """Return what a server process holds (VmRSS) or has held at most (VmHWM), in bytes."""
    status = Path(f"/proc/{connection.info.backend_pid}/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) * 1024


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda user: user.enqueue("x" * HUGE), id="prompt"),
        pytest.param(lambda user: user.enqueue(params={"a": "x" * HUGE}), id="params"),
        pytest.param(lambda user: user.save_prompt_template("a", "x" * HUGE), id="template"),
    ],
)
def test_100_mb_are_refused_by_the_database_which_gives_the_memory_back(db, alice, call):
    alice.ping()
    before = memory(alice.connection, "VmRSS")
    with unchanged(db):
        refused = outcome(lambda: call(alice))

    assert (refused.code, refused.token) == ("PT400", "invalid_input")
    assert len(refused.detail) < 200
    assert memory(alice.connection, "VmHWM") < 10 * HUGE
    assert memory(alice.connection, "VmRSS") < before + HUGE / 2
    assert alice.enqueue()["status"] == "queued"


# --- thousands of clients that poll ---


@dataclass(frozen=True)
class Api:
    """A gateway of this module's own."""

    db: Database
    url: str
    jwt_secret: str

    def token(self, user_id: str) -> str:
        claims = {"role": "authenticated", "sub": user_id, "exp": 4_102_444_800}
        return sign_jwt(self.jwt_secret, claims)


@pytest.fixture(scope="module")
def api(server: Server, template: str, stopped_stack: Stack) -> Iterator[Api]:
    """A database with thousands of users, behind a gateway of its own."""
    db = server.create(template)
    db.execute(
        f"insert into auth.users (id) select gen_random_uuid() from generate_series(1, {CLIENTS})"
    )
    db.execute("analyze")
    with gateway_before(db, stopped_stack) as url:
        yield Api(db, url, stopped_stack.jwt_secret)
    server.drop(db)


async def poll(api: Api, tokens: list[str]) -> Counter[tuple[int, bytes]]:
    """Have every client ask once what it has under way; count the answers."""
    answers: Counter[tuple[int, bytes]] = Counter()
    waiting = iter(tokens)

    async def ask(pool: httpcore.AsyncConnectionPool) -> None:
        for token in waiting:
            response = await pool.request(
                "POST",
                f"{api.url}/rpc/list_active_jobs",
                headers={"authorization": f"Bearer {token}", "content-type": "application/json"},
                content=b"{}",
                extensions={"timeout": {"read": 60, "connect": 60, "pool": 60}},
            )
            answers[response.status, response.content] += 1

    # Lite closes a connection after 5 idle seconds; ours goes first, so none is found closed.
    async with httpcore.AsyncConnectionPool(
        max_connections=CONNECTIONS, keepalive_expiry=2
    ) as pool:
        await asyncio.gather(*(ask(pool) for _ in range(CONNECTIONS)))
    return answers


def make_pictures(api: Api, user: User, workers: Workers) -> int:
    """Have jobs made one after the other, over HTTP; return the most connections seen."""
    open_now = "select count(*) from pg_stat_activity where datname = current_database()"
    most = 0
    with httpx.Client(timeout=60) as http:
        client = Client(Endpoints(http, auth="", rest=api.url, storage=""), api.token(user.id))
        for _ in range(FLOW):
            job = {"model": PREVIEW, "prompt": "a lighthouse at dusk", "params": SMALL}
            job_id = answer(client.rpc("enqueue_generation", **job))["job_id"]
            workers.until(job_id, "completed", within=60)
            assert answer(client.rpc("get_job_status", job_id=job_id))["status"] == "completed"
            most = max(most, api.db.value(open_now))
    return most


def test_thousands_of_idle_clients_poll_while_pictures_are_made(api, stack, tmp_path):
    ids = [str(row["id"]) for row in api.db.execute("select id from auth.users")]
    tokens = [api.token(each) for each in ids]
    user = User(api.db)
    idle = "select md5(string_agg(e::text, '' order by e.user_id)) from public.entitlements as e"
    before = api.db.value(f"{idle} where user_id <> %s", user.id)

    with Workers(api.db, stack, tmp_path) as workers, ThreadPoolExecutor(1) as other:
        workers.start()
        made = other.submit(make_pictures, api, user, workers)
        answers = asyncio.run(poll(api, tokens))
        most_connections = made.result(120)

    assert answers == {(200, b"[]"): CLIENTS}
    assert most_connections < 40
    assert api.db.value(f"{idle} where user_id <> %s", user.id) == before
    assert api.db.value("select count(*) from public.generations") == FLOW
