"""sql/72_claim.sql: jobs of a paused provider wait and lose neither place nor attempt."""

import pytest
from actors import PREVIEW
from database import assert_books_balance, unchanged

DEV = "black-forest-labs/flux-dev"


@pytest.fixture
def rich(db, alice):
    """Alice with credits, and every model active."""
    db.execute("update public.models set is_active = true")
    db.lift_limits()
    return alice.has(credits=1000)


def test_jobs_of_a_paused_provider_wait_while_others_are_claimed(db, rich, worker):
    waiting = [rich.enqueued(model=DEV) for _ in range(3)]
    preview = rich.enqueued(model=PREVIEW)
    worker.pause_provider("replicate", 60)

    assert [job.id for job in worker.claim_jobs(2)] == [preview]
    assert worker.claim_jobs(4) == []

    states = {rich.get_job_status(job_id)["status"] for job_id in waiting}
    assert states == {"queued"}
    assert_books_balance(db)


def test_after_the_pause_they_come_back_in_their_old_order(db, rich, worker):
    waiting = [rich.enqueued(model=DEV) for _ in range(3)]
    worker.pause_provider("replicate", 60)
    worker.claim_jobs(4)
    later = [rich.enqueued(model=PREVIEW) for _ in range(2)]

    db.pass_time("61 seconds")
    jobs = worker.claim_jobs(5)

    assert [job.id for job in jobs] == waiting + later
    assert {job.attempt for job in jobs} == {1}
    assert_books_balance(db)


def test_a_pile_of_paused_jobs_is_passed_in_one_claim_and_not_touched_again(db, rich, worker):
    for _ in range(25):
        rich.enqueue(model=DEV)
    preview = rich.enqueued(model=PREVIEW)
    worker.pause_provider("replicate", 60)

    assert [job.id for job in worker.claim_jobs(2)] == [preview]

    worker.let_the_next_claim_scan_all()
    with unchanged(db):
        assert worker.claim_jobs(2) == []


def test_a_pause_that_is_lifted_early_ends_when_the_jobs_are_due(db, rich, worker):
    job_id = rich.enqueued(model=DEV)
    worker.pause_provider("replicate", 60)
    worker.claim_jobs(1)
    db.execute("update private.providers set paused_until = null")

    assert worker.claim_jobs(1) == []
    db.pass_time("60 seconds")

    assert worker.claimed().id == job_id


def test_a_retry_of_a_paused_provider_keeps_count_and_checkpoint(db, rich, worker):
    rich.enqueue(model=DEV)
    job = worker.claimed()
    worker.checkpoint(job, "prediction-1")
    worker.fail_job(job, "internal", retry_after=0)
    worker.pause_provider("replicate", 60)
    assert worker.claim_jobs(1) == []

    db.pass_time("61 seconds")
    again = worker.claimed()

    assert (again.attempt, again.provider_job_id) == (2, "prediction-1")


def test_a_claim_names_the_inputs_to_sign(rich, worker):
    rich.enqueue(model=DEV)

    assert worker.claimed().image_inputs == ["image"]
