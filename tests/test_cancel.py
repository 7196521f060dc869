"""sql/77_cancel.sql and the ends in sql/75_outcomes.sql: what a cancel does, and who pays."""

import pytest
from actors import refused
from database import assert_books_balance, unchanged


def test_a_queued_job_is_canceled_and_refunded_at_once_and_once(db, alice, worker):
    job_id = alice.enqueued()

    state = alice.cancel_generation(job_id)

    assert (state["status"], state["refunded_credits"]) == ("canceled", 1)
    assert (state["prompt"], state["error"]) == ("a lighthouse at dusk", None)
    assert alice.credits() == 10
    assert worker.claim_jobs(1) == []
    with unchanged(db):
        assert alice.cancel_generation(job_id) == state


def test_a_running_job_is_marked_and_its_worker_told_once(alice, worker):
    worker.listening()
    job_id = alice.enqueued()
    job = worker.claimed()
    worker.wake_ups()

    states = [alice.cancel_generation(job_id)["status"] for _ in range(2)]

    assert states == ["processing", "processing"]
    assert worker.wake_ups() == ["cancel"]
    assert worker.heartbeat(job) == ["canceled"]
    with refused("DR002", "canceled"):
        worker.report_progress(job, "storing")


@pytest.mark.parametrize(("percent", "refunded"), [(100, 3), (50, 2), (0, 0)])
def test_once_the_provider_was_asked_the_operators_share_goes_back(
    db, alice, worker, percent, refunded
):
    db.execute("update private.settings set running_cancel_refund_percent = %s", percent)
    job_id = alice.enqueued(params={"num_outputs": 3})
    job = worker.claimed()
    alice.cancel_generation(job_id)

    worker.cancel_job(job)

    assert alice.credits() == 7 + refunded
    assert alice.get_job_status(job_id)["refunded_credits"] == refunded


NOT_BURNED = {
    "nobody asked": lambda worker, job: worker.cancel_job(job, {"is_asked": False}),
    "nothing is billed": lambda worker, job: worker.cancel_job(job, {"is_billed": False}),
    "released before it asked": lambda worker, job: worker.release_job(job, resumes=False),
    "it failed": lambda worker, job: worker.fail_job(job, "provider_error", metrics={"images": 1}),
    "its worker died": lambda worker, job: (
        worker.db.pass_time("61 seconds"),
        worker.recover_stale_jobs(),
    ),
}


@pytest.mark.parametrize("end", NOT_BURNED)
def test_who_canceled_pays_neither_for_our_failures_nor_for_what_nobody_bills(
    db, alice, worker, end
):
    db.execute("update private.settings set running_cancel_refund_percent = 0")
    job_id = alice.enqueued()
    job = worker.claimed()
    alice.cancel_generation(job_id)

    NOT_BURNED[end](worker, job)

    assert (alice.get_job_status(job_id)["status"], alice.credits()) == ("canceled", 10)
    assert db.value("select sum(day_burned) from public.entitlements") == 0


def test_who_canceled_what_then_failed_gets_back_what_the_failure_gives(db, alice, worker):
    db.execute("update private.error_codes set refund_percent = 40 where code = 'moderated'")
    job_id = alice.enqueued(params={"num_outputs": 3})
    job = worker.claimed()
    alice.cancel_generation(job_id)

    assert worker.fail_job(job, "moderated") == "canceled"

    assert alice.get_job_status(job_id)["refunded_credits"] == 2  # 1.2, in the user's favour
    assert_books_balance(db)


def test_a_user_burns_no_more_purchases_in_a_day_than_the_plan_allows(db, alice, worker):
    for _ in range(5):
        job_id = alice.enqueued()
        job = worker.claimed()
        alice.cancel_generation(job_id)
        worker.cancel_job(job)

    with unchanged(db), refused("PT429", "rate_limited") as refusal:
        alice.enqueue()

    assert "5 of them canceled" in refusal.detail
    assert 23 * 3600 < refusal.refusal.retry_after <= 24 * 3600
    db.pass_time("1 day")
    assert alice.enqueue()["status"] == "queued"


def test_a_batch_is_canceled_whole(db, alice, bob, worker):
    db.lift_limits()
    batch_id = alice.enqueue_batch(["one", "two", "three"])["batch_id"]
    done, running = worker.claim_jobs(2)
    worker.complete_job(done)

    canceled = alice.cancel_batch(batch_id)

    assert (canceled["completed"], canceled["processing"], canceled["canceled"]) == (1, 1, 1)
    assert worker.heartbeat(running) == ["canceled"]
    assert alice.credits() == 8
    for call in (bob.cancel_batch, bob.get_batch_status):
        with unchanged(db), refused("PT404", "not_found"):
            call(batch_id)
    assert_books_balance(db)
