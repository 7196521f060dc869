"""sql/83_watch.sql: the questions operators ask, each answered by one view."""

import pytest
from actors import PREVIEW, Service, Worker


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


def test_the_queue_of_each_plan(db, alice, bob, worker):
    bob.has_paid()
    for user in (alice, bob, bob):
        user.enqueue()
    job = worker.claimed()

    free, paid = rows(db, "queue_by_plan")

    assert only(free, "plan", "users") == ("free", 1)
    assert only(paid, "plan", "users") == ("paid", 1)
    assert free["ready"] + paid["ready"] == 2
    assert (paid if str(job.user_id) == bob.id else free)["running"] == 1


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


def test_what_is_stuck(db, alice, bob, worker):
    late, silent, unclaimed = alice.enqueued(), alice.enqueued(), bob.enqueued()
    jobs = {job.id: job for job in worker.claim_jobs(3)}
    worker.release_job(jobs[unclaimed])
    db.pass_time("301 seconds")
    worker.heartbeat(jobs[late])

    stuck = {str(row["job_id"]): row["problem"] for row in rows(db, "stuck_jobs")}

    assert stuck == {
        late: "deadline passed",
        silent: "lease ran out",
        unclaimed: "not claimed",
    }
    worker.recover_stale_jobs()
    worker.complete_job(worker.claimed())
    assert unclaimed not in {str(row["job_id"]) for row in rows(db, "stuck_jobs")}


def test_what_failed_lately_and_why(db, alice, worker):
    ended(alice, worker, 1)
    failed = ended(alice, worker, 1, "moderated")

    (failure,) = rows(db, "recent_failures")

    names = ("error_code", "error_detail", "outcome", "model_id", "generation_id")
    assert only(failure, *names[:4]) == (
        "moderated",
        "the provider said moderated",
        "failed",
        PREVIEW,
    )
    assert str(failure["generation_id"]) == failed
    db.pass_time("1 day")
    assert rows(db, "recent_failures") == []
    db.execute("update private.settings set watch_window = '2 days'")
    assert len(rows(db, "recent_failures")) == 1


def test_errors_of_each_model_and_code(db, alice, worker, another_model):
    db.lift_limits()
    for end in ("completed", "moderated", "moderated", "invalid_input"):
        ended(alice, worker, 1, end)
    ended(alice, worker, 1, "moderated", model=another_model)

    errors = rows(db, "errors_by_model")

    names = ("model_id", "error_code", "errors", "failed", "share_of_attempts")
    assert {only(row, *names) for row in errors} == {
        (PREVIEW, "moderated", 2, 2, 0.5),
        (PREVIEW, "invalid_input", 1, 1, 0.25),
        (another_model, "moderated", 1, 1, 1),
    }
    assert errors[0]["last_detail"] == "the provider said moderated"


def test_how_fast_each_model_is(db, alice, worker, another_model):
    db.lift_limits()
    for seconds in (10, 20, 30):
        ended(alice, worker, seconds)
    ended(alice, worker, 100, model=another_model)
    ended(alice, worker, 1, "moderated", model=another_model)

    slow, preview = rows(db, "model_performance")

    assert only(slow, "model_id", "success_rate", "completed") == (another_model, 0.5, 1)
    assert only(preview, "model_id", "success_rate", "completed") == (PREVIEW, 1, 3)
    assert round(preview["p50_seconds"]) == 20
    assert round(preview["p95_seconds"]) == 29
    assert preview["p50_provider_seconds"] == 10
    assert round(slow["p95_seconds"]) == 100


def test_how_long_users_wait(db, alice, worker):
    db.lift_limits()
    for waited in (0, 10, 60):
        alice.enqueue()
        db.pass_time(f"{waited} seconds")
        end_next(worker, 20)

    (times,) = rows(db, "waiting_times")

    assert only(times, "model_id", "plan", "completed") == (PREVIEW, "free", 3)
    assert round(times["p50_wait_seconds"]) == 10
    assert round(times["p95_wait_seconds"]) == 55
    assert round(times["p50_run_seconds"]) == 20


@pytest.mark.parametrize(
    ("view", "span"), [("throughput_per_hour", "1 hour"), ("throughput_per_day", "1 day")]
)
def test_how_many_succeed(db, alice, worker, view, span):
    db.lift_limits()
    db.execute("update private.settings set watch_window = '2 days'")
    for end in ("completed", "completed", "moderated"):
        ended(alice, worker, 0, end)
    db.pass_time(span)
    ended(alice, worker, 0)

    counts = [only(row, "completed", "failed", "retried", "canceled") for row in rows(db, view)]

    assert counts == [(1, 0, 0, 0), (2, 1, 0, 0)]


def test_which_worker_lives_and_what_it_does(db, alice, worker):
    db.lift_limits()
    dead = Worker(db, slots=1)
    ended(alice, dead, 0, "moderated")
    db.pass_time("2 minutes")
    worker.heartbeat(is_listening=False)
    ended(alice, worker, 0)
    alice.enqueue()
    worker.claimed()

    living, gone = rows(db, "worker_activity")

    names = ("worker_id", "is_alive", "is_listening", "slots", "slots_used", "completed", "errors")
    assert only(living, *names) == (worker.id, True, False, 4, 1, 1, 0)
    assert only(gone, *names) == (dead.id, False, True, 1, 0, 0, 1)
    assert living["last_ended_at"] > gone["last_ended_at"]


def test_who_asks_for_most(db, alice, bob, worker):
    db.lift_limits()
    ended(alice, worker, 0)
    ended(alice, worker, 0, "moderated")
    alice.cancel_generation(alice.enqueued())
    bob.enqueue()

    first, second = rows(db, "busiest_users")

    names = ("generations", "completed", "failed", "canceled", "active_jobs")
    assert (str(first["user_id"]), *only(first, *names)) == (alice.id, 3, 1, 1, 1, 0)
    assert (str(second["user_id"]), *only(second, *names)) == (bob.id, 1, 0, 0, 0, 1)


def have_arms(db, alias, **weights):
    """Let an alias stand for models, each with a weight."""
    for model, weight in weights.items():
        db.execute("insert into public.model_aliases values (%s, %s, %s)", alias, model, weight)


def test_which_model_behind_an_alias_does_better(db, alice, worker, another_model):
    db.lift_limits()
    db.execute("update public.models set cost_usd = 0.01, cost_unit = 'second'")
    have_arms(db, "auto/fast", **{PREVIEW: 1, another_model: 0})
    ended(alice, worker, 10, model="auto/fast")
    ended(alice, worker, 20, model="auto/fast")
    ended(alice, worker, 0, "moderated", model="auto/fast")
    alice.cancel_generation(alice.enqueued(model="auto/fast"))
    ended(alice, worker, 100)  # by its own name

    slow, preview = rows(db, "alias_arms")

    names = ("alias_id", "model_id", "weight", "generations")
    assert only(slow, *names) == ("auto/fast", another_model, 0, 0)
    assert only(preview, *names) == ("auto/fast", PREVIEW, 1, 4)
    assert float(preview["success_rate"]) == pytest.approx(2 / 3, abs=0.001)
    assert [round(preview[name]) for name in ("p50_seconds", "p95_seconds")] == [15, 20]
    assert float(preview["cost_usd_per_image"]) == pytest.approx(0.01 * (5 + 10) / 2)


def test_which_model_behind_an_alias_is_liked(db, alice, bob, worker):
    have_arms(db, "auto/fast", **{PREVIEW: 1})
    job_id = ended(alice, worker, 0, model="auto/fast")
    ended(alice, worker, 0, model="auto/fast")
    alice.set_favorite(job_id)
    alice.share_image(job_id)
    bob.like_image(job_id)
    db.execute("delete from public.model_aliases")

    (arm,) = rows(db, "alias_arms")

    names = ("model_id", "weight", "generations", "favorites", "likes")
    assert only(arm, *names) == (PREVIEW, None, 2, 1, 1)


def test_what_is_not_delivered_and_why(db, alice, worker):
    service = Service(db)
    hook = service.register_webhook("https://api.example.com/hooks")["webhook_id"]
    ended(alice, worker, 0)
    (delivery,) = worker.claim_deliveries(hook)
    worker.finish_delivery(delivery, "failed", 500, "what it said")

    (late,) = rows(db, "undelivered")

    names = ("state", "target", "attempts", "last_status", "last_error")
    assert only(late, *names) == (
        "pending",
        "https://api.example.com/hooks",
        1,
        500,
        "what it said",
    )
    service.redeliver(str(delivery.delivery_id))
    (delivery,) = worker.claim_deliveries(hook)
    worker.finish_delivery(delivery)
    assert rows(db, "undelivered") == []


def test_every_view_answers_an_empty_database(db):
    views = db.execute(
        "select viewname from pg_views where schemaname = 'private' and viewname <> 'queue_floor'"
    )

    assert len(views) >= 18
    assert [view["viewname"] for view in views if rows(db, view["viewname"])] == []
