"""sql/77_cancel.sql and the ends in sql/75_outcomes.sql: what a cancel does, and who pays."""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from actors import User, refused
from database import assert_books_balance, unchanged


def test_a_queued_job_is_canceled_and_refunded_at_once(db, alice, worker):
    job_id = alice.enqueued()

    state = alice.cancel_generation(job_id)

    assert (state["status"], state["refunded_credits"]) == ("canceled", 1)
    assert (state["prompt"], state["error"]) == ("a lighthouse at dusk", None)
    assert alice.credits() == 10
    assert worker.claim_jobs(1) == []
    assert_books_balance(db)


def test_canceling_again_changes_nothing(db, alice):
    job_id = alice.enqueued()
    first = alice.cancel_generation(job_id)

    with unchanged(db):
        assert alice.cancel_generation(job_id) == first


def test_a_running_job_is_marked_and_its_worker_told(db, alice, worker):
    worker.listening()
    job_id = alice.enqueued()
    job = worker.claimed()
    worker.wake_ups()

    state = alice.cancel_generation(job_id)

    assert state["status"] == "processing"
    assert worker.wake_ups() == ["cancel"]
    assert worker.heartbeat(job) == ["canceled"]
    with refused("DR002", "canceled"):
        worker.report_progress(job, "storing")


def test_only_the_first_cancel_of_a_running_job_notifies(alice, worker):
    worker.listening()
    job_id = alice.enqueued()
    worker.claimed()
    alice.cancel_generation(job_id)
    worker.wake_ups()

    alice.cancel_generation(job_id)

    assert worker.wake_ups() == []


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (lambda worker, job: worker.cancel_job(job), "canceled"),
        (lambda worker, job: worker.fail_job(job, "provider_error"), "canceled"),
        (lambda worker, job: worker.release_job(job), "canceled"),
        (lambda worker, job: worker.complete_job(job), "completed"),
    ],
    ids=["cancel_job", "fail_job", "release_job", "complete_job"],
)
def test_however_its_attempt_ends_a_marked_job_is_not_queued_again(db, alice, worker, end, outcome):
    job_id = alice.enqueued()
    job = worker.claimed()
    alice.cancel_generation(job_id)

    end(worker, job)
    with unchanged(db):
        end(worker, job)  # the answer was lost

    assert alice.get_job_status(job_id)["status"] == outcome
    assert db.value("select outcome from private.attempts") == outcome
    assert alice.credits() == (9 if outcome == "completed" else 10)
    assert_books_balance(db)


@pytest.mark.parametrize("clock", ["lease_until", "deadline_at"])
def test_recovery_cancels_what_a_dead_worker_was_told_to(db, alice, worker, clock):
    job_id = alice.enqueued()
    worker.claimed()
    alice.cancel_generation(job_id)
    db.execute(f"update private.running_jobs set {clock} = now() - interval '1 second'")

    worker.recover_stale_jobs()

    assert alice.get_job_status(job_id)["status"] == "canceled"
    assert_books_balance(db)


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
    assert alice.get_entitlement()["active_jobs"] == 0


def run_out(clock):
    """Have the clock of a running job run out, and the job recovered."""

    def end(worker, job):
        query = f"update private.running_jobs set {clock} = now() - interval '1 second'"
        worker.db.execute(query)
        worker.recover_stale_jobs()

    return end


BROKE_OFF = {
    "it failed": lambda worker, job: worker.fail_job(job, "provider_timeout"),
    "it was released": lambda worker, job: worker.release_job(job),
    "its worker died": run_out("lease_until"),
}
NOT_BURNED = {
    "nobody asked": lambda worker, job: worker.cancel_job(job, {"is_asked": False}),
    "nothing is billed": lambda worker, job: worker.cancel_job(job, {"is_billed": False}),
    "released before it asked": lambda worker, job: worker.release_job(job, resumes=False),
    "its worker died": BROKE_OFF["its worker died"],
    "its deadline passed": run_out("deadline_at"),
} | {
    code: lambda worker, job, code=code: worker.fail_job(job, code, metrics={"images": 1})
    for code in (
        "provider_error",
        "provider_timeout",
        "timeout",
        "internal",
        "moderated",
        "no-code",
    )
}


@pytest.fixture
def dear(db):
    """Nothing goes back of what is burned."""
    db.execute("update private.settings set running_cancel_refund_percent = 0")


def burned(db):
    """How many purchases count as burned, for the limit and for health."""
    counted = db.value("select sum(day_burned) from public.entitlements")
    assert db.value("select private.rates_health() -> 'burned_of_15_minutes'") == counted
    return counted


@pytest.mark.parametrize("end", NOT_BURNED)
def test_who_canceled_pays_neither_for_our_failures_nor_for_what_nobody_bills(
    db, alice, worker, dear, end
):
    job_id = alice.enqueued()
    job = worker.claimed()
    alice.cancel_generation(job_id)

    NOT_BURNED[end](worker, job)

    assert alice.get_job_status(job_id)["status"] == "canceled"
    assert alice.credits() == 10
    assert burned(db) == 0


@pytest.mark.parametrize("end", BROKE_OFF)
def test_a_job_whose_attempt_broke_off_waits_and_is_canceled_for_nothing(
    db, alice, worker, dear, end
):
    job_id = alice.enqueued()
    job = worker.claimed()
    worker.checkpoint(job, "prediction")
    BROKE_OFF[end](worker, job)

    alice.cancel_generation(job_id)

    assert alice.credits() == 10
    assert burned(db) == 0


@pytest.mark.parametrize(("plan", "most"), [("free", 5), ("paid", 50)])
def test_a_user_burns_no_more_purchases_in_a_day_than_the_plan_allows(db, worker, plan, most):
    user = User(db)
    if plan == "paid":
        user.has_paid()
    for _ in range(most):
        job_id = user.enqueued()
        job = worker.claimed()
        user.cancel_generation(job_id)
        worker.cancel_job(job)
    assert user.credits() == 10

    for call in (
        user.enqueue,
        lambda: user.enqueue_batch(["a"]),
        lambda: user.retry_generation(job_id),
    ):
        with unchanged(db), refused("PT429", "rate_limited") as refusal:
            call()

    assert f"{most} of them canceled" in refusal.detail
    assert 23 * 3600 < refusal.refusal.retry_after <= 24 * 3600
    db.pass_time("1 day")
    assert user.enqueue()["status"] == "queued"
    assert user.cancel_generation(user.enqueued())["status"] == "canceled"


def test_what_is_burned_is_told_in_health(db, alice, bob, service, worker):
    db.execute("update private.alert_rules set threshold = 1 where alert = 'burned'")
    for user in (alice, bob):
        job_id = user.enqueued()
        job = worker.claimed()
        user.cancel_generation(job_id)
        assert "burned" not in service.alerts()
        worker.cancel_job(job)

    said = "2 running jobs canceled in 15 minutes, by 2 users: the provider may bill them"
    assert service.alerts() == {"burned": said}
    db.pass_time("15 minutes")
    assert service.alerts() == {}


def test_a_worker_cannot_cancel_what_nobody_asked_it_to(db, alice, worker):
    alice.enqueue()
    job = worker.claimed()

    with unchanged(db), refused("22023"):
        worker.cancel_job(job)


def test_a_lost_lease_cannot_cancel(db, alice, worker):
    job_id = alice.enqueued()
    job = worker.claimed()
    alice.cancel_generation(job_id)
    db.execute("update private.running_jobs set token = nextval('private.lease_tokens')")

    with unchanged(db), refused("DR001"):
        worker.cancel_job(job)


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_what_has_ended_otherwise_is_not_canceled(db, alice, worker, status):
    job_id = alice.enqueued()
    job = worker.claimed()
    if status == "completed":
        worker.complete_job(job)
    else:
        worker.fail_job(job, "moderated")

    with unchanged(db), refused("PT409", "already_finished"):
        alice.cancel_generation(job_id)


def test_another_users_job_is_not_found(db, alice, bob):
    job_id = bob.enqueued()

    with unchanged(db), refused("PT404", "not_found"):
        alice.cancel_generation(job_id)
    with unchanged(db), refused("PT404", "not_found"):
        alice.cancel_generation(str(uuid.uuid4()))


def test_a_batch_is_canceled_whole(db, alice, worker):
    db.lift_limits()
    batch = alice.enqueue_batch(["one", "two", "three"])
    done, running = worker.claim_jobs(2)
    worker.complete_job(done)

    canceled = alice.cancel_batch(batch["batch_id"])

    assert (canceled["completed"], canceled["processing"], canceled["canceled"]) == (1, 1, 1)
    assert worker.heartbeat(running) == ["canceled"]
    assert alice.credits() == 8
    assert_books_balance(db)


def test_another_users_batch_is_not_found(db, alice, bob):
    batch = bob.enqueue_batch(["one"])

    for call in (alice.cancel_batch, alice.get_batch_status):
        with unchanged(db), refused("PT404", "not_found"):
            call(batch["batch_id"])


def test_a_cancel_waits_for_a_claim_and_then_finds_the_job_running(db, alice, worker):
    job_id = alice.enqueued()

    with worker.connection.transaction():
        job = worker.claimed()
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(alice.cancel_generation, job_id)
            db.wait_for_lock(alice.connection)
            worker.connection.execute("commit")
            state = pending.result()

    assert state["status"] == "processing"
    assert worker.heartbeat(job) == ["canceled"]
