"""The runbook's backup and restore, run: nothing finished is made again, no money is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fake_replicate
import pytest
from actors import LeaseLost, Service, User, Worker
from database import Database, Server, assert_books_balance
from runbook import Section
from worker_process import Workers

SCHNELL = "black-forest-labs/flux-schnell"
KEPT = (
    *("public.entitlements", "public.credit_ledger", "public.generations", "public.images"),
    *("private.attempts", "private.deliveries", "private.settings", "public.models"),
    "storage.objects",
)
# A trigger of the app's own.
MAIL_TO_NEW_USERS = """
create function auth.send_mail() returns trigger language plpgsql as
  $$ begin raise exception 'mail sent to an old user'; end; $$;
create trigger send_mail before insert on auth.users
  for each row execute function auth.send_mail();
"""

fake = fake_replicate.fake_replicate


def back_up(folder: Path, source: Database) -> None:
    Section("Backup").sh(folder, ADMIN_URL=source.url)


def restore(folder: Path, target: Database) -> None:
    Section("Restore").sh(folder, ADMIN_URL=target.url)
    problems = Section("Restore").sql(target.url)
    assert problems.split()[-3:] == ["0", "(1", "row)"], problems


def rows(db: Database, table: str) -> list[str]:
    """Return all rows, by the names of their columns: those that came later stand last."""
    query = f"select to_jsonb(t)::text as t from {table} as t order by 1"
    return [row["t"] for row in db.execute(query)]


@pytest.fixture
def target(server: Server, supabase_template: str) -> Iterator[Database]:
    """An empty database: Supabase's schemas, no Darkroom."""
    database = server.create(supabase_template)
    yield database
    server.drop(database)


@pytest.fixture
def user(db: Database) -> User:
    """A user with credits and no limits."""
    db.lift_limits()
    db.execute("update public.models set is_active = true")
    db.execute("update private.settings set retry_base = '0'")
    return User(db).has(credits=50)


def test_a_restore_brings_back_every_row_and_what_has_ended_stays_so(user, db, target, tmp_path):
    worker, service = Worker(db), Service(db)
    lane = service.register_webhook()["webhook_id"]
    done, failed = user.enqueued(), user.enqueued()
    worker.complete_job(worker.claimed())
    (delivery,) = worker.claim_deliveries(lane)
    worker.finish_delivery(delivery)
    worker.fail_job(worker.claimed(), "moderated")
    canceled = user.enqueued()
    user.cancel_generation(canceled)
    delayed, running, queued = user.enqueued(), user.enqueued(), user.enqueued()
    for job in worker.claim_jobs(2):
        if job.id == delayed:
            worker.fail_job(job, "provider_busy", retry_after=600)
    service.grant_credits(user, 5, "payment-1")
    path = f"{user.id}/{done}/0.png"
    insert = "insert into storage.objects (bucket_id, name) values ('generations', %s)"
    db.execute(insert, path)
    before = {table: rows(db, table) for table in KEPT}
    target.execute(MAIL_TO_NEW_USERS)

    back_up(tmp_path, db)
    restore(tmp_path, target)

    assert {table: rows(target, table) for table in KEPT} == before
    assert [] not in before.values()
    assert rows(target, "private.workers") == []
    same, live = User(target, user.id), "select job_id::text as id from private.{}"
    assert target.value(live.format("running_jobs")) == running
    assert {row["id"] for row in target.execute(live.format("ready_jobs"))} == {delayed, queued}
    states = {job: same.get_job_status(job)["status"] for job in (done, failed, canceled)}
    assert list(states.values()) == ["completed", "failed", "canceled"]
    with pytest.raises(AssertionError, match="installed here already"):
        restore(tmp_path, target)  # never on top of something
    # What is owed is sent under the same id; what was applied is not applied again.
    owed, sent = (
        {each.delivery_id for each in Worker(each).claim_deliveries(lane)} for each in (db, target)
    )
    assert len(owed) == 2 and sent == owed
    Service(target).grant_credits(same, 5, "payment-1")
    assert same.credits() == user.credits()
    target.execute("drop trigger send_mail on auth.users")
    assert User(target).credits() == 10  # our triggers are there
    same.enqueue()
    assert_books_balance(target)


def test_a_worker_that_survives_the_restore_is_fenced(user, db, target, tmp_path):
    user.enqueue()
    back_up(tmp_path, db)
    held = Worker(db).claimed()  # after the dump

    restore(tmp_path, target)
    again = Worker(target).claimed()

    assert again.job_id == held.job_id
    with pytest.raises(LeaseLost):
        Worker(target).complete_job(held)
    assert target.value("select token from private.running_jobs") == again.token


def test_workers_buy_after_a_restore_only_what_was_never_bought(
    user, target, stack, fake, tmp_path
):
    """Four jobs: its id is saved; begun and not saved; begun after the dump; never begun."""
    db = user.db

    def bought(job: str) -> str:
        query = "select provider_input from public.generations where id = %s"
        return fake.bought(SCHNELL, db.value(query, job))

    fake.default = fake_replicate.Behaviour(polls=1)
    jobs = [user.enqueued(f"picture {n}", SCHNELL) for n in range(4)]
    old = Worker(db)
    saved, begun = old.claim_jobs(2)
    old.checkpoint(saved, bought(saved.id))
    assert old.next_step(begun)["step"] == "create"
    back_up(tmp_path, db)
    kept = {job: bought(job) for job in (begun.id, jobs[2])}  # since the dump

    restore(tmp_path, target)
    target.pass_time("2 minutes")  # leases are over
    target.runs_at("replicate", fake.url, settle="0.2 seconds")
    with Workers(target, stack, tmp_path) as workers:
        workers.start(
            REPLICATE_API_TOKEN=fake.token,
            WORKER_POLL_SECONDS=0.1,
        )
        for job in jobs:
            workers.until(job, "completed")

    assert len(fake.creates) == 1 and len(fake.predictions) == 4
    query = "select generation_id::text as job, provider_job_id as id from private.attempts"
    done = {row["job"]: row["id"] for row in target.execute(f"{query} where outcome = 'completed'")}
    assert done | kept == done
    assert User(target, user.id).credits() == user.credits()
