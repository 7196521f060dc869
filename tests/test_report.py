"""sql/97_reports.sql: what the operator's page, `make top` and exporters draw."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from actors import PREVIEW, Worker, refused
from test_views import another_model, ended, only

__all__ = ["another_model"]


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
            "select public.queue_health(), public.queue_report()"
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


def test_errors_by_model_and_code(db, alice, worker, monitor):
    db.lift_limits()
    for _ in range(2):
        ended(alice, worker, 1, "internal")
    alice.enqueue()
    worker.fail_job(worker.claimed(), "internal", "upload: HTTP 403: row-level security")

    (error,) = monitor.queue_report()["errors"]

    assert only(error, "error_code", "errors", "failed") == ("internal", 3, 0)
    assert error["retried"] == 3


def test_errors_of_each_model_and_code(db, alice, worker, monitor, another_model):
    db.lift_limits()
    for end in ("completed", "moderated", "moderated", "invalid_input"):
        ended(alice, worker, 1, end)
    ended(alice, worker, 1, "moderated", model=another_model)

    errors = monitor.queue_report()["errors"]

    names = ("model_id", "error_code", "errors", "failed")
    assert only(errors[0], *names) == (PREVIEW, "moderated", 2, 2)
    assert {only(row, *names) for row in errors[1:]} == {
        (PREVIEW, "invalid_input", 1, 1),
        (another_model, "moderated", 1, 1),
    }


def test_how_fast_each_model_is(db, alice, worker, monitor, another_model):
    db.lift_limits()
    for seconds in (10, 20, 30):
        ended(alice, worker, seconds)
    ended(alice, worker, 100, model=another_model)
    ended(alice, worker, 1, "moderated", model=another_model)

    slow, preview = monitor.queue_report()["models"]

    assert only(slow, "model_id", "completed", "failed") == (another_model, 1, 1)
    assert only(preview, "model_id", "completed", "failed") == (PREVIEW, 3, 0)
    assert round(preview["p50_seconds"]) == 20
    assert round(preview["p95_seconds"]) == 29
    assert round(slow["p95_seconds"]) == 100


# What a provider says may be the prompt in any spelling, and an exception may name a user.
WORDS = 'Keep Out, "the" Owl'
SPELLED = [WORDS, WORDS.lower(), json.dumps(WORDS), json.dumps(json.dumps(WORDS)), WORDS[5:]]
CALLS = ("public.queue_health", "public.queue_report")


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

    told = [monitor.query(f"select * from {call}()") for call in CALLS]
    told.append(monitor.queue_history(ago(hours=1)))

    text = json.dumps(told, default=str)
    assert "skipped_rows" in text and "invalid_input" in text and "problems" in text
    found = [each for each in (alice.id, *jobs, "owl", "keep out") if each in text.lower()]
    assert found == []


def test_the_last_attempts_newest_first(alice, worker, monitor):
    ended(alice, worker, 2)
    ended(alice, worker, 1, "moderated")

    newest, older = monitor.queue_report()["recent"]

    assert only(newest, "outcome", "error_code") == ("failed", "moderated")
    assert only(older, "outcome", "attempt") == ("completed", 1)
    assert 2 <= older["ran_seconds"] < 5


def test_the_job_that_runs_for_longest_first(db, alice, worker, monitor):
    for _ in range(2):
        alice.enqueue()
        worker.claimed()
        db.pass_time("5 seconds")

    first, second = monitor.queue_report()["running"]

    assert 10 <= first["running_seconds"] < 20
    assert 5 <= second["running_seconds"] < 10


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

    alerts = {row["alert"]: row for row in monitor.queue_report()["alerts"]}

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
        connection.execute("select public.queue_report()")
        connection.execute("select public.queue_history(now() - interval '10 minutes', 60)")
        scanned = connection.execute(
            "select relname from pg_stat_xact_user_tables where seq_scan > 0"
        ).fetchall()

    grow = {"attempts", "credit_ledger", "entitlements", "generations", "images"}
    assert ("ready_jobs",) in scanned
    assert grow & {name for (name,) in scanned} == set()
