"""sql/74_purchase.sql: what keeps a picture from being bought twice."""

from dataclasses import replace
from hashlib import sha256

import pytest
from actors import Worker, outcome, refused, together
from database import assert_books_balance, unchanged


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


def test_the_first_create_has_nothing_before_it(job):
    assert job.begun_before is None


def test_something_may_be_bought_from_the_claim_on(db, worker, job):
    claimed_at = db.value("select claimed_at from private.running_jobs")

    assert worker.begin_create(job) == claimed_at


LOSSES = {
    "release": lambda worker, job: worker.release_job(job),
    "internal": lambda worker, job: worker.fail_job(job, "internal"),
    "provider_timeout": lambda worker, job: worker.fail_job(job, "provider_timeout"),
    "lease lost": lambda worker, job: None,
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_create_of_unknown_outcome_is_remembered(db, worker, job, loss):
    LOSSES[loss](worker, job)

    again = claim_again(db, worker)

    assert again.id == job.id
    begun = db.value("select claimed_at - interval '1 second' from private.running_jobs")
    assert again.begun_before < begun
    assert worker.begin_create(again) == again.begun_before
    worker.release_job(again)
    assert worker.claimed().begun_before == again.begun_before


@pytest.mark.parametrize("end", ["internal", "release"])
def test_a_job_the_provider_was_not_asked_for_has_nothing_to_look_for(db, worker, job, end):
    if end == "release":
        worker.release_job(job, resumes=False)
    else:
        worker.fail_job(job, end, metrics={"is_asked": False})

    assert claim_again(db, worker).begun_before is None


@pytest.mark.parametrize("code", ["provider_busy", "provider_error", "result_lost"])
def test_a_create_of_known_outcome_is_forgotten(db, worker, job, code):
    worker.checkpoint(job, "prediction-1")
    worker.fail_job(job, code)

    again = claim_again(db, worker)

    assert again.provider_job_id is None
    assert again.begun_before is None


def test_a_job_released_before_anything_was_bought_starts_anew(db, worker, job):
    worker.release_job(job, resumes=False)

    again = worker.claimed()
    assert (again.attempt, again.provider_job_id, again.begun_before) == (1, None, None)


def test_the_oldest_candidate_nobody_has_is_adopted(db, alice, worker):
    mine, running, done, waiting = running_jobs(db, alice, worker, 4)
    worker.checkpoint(running, "running")
    worker.checkpoint(done, "done")
    worker.complete_job(done)
    worker.checkpoint(waiting, "waiting")
    worker.release_job(waiting)

    adopted = worker.adopt_provider_job(mine, "done", "running", "waiting", "lost-1", "lost-2")

    assert adopted == "lost-1"
    query = "select provider_job_id from private.running_jobs where job_id = %s"
    assert db.value(query, mine.job_id) == "lost-1"
    assert_books_balance(db)


@pytest.mark.parametrize("candidates", [[], ["running"]])
def test_where_all_candidates_are_taken_nothing_is_adopted(db, alice, worker, candidates):
    mine, running = running_jobs(db, alice, worker, 2)
    worker.checkpoint(running, "running")

    with unchanged(db):
        assert worker.adopt_provider_job(mine, *candidates) is None


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


SAID = {"checkpoint": "23505", "adopt_provider_job": None}


@pytest.mark.parametrize("call", SAID)
@pytest.mark.parametrize("whereabouts", WHEREABOUTS)
def test_what_a_job_has_bought_is_never_anothers(db, alice, worker, whereabouts, call):
    mine, other = running_jobs(db, alice, worker, 2)
    worker.checkpoint(other, "bought")
    WHEREABOUTS[whereabouts](worker, other)
    db.execute("delete from private.attempts")  # as retention does one day

    with unchanged(db):
        answer = outcome(lambda: getattr(worker, call)(mine, "bought"))

    assert getattr(answer, "code", answer) == SAID[call]
    assert db.value("select count(*) from private.purchases") == 1


def test_jobs_that_are_told_of_one_purchase_at_once_do_not_share_it(db, alice, worker):
    jobs = running_jobs(db, alice, worker, 8)
    workers = [Worker(db) for _ in jobs]

    told = together(
        [
            lambda w=w, job=job: outcome(lambda: w.checkpoint(job, "bought"))
            for w, job in zip(workers, jobs, strict=True)
        ]
    )

    assert told.count(None) == 1
    assert {each.code for each in told if each} == {"23505"}
    assert db.value("select count(provider_job_id) from private.running_jobs") == 1


def test_one_call_does_not_give_a_purchase_to_two_jobs(db, alice, worker):
    jobs = running_jobs(db, alice, worker, 2)

    with unchanged(db), refused("23505"):
        worker.of_many("checkpoint_jobs", [(job, "bought") for job in jobs])


def test_a_checkpoint_whose_answer_was_lost_is_answered_again(db, worker, job):
    worker.checkpoint(job, "bought")

    with unchanged(db):
        worker.checkpoint(job, "bought")


def test_a_job_may_buy_more_than_once(db, worker, job):
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


SENT = sha256(b"an input with an address").digest()


@pytest.mark.parametrize("loss", LOSSES)
def test_what_was_asked_for_is_remembered_with_a_create_of_unknown_outcome(db, worker, job, loss):
    worker.begin_create(job, SENT)
    worker.begin_create(job)
    LOSSES[loss](worker, job)

    again = claim_again(db, worker)

    assert worker.recall_create(again) == (again.begun_before, SENT)
    worker.release_job(again, resumes=False)
    assert worker.recall_create(worker.claimed())[1] is None


def test_a_stranger_who_holds_every_lock_there_is_holds_up_no_adoption(db, monitor, worker, job):
    monitor.connection.execute(
        "select pg_advisory_lock(hashtextextended('darkroom.' || name, 0))"
        " from unnest('{adopt_provider_job,refresh_model_stats}'::text[]) as t (name)"
    )
    worker.connection.execute("set statement_timeout = '2s'")

    assert worker.adopt_provider_job(job, "lost-1") == "lost-1"


def test_an_adoption_whose_answer_was_lost_is_answered_again(worker, job):
    worker.adopt_provider_job(job, "p1", "p2")

    assert worker.adopt_provider_job(job, "p1", "p2") == "p1"
    assert worker.adopt_provider_job(job) == "p1"


def test_an_adopted_job_is_resumed_by_the_next_attempt(db, worker, job):
    worker.adopt_provider_job(job, "lost-1")

    assert claim_again(db, worker).provider_job_id == "lost-1"


CALLS = {
    "begin_create": lambda worker, job: worker.begin_create(job),
    "recall_create": lambda worker, job: worker.recall_create(job),
    "adopt_provider_job": lambda worker, job: worker.adopt_provider_job(job, "lost-1"),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_lost_lease_begins_and_adopts_nothing(db, worker, job, call):
    with unchanged(db), refused("DR001", "lease_lost"):
        CALLS[call](worker, replace(job, token=job.token + 1))


def test_adopting_again_answers_the_same_whatever_is_found_now(worker, job):
    worker.adopt_provider_job(job, "lost-1")

    assert worker.adopt_provider_job(job, "lost-1", "lost-2") == "lost-1"
    assert worker.adopt_provider_job(job, "lost-2") == "lost-1"
