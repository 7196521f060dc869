"""What the operator's page, `make top` and exporters draw."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from actors import PREVIEW, Worker, refused
from test_views import another_model, ended

__all__ = ["another_model"]


def ago(**time):
    return datetime.now(UTC) - timedelta(**time)


def test_health_in_the_report_is_that_of_queue_health(db, alice, worker):
    alice.enqueue()
    alice.enqueue()
    worker.fail_job(worker.claimed(), "provider_busy", retry_after=600)

    with db.connect().transaction() as transaction:  # in which no time passes
        health, report = transaction.connection.execute(
            "select public.queue_health(), public.queue_report()"
        ).fetchone()

    assert report["health"] == health
    assert (health["depth"]["ready"], health["depth"]["delayed"]) == (1, 1)


def test_it_shows_models_workers_errors_and_jobs(db, alice, monitor, another_model):
    living, dead = Worker(db), Worker(db)
    for seconds in (10, 30):
        ended(alice, dead, seconds)
    ended(alice, dead, 2, "moderated", model=another_model)
    for _ in range(2):
        alice.enqueue()
        dead.claimed()
        db.pass_time("61 seconds")
    alice.enqueue()
    living.heartbeat(is_listening=False)

    report = monitor.queue_report()

    assert report["took_ms"] > 0 and report["vacuum_holders"] == []
    rules = {row["alert"] for row in db.execute("select alert from private.alert_rules")}
    alerts = {row["alert"]: row for row in report["alerts"]}
    assert alerts.keys() == rules
    stuck = alerts["stuck"]
    assert (stuck["severity"], stuck["is_raised"], stuck["threshold"]) == ("critical", False, 120)
    names = ("model_id", "ready", "running", "completed", "failed")
    models = [tuple(each[name] for name in names) for each in report["models"]]
    assert models == [(PREVIEW, 1, 2, 2, 0), (another_model, 0, 0, 0, 1)]
    seconds = [report["models"][0][name] for name in ("p50_seconds", "p95_seconds")]
    assert [round(each) for each in seconds] == [20, 29]
    first, second = report["workers"]  # a dead one comes first
    assert (first["worker_id"], first["state"], first["slots_used"]) == (dead.id, "silent", 2)
    assert first["seen_seconds"] > 119
    assert (second["worker_id"], second["state"]) == (living.id, "idle")
    assert not second["is_listening"]
    (error,) = report["errors"]
    assert (error["error_code"], error["errors"], error["failed"]) == ("moderated", 1, 1)
    newest, *older = report["recent"]
    assert (newest["outcome"], newest["error_code"]) == ("failed", "moderated")
    assert 2 <= newest["ran_seconds"] < 5 and len(older) == 2
    longest, other = (each["running_seconds"] for each in report["running"])
    assert 122 <= longest < 150 and 61 <= other < 90
    db.pass_time("1 day")
    later = monitor.queue_report()
    assert (later["workers"], later["errors"], later["recent"]) == ([], [], [])
    assert [each["completed"] for each in later["models"]] == [0]


# What a provider says may be the prompt in any spelling, and an exception may name a user.
WORDS = 'Keep Out, "the" Owl'
SPELLED = [WORDS, WORDS.lower(), json.dumps(WORDS), json.dumps(json.dumps(WORDS)), WORDS[5:]]


def test_nobodys_words_and_ids_are_in_what_a_monitor_may_call(db, alice, worker, monitor):
    db.lift_limits()
    jobs = [ended(alice, worker, 1, end, prompt=WORDS) for end in ("completed", "moderated")]
    for said in [*SPELLED, f"user {alice.id}"]:
        jobs.append(alice.enqueued(WORDS))
        worker.fail_job(worker.claimed(), "invalid_input", said)
        db.execute("select private.note_skipped('a_step', %s, 'P0001', %s)", alice.id, said)
    jobs += [alice.enqueued(WORDS), alice.enqueued(WORDS)]
    worker.claimed()
    worker.pause_provider("preview", 60, f"HTTP 402: {WORDS} {alice.id}")
    db.execute("update public.entitlements set credits = credits + 1")
    db.execute("select private.check_books()")

    may_call = db.execute(
        "select oid::regproc::text as name from pg_proc"
        " where pronamespace::regnamespace::text in ('public', 'private')"
        " and has_function_privilege('darkroom_monitor', oid, 'execute')"
    )
    told = {row["name"].rpartition(".")[2] for row in may_call}
    assert told == {"queue_health", "queue_history", "queue_report", "queue_job"}
    told = [monitor.query(f"select public.{name}()") for name in told - {"queue_job"}]
    text = json.dumps(told, default=str)
    asked = json.dumps([monitor.queue_job(job) for job in jobs], default=str)

    assert "skipped_rows" in text and "invalid_input" in text and "problems" in text
    assert [each for each in (alice.id, *jobs, "owl", "keep out") if each in text.lower()] == []
    assert "invalid_input" in asked  # and of the id of a job, what it is given
    assert [each for each in (alice.id, "owl", "keep out") if each in asked.lower()] == []


def test_a_job_is_told_with_its_attempts_and_in_the_providers_words_to_operators_alone(
    db, alice, worker, monitor, service
):
    db.buys_previews()
    job_id = alice.enqueued()
    worker.fail_job(worker.claimed(), "provider_busy", WORDS, retry_after=60)
    waiting = monitor.queue_job(job_id)
    db.pass_time("61 seconds")
    job = worker.claimed()
    worker.checkpoint(job, "bought-1")
    running = service.queue_job(job_id)
    worker.complete_job(job, metrics={"provider_seconds": 2})

    told, shown = service.queue_job(job_id), monitor.queue_job(job_id)

    assert (waiting["waiting"]["state"], waiting["running"]) == ("delayed", None)
    assert (running["waiting"], running["running"]["provider_job_id"]) == (None, "bought-1")
    assert 0 <= running["running"]["running_seconds"] < 30
    assert (told["status"], told["images"], told["user_id"]) == ("completed", 1, alice.id)
    assert (told["waiting"], told["running"]) == (None, None)
    ends = [(each["outcome"], each["error_code"]) for each in told["attempts"]]
    assert ends == [("retried", "provider_busy"), ("completed", None)]
    assert told["attempts"][0]["error_detail"] == WORDS
    for each in (told, *told["attempts"]):  # but for these it is the same
        each.update(dict.fromkeys(each.keys() & {"user_id", "error_detail", "provider_job_id"}))
    assert shown == told
    with refused("PT404", "not_found"):
        monitor.queue_job(alice.id)


def test_only_operators_are_told_which_jobs_run_and_ended(db, alice, worker, monitor, service):
    ids = [ended(alice, worker, 1), alice.enqueued()]
    worker.claimed()

    reports = service.queue_report(), monitor.queue_report()

    assert [each["is_operator"] for each in reports] == [True, False]
    jobs = [[each["recent"][0]["job_id"], each["running"][0]["job_id"]] for each in reports]
    assert jobs == [ids, [None, None]]


def test_the_history_of_the_queue_moves_with_it(db, alice, worker, monitor):
    alice.enqueue()
    alice.cancel_generation(alice.enqueued())
    db.pass_time("10 minutes")
    worker.fail_job(worker.claimed(), "provider_busy", retry_after=0)
    alice.enqueue()
    worker.claimed()

    history = monitor.queue_history(ago(hours=1), bucket_seconds=60)

    then = ago(minutes=5).isoformat()
    before = [each for each in history["queue"] if each["at"] < then]
    counts = ("enqueued", "entered", "went")
    assert [sum(each[name] for each in before) for name in counts] == [2, 2, 1]
    assert sum(each["enqueued"] for each in history["queue"]) == 3
    assert max(each["waited_seconds"] or 0 for each in history["queue"]) >= 600
    left = sum(each["entered"] - each["went"] for each in history["queue"])
    assert left == db.value("select count(*) from private.ready_jobs") == 1


def test_the_history_of_models_adds_up_and_in_parts_is_the_whole(
    db, alice, worker, monitor, another_model
):
    db.execute("update public.models set cost_usd = 0.01, cost_unit = 'second'")
    ended(alice, worker, 10, model=another_model)
    for seconds, end in ((70, "completed"), (90, "completed"), (1, "moderated")):
        ended(alice, worker, seconds, end)

    whole = monitor.queue_history(ago(hours=1), bucket_seconds=60)
    last = whole["models"][-1]
    part = monitor.queue_history(datetime.fromisoformat(last["at"]), bucket_seconds=60)

    def total(model, name):
        return sum(each[name] or 0 for each in whole["models"] if each["model_id"] == model)

    assert total(another_model, "completed") == 1
    assert (total(PREVIEW, "completed"), total(PREVIEW, "failed")) == (2, 1)
    assert round(total(PREVIEW, "completed_seconds")) == 160
    assert total(PREVIEW, "cost_usd") == pytest.approx(0.01 * (35 + 45))
    assert part["since"] == last["at"]
    assert part["models"] == [each for each in whole["models"] if each["at"] >= last["at"]]


@pytest.mark.parametrize(
    ("age", "bucket", "about"),
    [
        (timedelta(hours=1), 9, "bucket_seconds"),
        (timedelta(hours=1), None, "bucket_seconds"),
        (timedelta(days=399), 86400, None),
        (timedelta(days=401), 86400, "since"),
        (timedelta(hours=-1), 60, "since"),
        (None, 60, None),
    ],
)
def test_a_history_of_too_much_is_refused(monitor, age, bucket, about):
    since = age and datetime.now(UTC) - age
    if about is None:
        assert monitor.queue_history(since, bucket_seconds=bucket)["models"] == []
        return
    with refused("PT400", "invalid_input") as expected:
        monitor.queue_history(since, bucket_seconds=bucket)
    assert about in expected.detail


def test_a_report_reads_little_of_a_long_history(db, alice, worker):
    alice.has_history(3000)
    db.pass_time("2 hours")
    alice.enqueue()
    worker.fail_job(worker.claimed(), "moderated")
    db.execute("analyze")

    with db.connect().transaction() as transaction:
        connection = transaction.connection
        connection.execute("select public.queue_health(), public.queue_report()")
        connection.execute("select public.queue_history(now() - interval '10 minutes', 60)")
        scanned = connection.execute(
            "select relname from pg_stat_xact_user_tables where seq_scan > 0"
        ).fetchall()

    grow = {"attempts", "credit_ledger", "entitlements", "generations", "images"}
    assert ("ready_jobs",) in scanned
    assert grow & {name for (name,) in scanned} == set()
