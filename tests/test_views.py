"""sql/88_health.sql, sql/97_reports.sql: the questions operators ask, each answered by a view."""

import pytest
from actors import PREVIEW

SLOW = "ada/slow"


def rows(db, view, *names):
    """Return these columns of what a view answers."""
    found = db.execute(f"select * from private.{view}")
    return [tuple(row[name] for name in names) if names else row for row in found]


@pytest.fixture
def another_model(db):
    """A second model: the preview's, under another name and provider."""
    db.lift_limits()
    db.execute("create temp table copy as select * from public.models where id = %s", PREVIEW)
    db.execute("update copy set id = %s, provider = 'replicate'", SLOW)
    db.execute("insert into public.models select * from copy")
    return SLOW


def ended(user, worker, seconds, end="completed", **request):
    """Have a job that ran for so many seconds; return its id."""
    job_id = user.enqueued(**request)
    job = worker.claimed()
    user.db.pass_time(f"{seconds} seconds")
    if end == "completed":
        worker.complete_job(job, metrics={"provider_seconds": seconds / 2, "images": 1})
    else:
        worker.fail_job(job, end, f"the provider said {end}")
    return job_id


def test_what_waits_and_since_when_and_whose_turn_is_next(db, alice, bob, worker):
    bob.has_paid()
    delayed = alice.enqueued()
    worker.fail_job(worker.claimed(), "provider_busy", retry_after=600)
    ready = [alice.enqueued(), bob.enqueued()]
    db.pass_time("1 minute")

    waiting = {str(row["job_id"]): row for row in rows(db, "waiting_now")}

    assert {job: (row["state"], row["plan"]) for job, row in waiting.items()} == {
        delayed: ("delayed", "free"),
        ready[0]: ("ready", "free"),
        ready[1]: ("ready", "paid"),
    }
    assert 60 <= waiting[delayed]["waiting"].total_seconds() < 90
    turns = [job for job, row in waiting.items() if row["state"] == "ready"]
    assert [worker.claimed().id for _ in ready] == turns


def test_the_queue_of_each_model_and_what_waits_for_a_pause_counted_once(
    db, alice, worker, service, another_model
):
    alice.enqueue()
    worker.claimed()
    db.pass_time("5 seconds")
    alice.enqueue()
    db.pass_time("5 seconds")
    alice.enqueue()
    waits = alice.enqueued(model=another_model)

    counts = ("model_id", "provider", "ready", "delayed", "paused", "running")
    slow, preview = rows(db, "queue_by_model", *counts)
    assert slow == (another_model, "replicate", 1, 0, 0, 0)
    assert preview == (PREVIEW, "preview", 2, 0, 0, 1)
    assert 5 <= rows(db, "queue_by_model")[1]["oldest_ready_seconds"] < 10

    worker.pause_provider("replicate", 60, "402: no credit")
    service.pause_model(another_model, until="2999-01-01")

    assert set(rows(db, "paused_now", "kind", "name")) == {
        ("provider", "replicate"),
        ("model", another_model),
    }
    assert "402: no credit" in {row["pause_reason"] for row in rows(db, "paused_now")}
    states = {str(job): state for job, state in rows(db, "waiting_now", "job_id", "state")}
    assert [job for job, state in states.items() if state == "paused"] == [waits]
    slow, preview = rows(db, "queue_by_model", *counts)
    assert slow == (another_model, "replicate", 0, 0, 1, 0)
    assert preview == (PREVIEW, "preview", 2, 0, 0, 1)


def test_what_runs_where_for_how_long_and_whether_it_is_stuck(db, alice, worker):
    db.buys_previews()
    late, silent = alice.enqueued(), alice.enqueued()
    jobs = {job.id: job for job in worker.claim_jobs(2)}
    worker.checkpoint(jobs[late], "prediction-1")
    worker.report_progress(jobs[late], "storing", 70)
    db.pass_time("30 seconds")

    running = {str(row["job_id"]): row for row in rows(db, "running_now")}

    names = ("worker_id", "host", "stage", "progress", "provider_job_id")
    assert [running[late][name] for name in names] == [
        *(worker.id, "test", "storing", 70, "prediction-1")
    ]
    assert 30 <= running[late]["running"].total_seconds() < 60
    assert 0 < running[late]["lease_left"].total_seconds() <= 30
    assert {row["stuck_for"].total_seconds() for row in running.values()} == {0}
    db.pass_time("271 seconds")
    worker.heartbeat(jobs[late])
    stuck = {str(job): since for job, since in rows(db, "running_now", "job_id", "stuck_for")}
    assert 0 < stuck[late].total_seconds() < 30  # since its deadline
    assert 240 < stuck[silent].total_seconds() < 270  # since its lease
