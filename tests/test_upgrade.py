"""Migrations under live workers: they go on, or say clearly that they are of another release."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from actors import User
from database import Database
from runbook import Section
from worker_process import Workers, eventually

SMALL = {"width": 64, "height": 64}


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

    Section("Upgrading").sh(tmp_path, ADMIN_URL=db.url, MIGRATION=str(migration))
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
