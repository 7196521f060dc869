"""sql/74_purchase.sql: what keeps a picture from being bought twice."""

from hashlib import sha256

import pytest
from actors import Worker, refused, together
from database import assert_books_balance, unchanged

SENT = sha256(b"an input with an address").digest()


@pytest.fixture
def job(alice, worker):
    """A running job of alice's."""
    alice.enqueue()
    return worker.claimed()


def claim_again(db, worker):
    """Claim the job after any backoff or lease."""
    db.pass_time("61 seconds")
    worker.recover_stale_jobs()
    db.pass_time("61 seconds")
    return worker.claimed()


def running_jobs(db, alice, worker, count):
    """Return that many running jobs."""
    db.lift_limits()
    alice.has(credits=count)
    for _ in range(count):
        alice.enqueue()
    return worker.claim_jobs(count)


# How an attempt ends, and whether something may have been bought that is not known.
ENDS = {
    "release": True,
    "lease lost": True,
    "provider_timeout": True,
    "internal": True,
    "worker_full": True,
    "storage_unavailable": True,
    "provider_busy": False,
    "provider_error": False,
    "result_lost": False,
    "internal, not asked": False,
    "released before it asked": False,
}


@pytest.mark.parametrize("is_checkpointed", [True, False])
@pytest.mark.parametrize("end", ENDS)
def test_the_next_attempt_resumes_and_looks_for_only_what_may_be_alive(
    db, worker, job, end, is_checkpointed
):
    assert job.begun_before is None
    claimed_at = db.value("select claimed_at from private.running_jobs")  # it may buy from then on
    assert worker.begin_create(job, SENT) == worker.begin_create(job) == claimed_at
    if is_checkpointed:
        worker.checkpoint(job, "prediction-1")
    code, _, is_asked = end.partition(", ")
    if end.startswith("release"):
        worker.release_job(job, resumes=end == "release")
    elif end != "lease lost":
        worker.fail_job(job, code, metrics={"is_asked": not is_asked})

    again = claim_again(db, worker)

    begun_before, sent = worker.recall_create(again)
    assert again.provider_job_id == ("prediction-1" if ENDS[end] and is_checkpointed else None)
    assert again.begun_before == (begun_before if ENDS[end] else None)
    assert sent == (SENT if ENDS[end] else None)


def test_the_oldest_candidate_nobody_has_is_adopted_and_resumed(db, alice, worker):
    mine, running, done, waiting = running_jobs(db, alice, worker, 4)
    worker.checkpoint(running, "running")
    worker.checkpoint(done, "done")
    worker.complete_job(done)
    worker.checkpoint(waiting, "waiting")
    worker.fail_job(waiting, "internal", retry_after=3600)
    taken = ["done", "running", "waiting"]
    with unchanged(db):
        assert worker.adopt_provider_job(mine, *taken) is None

    assert worker.adopt_provider_job(mine, *taken, "lost-1", "lost-2") == "lost-1"

    with unchanged(db):  # the answer was lost, and another one is found now
        for found in ([], ["lost-1", "lost-2"], ["lost-2"]):
            assert worker.adopt_provider_job(mine, *found) == "lost-1"
    worker.release_job(mine)
    assert worker.claimed().provider_job_id == "lost-1"
    assert_books_balance(db)


def test_jobs_that_look_alike_never_adopt_the_same_provider_job(db, alice, worker):
    jobs = running_jobs(db, alice, worker, 12)
    workers = [Worker(db) for _ in jobs]
    found = [f"lost-{number}" for number in range(8)]

    adopted = together(
        [
            lambda w=w, job=job: w.adopt_provider_job(job, *found)
            for w, job in zip(workers, jobs, strict=True)
        ]
    )

    assert sorted(each for each in adopted if each) == found
    assert adopted.count(None) == 4


WHEREABOUTS = {
    "running": lambda worker, job: None,
    "waiting": lambda worker, job: worker.release_job(job),
    "retried from the start": lambda worker, job: worker.fail_job(job, "provider_error"),
    "failed": lambda worker, job: worker.fail_job(job, "moderated"),
    "done": lambda worker, job: worker.complete_job(job),
}


@pytest.mark.parametrize("whereabouts", WHEREABOUTS)
def test_what_a_job_has_bought_is_never_anothers(db, alice, worker, whereabouts):
    mine, other = running_jobs(db, alice, worker, 2)
    worker.checkpoint(other, "bought")
    WHEREABOUTS[whereabouts](worker, other)
    db.execute("delete from private.attempts")  # as retention does one day

    with unchanged(db):
        assert worker.adopt_provider_job(mine, "bought") is None
        with refused("23505"):
            worker.checkpoint(mine, "bought")
    assert db.value("select count(*) from private.purchases") == 1
