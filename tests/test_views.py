"""The questions operators ask, each answered by one view."""

import pytest
from actors import PREVIEW, Worker

SLOW = "ada/slow"


def rows(db, view, *names):
    """Return these columns of what a view answers."""
    found = db.execute(f"select * from private.{view}")
    return [tuple(row[name] for name in names) if names else row for row in found]


def ids(*jobs):
    return [str(job) for job in jobs]


@pytest.fixture
def another_model(db):
    """A second model: the preview's, under another name and provider."""
    db.lift_limits()
    db.execute("create temp table copy as select * from public.models where id = %s", PREVIEW)
    db.execute("update copy set id = %s, provider = 'replicate'", SLOW)
    db.execute("insert into public.models select * from copy")
    return SLOW


def end_next(worker, seconds, end="completed"):
    """Claim the next job, and end it after so many seconds."""
    job = worker.claimed()
    worker.db.pass_time(f"{seconds} seconds")
    if end == "completed":
        worker.complete_job(job, metrics={"provider_seconds": seconds / 2, "images": 1})
    else:
        worker.fail_job(job, end, f"the provider said {end}")


def ended(user, worker, seconds, end="completed", **request):
    """Have a job that ran for so many seconds; return its id."""
    job_id = user.enqueued(**request)
    end_next(worker, seconds, end)
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
    assert ids(*(worker.claimed().job_id for _ in ready)) == turns


def test_the_queue_of_each_model_and_plan(db, alice, bob, worker, another_model):
    bob.has_paid()
    bob.enqueue()
    worker.claimed()
    db.pass_time("5 seconds")
    alice.enqueue()
    db.pass_time("5 seconds")
    alice.enqueue()
    alice.enqueue(model=another_model)
    worker.pause_provider("preview", 0)

    counts = ("ready", "delayed", "paused", "running")
    assert rows(db, "queue_by_model", "model_id", "provider", *counts) == [
        (SLOW, "replicate", 1, 0, 0, 0),
        (PREVIEW, "preview", 2, 0, 0, 1),
    ]
    assert 5 <= rows(db, "queue_by_model")[1]["oldest_ready_seconds"] < 10
    assert rows(db, "queue_by_plan", "plan", "ready", "delayed", "running", "users") == [
        ("free", 3, 0, 0, 1),
        ("paid", 0, 0, 1, 1),
    ]


def test_what_is_paused_and_which_jobs_wait_for_that_counted_once(
    db, alice, worker, service, another_model
):
    alice.enqueue()
    paused = alice.enqueued(model=another_model)
    worker.pause_provider("replicate", 60, "402: no credit")
    service.pause_model(another_model, until="2999-01-01")

    pauses = {pause[1:] for pause in rows(db, "paused_now", "pause_reason", "kind", "name")}
    assert pauses == {("provider", "replicate"), ("model", another_model)}
    assert "402: no credit" in {row["pause_reason"] for row in rows(db, "paused_now")}
    states = {str(job): state for job, state in rows(db, "waiting_now", "job_id", "state")}
    assert [job for job, state in states.items() if state == "paused"] == [paused]
    counts = rows(db, "queue_by_model", "model_id", "ready", "paused")
    assert counts == [(another_model, 0, 1), (PREVIEW, 1, 0)]


def test_what_runs_and_what_is_stuck(db, alice, bob, worker):
    late, silent, unclaimed = alice.enqueued(), alice.enqueued(), bob.enqueued()
    jobs = {job.id: job for job in worker.claim_jobs(3)}
    worker.release_job(jobs[unclaimed])
    worker.checkpoint(jobs[late], "prediction-1")
    worker.report_progress(jobs[late], "storing", 70)
    db.pass_time("30 seconds")

    names = ("job_id", "worker_id", "host", "stage", "progress", "provider_job_id")
    running = {str(row["job_id"]): row for row in rows(db, "running_now")}
    assert set(running) == {late, silent}
    assert [running[late][name] for name in names[1:]] == [
        *(worker.id, "test", "storing", 70, "prediction-1")
    ]
    assert 30 <= running[late]["running"].total_seconds() < 60
    assert 0 < running[late]["lease_left"].total_seconds() <= 30
    assert rows(db, "stuck_jobs") == []

    db.pass_time("271 seconds")
    worker.heartbeat(jobs[late])

    stuck = {str(job): problem for job, problem in rows(db, "stuck_jobs", "job_id", "problem")}
    assert stuck == {late: "deadline passed", silent: "lease ran out", unclaimed: "not claimed"}
    worker.recover_stale_jobs()
    worker.complete_job(worker.claimed())
    assert unclaimed not in ids(*(job for (job,) in rows(db, "stuck_jobs", "job_id")))


def test_what_failed_lately_and_why(db, alice, worker, another_model):
    for end in ("completed", "moderated", "moderated", "invalid_input"):
        ended(alice, worker, 1, end)
    failed = ended(alice, worker, 1, "moderated", model=another_model)

    said = "the provider said moderated"
    newest = rows(db, "recent_failures", "error_code", "error_detail", "outcome", "model_id")[0]
    assert newest == ("moderated", said, "failed", another_model)
    assert str(rows(db, "recent_failures")[0]["generation_id"]) == failed
    names = ("model_id", "error_code", "errors", "failed", "share_of_attempts", "last_detail")
    assert set(rows(db, "errors_by_model", *names)) == {
        (PREVIEW, "moderated", 2, 2, 0.5, said),
        (PREVIEW, "invalid_input", 1, 1, 0.25, "the provider said invalid_input"),
        (another_model, "moderated", 1, 1, 1, said),
    }
    db.pass_time("1 day")
    assert rows(db, "recent_failures") == []
    db.execute("update private.settings set watch_window = '2 days'")
    assert len(rows(db, "recent_failures")) == 4


def test_how_fast_each_model_is_and_how_long_users_wait(db, alice, worker, another_model):
    for waited, seconds in ((0, 10), (10, 20), (60, 30)):
        alice.enqueue()
        db.pass_time(f"{waited} seconds")
        end_next(worker, seconds)
    ended(alice, worker, 100, model=another_model)
    ended(alice, worker, 1, "moderated", model=another_model)

    slow, preview = rows(db, "model_performance")
    assert (slow["model_id"], slow["success_rate"], slow["completed"]) == (another_model, 0.5, 1)
    assert (preview["success_rate"], preview["completed"]) == (1, 3)
    assert [round(preview[name]) for name in ("p50_seconds", "p95_seconds")] == [20, 29]
    assert preview["p50_provider_seconds"] == 10
    times = {row["model_id"]: row for row in rows(db, "waiting_times")}[PREVIEW]
    assert (times["plan"], times["completed"]) == ("free", 3)
    names = ("p50_wait_seconds", "p95_wait_seconds", "p50_run_seconds")
    assert [round(times[name]) for name in names] == [10, 55, 20]


def test_how_many_succeed_and_who_asks_for_most(db, alice, bob, worker):
    db.lift_limits()
    db.execute("update private.settings set watch_window = '3 days'")
    for end in ("completed", "completed", "moderated"):
        ended(alice, worker, 0, end)
    db.pass_time("1 day")
    alice.cancel_generation(alice.enqueued())
    ended(bob, worker, 0)
    bob.enqueue()

    counts = ("completed", "failed", "retried", "canceled")
    for view in ("throughput_per_hour", "throughput_per_day"):
        assert rows(db, view, *counts) == [(1, 0, 0, 0), (2, 1, 0, 0)]
    names = ("generations", "completed", "failed", "canceled", "active_jobs")
    busiest = [(str(user), *rest) for user, *rest in rows(db, "busiest_users", "user_id", *names)]
    assert busiest == [(alice.id, 4, 2, 1, 1, 0), (bob.id, 2, 1, 0, 0, 1)]


def test_which_worker_lives_and_what_it_does(db, alice, worker):
    dead = Worker(db, slots=1)
    ended(alice, dead, 0, "moderated")
    db.pass_time("2 minutes")
    worker.heartbeat(is_listening=False)
    ended(alice, worker, 0)
    alice.enqueue()
    worker.claimed()

    names = ("worker_id", "is_alive", "is_listening", "slots", "slots_used", "completed", "errors")
    assert rows(db, "worker_activity", *names) == [
        (worker.id, True, False, 4, 1, 1, 0),
        (dead.id, False, True, 1, 0, 0, 1),
    ]
    (living,), (gone,) = rows(db, "worker_activity", "last_ended_at")
    assert living > gone


def test_which_model_behind_an_alias_does_better_and_is_liked(
    db, alice, bob, worker, another_model
):
    db.execute("update public.models set cost_usd = 0.01, cost_unit = 'second'")
    for model, weight in ((PREVIEW, 1), (another_model, 0)):
        db.execute("insert into public.model_aliases values ('auto/fast', %s, %s)", model, weight)
    liked = ended(alice, worker, 10, model="auto/fast")
    ended(alice, worker, 20, model="auto/fast")
    ended(alice, worker, 0, "moderated", model="auto/fast")
    alice.cancel_generation(alice.enqueued(model="auto/fast"))
    ended(alice, worker, 100)  # by its own name
    alice.set_favorite(liked)
    alice.share_image(liked)
    bob.like_image(liked)

    names = ("alias_id", "model_id", "weight", "generations", "favorites", "likes")
    assert rows(db, "alias_arms", *names) == [
        ("auto/fast", another_model, 0, 0, 0, 0),
        ("auto/fast", PREVIEW, 1, 4, 1, 1),
    ]
    preview = rows(db, "alias_arms")[1]
    assert float(preview["success_rate"]) == pytest.approx(2 / 3, abs=0.001)
    assert [round(preview[name]) for name in ("p50_seconds", "p95_seconds")] == [15, 20]
    assert float(preview["cost_usd_per_image"]) == pytest.approx(0.01 * (5 + 10) / 2)
    db.execute("delete from public.model_aliases")
    assert rows(db, "alias_arms", "model_id", "weight", "generations") == [(PREVIEW, None, 4)]


def test_what_is_not_delivered_and_why(db, alice, worker, service):
    hook = service.register_webhook("https://api.example.com/hooks")["webhook_id"]
    ended(alice, worker, 0)
    (delivery,) = worker.claim_deliveries(hook)
    worker.finish_delivery(delivery, "failed", 500, "what it said")

    names = ("state", "target", "attempts", "last_status", "last_error")
    late = ("pending", "https://api.example.com/hooks", 1, 500, "what it said")
    assert rows(db, "undelivered", *names) == [late]
    service.redeliver(str(delivery.delivery_id))
    (delivery,) = worker.claim_deliveries(hook)
    worker.finish_delivery(delivery)
    assert rows(db, "undelivered") == []
