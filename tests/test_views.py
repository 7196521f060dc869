"""sql/88_health.sql, sql/97_reports.sql: the questions operators ask, each answered by a view."""

import pytest
from actors import PREVIEW, Worker


def rows(db, view):
    """Return what a view answers."""
    return db.execute(f"select * from private.{view}")


def only(row, *names):
    """Return these columns of a row."""
    return tuple(row[name] for name in names)


@pytest.fixture
def another_model(db):
    """A second model: the preview's, under another name and provider."""
    db.execute("create temp table copy as select * from public.models where id = %s", PREVIEW)
    db.execute("update copy set id = 'ada/slow', provider = 'replicate'")
    db.execute("insert into public.models select * from copy")
    return "ada/slow"


def ended(user, worker, seconds, end="completed", **request):
    """Have a job that ran for so many seconds; return its id."""
    job_id = user.enqueued(**request)
    end_next(worker, seconds, end)
    return job_id


def end_next(worker, seconds, end="completed"):
    """Claim the next job, and end it after so many seconds."""
    db, job = worker.db, worker.claimed()
    db.pass_time(f"{seconds} seconds")
    if end == "completed":
        worker.complete_job(job, metrics={"provider_seconds": seconds / 2, "images": 1})
    else:
        worker.fail_job(job, end, f"the provider said {end}")


def test_what_waits_and_since_when(db, alice, bob, worker):
    db.lift_limits()
    bob.has_paid()
    delayed = alice.enqueued()
    worker.fail_job(worker.claimed(), "provider_busy", retry_after=600)
    ready = [alice.enqueued(), bob.enqueued()]
    db.pass_time("1 minute")

    waiting = {str(row["job_id"]): row for row in rows(db, "waiting_now")}

    assert {job_id: row["state"] for job_id, row in waiting.items()} == {
        delayed: "delayed",
        ready[0]: "ready",
        ready[1]: "ready",
    }
    assert [waiting[job_id]["plan"] for job_id in ready] == ["free", "paid"]
    assert 60 <= waiting[delayed]["waiting"].total_seconds() < 90
    turns = [str(row["job_id"]) for row in rows(db, "waiting_now") if row["state"] == "ready"]
    assert [str(worker.claimed().job_id) for _ in ready] == turns


def test_what_is_paused_and_which_jobs_wait_for_that(db, alice, worker, another_model):
    alice.enqueue()
    paused = alice.enqueued(model=another_model)
    worker.pause_provider("replicate", 60, "402: no credit")

    (pause,) = rows(db, "paused_now")

    assert only(pause, "kind", "name", "pause_reason") == (
        "provider",
        "replicate",
        "402: no credit",
    )
    states = {str(row["job_id"]): row["state"] for row in rows(db, "waiting_now")}
    assert [job_id for job_id, state in states.items() if state == "paused"] == [paused]
    counts = {row["model_id"]: row["paused"] for row in rows(db, "queue_by_model")}
    assert counts == {PREVIEW: 0, another_model: 1}


def test_a_job_that_waits_for_model_and_provider_counts_once(
    db, alice, worker, service, another_model
):
    waits = alice.enqueued(model=another_model)
    service.pause_model(another_model, until="2999-01-01")
    service.pause_model("replicate", until="2999-01-01")
    assert worker.claim_jobs(1) == []

    assert {only(row, "kind", "name") for row in rows(db, "paused_now")} == {
        ("model", another_model),
        ("provider", "replicate"),
    }
    (queue,) = rows(db, "queue_by_model")
    assert only(queue, "ready", "delayed", "paused") == (0, 0, 1)
    (waiting,) = rows(db, "waiting_now")
    assert (str(waiting["job_id"]), waiting["state"]) == (waits, "paused")


def test_the_queue_of_each_model(db, alice, worker, another_model):
    db.lift_limits()
    alice.enqueue()
    worker.claimed()
    db.pass_time("5 seconds")
    alice.enqueue()
    db.pass_time("5 seconds")
    alice.enqueue()
    alice.enqueue(model=another_model)
    worker.pause_provider("preview", 0)

    slow, preview = rows(db, "queue_by_model")

    names = ("model_id", "provider", "ready", "delayed", "paused", "running")
    assert only(slow, *names) == (another_model, "replicate", 1, 0, 0, 0)
    assert only(preview, *names) == (PREVIEW, "preview", 2, 0, 0, 1)
    assert 5 <= preview["oldest_ready_seconds"] < 10


def test_what_runs_where_and_for_how_long(db, alice, worker):
    alice.enqueue()
    job = worker.claimed()
    worker.checkpoint(job, "prediction-1")
    worker.report_progress(job, "storing", 70)
    db.pass_time("30 seconds")

    (running,) = rows(db, "running_now")

    names = ("job_id", "worker_id", "host", "stage", "progress", "provider_job_id")
    assert only(running, *names) == (job.job_id, worker.id, "test", "storing", 70, "prediction-1")
    assert 30 <= running["running"].total_seconds() < 60
    assert 0 < running["lease_left"].total_seconds() <= 30


def test_what_is_stuck(db, alice, worker):
    late, silent = alice.enqueued(), alice.enqueued()
    jobs = {job.id: job for job in worker.claim_jobs(2)}
    assert {row["stuck_for"].total_seconds() for row in rows(db, "running_now")} == {0}
    db.pass_time("301 seconds")
    worker.heartbeat(jobs[late])

    stuck = {str(row["job_id"]): row for row in rows(db, "running_now")}

    assert 0 < stuck[late]["stuck_for"].total_seconds() < 30  # its deadline
    assert 240 < stuck[silent]["stuck_for"].total_seconds() < 270  # its lease
    worker.recover_stale_jobs()
    assert rows(db, "running_now") == []


def test_what_was_tried_lately_and_what_the_provider_said(db, alice, worker):
    ended(alice, worker, 1)
    db.pass_time("10 seconds")
    alice.enqueue()
    db.pass_time("5 seconds")
    end_next(worker, 2, "moderated")

    failed, done = rows(db, "recent_attempts")

    names = ("error_code", "error_detail", "outcome", "model_id", "attempt")
    assert only(failed, *names) == (
        "moderated",
        "the provider said moderated",
        "failed",
        PREVIEW,
        1,
    )
    assert [round(failed[name]) for name in ("wait_seconds", "run_seconds")] == [5, 2]
    assert only(done, *names[:3]) == (None, None, "completed")
    assert done["provider_seconds"] == 0.5
    db.pass_time("1 day")
    assert rows(db, "recent_attempts") == []


def test_which_worker_lives_and_what_it_does(db, alice, worker):
    db.lift_limits()
    dead = Worker(db, slots=1)
    db.pass_time("2 minutes")
    worker.heartbeat(is_listening=False)
    alice.enqueue()
    worker.claimed()

    gone, living = rows(db, "worker_activity")

    names = ("worker_id", "is_alive", "is_listening", "slots", "slots_used")
    assert only(living, *names) == (worker.id, True, False, 4, 1)
    assert only(gone, *names) == (dead.id, False, True, 1, 0)


def test_every_view_answers_an_empty_database(db):
    views = db.execute(
        "select viewname from pg_views where schemaname = 'private' and viewname <> 'queue_floor'"
    )

    assert len(views) >= 10
    assert [view["viewname"] for view in views if rows(db, view["viewname"])] == []
