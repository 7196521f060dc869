"""The API at its limits: a prompt of 100 MB, and thousands of idle clients that poll.

A thousand clients share connections,
as behind a proxy; with `LIMITS=10 pytest tests/test_limits_http.py` they are ten thousand.
"""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from actors import PREVIEW, User, outcome
from database import memory, unchanged
from http_client import Client, Endpoints, answer, refusal
from http_fixtures import database_of, gateway_before
from worker_process import Workers, eventually

from stack import sign_jwt

pytest_plugins = ["http_fixtures"]

CLIENTS = 1000 * int(os.environ.get("LIMITS", "1"))
CONNECTIONS = 200
FLOW = 5  # jobs that are made meanwhile
HUGE = 100_000_000  # bytes
SMALL = {"width": 64, "height": 64}


def test_a_prompt_of_100_mb_is_refused_over_http_and_the_next_request_is_answered(user, stack_db):
    with unchanged(stack_db):
        refused = user.enqueue("x" * HUGE)

    if refused.status_code != 413:  # a gateway's own limit, where it has one
        assert refusal(refused).details == "prompt: longer than 4000 characters"
    assert user.enqueue().status_code == 200


@pytest.mark.parametrize("argument", ["prompt", "params"])
def test_100_mb_are_refused_by_the_database_which_gives_the_memory_back(db, alice, argument):
    alice.ping()
    pid = alice.connection.info.backend_pid
    before = memory(pid, "VmRSS")
    huge = "x" * HUGE if argument == "prompt" else {"a": "x" * HUGE}
    with unchanged(db):
        refused = outcome(lambda: alice.enqueue(**{argument: huge}))

    assert (refused.code, refused.token) == ("PT400", "invalid_input")
    assert len(refused.detail) < 200
    assert memory(pid, "VmHWM") < 10 * HUGE
    assert memory(pid, "VmRSS") < before + HUGE / 2
    assert alice.enqueue()["status"] == "queued"


def test_ten_filters_that_would_never_end_are_ended_and_the_api_goes_on(user, stack, stack_db):
    if not stack.postgrest:
        pytest.skip("filters are PostgREST's")
    user.enqueued("a" * 2999)
    never = {"select": "id", "prompt": r"match.^(a*)(a*)(a*)(a*)\1\2\3\4$"}  # twice as many is even
    db = database_of(user, stack_db)
    busy = (  # with those that the entry of cells has a cell do
        "select count(*) from pg_stat_activity where state = 'active'"
        " and usename in ('authenticator', 'darkroom_entry')"
    )

    with ThreadPoolExecutor(10) as pool:
        filters = [pool.submit(user.rest, "GET", "generations", params=never) for _ in range(10)]
        eventually(lambda: db.value(busy) >= 9)
        assert answer(user.rpc("ping"))["ok"]
        assert {refusal(each.result()).code for each in filters} == {"57014"}

    assert db.value(busy) == 0


def test_thousands_of_idle_clients_poll_while_pictures_are_made(
    server, template, stack, endpoints, tmp_path
):
    db = server.create(template)
    query = "insert into auth.users (id) select gen_random_uuid() from generate_series(1, %s)"
    idle = [str(row["id"]) for row in db.execute(f"{query} returning id", CLIENTS)]
    db.execute("analyze")
    rows = "select md5(string_agg(e::text, '' order by e.user_id)) from public.entitlements as e"
    before, user = db.value(rows), User(db)
    open_now = "select count(*) from pg_stat_activity where datname = current_database()"

    def client(user_id: str) -> Client:
        claims = {"role": "authenticated", "sub": user_id, "exp": 4_102_444_800}
        rest = Endpoints(endpoints.http, auth="", rest=url, storage="")
        return Client(rest, sign_jwt(stack.jwt_secret, claims))

    def poll(user_id: str) -> tuple[int, str]:
        response = client(user_id).rpc("list_active_jobs")
        return response.status_code, response.text

    with (
        gateway_before(db, stack) as url,
        Workers(db, stack, tmp_path) as workers,
        ThreadPoolExecutor(CONNECTIONS) as pool,
    ):
        workers.start()
        answers = pool.map(poll, idle)
        for _ in range(FLOW):
            job = {"model": PREVIEW, "prompt": "a lighthouse at dusk", "params": SMALL}
            job_id = answer(client(user.id).rpc("enqueue_generation", **job))["job_id"]
            workers.until(job_id, "completed", within=60)
            assert db.value(open_now) < 40

        assert Counter(answers) == {(200, "[]"): CLIENTS}
    assert db.value(f"{rows} where user_id <> %s", user.id) == before
    server.drop(db)
