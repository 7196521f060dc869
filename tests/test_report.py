"""sql/89_measures, 89_report: what the operator's page, `make top` and exporters draw."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from actors import Worker, refused
from test_views import another_model, ended, only

__all__ = ["another_model"]

PROMPT = "a lighthouse at dusk, oil painting of a storm"


def ago(**time):
    return datetime.now(UTC) - timedelta(**time)


def test_a_database_nobody_uses_has_an_empty_report(monitor, service):
    report = monitor.queue_report()

    lists = ("models", "workers", "errors", "running", "recent", "vacuum_holders")
    assert {name: report[name] for name in lists} == {name: [] for name in lists}
    assert report["health"] == service.queue_health()
    assert report["took_ms"] > 0


def test_health_in_the_report_is_that_of_queue_health(db, alice, worker):
    alice.enqueue()
    alice.enqueue()
    worker.fail_job(worker.claimed(), "provider_busy", retry_after=600)

    with db.connect().transaction() as transaction:  # in which no time passes
        health, report = transaction.connection.execute(
            "select private.queue_health(), private.queue_report()"
        ).fetchone()

    assert report["health"] == health
    assert (health["depth"]["ready"], health["depth"]["delayed"]) == (1, 1)


def test_each_model_with_its_queue_and_its_last_hour(db, alice, worker, monitor, another_model):
    db.lift_limits()
    for seconds in (10, 30):
        ended(alice, worker, seconds)
    ended(alice, worker, 1, "moderated", model=another_model)
    alice.enqueue()

    preview, slow = monitor.queue_report()["models"]

    names = ("ready", "running", "completed", "failed", "p50_seconds")
    assert only(preview, *names[:4]) == (1, 0, 2, 0)
    assert round(preview["p50_seconds"]) == 20
    assert only(slow, "model_id", *names) == (another_model, 0, 0, 0, 1, None)
    db.pass_time("1 hour")
    assert [each["completed"] for each in monitor.queue_report()["models"]] == [0]


def test_a_dead_worker_comes_first(db, alice, monitor):
    living = Worker(db)
    dead = Worker(db)
    alice.enqueue()
    dead.claimed()
    db.pass_time("2 minutes")
    living.heartbeat(is_listening=False)

    first, second = monitor.queue_report()["workers"]

    assert only(first, "worker_id", "state", "slots_used") == (dead.id, "silent", 1)
    assert first["seen_seconds"] > 119
    assert only(second, "worker_id", "state", "is_listening") == (living.id, "idle", False)
    db.pass_time("1 day")
    assert monitor.queue_report()["workers"] == []


def test_errors_by_model_and_code_with_what_was_said_last(db, alice, worker, monitor):
    db.lift_limits()
    for _ in range(2):
        ended(alice, worker, 1, "internal")
    alice.enqueue()
    worker.fail_job(worker.claimed(), "internal", "upload: HTTP 403: row-level security")

    (error,) = monitor.queue_report()["errors"]

    assert only(error, "error_code", "errors", "failed") == ("internal", 3, 0)
    assert error["retried"] == 3
    assert error["last_detail"] == "upload: HTTP 403: row-level security"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (f"not this: {PROMPT}.", "not this: [prompt]."),
        (f'{{"input": {json.dumps({"prompt": PROMPT})}}}', '{"input": {"prompt": "[prompt]"}}'),
        (f"cut off: {PROMPT[:30]}", "cut off: [prompt]"),
        ("HTTP 500", "HTTP 500"),
    ],
)
def test_the_prompt_is_not_in_what_a_provider_said(alice, worker, monitor, said, shown):
    alice.enqueue(PROMPT)
    worker.fail_job(worker.claimed(), "invalid_input", said)

    (error,) = monitor.queue_report()["errors"]

    assert error["last_detail"] == shown


@pytest.mark.parametrize("length", [100, 40])
def test_a_prompt_with_quotes_is_not_shown_either(alice, worker, monitor, length):
    prompt = 'a sign, "open"\nin neon, at night in the rain'
    alice.enqueue(prompt)
    worker.fail_job(worker.claimed(), "invalid_input", json.dumps({"p": prompt})[:length])

    report = json.dumps(monitor.queue_report())

    assert "neon" not in report and "[prompt]" in report


def test_nothing_of_a_user_is_in_report_or_history(db, alice, worker, monitor):
    db.lift_limits()
    for end in ("completed", "moderated"):
        ended(alice, worker, 1, end, prompt=PROMPT)
    alice.enqueue(PROMPT)
    worker.claimed()
    alice.enqueue(PROMPT)

    text = json.dumps([monitor.queue_report(), monitor.queue_history(ago(hours=1))])

    assert PROMPT not in text and alice.id not in text


def test_the_last_attempts_newest_first(alice, worker, monitor):
    first = ended(alice, worker, 2)
    second = ended(alice, worker, 1, "moderated")

    newest, older = monitor.queue_report()["recent"]

    assert only(newest, "job_id", "outcome", "error_code") == (second, "failed", "moderated")
    assert only(older, "job_id", "outcome", "attempt") == (first, "completed", 1)
    assert 2 <= older["ran_seconds"] < 5


def test_the_job_that_runs_for_longest_first(db, alice, worker, monitor):
    job_ids = [alice.enqueued(), alice.enqueued()]
    for _ in job_ids:
        worker.claimed()
        db.pass_time("5 seconds")

    running = monitor.queue_report()["running"]

    assert [each["job_id"] for each in running] == job_ids
    assert 10 <= running[0]["running_seconds"] < 20


def test_who_holds_back_vacuum_and_for_how_long(db, monitor):
    session = db.connect()
    session.execute("set application_name = 'a forgotten psql'")
    with session.transaction():
        session.execute("select pg_current_xact_id()")
        db.execute("select pg_sleep(1.1)")

        (holder,) = monitor.queue_report()["vacuum_holders"]

    assert only(holder, "pid", "name", "state") == (
        session.info.backend_pid,
        "a forgotten psql",
        "idle in transaction",
    )
    assert holder["seconds"] >= 1


def test_every_rule_is_an_alert_of_the_measures(db, alice, monitor):
    alice.enqueue()

    alerts = {row["alert"]: row for row in monitor.query("select * from private.report_alerts()")}

    rules = {row["alert"] for row in db.execute("select alert from private.alert_rules")}
    assert set(alerts) == rules
    assert only(alerts["no_worker"], "severity", "is_raised", "value") == ("critical", True, 1)
    assert only(alerts["depth"], "is_raised", "value", "threshold") == (False, 1, 10000)


def test_the_history_of_the_queue_moves_with_it(db, alice, worker, monitor):
    db.lift_limits()
    alice.enqueue()
    alice.cancel_generation(alice.enqueued())
    db.pass_time("10 minutes")
    worker.fail_job(worker.claimed(), "provider_busy", retry_after=0)
    alice.enqueue()
    worker.claimed()

    history = monitor.queue_history(ago(hours=1), bucket_seconds=60)

    before, now = history["queue"][0], history["queue"][-1]
    assert only(before, "enqueued", "entered", "went") == (2, 2, 1)
    assert sum(each["enqueued"] for each in history["queue"][1:]) == 1
    assert now["waited_seconds"] >= 600
    left = sum(each["entered"] - each["went"] for each in history["queue"])
    assert left == db.value("select count(*) from private.ready_jobs") == 1


def test_the_history_of_models_adds_up(db, alice, worker, monitor, another_model):
    db.lift_limits()
    db.execute("update public.models set cost_usd = 0.01, cost_unit = 'second'")
    ended(alice, worker, 10, model=another_model)
    for seconds, end in ((20, "completed"), (30, "completed"), (1, "moderated")):
        ended(alice, worker, seconds, end)

    buckets = monitor.queue_history(ago(hours=1), bucket_seconds=3600)["models"]

    totals = {}
    for each in buckets:
        model = totals.setdefault(each["model_id"], {})
        for name in ("completed", "failed", "completed_seconds", "cost_usd"):
            model[name] = model.get(name, 0) + (each[name] or 0)
    assert totals[another_model]["completed"] == 1
    preview = next(total for name, total in totals.items() if name != another_model)
    assert only(preview, "completed", "failed") == (2, 1)
    assert round(preview["completed_seconds"]) == 50
    assert preview["cost_usd"] == pytest.approx(0.01 * (10 + 15))


def test_a_history_in_parts_is_the_whole(db, alice, worker, monitor):
    db.lift_limits()
    for _ in range(3):
        ended(alice, worker, 1)
        db.pass_time("70 seconds")
    whole = monitor.queue_history(ago(hours=1), bucket_seconds=60)

    last = whole["models"][-1]
    part = monitor.queue_history(datetime.fromisoformat(last["at"]), bucket_seconds=60)

    assert part["models"] == [last]
    assert part["since"] == last["at"]


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


def test_users_have_no_reports(alice, anon):
    for somebody in (alice, anon):
        for function in ("queue_report", "queue_history"):
            with refused("42501"):
                somebody.query(f"select public.{function}()".replace("history()", "history(now())"))


def test_a_report_reads_little_of_a_long_history(db, alice, worker, monitor):
    alice.has_history(3000)
    db.pass_time("2 hours")
    alice.enqueue()
    worker.fail_job(worker.claimed(), "moderated")
    db.execute("analyze")

    with db.connect().transaction() as transaction:
        connection = transaction.connection
        connection.execute("select private.queue_report()")
        connection.execute("select private.queue_history(now() - interval '10 minutes', 60)")
        scanned = connection.execute(
            "select relname from pg_stat_xact_user_tables where seq_scan > 0"
        ).fetchall()

    grow = {"attempts", "credit_ledger", "entitlements", "generations", "images"}
    assert ("ready_jobs",) in scanned
    assert grow & {name for (name,) in scanned} == set()
