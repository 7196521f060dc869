"""Two cells behind one entry: users live in either, and see one API."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from actors import Worker
from database import Database, assert_books_balance
from http_client import PREVIEW, Client, Endpoints, Refusal, SignedUp, answer, refusal
from http_fixtures import endpoints_of
from PIL import Image
from pooler import pgbouncer

from cells import CELLS, CellStack

UNAVAILABLE = Refusal(
    503,
    "PT503",
    "unavailable",
    "The database of this account does not answer at the moment.",
    "Try again in 10 seconds.",
)


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def cells() -> Iterator[CellStack]:
    folder = Path(tempfile.mkdtemp(prefix="darkroom-cells-", dir="/dev/shm"))
    folder.chmod(0o711)
    stack = CellStack(folder, fsync=False)
    try:
        yield stack.up()
    finally:
        stack.clean()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def databases(cells: CellStack) -> Iterator[dict[str, Database]]:
    found = {name: Database(cells.url_of(name), name) for name in (*CELLS, "entry")}
    yield found
    for database in found.values():
        database.close()


@pytest.fixture(scope="module")
def endpoints(cells: CellStack) -> Iterator[Endpoints]:
    with httpx.Client(timeout=30) as http:
        yield endpoints_of(cells, http)


@pytest.fixture
def operator(endpoints: Endpoints, cells: CellStack) -> Client:
    return Client(endpoints, cells.service_role_key)


@pytest.fixture
def anybody(endpoints: Endpoints, cells: CellStack) -> Client:
    return Client(endpoints, cells.anon_key)


@pytest.fixture
def sign_up(endpoints: Endpoints, databases: dict[str, Database]) -> Callable[[str], SignedUp]:
    """Sign up a user who is to live in a cell."""

    def sign_up(cell: str) -> SignedUp:
        home = databases["home"]
        home.execute("update cells.cells set weight = (name = %s)::integer", cell)
        try:
            return SignedUp(endpoints)
        finally:
            home.execute("update cells.cells set weight = 1")

    return sign_up


@pytest.fixture
def users(sign_up, databases) -> Iterator[dict[str, SignedUp]]:
    users = {cell: sign_up(cell) for cell in CELLS}
    yield users
    for user in users.values():
        databases["home"].execute("delete from auth.users where id = %s", user.id)


def kill(stack: CellStack, cell: str) -> None:
    """End a cell at once, as a machine that loses power."""
    process = stack.clusters[cell]._processes.get("postgres")
    assert process
    os.killpg(process.pid, signal.SIGKILL)
    os.waitpid(process.pid, 0)  # until then it seems to run to who looks at postmaster.pid


@contextlib.contextmanager
def killed(stack: CellStack, databases: dict[str, Database], cell: str) -> Iterator[None]:
    """Have a cell be away."""
    kill(stack, cell)
    try:
        yield
    finally:
        databases[cell].close()
        databases[cell]._own = None
        stack.clusters[cell].start()


def until(question: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def shared(user: SignedUp, database: Database, count: int = 1) -> list[str]:
    """Have a user share finished pictures; return their places in the feed."""
    found = []
    for _ in range(count):
        job_id, worker = user.enqueued(), Worker(database)
        (job,) = [each for each in worker.claim_jobs(100) if each.id == job_id]
        worker.complete_job(job)
        worker.unregister_worker()
        found.append(answer(user.rpc("share_image", job_id=job_id))["share_id"])
    return found


@contextlib.contextmanager
def working(stack: CellStack) -> Iterator[None]:
    """Have one worker serve all cells."""
    stack.worker.start(stack.worker_environment())
    try:
        yield
    finally:
        stack.worker.stop()


def where(databases: dict[str, Database], user: SignedUp) -> list[str]:
    """Return the cells that have a user."""
    query = "select count(*) from public.entitlements where user_id = %s"
    return [cell for cell in CELLS if databases[cell].value(query, user.id)]


def test_each_user_lives_in_one_cell_and_uses_the_whole_api(users, databases):
    for cell, user in users.items():
        stranger = next(other for other in users.values() if other is not user)
        job_id = user.enqueued(params={"seed": 7}, idempotency_key="one")
        again = answer(user.enqueue(params={"seed": 7}, idempotency_key="one"))
        page = answer(user.rpc("list_generations", "GET", page_size=1))

        assert where(databases, user) == [cell]
        assert databases[cell].value(
            "select user_id::text from public.generations where id = %s", job_id
        ) == (user.id)
        assert again["job_id"] == job_id
        assert answer(user.get_job_status(job_id, "GET"))["params"] == {"seed": 7}
        assert [job["job_id"] for job in answer(user.rpc("list_active_jobs"))] == [job_id]
        assert [job["job_id"] for job in page["generations"]] == [job_id]
        assert refusal(stranger.get_job_status(job_id)).message == "not_found"
        assert answer(user.rpc("cancel_generation", job_id=job_id))["status"] == "canceled"
        assert user.credits() == 10
        batch = answer(user.rpc("enqueue_batch", model=PREVIEW, prompts=['a "b"', "{c}", "d, e"]))
        assert len(batch["job_ids"]) == 3
    for cell in CELLS:
        assert_books_balance(databases[cell])


def test_users_read_their_own_rows_and_operators_everybodys(users, databases, operator, anybody):
    for user in users.values():
        job_id = user.enqueued()
        newest = "generations?select=id,prompt&order=id.desc&limit=1"
        assert answer(user.rest("GET", newest)) == [
            {"id": job_id, "prompt": "a lighthouse at dusk"}
        ]
        assert user.ledger() == [("grant", 10), ("charge", -1)]
        answer(user.rpc("cancel_generation", job_id=job_id))
        answer(user.rpc("delete_generation", job_id=job_id))
        assert answer(user.rest("GET", newest)) == []
        refused = refusal(
            user.rest("PATCH", f"entitlements?user_id=eq.{user.id}", json={"debt": 0})
        )
        assert (refused.status, refused.code) == (403, "42501")
    ids = ",".join(user.id for user in users.values())
    rows = answer(operator.rest("GET", f"entitlements?select=user_id&user_id=in.({ids})"))
    assert {row["user_id"] for row in rows} == {user.id for user in users.values()}
    assert refusal(anybody.rest("GET", "entitlements")).code == "42501"


@pytest.mark.parametrize("cell", CELLS)
def test_errors_are_the_cells_own_to_the_letter(sign_up, databases, cell):
    user = sign_up(cell)
    user.enqueued(idempotency_key="same")
    responses = [
        user.enqueue(" \n\t "),
        user.get_job_status(user.id, "GET"),
        user.rpc("enqueue_generation", "GET", model=PREVIEW, prompt="a harbour"),
        user.enqueue("another", idempotency_key="same"),
        user.rpc("grant_credits", user_id=user.id, amount=5, kind="grant", external_id="x"),
        user.rpc("get_job_status", job_id="nope"),
    ]
    user.enqueued()
    user.enqueued()
    responses.append(user.enqueue())
    databases["home"].execute("delete from auth.users where id = %s", user.id)
    responses.append(user.enqueue())
    responses.append(user.with_token("").rpc("get_entitlement"))

    correct = "Correct the argument and call again."
    known = "Use the job_id that enqueue_generation answered."
    limit = "3 jobs are queued or running, the plan's limit"
    sign_in = "Sign in and send the access token as Authorization: Bearer."
    right, uuid = "permission denied for function grant_credits", "invalid input syntax for type"
    assert [refusal(response) for response in responses] == [
        Refusal(400, "PT400", "invalid_input", "prompt: missing or blank", correct),
        Refusal(404, "PT404", "not_found", "job_id: no such job of yours", known),
        Refusal(
            405,
            "PT405",
            "method_not_allowed",
            "This function changes something.",
            "Call it by POST.",
        ),
        Refusal(
            409,
            "PT409",
            "idempotency_conflict",
            "idempotency_key was used with another payload",
            "Use a new key for a new request.",
        ),
        Refusal(403, "42501", right, None, None),
        Refusal(400, "22P02", f'{uuid} uuid: "nope"', None, None),
        Refusal(429, "PT429", "too_many_active", limit, "Try again in 5 seconds."),
        Refusal(
            401, "PT401", "not_authenticated", "There is no such user any more.", "Sign in again."
        ),
        Refusal(401, "PT401", "not_authenticated", "The request carries no user.", sign_in),
    ]
    assert responses[6].headers["Retry-After"] == "5"


def test_answers_keep_the_headers_that_the_cell_sets(anybody):
    assert anybody.rpc("ping", "GET").headers["Cache-Control"] == "no-store"


def test_every_function_of_the_api_has_a_door_like_it(databases):
    ours = (
        "select p.proname, pg_get_function_arguments(p.oid) as arguments, p.provolatile,"
        " obj_description(p.oid) as description, array(select r from"
        "   unnest('{anon,authenticated,service_role,darkroom_monitor}'::text[]) as r"
        "   where has_function_privilege(r, p.oid, 'execute')) as roles"
        " from pg_proc as p where p.pronamespace = 'public'::regnamespace order by 1"
    )
    assert databases["entry"].execute(ours) == databases["two"].execute(ours)


def test_a_door_hands_on_its_arguments_in_their_order_whatever_the_planner_knows(databases):
    two = databases["two"]
    two.execute("analyze pg_catalog.pg_proc, pg_catalog.pg_depend")  # it sorts, then

    mixed_up = two.execute(
        "select f.name, f.names, p.proargnames from cells.list_functions() as f"
        " inner join pg_proc as p on p.proname = f.name"
        " and p.pronamespace = 'public'::regnamespace"
        " where f.names <> coalesce(p.proargnames, '{}')"
    )
    assert mixed_up == []


# What an entry, or who has its password, may call in a cell beside the API with its roles.
ENTRY_MAY = (
    "answer forget_guest know_event leave_user list_functions list_tables pack_user take_event"
    " take_parts unpack_user"
)
ENTRY_ALSO_MAY = {"home": "bring end_move hand_over", "two": "drop_user put_user"}


@pytest.mark.parametrize("cell", CELLS)
def test_an_entry_may_do_in_a_cell_what_is_listed_and_reads_but_writes_no_table(databases, cell):
    db = databases[cell]
    functions = db.execute(
        "select p.proname::text as name from pg_proc as p"
        " where p.pronamespace in ('cells'::regnamespace, 'private'::regnamespace)"
        " and has_function_privilege('darkroom_entry', p.oid, 'execute')"
        " and not exists (select from pg_depend where objid = p.oid and deptype = 'e')"
    )
    listed = f"{ENTRY_MAY} {ENTRY_ALSO_MAY[cell]} has_folder like_shared_image".split()
    assert {row["name"] for row in functions} == set(listed)
    rights = db.execute(
        "select c.oid::regclass::text as name, c.relkind::text as kind, r.name as may"
        " from pg_class as c"
        " cross join unnest('{select,insert,update,delete,truncate}'::text[]) as r (name)"
        " where c.relnamespace in ("
        "   'cells'::regnamespace, 'private'::regnamespace, 'public'::regnamespace)"
        " and c.relkind in ('r', 'v', 'p', 'f')"
        " and has_table_privilege('darkroom_entry', c.oid, r.name)"
    )
    assert {row["may"] for row in rights} == {"select"}
    tables = {row["name"] for row in rights if row["kind"] != "v"}
    assert tables == {"cells.users"}
    role = db.row("select * from pg_roles where rolname = 'darkroom_entry'")
    strong = ("rolsuper", "rolinherit", "rolcreaterole", "rolreplication", "rolbypassrls")
    assert not any(role[each] for each in strong)


def test_a_function_that_has_no_route_is_refused(databases):
    two, entry = databases["two"], databases["entry"]
    two.execute("create function public.is_new() returns json language sql return '1'::json")
    try:
        with pytest.raises(psycopg.errors.RaiseException, match="says not where is_new goes"):
            entry.execute("select cells.make_doors('two')")
    finally:
        two.execute("drop function public.is_new()")
    entry.execute("select cells.make_doors('two')")


def test_a_cell_that_is_away_concerns_its_users_only_and_is_back_by_itself(
    cells, users, databases, operator, anybody
):
    away, here = users["two"], users["home"]
    job_id = away.enqueued()
    with killed(cells, databases, "two"):
        began = time.monotonic()
        refused = [away.enqueue(), away.get_job_status(job_id, "GET"), away.rpc("get_entitlement")]

        assert time.monotonic() - began < 2
        assert [refusal(response) for response in refused] == [UNAVAILABLE] * 3
        for response in refused:  # PostgREST adds one of its own to each 503: 0
            assert response.headers["Retry-After"].split(", ")[-1] == "10"
        assert here.credits() == 10 and here.enqueued() and len(here.ledger()) == 2
        assert away.rest("GET", "credit_ledger").status_code == 503
        for _ in range(8):
            assert answer(anybody.rpc("list_models")), "whichever cell is asked first"
        health = answer(operator.rpc("queue_health"))
        assert (health["status"], health["cells_away"]) == ("critical", ["two"])
        assert answer(anybody.rpc("list_public_images"))["images"] == []
        assert refusal(operator.rpc("pause_model", model=PREVIEW)) == UNAVAILABLE
    assert answer(away.get_job_status(job_id))["status"] == "queued"
    assert answer(operator.rpc("resume_model", model=PREVIEW))["state"] == "closed"
    assert away.enqueued()
    assert "cells_away" not in answer(operator.rpc("queue_health"))


def test_a_cell_that_is_killed_under_load_fails_none_of_the_others_calls(
    cells, users, databases, operator
):
    told, ending = {cell: Counter[int]() for cell in CELLS}, threading.Event()
    limits = "update private.plans set max_active = {0}, max_per_minute = {0} where name = 'free'"
    databases["home"].execute(limits.format(100000))
    for user in users.values():
        given = {"user_id": user.id, "kind": "grant", "external_id": user.id}
        answer(operator.rpc("grant_credits", **given, amount=10000))
    arrived = "select max_active > 9 from private.plans where name = 'free'"
    until(lambda: databases["two"].value(arrived))

    def ask(cell: str) -> None:
        while not ending.is_set():
            told[cell][users[cell].enqueue().status_code] += 1

    threads = [threading.Thread(target=ask, args=[cell]) for cell in CELLS for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        now = told["home"][200]
        until(lambda now=now: told["home"][200] > now + 50)
        with killed(cells, databases, "two"):
            failed = told["two"][503]
            until(lambda failed=failed: told["two"][503] > failed)
    ending.set()
    for thread in threads:
        thread.join()

    assert told["home"].keys() == {200} and told["home"][200] > 150
    assert told["two"].keys() == {200, 503}
    for cell, user in users.items():
        jobs = "select count(*) from public.generations where user_id = %s"
        made = databases[cell].value(jobs, user.id)
        assert user.credits() == 10010 - made
        assert 0 <= made - told[cell][200] <= 3 * 2 * (cell == "two"), "done, and not answered"
        assert_books_balance(databases[cell])
    databases["home"].execute(
        "update private.plans set max_active = 3, max_per_minute = 10 where name = 'free'"
    )


def test_who_signs_up_while_the_cell_is_away_is_there_later(cells, sign_up, databases):
    with killed(cells, databases, "two"):
        user = sign_up("two")
        assert refusal(user.rpc("get_entitlement")) == UNAVAILABLE
    assert refusal(user.rpc("get_entitlement")) == UNAVAILABLE, "nobody has told the cell yet"

    databases["home"].execute("select private.apply_retention()")

    until(lambda: user.rpc("get_entitlement").status_code == 200)
    assert user.credits() == 10


def test_what_auth_says_of_a_user_reaches_the_users_cell(users, databases):
    for cell, user in users.items():
        user.enqueued()
        databases["home"].execute(
            "update auth.users set banned_until = now() + interval '1 day' where id = %s", user.id
        )
        assert refusal(user.enqueue()).message == "account_blocked", cell
        databases["home"].execute("delete from auth.users where id = %s", user.id)
        assert where(databases, user) == []
    assert databases["home"].execute("select 1 from cells.users where user_id = %s", user.id) == []


def test_calls_go_through_a_pooler_in_transaction_mode(cells, users, databases):
    home, two, entry = (databases[name] for name in ("home", "two", "entry"))
    before = home.value("select address from cells.cells where name = 'two'")
    told = "select coalesce(pooler, '') from cells.cells where name = 'two'"
    password = dict(word.split("=", 1) for word in before.split())["password"]
    url = cells.url_of("two").split("@")[1]
    change = "update cells.cells set pooler = %s where name = 'two'"
    began = two.value("select clock_timestamp()")
    with pgbouncer(f"postgresql://darkroom_entry:{password}@{url}", "transaction") as through:
        port = urlsplit(through).port
        home.execute(change, re.sub(r"port=\d+", f"port={port}", before))
        try:
            until(lambda: f"port={port} " in entry.value(told))
            with ThreadPoolExecutor(10) as pool:
                asked = pool.map(lambda _: users["two"].rpc("get_entitlement"), range(200))
            assert {response.status_code for response in asked} == {200}
            assert users["two"].enqueued()
            connections = (
                "select count(*) from pg_stat_activity where usename = 'darkroom_entry'"
                " and application_name <> 'postgres_fdw' and backend_start > %s"
            )
            assert 1 <= two.value(connections, began) <= 5, "the pool's size"
        finally:
            home.execute(change, None)
            until(lambda: entry.value(told) == "")


def test_new_users_go_by_weight(databases):
    home = databases["home"]
    elsewhere = "select count(*) from cells.users"
    before = home.value(elsewhere)
    home.execute("update cells.cells set weight = 3 where name = 'two'")
    home.execute("alter table auth.users disable trigger darkroom_create_entitlement")
    home.execute(
        "insert into auth.users (id) select gen_random_uuid() from generate_series(1, 4000)"
    )
    home.execute("alter table auth.users enable trigger darkroom_create_entitlement")
    home.execute("update cells.cells set weight = 1")

    assert 2850 < home.value(elsewhere) - before < 3150


def test_the_feed_is_one_by_time_in_pages(users, databases, anybody):
    shares = []
    for _ in range(2):
        for cell, user in users.items():
            shares += shared(user, databases[cell])
    shares.sort(reverse=True)
    first = answer(anybody.rpc("list_public_images", "GET", page_size=3))
    second = answer(
        users["two"].rpc("list_public_images", page_size=3, before=first["next_before"])
    )

    assert [image["share_id"] for image in first["images"]] == shares[:3]
    assert [image["share_id"] for image in second["images"]] == shares[3:]
    assert second["next_before"] is None
    whole = answer(users["two"].rpc("list_public_images"))["images"]
    assert [image["is_own"] for image in whole] == [True, False, True, False]


@pytest.mark.parametrize("cell", CELLS)
def test_one_worker_makes_and_erases_pictures_of_all_cells_in_homes_storage(
    cells, sign_up, databases, anybody, cell
):
    user = sign_up(cell)
    name = f"{user.id}/source.png"
    assert user.upload(f"inputs/{name}", png()).status_code == 200
    job_id = user.enqueued(params={"image": name})
    with working(cells):
        until(lambda: answer(user.get_job_status(job_id))["poll_after_ms"] is None)
        job = answer(user.get_job_status(job_id))
        assert job["status"] == "completed", job["error"]
        path = "generations/" + job["images"][0]["path"]
        assert user.download(path).status_code == 200
        assert anybody.download(path).status_code == 400
        answer(user.rpc("share_image", job_id=job_id))
        until(lambda: anybody.download(path).status_code == 200)
        answer(user.rpc("share_image", job_id=job_id, is_public=False))
        until(lambda: anybody.download(path).status_code == 400)

    databases["home"].execute("delete from auth.users where id = %s", user.id)

    files = "select count(*) from storage.objects where name like %s"
    with working(cells):  # it erases when it starts, and then each minute
        until(lambda: databases["home"].value(files, f"{user.id}/%") == 0)


def test_a_source_image_that_is_not_there_is_refused_in_every_cell(users):
    for user in users.values():
        refused = refusal(user.enqueue(params={"image": f"{user.id}/none.png"}))
        assert refused.details == "params.image: no such file in bucket inputs"


def test_health_is_of_all_cells(users, operator):
    before = answer(operator.rpc("queue_health"))["depth"]["ready"]
    for user in users.values():
        user.enqueued()
        user.enqueued()

    assert answer(operator.rpc("queue_health"))["depth"]["ready"] == before + 4
    report = answer(operator.rpc("queue_report"))
    assert [model["ready"] for model in report["models"]] == [before + 4]


def test_operators_reach_users_wherever_they_live(users, operator):
    for user in users.values():
        given = {"user_id": user.id, "amount": 5, "kind": "grant", "external_id": user.id}
        for applied in (True, False):
            granted = answer(operator.rpc("grant_credits", **given))
            assert granted == {"credits": 15, "debt": 0, "applied": applied}
        assert user.credits() == 15


def test_what_home_says_of_models_and_webhooks_holds_in_every_cell(
    users, databases, operator, cells
):
    price = "update public.models set price_credits = %s where id = %s"
    databases["home"].execute(price, 3, PREVIEW)
    databases["home"].execute("update private.settings set webhook_allows_private = true")
    hook = answer(operator.rpc("register_webhook", url="http://127.0.0.1:9/hook"))
    found = "select secret from private.webhook_endpoints where id = %s"
    until(lambda: databases["two"].execute(found, hook["webhook_id"]) != [])
    until(
        lambda: (
            databases["two"].value("select price_credits from public.models where id = %s", PREVIEW)
            == 3
        )
    )
    for user in users.values():
        assert answer(user.enqueue())["credits_left"] == 7
    assert databases["two"].value(found, hook["webhook_id"]) == hook["secret"]
    databases["home"].execute(price, 1, PREVIEW)
    answer(operator.rpc("delete_webhook", webhook_id=hook["webhook_id"]))


# What all cells may run at a provider and spend, together.


@pytest.fixture
def crowds(sign_up, databases) -> Iterator[dict[str, SignedUp]]:
    """In each cell a user who may have many jobs, of 1 USD each; limits are divided by the test."""
    home = databases["home"]
    home.execute("update cron.job set active = false where jobname = 'darkroom_share_limits'")
    home.execute("update private.plans set max_active = 999, max_per_minute = 999")
    home.execute("update public.models set cost_usd = 1, cost_unit = 'image'")
    arrives(databases, "select bool_and(cost_usd = 1) from public.models")
    users = {cell: sign_up(cell) for cell in CELLS}
    for cell, user in users.items():
        given = "select public.grant_credits(%s, 999, 'grant', %s)"
        databases[cell].execute(given, user.id, user.id)
    yield users
    for user in users.values():
        home.execute("delete from auth.users where id = %s", user.id)
    home.execute("delete from private.budgets")
    home.execute("update private.providers set max_running = null where name = 'preview'")
    home.execute("update public.models set cost_usd = null, cost_unit = null")
    home.execute("update private.plans set max_active = 3, max_per_minute = 10")
    arrives(databases, "select bool_and(cost_usd is null) from public.models")
    arrives(databases, "select count(*) = 0 from private.budgets")


def arrives(databases: dict[str, Database], question: str) -> None:
    """Wait until home has sent it to the other cell."""
    until(lambda: databases["two"].value(question))


def cap(databases: dict[str, Database], at_once: int) -> None:
    """Limit the provider, as for the first time: all of it is home's."""
    databases["two"].execute("update private.providers set part = 0")
    databases["home"].execute("delete from cells.parts")
    query = "update private.providers set max_running = %s, part = null where name = 'preview'"
    databases["home"].execute(query, at_once)
    arrives(databases, "select max_running > 0 from private.providers where name = 'preview'")


def budget(databases: dict[str, Database], limit: int) -> None:
    databases["home"].execute(
        "insert into private.budgets (period, limit_usd, on_breach) values ('day', %s, 'pause')",
        limit,
    )
    arrives(databases, "select exists (select from private.budgets)")


def parts(databases: dict[str, Database]) -> dict[str, int]:
    """Divide, and return how many jobs of the provider each cell may have at once."""
    databases["home"].execute("call cells.share_limits()")
    query = "select cell, part::integer from cells.parts where name = 'provider preview'"
    return {row["cell"]: row["part"] for row in databases["home"].execute(query)}


def bought(databases: dict[str, Database]) -> dict[str, int]:
    query = "select (spent_usd + reserved_usd)::integer from private.budget_states"
    return {cell: databases[cell].value(query) for cell in CELLS}


def claimed(databases: dict[str, Database], cell: str) -> int:
    """Have all claimed that may be, and return how many."""
    worker = Worker(databases[cell])
    worker.let_the_next_claim_scan_all()
    return len(worker.claim_jobs(100))


@pytest.mark.parametrize(("limit", "most"), [(cap, 3), (budget, 20)])
def test_however_limits_are_divided_all_cells_together_never_pass_one(
    crowds, databases, limit, most
):
    limit(databases, most)
    for user in crowds.values():
        for _ in range(20):
            user.enqueued()
    parts(databases)
    lock, ending, running, done = threading.Lock(), threading.Event(), Counter(), Counter()
    seen = [0]

    def work(cell: str) -> None:
        worker = Worker(databases[cell])
        while not ending.is_set():
            jobs = worker.claim_jobs(2)
            with lock:
                running[cell] += len(jobs)
                seen.append(running.total() + (done.total() if limit is budget else 0))
            time.sleep(0.01)
            with lock:
                running[cell] -= len(jobs)
                done[cell] += len(jobs)
            for job in jobs:
                worker.complete_job(job)

    def divide() -> None:
        with psycopg.connect(databases["home"].url, autocommit=True) as connection:
            while not ending.is_set():
                connection.execute("call cells.share_limits()")

    threads = [threading.Thread(target=divide)]
    threads += [threading.Thread(target=work, args=[cell]) for cell in CELLS for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: done.total() >= (40 if limit is cap else most))
    time.sleep(0.3 if limit is budget else 0)
    ending.set()
    for thread in threads:
        thread.join()

    assert max(seen) <= most
    assert len(+done) == 2
    if limit is budget:
        assert sum(bought(databases).values()) == most


def test_a_part_follows_the_load_and_a_cell_that_is_away_keeps_its_own(cells, crowds, databases):
    cap(databases, 3)
    assert databases["home"].value("select cells.next_parts('two', 0.5)") == {}, "nobody has told"
    waiting = [crowds["home"].enqueued() for _ in range(9)]
    until(lambda: parts(databases) == {"home": 3, "two": 0})
    assert claimed(databases, "home") == 3
    for _ in range(9):
        crowds["two"].enqueued()

    assert parts(databases) == {"home": 3, "two": 0}, "who runs them still has them"
    assert claimed(databases, "two") == 0
    for job_id in waiting:
        crowds["home"].rpc("cancel_generation", job_id=job_id)
    databases["home"].execute("delete from private.running_jobs")
    until(lambda: parts(databases) == {"home": 0, "two": 3})
    assert claimed(databases, "two") == 3

    address = "host=127.0.0.1 port=1 user=nobody password=none"
    databases["home"].execute("insert into cells.cells values ('three', %s, 0)", address)
    assert parts(databases) == {"home": 0, "two": 3}, "who never answered has nothing"

    kill(cells, "two")
    try:
        crowds["home"].enqueued()
        assert refusal(crowds["two"].enqueue()) == UNAVAILABLE
        for _ in range(3):
            assert parts(databases) == {"home": 0, "two": 3}
        assert claimed(databases, "home") == 0
        databases["home"].execute(
            "update private.providers set max_running = 5 where name = 'preview'"
        )
        assert parts(databases) == {"home": 2, "two": 3}, "what it leaves is for the others"
        assert claimed(databases, "home") == 1
    finally:
        databases["home"].execute("delete from cells.cells where name = 'three'")
        databases["two"].close()
        databases["two"]._own = None
        cells.clusters["two"].start()
    until(lambda: parts(databases) == {"home": 1, "two": 4})


def test_what_a_cell_may_have_is_on_record_before_the_cell_is_told(crowds, databases):
    cap(databases, 3)
    for _ in range(9):
        crowds["two"].enqueued()
    own = "select part from private.providers where name = 'preview'"
    record = "select part >= 2 from cells.parts where (cell, name) = ('two', 'provider preview')"
    with psycopg.connect(databases["two"].url) as holder:
        holder.execute(own + " for update")
        thread = threading.Thread(target=parts, args=[databases])
        thread.start()
        with psycopg.connect(databases["home"].url, autocommit=True) as home:
            until(lambda: home.execute(record).fetchone() == (True,))
        assert databases["two"].value(own) == 0
    thread.join()
    assert databases["two"].value(own) >= 2


def test_what_a_cell_has_spent_is_gone_and_the_rest_is_spent_where_it_is_asked_for(
    crowds, databases, operator
):
    home = databases["home"]
    budget(databases, 10)
    for _ in range(6):
        crowds["home"].enqueued()
    assert claimed(databases, "home") == 6, "all of it is home's until it is divided"
    for _ in range(9):
        crowds["two"].enqueued()
        crowds["home"].enqueued()
    assert claimed(databases, "two") == 0

    for _ in range(9):
        home.execute("call cells.share_limits()")
        claimed(databases, "two")
    assert bought(databases) == {"home": 6, "two": 4}
    home.execute("update private.budgets set on_breach = 'refuse'")
    assert refusal(crowds["home"].enqueue()).message == "budget_spent"
    (told,) = answer(operator.rpc("queue_health"))["budgets"]
    spent = told["spent_usd"] + told["reserved_usd"]
    assert (told["limit_usd"], spent) == (10, 10)
    assert told["used"] >= 1, "of its part, which may be less than it has spent"

    home.execute("update private.budgets set limit_usd = 12")
    arrives(databases, "select bool_and(limit_usd = 12) from private.budgets")
    for _ in range(9):
        home.execute("call cells.share_limits()")
        claimed(databases, "two")
    assert bought(databases) == {"home": 6, "two": 6}
    home.execute("update private.budgets set limit_usd = 0")
    arrives(databases, "select bool_and(limit_usd = 0) from private.budgets")
    assert [claimed(databases, cell) for cell in CELLS] == [0, 0]


def test_each_cell_is_sent_all_that_operators_set_and_nothing_it_finds_out_itself(databases):
    unsent = databases["home"].execute(
        "select c.table_name || '.' || c.column_name as name"
        " from information_schema.columns as c inner join pg_publication_tables as p"
        " on (p.schemaname, p.tablename) = (c.table_schema, c.table_name)"
        " where p.pubname = 'darkroom_catalogue' and c.column_name <> all (p.attnames) order by 1"
    )
    assert [row["name"] for row in unsent] == [
        "budgets.part_usd",
        "budgets.spent_until",
        "plans.looked_at",
        "plans.oldest_ready_at",
        "providers.part",
    ]


# Moving.


def moved(databases: dict[str, Database], user: SignedUp, cell: str) -> None:
    """Move a user, waiting for what runs."""

    def done() -> bool:
        return databases["home"].value("call cells.move_user(%s, %s)", user.id, cell) == "moved"

    until(done)


def seen(user: SignedUp) -> list[Any]:
    """Return all that a user sees of what is theirs, but for guesses."""
    calls = ("list_generations", "list_active_jobs", "get_entitlement", "list_prompt_templates")
    answers = [answer(user.rpc(function)) for function in calls]
    for job in (*answers[0]["generations"], *answers[1]):
        job["eta_seconds"] = job["queue_position"] = job["poll_after_ms"] = None
    return [*answers, user.ledger(), answer(user.rest("GET", "images?order=generation_id"))]


def test_a_user_who_is_moved_has_all_that_was_there_and_goes_on(
    sign_up, databases, operator, anybody
):
    user, other = sign_up("home"), sign_up("two")
    shared(user, databases["home"])
    given = {"user_id": user.id, "kind": "grant", "expires_at": "2100-01-01"}
    answer(operator.rpc("grant_credits", **given, amount=5, external_id=f"a{user.id}"))
    waiting = [user.enqueued(idempotency_key="one"), user.enqueued(params={"seed": 3})]
    answer(user.rpc("set_tags", job_id=waiting[0], tags=["b"]))
    answer(user.rpc("save_prompt_template", title="t", prompt="p {x}"))
    before = seen(user)

    for cell in ("two", "home", "two"):
        moved(databases, user, cell)

        assert where(databases, user) == [cell]
        assert seen(user) == before
        feed = answer(anybody.rpc("list_public_images"))["images"]
        assert len([each for each in feed if user.id in each["path"]]) == 1
        assert user.enqueued(idempotency_key="one") == waiting[0]
        for database in CELLS:
            assert_books_balance(databases[database])
    answer(operator.rpc("grant_credits", **given, amount=5, external_id=f"b{user.id}"))
    other.enqueued()
    worker = Worker(databases["two"])
    for job in worker.claim_jobs(100):
        worker.complete_job(job)
    worker.unregister_worker()
    assert [answer(user.get_job_status(job))["status"] for job in waiting] == ["completed"] * 2
    assert_books_balance(databases["two"])


def test_a_user_whose_job_runs_is_not_moved(sign_up, databases):
    user = sign_up("home")
    job_id, worker = user.enqueued(), Worker(databases["home"])
    (job,) = [each for each in worker.claim_jobs(100) if each.id == job_id]
    call = "call cells.move_user(%s, 'two')"

    assert databases["home"].value(call, user.id) == "running"
    assert answer(user.get_job_status(job_id))["status"] == "processing"
    worker.complete_job(job)
    worker.unregister_worker()
    assert databases["home"].value(call, user.id) == "moved"
    assert answer(user.get_job_status(job_id))["status"] == "completed"


def test_a_move_that_breaks_off_anywhere_is_finished_by_the_next_and_nothing_is_done_twice(
    cells, sign_up, databases
):
    home = databases["home"]
    for step in ("unpack_user", "leave_user"):
        user = sign_up("home")
        user.enqueued(idempotency_key="one")
        before = seen(user)
        broken = f"alter function cells.{step} rename to broken"
        databases["two" if step == "unpack_user" else "home"].execute(broken)
        with pytest.raises(psycopg.Error):
            home.execute("call cells.move_user(%s, 'two')", user.id)
        if step == "unpack_user":
            assert refusal(user.enqueue()) == UNAVAILABLE
        whole = f"alter function cells.broken rename to {step}"
        databases["two" if step == "unpack_user" else "home"].execute(whole)

        moved(databases, user, "two")

        assert seen(user) == before
        assert where(databases, user) == ["two"]
        for cell in CELLS:
            assert_books_balance(databases[cell])


def test_a_user_who_never_stops_asking_is_moved_to_and_fro_and_charged_once_for_each(
    sign_up, databases
):
    user, asked, ending = sign_up("home"), Counter(), threading.Event()
    home = databases["home"]
    home.execute(
        "update private.plans set max_active = 100000, max_per_minute = 100000 where name = 'free'"
    )
    until(
        lambda: (
            databases["two"].value("select max_active from private.plans where name = 'free'") > 9
        )
    )
    home.execute("select public.grant_credits(%s, 10000, 'grant', %s)", user.id, user.id)

    def ask() -> None:
        while not ending.is_set():
            asked[user.enqueue().status_code] += 1

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for cell in ["two", "home"] * 5:
        moved(databases, user, cell)
    ending.set()
    for thread in threads:
        thread.join()

    assert asked.keys() <= {200, 503} and asked[200] > 20
    jobs = home.value("select count(*) from public.generations where user_id = %s", user.id)
    waiting = home.value("select count(*) from private.ready_jobs where user_id = %s", user.id)
    assert (jobs, waiting) == (asked[200], asked[200])
    assert user.credits() == 10010 - asked[200]
    for cell in CELLS:
        assert_books_balance(databases[cell])
    home.execute("update private.plans set max_active = 3, max_per_minute = 10 where name = 'free'")
