"""sql/74_purchase.sql: what keeps a picture from being bought twice."""

from hashlib import sha256

import pytest
from actors import Worker, outcome, refused, together
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


def test_something_may_be_bought_from_the_claim_on(db, worker, job):
    assert job.begun_before is None
    assert worker.begin_create(job) == db.value("select claimed_at from private.running_jobs")


LOSSES = {
    "release": lambda worker, job: worker.release_job(job),
    "internal": lambda worker, job: worker.fail_job(job, "internal"),
    "provider_timeout": lambda worker, job: worker.fail_job(job, "provider_timeout"),
    "lease lost": lambda worker, job: None,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_create_of_unknown_outcome_is_remembered_with_what_was_asked_for(db, worker, job, loss):
    worker.begin_create(job, SENT)
    worker.begin_create(job)
    LOSSES[loss](worker, job)

    again = claim_again(db, worker)

    begun = db.value("select claimed_at - interval '1 second' from private.running_jobs")
    assert again.begun_before < begun
    assert worker.begin_create(again) == again.begun_before
    assert worker.recall_create(again) == (again.begun_before, SENT)
    worker.release_job(again)
    assert worker.claimed().begun_before == again.begun_before


# What the next attempt resumes, looks for, or does not have to look for.
KNOWN = {
    "released before it asked": lambda worker, job: worker.release_job(job, resumes=False),
    "not asked": lambda worker, job: worker.fail_job(job, "internal", metrics={"is_asked": False}),
} | {
    code: lambda worker, job, code=code: worker.fail_job(job, code)
    for code in ("provider_busy", "provider_error", "result_lost")
}


@pytest.mark.parametrize("end", KNOWN)
def test_a_create_of_known_outcome_is_forgotten(db, worker, job, end):
    worker.begin_create(job, SENT)
    KNOWN[end](worker, job)

    again = claim_again(db, worker)

    assert (again.provider_job_id, again.begun_before) == (None, None)
    assert worker.recall_create(again)[1] is None


@pytest.mark.parametrize(
    ("code", "resumes"),
    [
        ("provider_timeout", True),
        ("internal", True),
        ("worker_full", True),
        ("storage_unavailable", True),
        ("provider_busy", False),
        ("provider_error", False),
        ("result_lost", False),
    ],
)
def test_the_next_attempt_resumes_only_what_may_be_alive(db, worker, job, code, resumes):
    worker.checkpoint(job, "prediction-1")
    worker.fail_job(job, code)

    again = claim_again(db, worker)

    assert again.provider_job_id == ("prediction-1" if resumes else None)
    assert (again.begun_before is not None) == resumes
    assert db.value("select provider_job_id from private.attempts") == "prediction-1"


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


def test_jobs_that_are_told_of_one_purchase_at_once_do_not_share_it(db, alice, worker):
    jobs = running_jobs(db, alice, worker, 8)
    workers = [Worker(db) for _ in jobs]
    with unchanged(db), refused("23505"):
        worker.of_many("checkpoint_jobs", [(job, "bought") for job in jobs])

    told = together(
        [
            lambda w=w, job=job: outcome(lambda: w.checkpoint(job, "bought"))
            for w, job in zip(workers, jobs, strict=True)
        ]
    )

    assert told.count(None) == 1
    assert {each.code for each in told if each} == {"23505"}
    assert db.value("select count(provider_job_id) from private.running_jobs") == 1


def test_a_job_may_buy_more_than_once_and_each_answer_may_be_lost(db, worker, job):
    worker.checkpoint(job, "first")
    worker.fail_job(job, "provider_error")
    again = claim_again(db, worker)
    worker.checkpoint(again, "second")

    with unchanged(db):
        worker.checkpoint(again, "second")
    assert db.value("select count(*) from private.purchases") == 2


@pytest.mark.parametrize("way", ["user", "generation"])
def test_what_was_bought_is_erased_with_its_job(db, alice, worker, job, way):
    worker.checkpoint(job, "bought")
    if way == "user":
        db.execute("delete from auth.users where id = %s", alice.id)
    else:
        worker.complete_job(job)
        db.execute("delete from public.generations")

    assert db.value("select count(*) from private.purchases") == 0
