"""Moving users between three cells: whole, once, whatever breaks off; and what goes round it."""

# ruff: noqa: F401, F811

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from actors import User, Worker
from database import Database, assert_books_balance
from http_client import PREVIEW, SignedUp, answer, refusal
from test_cells import (
    UNAVAILABLE,
    anybody,
    cells,
    databases,
    endpoints,
    kill,
    moved,
    operator,
    seen,
    shared,
    sign_up,
    until,
)
from test_cells_script import gone, other

from cells import CellStack

EVERY = ("home", "two", "three")
MEND = "alter function cells.broken rename to unpack_user"
PLACE = "select coalesce((select cell from cells.users where user_id = %s), 'home')"


@pytest.fixture(scope="module", autouse=True)
def three(cells: CellStack, databases: dict[str, Database]) -> Iterator[Database]:
    """A third cell, which takes no new users."""
    cluster = other(cells, "three")
    cells.script("add", "three", cells.owner_of("three"), "0")
    databases["three"] = Database(cluster.url(), "three")
    yield databases["three"]
    databases.pop("three").close()
    gone(cells, "three")


@pytest.fixture
def user(sign_up) -> SignedUp:
    return sign_up("home")


def places(databases: dict[str, Database], user_id: str) -> list[str]:
    """Return the cells that have a user, in any way."""
    query = (
        "select (select count(*) from public.entitlements where user_id = %s)"
        " + (select count(*) from public.generations where user_id = %s)"
        " + (select count(*) from public.credit_ledger where user_id = %s)"
        " + (select count(*) from private.ready_jobs where user_id = %s)"
    )
    return [cell for cell in EVERY if databases[cell].value(query, *[user_id] * 4)]


def sees(user: SignedUp) -> list[Any]:
    """Return what a user sees after a crash: each connection to the cell fails once."""
    for _ in range(50):
        with contextlib.suppress(AssertionError):
            return seen(user)
        time.sleep(0.1)
    return seen(user)


def settled(databases: dict[str, Database], user_id: str, cell: str) -> None:
    """Assert that a user is in one cell, whole, and that the directory says so."""
    assert places(databases, user_id) == [cell]
    assert databases["home"].value(PLACE, user_id) == cell
    for name in EVERY:
        assert databases[name].value("select count(*) from cells.moves") == 0, name
        assert_books_balance(databases[name])


def retention(databases: dict[str, Database], *names: str) -> None:
    for name in names or EVERY:
        databases[name].execute("select private.apply_retention()")


@pytest.fixture(autouse=True)
def mended(databases: dict[str, Database]) -> Iterator[None]:
    yield
    for name in EVERY:
        if databases[name].value("select to_regproc('cells.broken') is not null"):
            databases[name].execute(MEND)


def packed(databases: dict[str, Database], user: SignedUp, cell: str, target: str) -> None:
    """Have a move to a cell break off before the user has come there, until that cell is mended."""
    databases[target].execute("alter function cells.unpack_user rename to broken")
    with pytest.raises(psycopg.Error):
        databases["home"].execute("call cells.move_user(%s, %s)", user.id, target)
    assert databases[cell].value("select count(*) from cells.moves") == 1


def as_old(databases: dict[str, Database]) -> None:
    for name in EVERY:
        databases[name].execute("update cells.moves set packed_at = now() - interval '2 minutes'")


def crash(cells: CellStack, databases: dict[str, Database], cell: str) -> None:
    """Have a cell lose its power, and start again."""
    kill(cells, cell)
    databases[cell].close()
    databases[cell]._own = None
    cells.clusters[cell].start()


def is_moved(url: str, user_id: str, target: str) -> bool:
    """Move a user, and say whether that was done."""
    try:
        with psycopg.connect(url, autocommit=True) as home:
            return home.execute("call cells.move_user(%s, %s)", [user_id, target]).fetchone() == (
                "moved",
            )
    except psycopg.Error:
        return False


# Whole.


def test_a_user_goes_from_cell_to_cell_with_all_there_is_and_who_was_merged(
    user, sign_up, databases, operator, anybody
):
    guest, home = sign_up("home"), databases["home"]
    (share,) = [shared(guest, home), shared(user, home)][1]
    path = home.value("select storage_path from public.images where share_id = %s", share)
    home.execute("insert into storage.objects (bucket_id, name) values ('generations', %s)", path)
    both = {"from_user_id": guest.id, "to_user_id": user.id, "allow_permanent": True}
    answer(operator.rpc("merge_user", **both))
    given = {"user_id": user.id, "kind": "grant", "expires_at": "2100-01-01"}
    answer(operator.rpc("grant_credits", **given, amount=5, external_id=f"a{user.id}"))
    token = f"ExponentPushToken[{uuid.uuid4().hex}]"
    answer(user.rpc("register_push_token", token=token))
    waiting = user.enqueued(idempotency_key="one", params={"seed": 3})
    answer(user.rpc("set_tags", job_id=waiting, tags=["b"]))

    def exported() -> Any:
        told = answer(operator.rpc("export_user", user_id=user.id))
        for row in told["tables"]["entitlements"]:
            del row[
                "last_fair_key"
            ]  # a place in the queue is as far from the cell's present as it was
        return told

    before, all_of_it = seen(user), exported()

    def is_everybodys() -> bool:
        with psycopg.connect(home.url) as connection:
            connection.execute("set local role anon")
            found = connection.execute("select 1 from storage.objects where name = %s", [path])
            return found.fetchone() is not None

    def is_known_at_home() -> bool:
        return home.value("select private.owner_of(%s)::text", guest.id) == user.id

    for cell in ("two", "three", "two", "three", "home", "three"):
        moved(databases, user, cell)

        settled(databases, user.id, cell)
        assert places(databases, guest.id) == [cell], "who was merged is taken along"
        assert seen(user) == before
        assert exported() == all_of_it
        assert user.enqueued(idempotency_key="one", params={"seed": 3}) == waiting
        assert databases[cell].value("select count(*) from private.push_tokens") == 1
        assert refusal(guest.enqueue()).message == "account_blocked"
        until(is_everybodys)
        assert is_known_at_home()
        feed = answer(anybody.rpc("list_public_images"))["images"]
        assert [each["path"] for each in feed].count(path) == 1
    home.execute("delete from auth.users where id = any (%s)", [user.id, guest.id])
    for user_id in (user.id, guest.id):
        assert places(databases, user_id) == []
        assert home.execute("select from cells.users where user_id = %s", user_id) == []


def test_a_device_that_another_user_of_the_cell_has_by_now_stays_the_others(
    user, sign_up, databases
):
    other, token = sign_up("two"), f"ExponentPushToken[{uuid.uuid4().hex}]"
    for each in (user, other):
        answer(each.rpc("register_push_token", token=token))

    moved(databases, user, "two")

    owner = "select user_id::text from private.push_tokens where token = %s"
    assert databases["two"].value(owner, token) == other.id


# What rows of users stay where they are, or go by themselves; all others are moved.
STAYS = {
    "private.breakers": "of a model; its probe is a job that runs",
    "private.budgets": "home's to say, and sent to all",
    "private.running_jobs": "nobody is moved while a job runs",
    "private.model_stats": "of a model",
    "private.skipped_rows": "of the cell",
}


def test_of_each_table_with_rows_of_users_it_is_said_whether_they_are_moved(databases):
    rows = databases["home"].execute(
        "select distinct format('%s.%s', c.relnamespace::regnamespace, c.relname) as name"
        " from pg_class as c inner join pg_attribute as a on a.attrelid = c.oid"
        " where c.relnamespace in ('public'::regnamespace, 'private'::regnamespace)"
        " and c.relkind in ('r', 'p') and not c.relispartition and not a.attisdropped and a.attname"
        " in ('user_id', 'into_id', 'generation_id', 'job_id', 'source_id', 'retry_of', 'batch_id')"
    )
    told = databases["home"].execute(
        "select format('%s.%s', c.relnamespace::regnamespace, c.relname) as name"
        " from cells.moved_tables as m inner join pg_class as c on c.oid = m.name"
    )

    assert {row["name"] for row in rows} - set(STAYS) == {row["name"] for row in told}


# While they are on their way.


def test_who_is_packed_is_in_no_cell_and_nothing_that_comes_round_the_entry_is_lost(
    user, databases, operator
):
    job_id, before = user.enqueued(), seen(user)
    home = databases["home"]
    packed(databases, user, "home", "two")
    direct = User(home, user.id)

    assert places(databases, user.id) == []
    refused = [
        lambda: direct.enqueue_generation(model="preview", prompt="x"),
        lambda: direct.cancel_generation(job_id),
        lambda: home.execute("select public.grant_credits(%s, 5, 'grant', 'x')", user.id),
        lambda: home.execute("select public.set_paid(%s, 'infinity', now(), 'x')", user.id),
    ]
    for call in refused:
        with pytest.raises(psycopg.errors.Error, match=r"not_authenticated|not_found"):
            call()
    home.execute("update auth.users set updated_at = now() where id = %s", user.id)  # signs in
    assert [refusal(user.enqueue()), refusal(user.get_job_status(job_id))] == [UNAVAILABLE] * 2
    given = {"user_id": user.id, "amount": 5, "kind": "grant", "external_id": "x"}
    assert refusal(operator.rpc("grant_credits", **given)) == UNAVAILABLE

    databases["two"].execute(MEND)
    moved(databases, user, "two")

    settled(databases, user.id, "two")
    assert seen(user) == before
    retention(databases)
    assert home.execute("select from private.skipped_rows where key = %s", user.id) == []


def test_a_call_that_has_looked_where_the_user_lives_is_waited_for(user, databases):
    home = databases["home"]
    mover = threading.Thread(target=is_moved, args=[home.url, user.id, "two"])
    claims = json.dumps({"sub": user.id, "role": "authenticated"})
    look = "select cells.answer(%s, 'authenticated', %s, 'POST', false, 'select null::json', '{}')"
    waits = "select count(*) from pg_stat_activity where wait_event = 'advisory' and query ~ 'pack'"
    with psycopg.connect(home.url) as call:
        call.execute(look, [user.id, claims])
        mover.start()
        until(lambda: home.value(waits) == 1)
        call.execute("select public.enqueue_generation(%s, 'a harbour')", [PREVIEW])
    mover.join()

    settled(databases, user.id, "two")
    assert user.credits() == 9
    assert len(answer(user.rpc("list_active_jobs"))) == 1


@pytest.mark.parametrize("target", ["two", "home"])
def test_who_is_deleted_on_the_way_is_erased_in_the_cell_where_the_way_ends(
    user, databases, target
):
    source = "home" if target == "two" else "three"
    moved(databases, user, source)
    shared(user, databases[source])
    packed(databases, user, source, target)
    databases["home"].execute("delete from auth.users where id = %s", user.id)
    databases[target].execute(MEND)
    as_old(databases)

    for _ in range(3):  # one part of the move each, and then what Auth said
        retention(databases)

    assert places(databases, user.id) == []
    for name in EVERY:
        assert databases[name].value("select count(*) from cells.moves") == 0
    assert databases["home"].execute("select from cells.users where user_id = %s", user.id) == []
    files = "select count(*) from private.expired_files where user_id = %s"
    assert databases[target].value(files, user.id) > 0, "the files are marked, for its worker"
    assert databases["home"].execute("select from private.skipped_rows") == []


def test_who_is_banned_on_the_way_is_blocked_in_the_new_cell(user, databases):
    packed(databases, user, "home", "two")
    databases["home"].execute(
        "update auth.users set banned_until = now() + interval '1 day' where id = %s", user.id
    )
    databases["two"].execute(MEND)

    moved(databases, user, "two")

    assert refusal(user.enqueue()).message == "account_blocked"
    retention(databases)
    settled(databases, user.id, "two")


def test_a_move_that_nobody_finishes_is_finished_by_retention(user, databases):
    moved(databases, user, "three")
    user.enqueued()
    before = seen(user)
    packed(databases, user, "three", "two")
    retention(databases)
    assert places(databases, user.id) == [], "whoever began it may still be at it"
    databases["two"].execute(MEND)
    as_old(databases)

    retention(databases, "home")
    assert seen(user) == before, "is there already"
    retention(databases, "home")

    settled(databases, user.id, "two")
    assert seen(user) == before


def test_what_an_earlier_move_has_left_is_never_taken_for_a_later_one(user, databases):
    home = databases["home"]
    home.execute("alter function cells.leave_user rename to stays")
    with pytest.raises(psycopg.Error):
        home.execute("call cells.move_user(%s, 'two')", user.id)
    home.execute("alter function cells.stays rename to leave_user")
    assert home.value("select count(*) from cells.moves") == 1
    job_id = user.enqueued()

    moved(databases, user, "home")
    moved(databases, user, "two")

    settled(databases, user.id, "two")
    assert [job["job_id"] for job in answer(user.rpc("list_active_jobs"))] == [job_id]


def test_who_cannot_come_to_a_cell_that_is_lost_is_taken_back(user, databases):
    moved(databases, user, "two")
    user.enqueued()
    before = seen(user)
    packed(databases, user, "two", "three")
    databases["three"].execute(MEND)
    two = databases["two"]
    two.execute("select cells.unpack_user(package) from cells.moves where user_id = %s", user.id)

    settled(databases, user.id, "two")
    assert seen(user) == before


def test_a_mover_waits_as_long_as_it_is_told_for_what_runs(user, databases):
    user.enqueued()
    worker, home = Worker(databases["home"]), databases["home"]
    (job,) = [each for each in worker.claim_jobs(100) if str(each.user_id) == user.id]
    call = "call cells.move_user(%s, 'two', p_wait => %s)"
    assert home.value(call, user.id, "0.1s") == "running"
    ending = threading.Timer(1, lambda: worker.complete_job(job))
    ending.start()

    with psycopg.connect(home.url, autocommit=True) as connection:
        state = connection.execute(call, [user.id, "1 min"]).fetchone()

    assert state == ("moved",)
    worker.unregister_worker()
    settled(databases, user.id, "two")


def test_of_two_movers_at_once_to_two_cells_both_are_done_one_after_the_other(user, databases):
    user.enqueued()
    before, failed = seen(user), []

    def move(target: str) -> None:
        with psycopg.connect(databases["home"].url, autocommit=True) as connection:
            for _ in range(5):
                try:
                    connection.execute("call cells.move_user(%s, %s)", [user.id, target])
                except psycopg.Error as error:
                    failed.append(str(error))

    threads = [threading.Thread(target=move, args=[cell]) for cell in EVERY for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    as_old(databases)
    retention(databases, "home", "home")

    settled(databases, user.id, databases["home"].value(PLACE, user.id))
    assert seen(user) == before
    assert not [error for error in failed if "on the way" not in error]


# Files.


def test_each_cell_looks_for_left_files_of_its_users_and_home_for_those_of_nobody(
    sign_up, databases, operator, cells
):
    home, left, wanted = databases["home"], {}, []
    users = {"home": sign_up("home"), "two": sign_up("two"), "three": sign_up("two")}
    guest = sign_up("two")
    moved(databases, users["three"], "three")
    shared(guest, databases["two"])
    both = {"from_user_id": guest.id, "to_user_id": users["two"].id, "allow_permanent": True}
    answer(operator.rpc("merge_user", **both))
    home.execute("delete from auth.users where id = %s", guest.id)
    for cell, user in users.items():
        shared(user, databases[cell])
        paths = databases[cell].execute(
            "select storage_path from public.images where user_id = %s", user.id
        )
        wanted += [row["storage_path"] for row in paths]
        left[cell] = [f"{user.id}/{uuid.uuid4()}/0.png"]
    left["two"].append(f"{guest.id}/{uuid.uuid4()}/0.png")
    left["home"].append(f"{uuid.uuid4()}/{uuid.uuid4()}/0.png")
    # Even if home has not heard of the merge.
    home.execute("delete from private.merged_users where user_id = %s", guest.id)
    assert len([path for path in wanted if path.startswith(guest.id)]) == 1
    for path in [*wanted, *(path for paths in left.values() for path in paths)]:
        home.execute(
            "insert into storage.objects (bucket_id, name, created_at, updated_at)"
            " values ('generations', %s, now() - interval '2 days', now() - interval '2 days')"
            " on conflict do nothing",
            path,
        )
    for name in EVERY:
        databases[name].execute("delete from private.expired_files")
        databases[name].execute("update private.retention_walks set place = default")

    for name in EVERY:
        databases[name].execute("select private.apply_retention(10000)")

    for name in EVERY:
        rows = databases[name].execute("select path from private.expired_files")
        assert {row["path"] for row in rows} == set(left[name]), name

    kill(cells, "three")
    try:
        nobodys = f"{uuid.uuid4()}/{uuid.uuid4()}/0.png"
        home.execute(
            "insert into storage.objects (bucket_id, name, created_at, updated_at)"
            " values ('generations', %s, now() - interval '2 days', now() - interval '2 days')",
            nobodys,
        )
        retention(databases, "home")
        marked = "select count(*) from private.expired_files where path = %s"
        assert home.value(marked, nobodys) == 0, "it could be the other cell's"
    finally:
        databases["three"].close()
        databases["three"]._own = None
        cells.clusters["three"].start()
    retention(databases, "home")
    assert home.value(marked, nobodys) == 1
    home.execute("delete from private.skipped_rows")


# Power.


def test_who_signed_up_while_the_cell_was_away_may_be_moved_at_once(cells, sign_up, databases):
    kill(cells, "two")
    try:
        user = sign_up("two")
    finally:
        databases["two"].close()
        databases["two"]._own = None
        cells.clusters["two"].start()

    moved(databases, user, "three")

    settled(databases, user.id, "three")
    assert sees(user)[2]["credits"] == 10


def test_nobody_is_packed_for_a_cell_that_is_away_or_not_there(cells, user, databases):
    kill(cells, "three")
    try:
        for target in ("three", "nowhere"):
            with pytest.raises(psycopg.Error, match=r"could not establish connection|no such cell"):
                databases["home"].execute("call cells.move_user(%s, %s)", user.id, target)
            assert user.credits() == 10
    finally:
        databases["three"].close()
        databases["three"]._own = None
        cells.clusters["three"].start()


def test_whatever_is_killed_while_a_user_moves_nothing_is_lost_or_doubled(cells, user, databases):
    until(lambda: user.enqueue(idempotency_key="one").status_code == 200)
    before, chance = sees(user), random.Random(7)
    for round in range(9):
        target = EVERY[(round + 1) % 3]
        mover = threading.Thread(target=is_moved, args=[databases["home"].url, user.id, target])
        mover.start()
        time.sleep(chance.uniform(0, 0.15))
        crash(cells, databases, chance.choice(EVERY))
        mover.join()

        until(lambda target=target: is_moved(databases["home"].url, user.id, target))
        as_old(databases)
        retention(databases, "home")
        settled(databases, user.id, target)
        # Tables are read where the entry's copy of the directory says: it may be late.
        until(lambda: user.rpc("get_entitlement").status_code == 200 and user.ledger() != [])
        assert sees(user) == before
