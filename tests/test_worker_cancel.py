"""A real worker whose jobs are canceled: told within a second, stopped at the provider."""

import signal
import time

import pytest
from shared_worker import shared_worker
from worker_process import eventually

SCHNELL = "black-forest-labs/flux-schnell"

world, db, workers = shared_worker(
    "running_cancel_refund_percent = 0",  # what was bought is paid for
    WORKER_POLL_SECONDS=60,
)


def canceled(workers, user, job_id):
    """Have a job canceled; return how many seconds it takes."""
    user.cancel_generation(job_id)
    asked = time.monotonic()
    workers.until(job_id, "canceled")
    return time.monotonic() - asked


def test_a_canceled_job_is_stopped_at_the_provider_within_a_second_and_paid_for(db, alice, workers):
    job_id = workers.running(alice, seconds=60)
    running = workers.checkpointed(job_id)

    assert canceled(workers, alice, job_id) < 1

    workers.process.logged(f"job.canceled job={job_id}")
    prediction = workers.fake.predictions[running["provider_job_id"]]
    attempt = db.row("select * from private.attempts where generation_id = %s", job_id)
    assert (prediction["status"], attempt["outcome"]) == ("canceled", "canceled")
    seconds = prediction["metrics"]["predict_time"]  # it bills them
    assert attempt["provider_seconds"] == pytest.approx(seconds)
    query = "select credits, day_burned from public.entitlements where user_id = %s"
    assert db.row(query, alice.id) == {"credits": 9, "day_burned": 1}


@pytest.mark.parametrize("create", [{"slow": {"create": 1}}, {"answer": None, "stored": True}])
def test_a_cancel_during_the_create_stops_what_it_buys(alice, workers, create):
    fake = workers.fake
    before = len(fake.predictions)
    fake.next(**create, seconds=60)
    job_id = alice.enqueued(model=SCHNELL)
    fake.until(lambda: len(fake.predictions) > before)
    eventually(lambda: "slow" in create or workers.checkpointed(job_id))

    canceled(workers, alice, job_id)

    assert [each["status"] for each in fake.predictions.values()][before:] == ["canceled"]


def test_who_cancels_before_this_attempt_has_bought_anything_pays_nothing(db, alice, workers):
    fake, process = workers.fake, workers.process
    creates, requests = len(fake.creates), len(fake.requests)
    process.signal(signal.SIGSTOP)
    job_id = alice.enqueued(model=SCHNELL)
    earlier = "update private.ready_jobs set create_started_at = now() - interval '1 minute'"
    db.execute(f"{earlier} where job_id = %s", job_id)
    process.signal(signal.SIGCONT)
    fake.until(lambda: "GET" in {each.method for each in fake.requests[requests:]})

    canceled(workers, alice, job_id)  # while it looks for what the earlier attempt has bought

    assert (alice.credits(), len(fake.creates)) == (10, creates)
