"""sql/70_worker.sql: register, claim, heartbeat, checkpoint, progress."""

import uuid
from dataclasses import replace

import pytest
from actors import Job, Worker, refused, together
from database import assert_books_balance, unchanged


def lost(job: Job) -> Job:
    """Return the job as a worker knows it whose lease somebody else has by now."""
    return replace(job, token=job.token - 1)


def test_a_worker_learns_its_id_channel_and_intervals(db):
    first, second = Worker(db, slots=3), Worker(db)

    assert first.id != second.id
    assert first.channel == f"darkroom_worker_{first.id}"
    assert (first.heartbeat_seconds, first.lease_seconds) == (15, 60)
    row = db.row("select host, slots, version, asleep from private.workers where id = %s", first.id)
    assert row == {"host": "test", "slots": 3, "version": "1", "asleep": False}


def test_a_worker_that_has_stopped_is_not_woken(alice, worker):
    worker.listening().sleep()

    worker.unregister_worker()
    alice.enqueue()

    assert worker.wake_ups() == []


def test_a_claim_hands_out_all_a_worker_needs(db, alice, worker):
    job_id = alice.enqueued("a lighthouse", params={"num_outputs": 2, "seed": 7, "width": 64})

    job = worker.claimed()

    assert (job.id, str(job.user_id)) == (job_id, alice.id)
    assert (job.provider, job.provider_ref) == ("preview", "darkroom/preview")
    assert (job.attempt, job.image_count, job.deadline_seconds) == (1, 2, 300)
    assert (job.provider_input["prompt"], job.provider_input["seed"]) == ("a lighthouse", 7)
    assert job.provider_job_id is None
    assert_books_balance(db)


def test_a_claim_takes_at_most_as_many_as_there_are_slots(db, alice, bob, worker):
    for user in (alice, bob):
        for _ in range(3):
            user.enqueue()

    assert [len(worker.claim_jobs(4)) for _ in range(3)] == [4, 2, 0]
    assert_books_balance(db)


def test_without_slots_nothing_is_claimed(db, alice, worker):
    alice.enqueue()

    with unchanged(db):
        assert worker.claim_jobs(0) == []


def test_jobs_come_in_the_order_of_the_queue_and_their_tokens_rise(alice, worker):
    queued = [alice.enqueued() for _ in range(3)]

    jobs = worker.claim_jobs(3)

    assert [job.id for job in jobs] == queued
    assert [job.token for job in jobs] == sorted(job.token for job in jobs)


def test_a_claim_does_not_wait_for_another_one(db, alice, worker):
    first, second = alice.enqueued(), alice.enqueued()
    other = Worker(db)

    with worker.connection.transaction():
        assert worker.claimed().id == first
        assert other.claimed().id == second

    assert worker.claim_jobs() == []


def test_many_workers_never_get_the_same_job(db, alice):
    db.lift_limits()
    alice.has(credits=120)
    for _ in range(120):
        alice.enqueue()
    workers = [Worker(db) for _ in range(8)]

    def claim_all(worker: Worker) -> list[Job]:
        jobs: list[Job] = []
        while claimed := worker.claim_jobs(3):
            jobs += claimed
        return jobs

    jobs = [job for share in together([lambda w=w: claim_all(w) for w in workers]) for job in share]

    assert len(jobs) == len({job.id for job in jobs}) == len({job.token for job in jobs}) == 120
    assert_books_balance(db)


def test_delayed_jobs_are_claimed_when_they_are_due(db, alice, worker):
    job_id = alice.enqueued()
    worker.fail_job(worker.claimed(), "provider_error", retry_after=30)
    db.pass_time("29 seconds")
    assert worker.claim_jobs() == []

    db.pass_time("1 second")

    assert worker.claimed().id == job_id


def test_jobs_below_the_low_water_mark_are_found_all_the_same(db, alice, worker):
    job_id = alice.enqueued()
    worker.release_job(worker.claimed())
    db.execute("select setval('private.virtual_clock', 1000000000)")

    worker.let_the_next_claim_scan_all()

    assert worker.claimed().id == job_id


def test_a_claim_may_start_at_the_low_water_mark(db, alice, bob, worker):
    alice.enqueue()
    worker.claimed()
    db.execute("select setval('private.virtual_clock', 1000000000)")

    job_id = bob.enqueued()

    assert worker.claimed().id == job_id


def test_a_worker_that_claims_is_awake(db, alice, worker):
    alice.enqueue()
    worker.sleep()

    worker.claimed()

    assert db.value("select asleep from private.workers") is False


def test_a_worker_that_finds_nothing_stays_asleep(db, worker):
    worker.sleep()

    worker.claim_jobs()

    assert db.value("select asleep from private.workers") is True


def test_a_heartbeat_extends_the_leases_and_takes_in_progress(db, alice, worker):
    alice.enqueue()
    alice.enqueue()
    jobs = worker.claim_jobs(2)
    db.pass_time("50 seconds")

    assert worker.heartbeat(*jobs, progress=[30, None]) == ["ok", "ok"]

    db.pass_time("50 seconds")
    assert worker.recover_stale_jobs() == 0
    progress = db.execute("select progress from private.running_jobs order by token")
    assert [row["progress"] for row in progress] == [30, None]


def test_a_heartbeat_without_progress_keeps_the_last(db, alice, worker):
    alice.enqueue()
    job = worker.claimed()
    worker.heartbeat(job, progress=[30])

    worker.heartbeat(job)

    assert db.value("select progress from private.running_jobs") == 30


def test_a_heartbeat_tells_each_job_its_own_verdict(db, alice, worker):
    for _ in range(3):
        alice.enqueue()
    healthy, stolen, stopped = worker.claim_jobs(3)
    db.execute(
        "update private.running_jobs set cancel_requested = true where job_id = %s", stopped.id
    )

    verdicts = worker.heartbeat(lost(stolen), stopped, healthy)

    assert verdicts == ["lost", "canceled", "ok"]


def test_a_heartbeat_with_a_lost_token_extends_nothing(db, alice, worker):
    alice.enqueue()
    job = worker.claimed()
    db.pass_time("61 seconds")

    assert worker.heartbeat(lost(job), progress=[99]) == ["lost"]

    assert worker.recover_stale_jobs() == 1


def test_an_idle_worker_beats_too(db, worker):
    db.pass_time("1 hour")

    assert worker.heartbeat() == []

    assert db.value("select now() - seen_at < interval '1 minute' from private.workers")


def test_a_checkpoint_outlives_the_worker(db, alice, worker):
    alice.enqueue()
    worker.checkpoint(worker.claimed(), "prediction-1")
    db.pass_time("61 seconds")
    worker.recover_stale_jobs()
    db.pass_time("61 seconds")

    job = worker.claimed()

    assert (job.provider_job_id, job.attempt) == ("prediction-1", 2)


def test_progress_is_reported_at_once(alice, worker):
    job_id = alice.enqueued()
    job = worker.claimed()
    worker.report_progress(job, "generating", 40)

    worker.report_progress(job, "storing")

    status = alice.get_job_status(job_id)
    assert (status["stage"], status["progress"]) == ("storing", 40)


def test_a_canceled_job_is_told_so_when_it_reports(db, alice, worker):
    alice.enqueue()
    job = worker.claimed()
    db.execute("update private.running_jobs set cancel_requested = true")

    with unchanged(db), refused("DR002", "canceled"):
        worker.report_progress(job, "storing")


@pytest.mark.parametrize("call", ["checkpoint", "report_progress"])
def test_late_reports_change_nothing(db, alice, worker, call):
    alice.enqueue()
    job = worker.claimed()
    nobodys = replace(job, job_id=uuid.uuid4())

    for late in (lost(job), nobodys):
        with unchanged(db), refused("DR001", "lease_lost"):
            getattr(worker, call)(late, "storing")


@pytest.mark.parametrize(("said", "kept"), [(101, 100), (-1, 0)])
def test_a_progress_that_is_no_percentage_is_cut_to_one(alice, worker, said, kept):
    job_id = alice.enqueued()

    worker.report_progress(worker.claimed(), "storing", said)

    assert alice.get_job_status(job_id)["progress"] == kept


def test_one_jobs_bad_progress_costs_the_others_no_beat(db, alice, worker):
    alice.enqueue()
    alice.enqueue()
    jobs = worker.claim_jobs(2)
    db.pass_time("50 seconds")

    worker.heartbeat(*jobs, progress=[101, 50])

    db.pass_time("50 seconds")
    assert worker.recover_stale_jobs() == 0


def test_a_job_whose_model_is_deleted_ends_and_is_refunded(db, alice, worker):
    job_id = alice.enqueued()
    db.execute("delete from public.models")
    db.execute("update private.settings set retry_base = '0'")

    for _ in range(3):
        worker.fail_job(worker.claimed(), "internal", retry_after=0)

    assert alice.get_job_status(job_id)["status"] == "failed"
    assert_books_balance(db)
