"""sql/80_recovery.sql: what a dead worker left."""

import pytest
from actors import User, refused
from database import assert_books_balance, unchanged


@pytest.mark.parametrize("deadline", ["5 minutes", "10 seconds"])
def test_a_job_that_is_stuck_fails_at_its_models_deadline_though_its_worker_beats(
    db, alice, worker, deadline
):
    db.execute("update public.models set deadline = %s", deadline)
    job_id = alice.enqueued()
    job = worker.claimed()
    db.pass_time(deadline)
    worker.heartbeat(job)

    assert worker.recover_stale_jobs() == 1

    assert alice.get_job_status(job_id)["error"]["code"] == "timeout"
    assert alice.credits() == 10
    with unchanged(db), refused("DR001", "lease_lost"):
        worker.complete_job(job)


def test_after_an_outage_a_job_past_its_deadline_is_resumed_not_failed(db, alice, worker):
    db.buys_previews()
    alice.enqueue()
    worker.checkpoint(worker.claimed(), "prediction-1")
    db.pass_time("10 minutes")

    worker.recover_stale_jobs()

    db.pass_time("1 minute")
    assert worker.claimed().provider_job_id == "prediction-1"


@pytest.mark.parametrize(
    ("table", "event"),
    [
        ("public.entitlements", "update"),
        ("public.generations", "update"),
        ("private.running_jobs", "delete"),
    ],
)
def test_one_job_that_cannot_be_recovered_holds_up_no_other(db, service, worker, table, event):
    db.execute("update private.settings set max_attempts = 1")
    users = [User(db) for _ in range(5)]
    for user in users:
        user.enqueue()
    worker.claim_jobs(5)
    db.execute(
        "create function private.poison() returns trigger language plpgsql as"
        " $$ begin raise 'poisoned'; end $$;"
        f"create trigger zz_poison before {event} on {table} for each row"
        f" when (old.user_id = '{users[0].id}') execute function private.poison()"
    )
    db.pass_time("61 seconds")

    assert worker.recover_stale_jobs() == 4

    assert [user.credits() for user in users] == [9, 10, 10, 10, 10]
    assert service.queue_health()["skipped"]["steps"] == {"end_stale_jobs": 1}
    users[1].enqueue()
    worker.claimed()
    db.pass_time("61 seconds")
    assert worker.recover_stale_jobs(at_most=1) == 1  # the bad one comes first, and takes no place
    db.execute(f"drop trigger zz_poison on {table}")
    assert worker.recover_stale_jobs() == 1
    assert service.queue_health()["skipped"]["steps"] == {}
    assert_books_balance(db)
