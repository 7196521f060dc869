"""Migrations of databases at work: what is there stays, and live workers go on.

The first edition is kept packed: its `sql/` with the seed, and its `worker.py`.
"""

from __future__ import annotations

import json
import lzma
import re
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from actors import Service, User, Worker
from database import PROJECT, Database, Server, assert_books_balance
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from runbook import Section
from worker_process import WorkerProcess, Workers, eventually

import migrate
from stack import supabase_cli

SMALL = {"width": 64, "height": 64}
FIRST = PROJECT / "tests" / "first_edition.sql.xz"
FIRST_WORKER = PROJECT / "tests" / "first_edition_worker.py.xz"


@pytest.fixture
def workers(db: Database, stack, tmp_path: Path) -> Iterator[Workers]:
    db.lift_limits()
    with Workers(db, stack, tmp_path) as workers:
        yield workers


def expansion(db: Database) -> str:
    """A migration as the runbook allows it: columns, a parameter with a default, a new body."""
    query = "select pg_get_functiondef('private.{}'::regproc) as text"
    beat = str(db.value(query.format("heartbeat")))
    claim = str(db.value(query.format("claim_jobs")))
    signature = "heartbeat(bigint, uuid[], bigint[], smallint[], boolean)"
    wider = beat.replace(
        "p_is_listening boolean DEFAULT true",
        "p_is_listening boolean DEFAULT true, p_load real DEFAULT null",
    )
    assert wider != beat
    return f"""
    alter table public.generations add column mood text;
    alter table private.running_jobs add column note text not null default '';
    drop function private.{signature};
    {wider};
    grant execute on function private.heartbeat to darkroom_worker;
    {claim.replace("begin", "begin -- anew", 1)};
    """


def test_an_old_worker_goes_on_while_a_migration_is_applied(db, workers, tmp_path):
    db.execute("update private.settings set heartbeat = '0.2 seconds', lease = '5 seconds'")
    alice = User(db).has(credits=100)
    process = workers.start(PREVIEW_SECONDS=0.3)
    jobs = [alice.enqueued(params=SMALL) for _ in range(12)]
    workers.until(jobs[0], "completed")
    migration = tmp_path / "migration.sql"
    migration.write_text(expansion(db))

    def is_applied() -> bool:
        try:
            Section("Upgrading").sh(tmp_path, ADMIN_URL=db.url, MIGRATION=str(migration))
        except AssertionError as error:  # as the runbook says: try again
            assert re.search("deadlock detected|lock timeout", str(error))
            return False
        return True

    eventually(is_applied)
    assert workers.status(jobs[-1]) != "completed"  # it is under way
    jobs += [alice.enqueued(params=SMALL) for _ in range(4)]
    for job in jobs:
        workers.until(job, "completed")

    assert [workers.outcomes(job) for job in jobs] == [["completed"]] * len(jobs)
    trouble = r"Outdated|database.lost|job.lost|ERROR|Traceback"
    assert not re.search(trouble, process.log)
    seen = db.value("select seen_at from private.workers")
    eventually(lambda: db.value("select seen_at from private.workers") > seen)
    assert "0.1.0" in Section("Upgrading").sql(db.url)


def test_a_migration_that_would_wait_gives_up_and_changes_nothing(db, alice, tmp_path):
    migration = tmp_path / "migration.sql"
    migration.write_text("create table public.new (); alter table public.generations add a int;")
    with db.connect().transaction() as reading:
        reading.connection.execute("select from public.generations")

        with pytest.raises(AssertionError, match="lock timeout"):
            Section("Upgrading").sh(tmp_path, ADMIN_URL=db.url, MIGRATION=str(migration))

        assert db.value("select to_regclass('public.new')") is None
        alice.enqueue()
    Section("Upgrading").sh(tmp_path, ADMIN_URL=db.url, MIGRATION=str(migration))


def rename(db: Database, function: str, name: str) -> None:
    db.execute(f"alter function private.{function} rename to {name}")


def test_no_job_fails_because_its_worker_is_of_another_release(db, workers):
    alice = User(db)
    process = workers.start(PREVIEW_SECONDS=0.5)
    job = alice.enqueued(params=SMALL)
    workers.until(job, "processing")

    rename(db, "complete_jobs", "complete_jobs_of_the_future")
    process.logged("database.lost call=complete_jobs error=Outdated")
    assert workers.status(job) == "processing"
    rename(db, "complete_jobs_of_the_future", "complete_jobs")

    workers.until(job, "completed")
    assert workers.outcomes(job) == ["completed"]


def test_a_worker_that_cannot_claim_any_more_hands_back_what_it_holds(db, workers):
    alice = User(db)
    process = workers.start(PREVIEW_SECONDS=60, WORKER_GRACE_SECONDS=0.1)
    job = alice.enqueued(params=SMALL)
    workers.until(job, "processing")

    rename(db, "claim_jobs", "claim_jobs_of_the_future")
    alice.enqueue()
    process.logged("database.lost call=claim_jobs error=Outdated")
    assert process.stop() == 0

    assert workers.outcomes(job) == ["released"]


def test_a_worker_of_another_release_says_so_when_it_starts_and_waits(db, workers):
    rename(db, "register_worker", "register_worker_of_the_future")
    process = workers.launch()
    process.logged("no private.register_worker for worker 0.1.0: upgrade it")

    rename(db, "register_worker_of_the_future", "register_worker")

    process.logged(r"worker\.started")


# The first edition becomes the second.


@pytest.fixture(scope="module")
def first_template(server: Server, supabase_template: str) -> str:
    """Name of a database with the first edition in it, as `make migrate` left it."""
    database = server.create(supabase_template)
    done = database.psql(script=lzma.decompress(FIRST.read_bytes()).decode())
    assert done.returncode == 0, done.stderr
    create = migrate.read_migrations()[0]
    database.execute(migrate.HISTORY)
    database.execute(
        "insert into supabase_migrations.schema_migrations (version, name) values (%s, %s)",
        create.version,
        create.name,
    )
    database.close()
    return database.name


@pytest.fixture
def first(server: Server, first_template: str) -> Iterator[Database]:
    """A database of the first edition."""
    database = server.create(first_template)
    yield database
    server.drop(database)


class FirstWorker:
    """Calls the functions as the first edition's worker.py did."""

    def __init__(self, db: Database) -> None:
        self.connection = db.connect()
        self.connection.execute("set role darkroom_worker")
        self.id = self.call("register_worker", "first", 8, "0.1.0")[0]["worker_id"]

    def call(self, function: str, *arguments: Any) -> list[dict[str, Any]]:
        marks = ", ".join(["%b"] * len(arguments))
        query = f"select * from private.{function}({marks})".encode()
        cursor = self.connection.cursor(row_factory=dict_row, binary=True)
        return cursor.execute(query, arguments).fetchall()

    def of_one(self, function: str, job: dict[str, Any], *arguments: Any) -> dict[str, Any]:
        """Call a function for many jobs with one."""
        arrays = [[each] for each in (job["job_id"], job["token"], *arguments)]
        (row,) = self.call(function, *arrays)
        assert row["token"] == job["token"]
        return row

    def claims(self, count: int = 1) -> list[dict[str, Any]]:
        return self.call("claim_jobs", self.id, count)

    def completes(self, job: dict[str, Any]) -> None:
        image = {
            "position": 0,
            "storage_path": f"{job['user_id']}/{job['job_id']}/0.png",
            "content_type": "image/png",
            "width": 64,
            "height": 64,
            "bytes": 1000,
        }
        said = self.of_one("complete_jobs", job, Jsonb([image]), Jsonb({"provider_seconds": 1.5}))
        assert said["verdict"] == "completed"

    def fails(self, job: dict[str, Any], code: str) -> str:
        metrics = Jsonb({"cost_usd": 0.003})
        return str(self.of_one("fail_jobs", job, code, "says why", None, metrics)["verdict"])


class Past:
    """A database of the first edition with something of everything in it."""

    def __init__(self, db: Database) -> None:
        self.db = db
        service = self.service = Service(db)
        worker = self.worker = FirstWorker(db)
        alice = self.alice = User(db).has_paid().has(credits=100)
        bob = self.bob = User(db).has_paid().has(credits=50)
        service.register_webhook("https://api.example.com/hooks")
        alice.register_push_token("ExpoPushToken[abc]")

        completed, failed = (alice.enqueued(idempotency_key=key) for key in ("one", "two"))
        for job in worker.claims(2):
            worker.of_one("checkpoint_jobs", job, f"bought-{job['job_id']}")
            if str(job["job_id"]) == completed:
                worker.completes(job)
            else:
                assert worker.fails(job, "moderated") == "failed"
        alice.set_favorite(completed)
        alice.set_tags(completed, "harbour", "night")
        alice.share_image(completed)
        bob.like_image(completed)
        alice.save_prompt_template("Evening", "a lighthouse at {time}")
        alice.cancel_generation(alice.enqueued())
        self.completed, self.failed = completed, failed

        self.gone = bob.enqueued()
        worker.completes(worker.claims()[0])
        bob.delete_generation(self.gone)
        self.delayed = bob.enqueued()
        assert worker.fails(worker.claims()[0], "provider_busy") == "retried"
        db.execute("update private.ready_jobs set run_at = now() + interval '1 hour'")

        self.bought, self.begun = alice.enqueued(), alice.enqueued()
        self.running = {str(job["job_id"]): job for job in worker.claims(2)}
        worker.of_one("begin_creates", self.running[self.begun])
        worker.of_one("checkpoint_jobs", self.running[self.bought], "bought-one")

        db.execute("update private.settings set heartbeat = '7 seconds', welcome_credits = 3")
        db.execute("update private.plans set max_active = 7 where name = 'free'")
        self.batch = alice.enqueue_batch(["a harbour", "a pier"])["batch_id"]
        self.held = bob.enqueued()
        service.pause_model("darkroom/preview")
        assert worker.claims() == []
        assert db.value("select count(*) from private.ready_jobs where is_held") == 3

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Return all rows of all tables."""
        tables = self.db.execute(
            "select format('%I.%I', schemaname, tablename) as name from pg_tables"
            " where schemaname in ('public', 'private') order by 1"
        )
        query = "select to_jsonb(t) as row from {} as t order by t::text"
        return {
            each["name"]: [row["row"] for row in self.db.execute(query.format(each["name"]))]
            for each in tables
        }


def push(db: Database) -> None:
    supabase_cli(db.url, "db", "push", "--yes")


def make_migrate(db: Database) -> None:
    migrate.migrate(db.url, is_confirmed=True)


@pytest.mark.parametrize("apply", [push, make_migrate])
def test_the_first_edition_becomes_the_second_with_all_that_is_in_it(
    first, db, apply: Callable[[Database], None]
):
    past = Past(first)
    before = past.rows()

    apply(first)

    assert first.objects() == db.objects()
    after = past.rows()
    for table, rows in before.items():
        if rows and table not in MOVED:
            columns = rows[0].keys() & after[table][0].keys()
            assert sort(rows, columns) == sort(after[table], columns), table
    (was,), (now,) = before["private.settings"], after["private.settings"]
    assert {name for name in was if was[name] != now[name]} == {"breaker_users"}
    assert len(after["private.ready_jobs"]) == len(before["private.ready_jobs"])
    assert_books_balance(first)
    first.execute("select private.check_books()")
    assert set(past.service.alerts()) <= {"paused", "no_worker"}
    pushes = first.execute("select user_id::text from private.deliveries where lane = 'expo'")
    assert {row["user_id"] for row in pushes} == {past.alice.id}
    bought = first.execute("select provider_job_id as id from private.purchases")
    assert {row["id"] for row in bought} == {
        "bought-one",
        f"bought-{past.completed}",
        f"bought-{past.failed}",
    }


# What the migration is to change: held jobs wait like others, walks begin anew; words and defaults.
MOVED = {
    *("private.ready_jobs", "private.retention_walks"),
    *("private.alert_rules", "private.error_codes", "private.settings"),
}


def sort(rows: list[dict[str, Any]], columns: Collection[str]) -> list[str]:
    return sorted(json.dumps({name: row[name] for name in sorted(columns)}) for row in rows)


def test_users_and_workers_of_the_first_edition_go_on_with_the_second(first):
    past = Past(first)
    make_migrate(first)

    assert past.alice.enqueue(idempotency_key="one")["job_id"] == past.completed
    shown = {each["job_id"]: each for each in past.alice.list_generations()["generations"]}
    assert shown[past.completed]["is_favorite"]
    assert shown[past.completed]["tags"] == ["harbour", "night"]
    (shared,) = past.bob.list_public_images()["images"]
    assert (shared["job_id"], shared["is_liked"]) == (past.completed, True)
    past.bob.restore_generation(past.gone)
    past.worker.of_one("begin_creates", past.running[past.begun])
    past.worker.of_one("checkpoint_jobs", past.running[past.begun], "bought-two")
    for job in past.running.values():
        past.worker.completes(job)
    past.service.resume_model("darkroom/preview")
    first.execute("update private.ready_jobs set run_at = now() where run_at is not null")
    rest: list[dict[str, Any]] = []  # claims look below the clock now and then
    eventually(lambda: rest.extend(past.worker.claims(8)) or len(rest) >= 4)
    assert {past.held, past.delayed} <= {str(job["job_id"]) for job in rest}
    assert past.worker.fails(rest[0], "moderated") == "failed"
    for job in rest[1:]:
        past.worker.completes(job)
    assert past.alice.get_batch_status(past.batch)["status"] == "finished"
    Worker(first).apply_retention()
    assert_books_balance(first)
    assert first.value("select count(*) from private.ready_jobs") == 0


def test_a_request_that_waits_for_the_second_edition_fails_once_at_most_and_costs_nothing(first):
    first.execute("update private.plans set max_active = 100000, max_per_minute = 100000")
    users = [User(first).has(credits=10000) for _ in range(4)]
    done = threading.Event()

    def ask(user: User) -> list[str]:
        outcomes = []
        while not done.is_set():
            try:
                outcomes.append(user.enqueue()["status"])
            except psycopg.errors.UndefinedFunction:  # it began in a function of the first edition
                outcomes.append("failed")
        return outcomes

    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask, user) for user in users]
        try:
            make_migrate(first)
        finally:
            done.set()
        outcomes = [each.result() for each in asking]
    assert all(each.count("failed") <= 1 and each[-1] == "queued" for each in outcomes)
    jobs = first.value("select count(*) from public.generations where status = 'queued'")
    assert jobs == sum(each.count("queued") for each in outcomes)
    assert_books_balance(first)


def test_it_changes_nothing_in_a_database_of_the_second_edition(db):
    (upgrade,) = (PROJECT / "supabase" / "migrations").glob("*_upgrade_first_edition.sql")
    before = db.objects(), db.snapshot()

    assert db.psql(upgrade).returncode == 0

    assert (db.objects(), db.snapshot()) == before


def test_live_workers_of_the_first_edition_finish_what_they_hold(
    first, stack, tmp_path, monkeypatch
):
    program = tmp_path / "worker.py"
    program.write_bytes(lzma.decompress(FIRST_WORKER.read_bytes()))
    monkeypatch.setattr(WorkerProcess, "program", program)
    alice = User(first).has_paid().has(credits=100)
    with Workers(first, stack, tmp_path) as workers:
        process = workers.start(PREVIEW_SECONDS=2, WORKER_SLOTS=4)
        jobs = [alice.enqueued(params=SMALL) for _ in range(8)]
        workers.until(jobs[3], "processing")

        make_migrate(first)

        assert workers.status(jobs[-1]) == "queued"  # it is under way
        jobs += [alice.enqueued(params=SMALL) for _ in range(2)]
        for job in jobs:
            workers.until(job, "completed")
        assert [workers.outcomes(job) for job in jobs] == [["completed"]] * len(jobs)
        assert not re.search(r"Outdated|job.lost", process.log)
        assert process.stop() == 0
