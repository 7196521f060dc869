"""sql/70_worker.sql and sql/72_claim.sql: register, claim, heartbeat, progress."""

from dataclasses import replace

import pytest
from actors import Worker
from database import assert_books_balance, unchanged

DEV = "black-forest-labs/flux-dev"
SCHNELL = "black-forest-labs/flux-schnell"
RECOVERED = "select private.recover_stale_jobs()"


@pytest.fixture
def rich(db, alice):
    """Alice with credits, and every model active."""
    db.execute("update public.models set is_active = true")
    db.lift_limits()
    return alice.has(credits=1000)


def test_a_claim_hands_out_all_a_worker_needs(rich, worker):
    job_id = rich.enqueued("a lighthouse", params={"num_outputs": 2, "seed": 7, "width": 64})

    job = worker.claimed()

    assert (job.id, str(job.user_id)) == (job_id, rich.id)
    assert (job.provider, job.provider_ref) == ("preview", "darkroom/preview")
    assert (job.attempt, job.image_count, job.deadline_seconds) == (1, 2, 300)
    assert (job.provider_input["prompt"], job.provider_input["seed"]) == ("a lighthouse", 7)
    assert (job.provider_job_id, job.image_inputs) == (None, ["image"])


def test_a_claim_takes_at_most_as_many_as_there_are_slots_in_order(db, alice, bob, worker):
    for user in (alice, bob):
        for _ in range(3):
            user.enqueue()
    with unchanged(db):
        assert worker.claim_jobs(0) == []

    claims = [worker.claim_jobs(4) for _ in range(3)]

    assert [len(jobs) for jobs in claims] == [4, 2, 0]
    tokens = [job.token for jobs in claims for job in jobs]
    assert tokens == sorted(tokens)
    assert_books_balance(db)


def test_a_claim_does_not_wait_for_another_one(alice, worker):
    first, second = alice.enqueued(), alice.enqueued()
    other = Worker(worker.db)

    with worker.connection.transaction():
        assert [worker.claimed().id, other.claimed().id] == [first, second]

    assert other.claim_jobs() == []


def test_delayed_jobs_are_claimed_when_they_are_due(db, alice, worker):
    job_id = alice.enqueued()
    worker.fail_job(worker.claimed(), "provider_error", retry_after=30)
    db.pass_time("29 seconds")
    assert worker.claim_jobs() == []

    db.pass_time("1 second")

    assert worker.claimed().id == job_id


def test_a_heartbeat_extends_leases_takes_in_progress_and_gives_each_its_verdict(db, alice, worker):
    for _ in range(3):
        alice.enqueue()
    healthy, stolen, stopped = worker.claim_jobs(3)
    alice.cancel_generation(stopped.id)
    db.pass_time("50 seconds")

    stolen = replace(stolen, token=stolen.token - 1000)
    verdicts = worker.heartbeat(stolen, stopped, healthy, progress=[99, 101, 30])
    worker.heartbeat(healthy)

    assert verdicts == ["lost", "canceled", "ok"]
    db.pass_time("50 seconds")
    assert worker.recover_stale_jobs() == 1  # the stolen one
    progress = db.execute("select progress from private.running_jobs order by token")
    assert [row["progress"] for row in progress] == [30, 100]


# What is paused waits.


def test_jobs_of_a_paused_provider_keep_place_attempt_and_checkpoint(db, rich, worker, service):
    waiting = [rich.enqueued(model=[DEV, SCHNELL][n % 2]) for n in range(4)]
    worker.checkpoint(first := worker.claimed(), "prediction-1")
    worker.fail_job(first, "internal")
    db.pass_time("2 seconds")
    preview, canceled = rich.enqueued(), rich.enqueued(model=DEV)
    service.pause_model("replicate")
    assert [job.id for job in worker.claim_jobs(4)] == [preview]
    assert {rich.get_job_status(job_id)["status"] for job_id in waiting} == {"queued"}
    rich.cancel_generation(canceled)
    later = rich.enqueued()

    service.resume_model("replicate")
    jobs = worker.claim_jobs(8)

    assert [job.id for job in jobs] == [*waiting, later]
    assert [job.attempt for job in jobs] == [2, 1, 1, 1, 1]
    assert jobs[0].provider_job_id == "prediction-1"


# While a look at the whole queue is dear, one session looks for all.


def due_in(db, name: str, seconds: float) -> None:
    query = "select setval(%s::regclass, (1000 * (extract(epoch from now()) + %s))::bigint)"
    db.execute(query, f"private.{name}", seconds)


@pytest.fixture
def below(db, alice, worker) -> str:
    """A job that lies below the clock."""
    job_id = alice.enqueued()
    worker.release_job(worker.claimed())
    db.execute("select setval('private.virtual_clock', 1000000000)")
    return job_id


def test_what_lies_below_the_clock_is_found_first_when_somebody_may_look(db, bob, below):
    due_in(db, "scan_due", 30)
    assert [Worker(db).claim_jobs() for _ in range(2)] == [[], []]
    bob.enqueue()

    due_in(db, "scan_due", -1)

    assert Worker(db).claimed().id == below


def test_recovery_waits_until_somebody_may_look(db, alice, worker):
    alice.enqueue()
    worker.claimed()
    db.pass_time("61 seconds")
    due_in(db, "recovery_due", 10)
    assert db.value(RECOVERED) == 0

    due_in(db, "recovery_due", -1)
    assert db.value(RECOVERED) == 1
