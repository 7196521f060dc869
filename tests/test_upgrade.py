"""Migrations of databases at work: what is there stays, and live workers go on.

The first edition is kept packed: its `sql/` with the seed, and its `worker.py`.
"""

from __future__ import annotations

import json
import lzma
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, cast

import psycopg
import pytest
from actors import Job, Service, User, Worker
from database import PROJECT, Database, assert_books_balance
from runbook import Section
from worker_process import WorkerProcess, Workers, eventually

import migrate
from stack import supabase_cli

SMALL = {"width": 64, "height": 64}
FIRST_WORKER = PROJECT / "tests" / "first_edition_worker.py.xz"


@pytest.fixture
def workers(db: Database, stack, tmp_path: Path) -> Iterator[Workers]:
    db.lift_limits()
    with Workers(db, stack, tmp_path) as workers:
        yield workers


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
    Worker(db)
    assert re.search(r"version \| workers.* 1 +\| +1", Section("Upgrading").sql(db.url), re.DOTALL)


def rename(db: Database, function: str, name: str) -> None:
    db.execute(f"alter function private.{function} rename to {name}")


def test_a_worker_of_another_release_waits_fails_no_job_and_hands_back_what_it_holds(db, workers):
    def rename(function: str, *, is_there: bool) -> None:
        names = (function, f"{function}_of_the_future")
        was, becomes = reversed(names) if is_there else names
        db.execute(f"alter function private.{was} rename to {becomes}")

    alice = User(db)
    rename("register_worker", is_there=False)
    process = workers.launch(PREVIEW_SECONDS=0.5, WORKER_GRACE_SECONDS=0.1)
    process.logged("no private.register_worker for worker 0.1.0: upgrade it")
    rename("register_worker", is_there=True)
    process.logged(r"worker\.started")

    job = alice.enqueued(params=SMALL)
    workers.until(job, "processing")
    rename("complete_jobs", is_there=False)
    process.logged("database.lost call=complete_jobs error=Outdated")
    assert workers.status(job) == "processing"
    rename("complete_jobs", is_there=True)
    workers.until(job, "completed")
    assert workers.outcomes(job) == ["completed"]

    rename("complete_jobs", is_there=False)
    held = alice.enqueued(params=SMALL)
    workers.until(held, "processing")
    rename("claim_jobs", is_there=False)
    alice.enqueue()
    process.logged("database.lost call=claim_jobs error=Outdated")
    assert process.stop() == 0
    assert workers.outcomes(held) == ["released"]


# The first edition becomes the second.


class FirstWorker(Worker):
    """A worker of the first edition: what it calls otherwise than one of today."""

    NOT_YET: ClassVar = {"base_url", "secret", "key_hosts", "hosts", "max_running"}

    def register_worker(self, slots: int) -> dict[str, Any]:
        return self._rows("select * from private.register_worker('test', %s, '1')", slots)[0]

    def claim_jobs(self, slots: int = 1) -> list[Job]:
        rows = self._rows("select * from private.claim_jobs(%s, %s)", self.id, slots)
        return [Job(**row, **dict.fromkeys(self.NOT_YET)) for row in rows]

    def begin_create(self, job: Job) -> datetime:
        query = "select * from private.begin_creates(%s::uuid[], %s::bigint[])"
        (begun,) = self._rows(query, [job.job_id], [job.token])
        return cast("datetime", begun["create_started_at"])

    def checkpoint(self, job: Job, provider_job_id: str) -> None:
        query = "select verdict from private.checkpoint_jobs(array[%s], array[%s], array[%s])"
        (saved,) = self._rows(query, job.job_id, job.token, provider_job_id)
        assert saved["verdict"] == "ok"


def test_a_worker_of_the_release_before_finishes_what_it_holds(db, alice, worker):
    db.buys_previews()
    for _ in range(2):
        alice.enqueue(params={"seed": 7})
    first, second = worker.claim_jobs(2)
    old = FirstWorker(db)
    assert old.begin_create(first) == old.begin_create(second)
    old.checkpoint(first, "bought-one")
    adopt = "select private.adopt_provider_job(%s, %s, array['bought-one', 'bought-two'])"
    for _ in range(2):
        assert (
            old._rows(adopt, second.job_id, second.token)[0]["adopt_provider_job"] == "bought-two"
        )

    for job in (first, second):
        old.release_job(job)
    for job, bought in zip(worker.claim_jobs(2), ("bought-one", "bought-two"), strict=True):
        assert worker.next_step(job)["request"]["url"].endswith(bought)


class Past:
    """A database of the first edition with something of everything in it."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.service, self.worker = Service(db), FirstWorker(db, slots=8)
        self.alice = User(db).has_paid().has(credits=100)
        self.bob = User(db).has_paid().has(credits=50)
        self.service.register_webhook("https://api.example.com/hooks")
        self.alice.register_push_token("ExpoPushToken[abc]")
        self._have_ended_jobs(self.alice, self.bob, self.worker)

        self.bought, self.begun = self.alice.enqueued(), self.alice.enqueued()
        self.running = {job.id: job for job in self.worker.claim_jobs(2)}
        self.worker.begin_create(self.running[self.begun])
        self.worker.checkpoint(self.running[self.bought], "bought-one")
        db.execute("update private.settings set heartbeat = '7 seconds', welcome_credits = 3")
        db.execute("update private.plans set max_active = 7 where name = 'free'")
        self.batch = self.alice.enqueue_batch(["a harbour", "a pier"])["batch_id"]
        self.held = self.bob.enqueued()
        self.service.pause_model("darkroom/preview")
        assert self.worker.claim_jobs() == []
        assert db.value("select count(*) from private.ready_jobs where is_held") == 3

    def _have_ended_jobs(self, alice: User, bob: User, worker: Worker) -> None:
        self.completed, self.failed = (alice.enqueued(idempotency_key=key) for key in "ab")
        for job in worker.claim_jobs(2):
            worker.checkpoint(job, f"bought-{job.id}")
            if job.id == self.completed:
                worker.complete_job(job, metrics={"provider_seconds": 1.5})
            else:
                worker.fail_job(job, "moderated", "says why", metrics={"cost_usd": 0.003})
        alice.set_favorite(self.completed)
        alice.set_tags(self.completed, "harbour", "night")
        alice.share_image(self.completed)
        bob.like_image(self.completed)
        alice.save_prompt_template("Evening", "a lighthouse at {time}")
        alice.cancel_generation(alice.enqueued())
        self.gone = bob.enqueued()
        worker.complete_job(worker.claimed())
        bob.delete_generation(self.gone)
        self.delayed = bob.enqueued()
        assert worker.fail_job(worker.claimed(), "provider_busy") == "retried"
        self.db.execute("update private.ready_jobs set run_at = now() + interval '1 hour'")

    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Return all rows of all tables."""
        tables = self.db.execute(
            "select format('%I.%I', schemaname, tablename) as name from pg_tables"
            " where schemaname in ('public', 'private')"
        )
        query = "select to_jsonb(t) as row from {} as t"
        return {
            each["name"]: [row["row"] for row in self.db.execute(query.format(each["name"]))]
            for each in tables
        }


def make_migrate(db: Database) -> None:
    migrate.migrate(db.url, is_confirmed=True)


# What the migration is to change: held jobs wait like others, walks begin anew; words and defaults.
MOVED = {
    *("private.ready_jobs", "private.retention_walks"),
    *("private.alert_rules", "private.error_codes", "private.settings"),
}


@pytest.mark.parametrize("by_cli", [True, False])
def test_the_first_edition_becomes_the_second_with_all_that_is_in_it(first, db, by_cli):
    past = Past(first)
    again = "update public.generations set retry_of = %s where id = %s"
    first.execute(again, past.failed, past.completed)
    before = past.rows()

    if by_cli:
        supabase_cli(first.url, "db", "push", "--yes")
    else:
        make_migrate(first)

    assert first.objects() == db.objects()
    after = past.rows()
    for table, rows in before.items():
        if rows and table in after and table not in MOVED:
            kept = rows[0].keys() & after[table][0].keys()
            was, now = (
                sorted(json.dumps({name: row[name] for name in sorted(kept)}) for row in each)
                for each in (rows, after[table])
            )
            assert was == now or (table == "private.plans" and set(was) < set(now)), table
    (was,), (now,) = before["private.settings"], after["private.settings"]
    kept = was.keys() & now.keys()
    assert {name for name in kept if was[name] != now[name]} == {"breaker_users"}
    assert len(after["private.ready_jobs"]) == len(before["private.ready_jobs"])
    assert_books_balance(first)
    first.execute("select private.check_books()")
    assert set(past.service.alerts()) <= {"paused", "no_worker"}
    pushes = first.execute("select user_id::text from private.deliveries where lane = 'expo'")
    assert {row["user_id"] for row in pushes} == {past.alice.id}
    bought = first.execute("select provider_job_id as id from private.purchases")
    asked = {f"bought-{job}" for job in ("one", past.completed, past.failed)}
    assert {row["id"] for row in bought} == asked
    assert first.row("select retry_of::text, generation_id::text from private.retries") == {
        "retry_of": past.failed,
        "generation_id": past.completed,
    }
    of_batch = "select array_agg(id order by id) from public.generations where batch_id = %s"
    assert first.value("select job_ids from public.batches") == first.value(of_batch, past.batch)
    derived = "select id, required_inputs, lowest_seed, highest_seed from public.models order by id"
    assert first.execute(derived) == db.execute(derived)


def test_users_and_workers_of_the_first_edition_go_on_with_the_second(first):
    past = Past(first)
    alice, bob, worker = past.alice, past.bob, past.worker
    make_migrate(first)

    assert alice.enqueue(idempotency_key="a")["job_id"] == past.completed
    shown = {each["job_id"]: each for each in alice.list_generations()["generations"]}
    assert shown[past.completed]["is_favorite"]
    assert shown[past.completed]["tags"] == ["harbour", "night"]
    (shared,) = bob.list_public_images()["images"]
    assert (shared["job_id"], shared["is_liked"]) == (past.completed, True)
    bob.restore_generation(past.gone)
    worker.begin_create(past.running[past.begun])
    worker.checkpoint(past.running[past.begun], "bought-two")
    for job in past.running.values():
        worker.complete_job(job)
    past.service.resume_model("darkroom/preview")
    first.execute("update private.ready_jobs set run_at = now() where run_at is not null")
    with pytest.raises(psycopg.errors.UndefinedFunction):
        worker.claim_jobs(1)  # so it waits to be replaced
    worker = Worker(first)
    rest: list[Job] = []  # claims look below the clock now and then
    eventually(lambda: rest.extend(worker.claim_jobs(8)) or len(rest) >= 4)
    assert {past.held, past.delayed} <= {job.id for job in rest}
    assert worker.fail_job(rest[0], "moderated") == "failed"
    for job in rest[1:]:
        worker.complete_job(job)
    assert alice.get_batch_status(past.batch)["status"] == "finished"
    worker.apply_retention()
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
        return [*outcomes, user.enqueue()["status"]]

    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask, user) for user in users]
        try:
            make_migrate(first)
        finally:
            done.set()
        outcomes = [each.result() for each in asking]
    assert all(each.count("failed") <= 1 for each in outcomes)
    jobs = first.value("select count(*) from public.generations where status = 'queued'")
    assert jobs == sum(each.count("queued") for each in outcomes)
    assert_books_balance(first)


def test_it_changes_nothing_in_a_database_of_the_second_edition(db):
    (upgrade,) = (PROJECT / "supabase" / "migrations").glob("*_upgrade_first_edition.sql")
    before = db.objects(), db.snapshot()

    assert db.psql(upgrade).returncode == 0

    assert (db.objects(), db.snapshot()) == before


def test_live_workers_of_the_first_edition_finish_what_they_hold_and_new_ones_take_over(
    first, stack, tmp_path, monkeypatch
):
    program = tmp_path / "worker.py"
    program.write_bytes(lzma.decompress(FIRST_WORKER.read_bytes()))
    monkeypatch.setattr(WorkerProcess, "program", program)
    first.execute("update public.models set price_credits = 2, paid_price_credits = 2")
    alice = User(first).has_paid().has(credits=100)

    def images() -> dict[str, bytes]:
        """Return the path and the file of every picture there is."""
        paths = "select storage_path as p from public.images union select preview_path from"
        found = first.execute(f"{paths} public.images where preview_path is not null")
        return {row["p"]: workers.stored_file(row["p"]) for row in found}

    with Workers(first, stack, tmp_path) as workers:
        stays = workers.start(PREVIEW_SECONDS=0.1, WORKER_SLOTS=2)
        done = [alice.enqueued(params=SMALL) for _ in range(2)]
        for job in done:
            workers.until(job, "completed")
        assert stays.stop() == 0
        canceled = alice.enqueued(params=SMALL)
        alice.cancel_generation(canceled)
        stays, dies = (workers.start(PREVIEW_SECONDS=3, WORKER_SLOTS=2) for _ in range(2))
        jobs = [alice.enqueued(params=SMALL) for _ in range(7)]
        eventually(lambda: first.value("select count(*) = 4 from private.running_jobs"))
        held_by = "select array_agg(job_id::text) from private.running_jobs where worker_id = %s"
        held, left = (first.value(held_by, each.worker_id) for each in (stays, dies))
        files, credits = images(), alice.get_entitlement()["credits"]
        assert credits == 100 - 2 * 9  # the canceled one is refunded

        make_migrate(first)

        assert {workers.status(job) for job in held + left} == {"processing"}  # it is under way
        dies.kill()
        stays.logged(r"claim\.failed error=Outdated")
        for job in held:
            workers.until(job, "completed")
        assert not re.search(r"call=(?!claim_jobs)\S+ error=Outdated|job.lost", stays.log)
        assert {workers.status(job) for job in set(jobs) - {*held, *left}} == {"queued"}
        assert stays.stop() == 0
        monkeypatch.undo()
        workers.backdate_leases()
        workers.start()
        jobs += [alice.enqueued(params=SMALL) for _ in range(2)]
        for job in jobs:
            workers.until(job, "completed")

        twice = {job for job in jobs + done if workers.outcomes(job) != ["completed"]}
        assert twice == set(left)  # those of the one that died
        assert workers.status(canceled) == "canceled"
        assert images().items() > files.items()
        made = "select generation_id::text as job from public.images order by 1"
        assert [row["job"] for row in first.execute(made)] == sorted(done + jobs)
        assert alice.get_entitlement()["credits"] == credits - 4  # two came later
