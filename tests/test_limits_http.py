"""The API at its limits: a prompt of 100 MB, and thousands of idle clients that poll.

Against PostgREST, or the local gateway where there is none. A thousand clients share connections,
as behind a proxy; with `LIMITS=10 pytest tests/test_limits_http.py` they are ten thousand.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import httpcore
import httpx
import pytest
from actors import PREVIEW, User, outcome
from database import Database, Server, cost, memory, unchanged
from hostile import NUMBERS
from http_client import Client, Endpoints, answer, refusal
from http_fixtures import HAS_POSTGREST, gateway_before
from worker_process import Workers, eventually

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
    pid = alice.connection.info.backend_pid
    before = memory(pid, "VmRSS")
    with unchanged(db):
        refused = outcome(lambda: call(alice))

    assert (refused.code, refused.token) == ("PT400", "invalid_input")
    assert len(refused.detail) < 200
    assert memory(pid, "VmHWM") < 10 * HUGE
    assert memory(pid, "VmRSS") < before + HUGE / 2
    assert alice.enqueue()["status"] == "queued"


# --- little that comes to much ---

JSON = {"Content-Type": "application/json"}
as_sent = pytest.mark.skipif(not HAS_POSTGREST, reason="Lite reads JSON itself, and writes it anew")


@as_sent
@pytest.mark.parametrize("numbers", NUMBERS, ids=lambda numbers: numbers[1:9])
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("enqueue_generation", {"model": PREVIEW, "prompt": "x"}),
        ("enqueue_batch", {"model": PREVIEW, "prompts": ["x"]}),
        ("save_prompt_template", {"title": "x", "prompt": "x"}),
    ],
)
def test_36_kb_of_numbers_that_are_long_to_write_are_refused_unwritten(
    user, stack_db, function, arguments, numbers
):
    body = json.dumps(arguments | {"params": {"a": "?"}}).replace('"?"', numbers)
    backends = stack_db.execute(
        "select pid from pg_stat_activity"
        " where datname = current_database() and backend_type = 'client backend'"
    )
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(user.rest("POST", f"rpc/{function}", content=body, headers=JSON))

    costs = [cost([row["pid"] for row in backends], ask) for _ in range(3)]

    assert {(each.status, each.message) for each in map(refusal, answers)} == {
        (400, "invalid_input")
    }
    assert max(grown for _, grown in costs) < 20_000_000
    assert min(seconds for seconds, _ in costs) < 0.05


@as_sent
@pytest.mark.parametrize(("levels", "statuses"), [(8000, {400}), (16_000, {400, 413})])
@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_what_is_nested_too_deep_is_refused(user, opening, levels, statuses):
    closing = "]" if opening == "[" else "1}"
    params = opening * levels + closing[:-1] + closing[-1] * levels
    body = f'{{"model": "{PREVIEW}", "prompt": "x", "params": {params}}}'
    refused = refusal(user.rest("POST", "rpc/enqueue_generation", content=body, headers=JSON))

    assert refused.status in statuses
    assert refused.code in {"PT400", "54001"}  # PostgREST meets it before our function does


# --- a pattern that never ends ---


@as_sent
def test_ten_filters_that_would_never_end_are_ended_and_the_api_goes_on(user, stack_db):
    user.enqueued("a" * 2999)
    never = {"select": "id", "prompt": r"match.^(a*)(a*)(a*)(a*)\1\2\3\4$"}  # twice as many is even
    busy = "select count(*) from pg_stat_activity where query ~ 'generations' and state = 'active'"

    with ThreadPoolExecutor(10) as pool:
        filters = [pool.submit(user.rest, "GET", "generations", params=never) for _ in range(10)]
        eventually(lambda: stack_db.value(f"{busy} and pid <> pg_backend_pid()") >= 9)
        assert answer(user.rpc("ping"))["ok"]
        assert {refusal(each.result()).code for each in filters} == {"57014"}

    assert stack_db.value(f"{busy} and pid <> pg_backend_pid()") == 0


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
            headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
            ask_once = partial(
                pool.request,
                "POST",
                f"{api.url}/rpc/list_active_jobs",
                headers=headers,
                content=b"{}",
                extensions={"timeout": {"read": 60, "connect": 60, "pool": 60}},
            )
            try:
                response = await ask_once()
            except httpcore.NetworkError:  # a busy machine found it closed after all
                response = await ask_once()
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
