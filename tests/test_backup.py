"""The runbook's backup and restore, run: nothing finished is made again, no money is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_replicate
import pytest
from actors import LeaseLost, Service, User, Worker
from database import Database, Server, assert_books_balance
from fake_replicate import FakeReplicate
from runbook import Section
from worker_process import Workers

SCHNELL = "black-forest-labs/flux-schnell"
KEPT = (
    "public.entitlements",
    "public.credit_ledger",
    "public.generations",
    "public.images",
    "private.ready_jobs",
    "private.running_jobs",
    "private.attempts",
    "private.deliveries",
    "private.settings",
    "public.models",
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


def restored(folder: Path, source: Database, target: Database) -> Database:
    """Dump one database and restore it into another, as the runbook says."""
    Section("Backup").sh(folder, ADMIN_URL=source.url)
    return after(folder, target)


def after(folder: Path, target: Database) -> Database:
    """Restore an earlier dump."""
    Section("Restore").sh(folder, ADMIN_URL=target.url)
    problems = Section("Restore").sql(target.url)
    assert problems.split()[-3:] == ["0", "(1", "row)"], problems
    return target


def rows(db: Database, table: str) -> list[str]:
    return [row["t"] for row in db.execute(f"select t::text as t from {table} as t order by 1")]


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
    db.execute("update private.settings set retry_base = '0', welcome_credits = 10")
    return User(db).has(credits=50)


def have_jobs_in_every_state(user: User) -> dict[str, str]:
    """Return what has ended, by id."""
    worker, service = Worker(user.db), Service(user.db)
    hook = service.register_webhook()["webhook_id"]
    done, failed = user.enqueued(), user.enqueued()
    worker.complete_job(worker.claimed())
    (delivery,) = worker.claim_deliveries(hook)
    worker.finish_delivery(delivery)
    worker.fail_job(worker.claimed(), "moderated")
    canceled = user.enqueued()
    user.cancel_generation(canceled)
    user.enqueue()
    worker.fail_job(worker.claimed(), "provider_busy", retry_after=600)
    user.enqueue()
    worker.claimed()
    user.enqueue()
    user.db.execute(
        "insert into storage.objects (bucket_id, name) values ('generations', %s)",
        f"{user.id}/{done}/0.png",
    )
    return {done: "completed", failed: "failed", canceled: "canceled"}


def test_a_restore_brings_back_every_row_and_the_books(user, db, target, tmp_path):
    ended = have_jobs_in_every_state(user)
    before = {table: rows(db, table) for table in KEPT}
    target.execute(MAIL_TO_NEW_USERS)

    restored(tmp_path, db, target)

    marked = {"private.ready_jobs", "private.running_jobs"}  # create_started_at
    for table in before.keys() - marked:
        assert rows(target, table) == before[table] != [], table
    assert {table: len(rows(target, table)) for table in marked} == {
        table: len(before[table]) for table in marked
    }
    assert_books_balance(target)
    same = User(target, user.id)
    assert same.credits() == user.credits()
    assert {job: same.get_job_status(job)["status"] for job in ended} == ended
    assert rows(target, "private.workers") == []
    with pytest.raises(AssertionError, match="installed here already"):
        after(tmp_path, target)  # never on top of something


def test_ended_jobs_stay_ended_and_what_is_owed_is_sent_under_the_same_id(
    user, db, target, tmp_path
):
    have_jobs_in_every_state(user)
    lane = str(db.value("select id from private.webhook_endpoints"))

    restored(tmp_path, db, target)
    owed = {each.delivery_id for each in Worker(db).claim_deliveries(lane)}
    sent = {each.delivery_id for each in Worker(target).claim_deliveries(lane)}
    Worker(target).recover_stale_jobs()

    assert len(owed) == 2  # failed and canceled; completed has been delivered
    assert sent == owed
    claimed = {job.id for job in Worker(target).claim_jobs(10)}
    ended = "select id from public.generations where finished_at is not null"
    assert claimed and not claimed & {str(row["id"]) for row in target.execute(ended)}


def test_a_worker_that_survives_the_restore_is_fenced(user, db, target, tmp_path):
    user.enqueue()
    Section("Backup").sh(tmp_path, ADMIN_URL=db.url)
    held = Worker(db).claimed()  # after the dump

    after(tmp_path, target)
    again = Worker(target).claimed()

    assert again.job_id == held.job_id
    with pytest.raises(LeaseLost):
        Worker(target).complete_job(held)
    assert target.value("select token from private.running_jobs") == again.token


def test_new_users_and_grants_work_after_it(user, db, target, tmp_path):
    Service(db).grant_credits(user, 5, "payment-1")

    restored(tmp_path, db, target)

    assert User(target).credits() == 10  # the triggers are there
    same = User(target, user.id)
    Service(target).grant_credits(same, 5, "payment-1")  # sent again: applied before
    assert same.credits() == user.credits() == 55
    same.enqueue()
    assert_books_balance(target)


def bought(fake: FakeReplicate, db: Database, job: str) -> str:
    """Have the provider work at a job, as if a worker had just asked."""
    query = "select provider_input from public.generations where id = %s"
    return fake.bought(SCHNELL, db.value(query, job))


def test_workers_buy_after_a_restore_only_what_was_never_bought(
    user, target, stack, fake, tmp_path
):
    """Four jobs: its id is saved; begun and not saved; begun after the dump; never begun."""
    db = user.db
    fake.default = fake_replicate.Behaviour(polls=1)
    jobs = [user.enqueued(f"picture {n}", SCHNELL) for n in range(4)]
    old = Worker(db)
    saved, begun = old.claim_jobs(2)
    old.checkpoint(saved, bought(fake, db, saved.id))
    old.begin_create(begun)
    Section("Backup").sh(tmp_path, ADMIN_URL=db.url)
    kept = {job: bought(fake, db, job) for job in (begun.id, jobs[2])}  # since the dump

    after(tmp_path, target)
    target.pass_time("2 minutes")  # leases are over
    with Workers(target, stack, tmp_path) as workers:
        workers.start(**at(fake))
        for job in jobs:
            workers.until(job, "completed")

    assert len(fake.creates) == 1 and len(fake.predictions) == 4
    query = "select generation_id::text as job, provider_job_id as id from private.attempts"
    done = {row["job"]: row["id"] for row in target.execute(f"{query} where outcome = 'completed'")}
    assert done | kept == done
    assert User(target, user.id).credits() == user.credits()


def at(fake: FakeReplicate) -> dict[str, Any]:
    return {
        "REPLICATE_API_URL": fake.url,
        "REPLICATE_API_TOKEN": fake.token,
        "REPLICATE_SETTLE_SECONDS": 0.2,
        "WORKER_POLL_SECONDS": 0.1,
    }
