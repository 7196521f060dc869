"""deploy/cells/cells: what a DBA calls to make, add and remove cells, and after a release."""

# ruff: noqa: F401, F811, PLR0913, PLR0917

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from actors import Worker
from database import PROJECT, Database, assert_books_balance
from http_client import SignedUp, answer
from test_cells import (
    anybody,
    cells,
    databases,
    endpoints,
    killed,
    moved,
    operator,
    shared,
    sign_up,
    until,
    users,
)

import migrate
from cells import LOGICAL, SCRIPT, CellStack
from processes import StackError
from stack import Cluster, PostgREST, Settings

OBJECTS = """
select array_agg(l order by l) from (
  select subname || subconninfo as l from pg_subscription
  union all select slot_name from pg_replication_slots
  union all select rolname || coalesce(rolconfig::text, '')
    from pg_roles where rolname like 'darkroom%'
  union all select relname || relnamespace::regnamespace from pg_class where relnamespace
    in ('cells'::regnamespace, 'public'::regnamespace, 'private'::regnamespace)
  union all select p.oid::regprocedure || coalesce(p.proacl::text, '') from pg_proc as p
    where pronamespace in ('cells'::regnamespace, 'public'::regnamespace)
  union all select tgrelid::regclass || tgname || tgenabled::text from pg_trigger
    where not tgisinternal
  union all select polrelid::regclass || polname from pg_policy
  union all select pubname || tablename from pg_publication_tables
  union all select evtname from pg_event_trigger
) as made (l)
"""


def other(stack: CellStack, name: str, **settings: str) -> Cluster:
    """Start one more empty cluster."""
    folder = stack.folder / name
    cluster = Cluster(folder, Settings(folder / "env"), fsync=False, tuning=LOGICAL | settings)
    stack.clusters[name] = cluster
    stack.start_other(name)
    return cluster


def gone(stack: CellStack, name: str) -> None:
    cluster = stack.clusters.pop(name)
    cluster.stop()
    cluster.delete()


def refused(stack: CellStack, *command: str) -> str:
    with pytest.raises(StackError) as error:
        stack.script(*command)
    return str(error.value)


def made(databases: dict[str, Database]) -> dict[str, Any]:
    """Return what the script makes, but for passwords of replication, which are always new."""
    found = {name: databases[name].value(OBJECTS) for name in ("home", "two", "entry")}
    masked = {
        name: [re.sub("password=[0-9a-f]{48}", "", line) for line in lines]
        for name, lines in found.items()
    }
    return masked | {"cells": databases["home"].execute("table cells.cells order by name")}


def test_every_step_may_be_repeated_and_changes_nothing(cells, users, databases):
    before = made(databases)
    jobs = {cell: user.enqueued() for cell, user in users.items()}

    cells.script("home")
    cells.script("add", "two", cells.owner_of("two"))
    cells.script("entry", cells.owner_of("entry"))
    cells.script("refresh")

    assert made(databases) == before
    for cell, user in users.items():
        assert answer(user.get_job_status(jobs[cell]))["status"] == "queued"
        assert answer(user.rest("GET", "generations?select=id")) == [{"id": jobs[cell]}]


def test_a_cell_is_as_if_migrated_and_has_nothing_to_migrate(cells, databases):
    for name in ("home", "two"):
        target, migrations = migrate.Target(databases[name].connect()), migrate.read_migrations()
        assert (migrate.plan(target, migrations), target.wants_seed()) == ([], False)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["add", "Two", "{two}"], "NAME: Two: not small letters"),
        (["add", "public", "{two}"], "NAME: public: not small letters"),
        (["add", "three", "{two}", "many"], "WEIGHT: many: not a number"),
        (["add", "three", "postgresql://127.0.0.1:1/x"], "CELL_URL: cannot connect"),
        (["add", "three", "{entry}"], "CELL_URL: that is home or an entry"),
        (["add", "three", "{home}"], "CELL_URL: that is home or an entry"),
        (["entry", "{two}"], "ENTRY_URL: not empty"),
        (["remove", "three"], "NAME: no such cell or entry"),
        (["remove", "two", "two"], "TO: no such cell"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_done(cells, databases, command, says):
    before = made(databases)
    urls = {name: cells.owner_of(name) for name in ("home", "two", "entry")}

    assert f"cells: {says}" in refused(cells, *(word.format(**urls) for word in command))

    assert made(databases) == before


@pytest.mark.parametrize(
    ("words", "home", "says", "code"),
    [
        (["home"], "", "HOME_URL: missing", 1),
        ([], "x", "HOME_URL=… deploy/cells/cells home ", 2),
        (["add", "two"], "x", "HOME_URL=… deploy/cells/cells add NAME CELL_URL", 2),
    ],
)
def test_it_says_how_it_is_called(words, home, says, code):
    done = subprocess.run(
        [SCRIPT, *words],
        env=os.environ | {"HOME_URL": home},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code and says in done.stderr


def test_home_needs_darkroom_and_logical_replication(cells, db):
    url, _, _ = db.url.rpartition("/")
    for where, says in ((f"{url}/template1", "no Darkroom there"), (db.url, "wal_level is not")):
        done = subprocess.run(
            [SCRIPT, "home"],
            env=os.environ | {"HOME_URL": where},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1 and f"cells: HOME_URL: {says}" in done.stderr


def test_who_calls_the_api_reads_no_address_and_no_password(databases):
    readable = (
        "select r.name, t.name from unnest('{anon,authenticated,service_role,darkroom_monitor,"
        "darkroom_worker,public}'::text[]) as r (name),"
        " unnest('{cells.cells,cells.databases,pg_subscription}'::text[]) as t (name)"
        " where to_regclass(t.name) is not null and r.name <> 'public' and to_regrole(r.name) is"
        " not null and (has_any_column_privilege(r.name, t.name, 'select') and t.name like 'cells%'"
        "  or t.name = 'pg_subscription' and has_column_privilege(r.name, t.name, 'subconninfo',"
        "  'select'))"
    )
    seen = "select umoptions from pg_user_mappings"
    for name in ("home", "two", "entry"):
        assert databases[name].execute(readable) == []
        for role in ("service_role", "darkroom_entry"):
            stranger = databases[name].connect()
            stranger.execute(f"set role {role}")
            assert {options for (options,) in stranger.execute(seen)} <= {None}
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                stranger.execute("table cells.cells")


def test_roles_that_databases_use_among_each_other_have_no_more_rights_than_they_need(databases):
    roles = (
        "select array_agg(r.of order by r.of) from (select rolname"
        " || case when rolsuper or rolcreaterole or rolcreatedb then ' !'"
        " else '' end || case when rolreplication then ' replication' else '' end as of"
        " from pg_roles where rolcanlogin and rolname ~ '_(entry|catalogue|files|directory)') as r"
    )
    tables = (
        "select count(*) from information_schema.role_table_grants"
        " where grantee = 'darkroom_directory_entry1' and (table_schema, table_name) not in"
        " (('cells', 'cells'), ('cells', 'users'))"
    )
    assert databases["home"].value(roles) == [
        "darkroom_catalogue_two replication",
        "darkroom_directory_entry1 replication",
        "darkroom_entry",
    ]
    assert databases["two"].value(roles) == ["darkroom_entry", "darkroom_files_two replication"]
    assert databases["home"].value(tables) == 0


def test_calls_go_through_a_pooler_where_a_cell_has_one(databases, users):
    home, two, user = databases["home"], databases["two"], users["two"]
    home.execute(
        "update cells.cells set pooler = address || ' application_name=pooler' where name = 'two'"
    )
    pooled = "select exists (select from pg_stat_activity where application_name = 'pooler')"
    until(lambda: bool(user.enqueue()) and two.value(pooled))
    assert len(user.rest("GET", "generations?limit=1").json()) == 1
    home.execute("update cells.cells set pooler = null")


@pytest.fixture(scope="module")
def three(cells, databases) -> Iterator[Database]:
    """An empty database, which logs whatever changes something."""
    cluster = other(cells, "three", log_statement="mod")
    databases["three"] = Database(cluster.url(), "three")
    yield databases["three"]
    databases.pop("three").close()
    gone(cells, "three")


@pytest.fixture
def cell_three(cells, three) -> Database:
    """The same as a cell, whichever test is the first."""
    cells.script("add", "three", cells.owner_of("three"))
    return three


def test_a_cell_is_added_while_users_go_on(
    cells, endpoints, databases, three, sign_up, anybody, tmp_path, monkeypatch
):
    users = {cell: sign_up(cell) for cell in ("home", "two")}
    for cell, user in users.items():
        databases[cell].execute(
            "update private.plans set max_active = 10000, max_per_minute = 10000"
        )
        databases[cell].execute("select public.grant_credits(%s, 5000, 'grant', 'x')", user.id)
    asked: Counter[tuple[str, int]] = Counter()
    ending = threading.Event()

    def ask(cell: str, user: SignedUp) -> None:
        while not ending.is_set():
            asked[cell, user.enqueue().status_code] += 1
            asked[cell, user.rest("GET", "generations?limit=1").status_code] += 1

    threads = [threading.Thread(target=ask, args=pair) for pair in users.items()]
    for thread in threads:
        thread.start()
    (tmp_path / "psql").write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/seen\nexec {shutil.which("psql")} "$@"\n'
    )
    (tmp_path / "psql").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    password = cells.clusters["three"].settings.secret("POSTGRES_PASSWORD")
    url = cells.owner_of("three").replace("postgres@", f"postgres:{password}@")
    try:
        said = cells.script("add", "three", url, "2")
    finally:
        ending.set()
        for thread in threads:
            thread.join()

    assert {status for _, status in asked} <= {200, 206, 429} and min(asked.values()) > 20, asked
    assert "three: takes new users by weight 2" in said
    user = sign_up("three")
    places = shared(user, three)
    assert three.value("select count(*) from public.entitlements") == 1
    for cell in users:
        places += shared(sign_up(cell), databases[cell])
    feed = answer(anybody.rpc("list_public_images"))["images"]
    assert [image["share_id"] for image in feed[:3]] == sorted(places, reverse=True)
    assert len(answer(user.rest("GET", "generations?select=id"))) == 1

    seen = (tmp_path / "seen").read_text() + cells.clusters["three"].log.read_text() + said
    addresses = databases["home"].execute("select address from cells.cells")
    secrets = [row["address"].split("password=")[1].split()[0] for row in addresses]
    secrets += [password, three.value("select substring(subconninfo, 'password=(\\w+)')"
                                      " from pg_subscription")]  # fmt: skip
    assert len(seen) > 10000
    for secret in secrets:
        assert not re.search(f".{{,200}}{secret}", seen)


def test_two_entries_serve_all_users_and_one_of_them_is_enough(
    cells, databases, cell_three, users, endpoints
):
    second = other(cells, "entry2")
    try:
        cells.script("entry", cells.owner_of("entry2"))
        rest = PostgREST(second.folder, second.settings)
        second.settings.keep("JWT_SECRET", cells.jwt_secret)
        rest.start(second.url())
        try:
            by_second = replace(endpoints, rest=rest.address())
            for cell, user in users.items():
                job_id = user.enqueued()
                user.endpoints = by_second
                assert answer(user.get_job_status(job_id))["job_id"] == job_id, cell
                assert len(answer(user.rest("GET", "generations?select=id"))) == 1
            moved(databases, users["two"], "three")
            for where in (endpoints, by_second):
                users["two"].endpoints = where
                assert len(answer(users["two"].rpc("list_active_jobs"))) == 1
                until(lambda: len(users["two"].rest("GET", "generations").json()) == 1)
            with killed(cells, databases, "entry"):
                for user in users.values():
                    user.endpoints = by_second
                    assert user.enqueued()
        finally:
            rest.stop()
        cells.script("remove", "entry2")
    finally:
        gone(cells, "entry2")
    slots = "select count(*) from pg_replication_slots where slot_name like '%entry2'"
    assert databases["home"].value(slots) == 0


def test_a_cell_is_removed_when_its_users_have_moved_and_whose_job_runs_is_waited_for(
    cells, databases, cell_three, sign_up
):
    waiting, working = sign_up("three"), sign_up("three")
    jobs, worker = [waiting.enqueued(), working.enqueued()], Worker(cell_three)
    answer(waiting.rpc("cancel_generation", job_id=jobs[0]))
    (job,) = [each for each in worker.claim_jobs(100) if each.id == jobs[1]]
    jobs.append(waiting.enqueued())
    done = threading.Event()

    def remove() -> None:
        cells.script("remove", "three", "two")
        done.set()

    thread = threading.Thread(target=remove)
    thread.start()
    until(lambda: databases["home"].value(
        "select cell from cells.users where user_id = %s", waiting.id) == "two")  # fmt: skip
    assert not done.is_set()
    worker.complete_job(job)
    worker.unregister_worker()
    thread.join()

    assert done.is_set()
    for user, job_id in zip((waiting, working, waiting), jobs, strict=True):
        assert answer(user.get_job_status(job_id))["job_id"] == job_id
    home = databases["home"]
    assert home.value("select array_agg(name order by name) from cells.cells") == ["home", "two"]
    left = (
        "select (select count(*) from pg_subscription where subname like '%three')"
        " + (select count(*) from pg_replication_slots where slot_name like '%three')"
        " + (select count(*) from pg_roles where rolname like '%three')"
    )
    assert (home.value(left), cell_three.value(left)) == (0, 0)
    assert databases["entry"].value("select count(*) from pg_foreign_server") == 2
    for cell in ("home", "two"):
        assert_books_balance(databases[cell])


def test_what_a_lost_slot_has_missed_is_copied_anew(cells, databases, sign_up, anybody):
    """As after a restore, or a failover, of who publishes."""
    home, two, user = databases["home"], databases["two"], sign_up("two")
    shared(user, two)
    price = "select paid_price_credits from public.models where id = 'darkroom/preview'"
    shares = "select count(*) from cells.shared_paths"
    until(lambda: home.value(shares) > 0)
    was = home.value(shares)
    for publisher, subscriber, name in (
        (home, two, "catalogue_two"),
        (home, databases["entry"], "directory_entry1"),
        (two, home, "files_two"),
    ):
        subscriber.execute(f"alter subscription darkroom_{name} disable")
        idle = "select not active from pg_replication_slots where slot_name = %s"
        until(lambda q=idle, p=publisher, n=name: p.value(q, f"darkroom_{n}"))
        publisher.execute("select pg_drop_replication_slot(%s)", f"darkroom_{name}")
    home.execute("update public.models set paid_price_credits = 7")
    home.execute("delete from cells.shared_paths")
    moved_user = sign_up("home")
    home.execute("insert into cells.users values (%s, 'two')", moved_user.id)

    cells.script("refresh")

    assert two.value(price) == 7
    assert home.value(shares) == was
    known = "select count(*) from cells.users where user_id = %s"
    assert databases["entry"].value(known, moved_user.id) == 1
    home.execute("delete from cells.users where user_id = %s", moved_user.id)
    home.execute("update public.models set paid_price_credits = 0")
    until(lambda: two.value(price) == 0)


def test_after_a_release_come_the_cells_then_home_then_the_entries(
    cells, databases, users, operator, monkeypatch, tmp_path
):
    release = migrate.Migration(
        "29990101000000",
        "next",
        "create function public.is_new() returns json language sql"
        " set search_path = pg_catalog, pg_temp return '\"new\"'::json;"
        "revoke all on function public.is_new from public;"
        "grant execute on function public.is_new to authenticated;"
        "alter table public.models add is_new boolean not null default true;"
        "insert into private.error_codes (code, message, is_retryable)"
        " values ('is_new', 'x', true);",
    )
    whole = [*migrate.read_migrations(), release]
    monkeypatch.setattr(migrate, "read_migrations", lambda: whole)
    for cell in ("two", "home"):
        migrate.migrate(cells.url_of(cell), is_confirmed=True)

    assert "cells.routes says not where is_new goes" in refused(cells, "refresh")
    assert users["two"].enqueued() and users["home"].enqueued(), "all else is as it was"

    shutil.copytree(SCRIPT.parent, tmp_path / "deploy/cells")
    for folder in ("sql", "supabase"):
        (tmp_path / folder).symlink_to(PROJECT / folder)
    entry = tmp_path / "deploy/cells/entry.sql"
    entry.write_text(entry.read_text().replace("'cancel_batch,", "'is_new,cancel_batch,"))
    monkeypatch.setattr("cells.SCRIPT", tmp_path / "deploy/cells/cells")
    cells.script("refresh")

    for user in users.values():
        assert answer(user.rpc("is_new")) == "new"
    code = "select count(*) from private.error_codes where code = 'is_new'"
    until(lambda: databases["two"].value(code) == 1)
    databases["home"].execute("update private.error_codes set message = 'y' where code = 'is_new'")
    until(lambda: databases["two"].value(code + " and message = 'y'") == 1)
