"""When a job is likely to be done, and what that is told from."""

from __future__ import annotations

import pytest
from actors import PREVIEW, User, Worker
from database import Database

SLOW = "test/slow"


def measured(db: Database, seconds: float, model: str = PREVIEW, rate: float = 0) -> None:
    """Have attempts of this model on record, as the statistics hold them; it may be a new one."""
    db.execute(
        "insert into public.models select (jsonb_populate_record(m, jsonb_build_object("
        " 'id', %s::text))).* from public.models as m where id = %s on conflict do nothing",
        model,
        PREVIEW,
    )
    db.execute(
        "insert into private.model_stats (model_id, mean_seconds, sample_count,"
        " requests_per_second, queue_distance, refreshed_at) values (%s, %s, 10, %s, 1000, now())",
        model,
        seconds,
        rate,
    )


def etas(user: User) -> list[float | None]:
    """Return the ETA of each of the user's active jobs, oldest first."""
    return [job["eta_seconds"] for job in reversed(user.list_active_jobs())]


def test_it_is_not_known_without_measurements_or_a_live_worker(db, alice):
    worker = Worker(db, slots=1)
    alice.enqueue()
    assert etas(alice) == [None]
    measured(db, 8)
    assert etas(alice) == [8]

    db.pass_time("61 seconds")
    assert etas(alice) == [None]
    worker.heartbeat()
    assert etas(alice) == [8]


def test_jobs_share_the_slots_in_the_order_they_will_be_claimed(db, alice, bob):
    db.lift_limits()
    measured(db, 8)
    Worker(db, slots=2)
    for _ in range(5):
        alice.enqueue()
    bob.enqueue()

    assert etas(alice) == [8, 16, 16, 24, 24]
    assert etas(bob) == [8]  # behind alice's first alone: the users take turns


def test_each_model_counts_with_its_own_length_and_progress_and_in_its_order(db, alice):
    db.lift_limits()
    measured(db, 2)
    measured(db, 30, SLOW)
    worker = Worker(db, slots=2)
    for model in (SLOW, PREVIEW, PREVIEW, PREVIEW):
        alice.enqueue(model=model)
    assert etas(alice) == [30, 2, 4, 6]  # the slow one keeps one slot, the quick the other

    job = worker.claimed()
    db.pass_time("10 seconds")
    worker.heartbeat()

    assert etas(alice) == pytest.approx([20, 2, 4, 6], abs=1)
    worker.report_progress(job, "generating", 20)
    assert etas(alice)[0] == pytest.approx(30, abs=1)  # between the clock's 20 and its 40
    worker.report_progress(job, "generating", 90)
    db.pass_time("50 seconds")
    assert etas(alice)[0] == pytest.approx(7.5)  # late: a quarter to go


def test_a_delay_or_a_pause_is_waited_for_unless_it_has_no_end(db, alice, bob, worker, service):
    measured(db, 8)
    alice.enqueue()
    worker.fail_job(worker.claimed(), "provider_busy", retry_after=100)
    assert etas(alice) == pytest.approx([108], abs=1)
    bob.enqueue()
    worker.pause_provider("preview", 60)
    assert etas(bob) == pytest.approx([68], abs=1)

    service.pause_model(PREVIEW)
    assert etas(bob) == [None]


def test_what_is_likely_to_be_put_before_a_job_is_counted(db, alice):
    db.lift_limits()
    worker = Worker(db, slots=1)
    measured(db, 10, rate=0.05)
    alice.enqueue()
    worker.claimed()
    for _ in range(3):
        alice.enqueue()

    *_, last = etas(alice)

    # Three slots' work of 10 s; of those 10 s in 20 of others, who will be put before two thirds.
    assert last == pytest.approx(10 + 30 / (1 - 0.5 * 2 / 3), abs=1)


def test_the_mean_takes_in_each_completed_attempt_once(db, alice, worker):
    for seconds in (10, 20):
        alice.enqueue()
        job = worker.claimed()
        db.pass_time(f"{seconds} seconds")
        worker.complete_job(job)
    alice.enqueue()
    worker.fail_job(worker.claimed(), "moderated")

    for _ in range(3):
        worker.recover_stale_jobs()
        db.pass_time("16 seconds")

    stats = db.row("select * from private.model_stats")
    assert (stats["model_id"], stats["sample_count"]) == (PREVIEW, 2)
    assert stats["mean_seconds"] == pytest.approx(15, abs=1)
    assert stats["requests_per_second"] == pytest.approx(3 / 300)
