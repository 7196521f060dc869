"""sql/80_recovery.sql: what a dead worker left."""

import pytest
from actors import User, Worker, refused, together
from database import assert_books_balance, unchanged
from test_retention import poison, skipped


def test_a_job_of_a_dead_worker_is_queued_again_with_its_checkpoint(db, alice, worker):
    job_id = alice.enqueued()
    worker.checkpoint(worker.claimed(), "prediction-1")
    db.pass_time("61 seconds")

    assert worker.recover_stale_jobs() == 1

    assert alice.get_job_status(job_id)["status"] == "queued"
    ready = db.row("select attempt, provider_job_id from private.ready_jobs")
    assert ready == {"attempt": 1, "provider_job_id": "prediction-1"}
    detail = db.row("select outcome, error_code, error_detail from private.attempts")
    assert detail == {
        "outcome": "retried",
        "error_code": "internal",
        "error_detail": f"lease of worker {worker.id} ran out",
    }
    assert_books_balance(db)


def test_a_job_that_kills_every_worker_fails_in_the_end(db, alice, worker):
    job_id = alice.enqueued("a lighthouse")

    for _ in range(3):
        db.pass_time("61 seconds")
        worker.claimed()
        db.pass_time("61 seconds")
        worker.recover_stale_jobs()

    job = alice.get_job_status(job_id)
    assert (job["status"], job["prompt"]) == ("failed", "a lighthouse")
    assert job["error"]["code"] == "internal"
    assert alice.ledger() == [("grant", 10), ("charge", -1), ("refund", 1)]
    assert_books_balance(db)


def test_a_job_that_is_stuck_fails_at_its_deadline_though_its_worker_beats(db, alice, worker):
    job_id = alice.enqueued()
    job = worker.claimed()
    db.pass_time("301 seconds")
    worker.heartbeat(job)

    assert worker.recover_stale_jobs() == 1

    assert alice.get_job_status(job_id)["error"]["code"] == "timeout"
    assert alice.credits() == 10
    with unchanged(db), refused("DR001", "lease_lost"):
        worker.complete_job(job)
    assert_books_balance(db)


def test_after_an_outage_a_job_past_its_deadline_is_resumed_not_failed(db, alice, worker):
    alice.enqueue()
    worker.checkpoint(worker.claimed(), "prediction-1")
    db.pass_time("10 minutes")

    worker.recover_stale_jobs()

    db.pass_time("1 minute")
    assert worker.claimed().provider_job_id == "prediction-1"


def test_the_deadline_is_the_models_own(db, alice, worker):
    db.execute("update public.models set deadline = '10 seconds'")
    alice.enqueue()
    worker.claimed()

    db.pass_time("11 seconds")

    assert worker.recover_stale_jobs() == 1


def test_a_job_in_good_hands_is_left_alone(db, alice, worker):
    alice.enqueue()
    job = worker.claimed()
    db.pass_time("59 seconds")
    db.execute("select private.refresh_queue_state()")

    with unchanged(db):
        assert worker.recover_stale_jobs() == 0

    worker.complete_job(job)


def test_a_lease_that_ran_out_unnoticed_is_still_good(db, alice, worker):
    alice.enqueue()
    job = worker.claimed()
    db.pass_time("61 seconds")

    worker.complete_job(job)

    assert worker.recover_stale_jobs() == 0
    assert_books_balance(db)


def test_one_call_recovers_as_many_as_it_was_told(db, alice, worker):
    for _ in range(3):
        alice.enqueue()
    worker.claim_jobs(3)
    db.pass_time("61 seconds")

    assert [worker.recover_stale_jobs(2) for _ in range(3)] == [2, 1, 0]


def test_recoveries_at_the_same_moment_double_nothing(db):
    db.lift_limits()
    workers = [Worker(db) for _ in range(4)]
    users = [User(db) for _ in range(6)]
    for user in users:
        for _ in range(10):
            user.enqueue()
    jobs = workers[0].claim_jobs(60)
    db.pass_time("61 seconds")

    counts = together([lambda w=w: w.recover_stale_jobs(100) for w in workers])

    assert sum(counts) == len(jobs) == 60
    assert db.value("select count(*) from private.attempts") == 60
    assert_books_balance(db)


@pytest.mark.parametrize("commits", [True, False])
def test_a_job_that_is_being_completed_is_not_recovered(db, alice, worker, commits):
    alice.enqueue()
    job = worker.claimed()
    other = Worker(db)
    db.pass_time("61 seconds")

    with worker.connection.transaction(force_rollback=not commits):
        worker.complete_job(job)
        assert other.recover_stale_jobs() == 0

    assert other.recover_stale_jobs() == (0 if commits else 1)
    assert_books_balance(db)


def test_a_beat_that_comes_just_before_saves_the_lease(db, alice, worker):
    alice.enqueue()
    job = worker.claimed()
    other = Worker(db)
    db.pass_time("61 seconds")

    with worker.connection.transaction():
        assert worker.heartbeat(job) == ["ok"]
        assert other.recover_stale_jobs() == 0

    assert other.recover_stale_jobs() == 0


def test_workers_silent_for_a_week_are_forgotten(db, worker):
    db.pass_time("8 days")
    living = Worker(db)

    db.execute("select private.trim_history()")

    assert db.execute("select id from private.workers") == [{"id": living.id}]


def test_a_job_is_never_lost_with_its_worker(db, alice, worker):
    job_id = alice.enqueued()
    worker.claimed()
    db.pass_time("8 days")
    db.execute("select private.trim_history()")

    Worker(db).recover_stale_jobs()

    assert alice.get_job_status(job_id)["status"] == "failed"
    assert_books_balance(db)


# --- one bad row ---


@pytest.mark.parametrize(
    ("table", "row", "event"),
    [
        ("public.entitlements", "user_id = '{user}'", "update"),
        ("public.generations", "user_id = '{user}'", "update"),
        ("private.running_jobs", "user_id = '{user}'", "delete"),
    ],
)
def test_one_job_that_cannot_be_recovered_holds_up_no_other(db, worker, table, row, event):
    db.execute("update private.settings set max_attempts = 1")
    users = sorted((User(db) for _ in range(5)), key=lambda user: user.id)
    for user in users:
        user.enqueue()
        worker.claimed()
    poison(db, table, row.format(user=users[0].id), event)
    db.pass_time("61 seconds")

    assert worker.recover_stale_jobs() == 4

    assert [user.credits() for user in users] == [9, 10, 10, 10, 10]
    assert skipped(db) == {"end_stale_jobs": 1}
    assert worker.recover_stale_jobs(at_most=1) == 0
    users[1].enqueue()
    worker.claimed()
    db.pass_time("61 seconds")
    assert worker.recover_stale_jobs(at_most=1) == 1  # the bad one comes first, and takes no place
    db.execute(f"drop trigger zz_poison on {table}")
    assert worker.recover_stale_jobs() == 1
    assert skipped(db) == {}
    assert_books_balance(db)


def test_a_user_whose_balance_is_locked_for_ever_holds_up_no_other(db, worker):
    users = [User(db) for _ in range(3)]
    for user in users:
        user.enqueue()
        db.execute("update private.settings set max_attempts = 1")
        worker.claimed()
    db.pass_time("61 seconds")

    with db.connect().transaction() as forgotten:
        query = "select from public.entitlements where user_id = %s for update"
        forgotten.connection.execute(query, [users[0].id])
        assert worker.recover_stale_jobs() == 2

    assert worker.recover_stale_jobs() == 1
    assert_books_balance(db)


@pytest.mark.parametrize("bad", ["started_at = '-infinity'", "ended_at = 'infinity'"])
def test_an_attempt_out_of_all_time_spoils_no_estimate(db, alice, bob, worker, bad):
    for user in (alice, bob):
        user.enqueue()
        worker.complete_job(worker.claimed())
    db.execute(f"update private.attempts set {bad} where token = 1")
    db.execute("delete from private.model_stats")

    worker.recover_stale_jobs()

    assert db.value("select sample_count from private.model_stats") == 1
    assert skipped(db) == {}
