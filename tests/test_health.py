"""queue_health: what it counts, how severe it is, and the books. Each alert: test_runbook."""

import json

import pytest
from actors import User, Worker
from database import assert_books_balance


def test_it_counts_what_waits_what_runs_and_who_works(db, alice, service, worker):
    db.lift_limits()
    empty = service.queue_health()
    for _ in range(4):
        alice.enqueue()
    worker.claimed()
    worker.fail_job(worker.claimed(), "provider_busy", retry_after=600)
    db.execute("delete from public.models")  # its jobs still count

    health = service.queue_health()

    assert (empty["status"], empty["alerts"], empty["rates"]["error_rate"]) == ("ok", [], None)
    assert empty["depth"] == {"ready": 0, "delayed": 0, "paused": 0, "oldest_ready_seconds": None}
    depth = health["depth"]
    assert (depth["ready"], depth["delayed"], depth["paused"]) == (2, 1, 0)
    assert 0 <= depth["oldest_ready_seconds"] < 60
    assert health["running"] == {"jobs": 1, "stale": 0, "stale_seconds": None}
    slots = {"alive": 1, "asleep": 0, "listening": 1, "slots": 4, "slots_used": 1}
    assert health["workers"] == slots
    db.pass_time("59 seconds")
    assert service.queue_health()["workers"]["alive"] == 1
    db.pass_time("2 seconds")
    assert service.queue_health()["workers"]["alive"] == 0  # silent for a lease
    db.pass_time("10 minutes")
    assert service.queue_health()["depth"]["ready"] == 3


def test_what_no_living_worker_can_make_is_counted_by_provider(db, alice, service):
    db.lift_limits()
    for _ in range(2):
        alice.enqueue()
    assert service.queue_health()["unserved"] == {}  # no_worker says it
    worker = Worker(db, keys=["OTHER_TOKEN"])

    for change, count in (
        ("secret = 'FAL_KEY'", 2),
        ("secret = 'OTHER_TOKEN'", 0),
        ("secret = null", 0),
        ("is_active = false", 2),
    ):
        db.execute(f"update private.providers set {change} where name = 'preview'")
        assert service.queue_health()["unserved"] == ({"preview": count} if count else {}), change
    service.pause_model("preview")
    assert service.queue_health()["unserved"] == {}
    service.resume_model("preview")
    db.pass_time("61 seconds")
    assert service.queue_health()["unserved"] == {}
    worker.heartbeat()
    assert set(service.alerts()) == {"unserved"}


def test_it_counts_the_last_minute_and_the_last_fifteen(db, alice, service, worker):
    for _ in range(3):
        alice.enqueue()
    worker.complete_job(worker.claimed())
    db.pass_time("2 minutes")
    worker.fail_job(worker.claimed(), "moderated")

    rates = service.queue_health()["rates"]

    kinds = ("enqueued", "completed", "failed", "retried")
    assert rates["last_minute"] == dict(zip(kinds, (0, 0, 1, 0), strict=True))
    assert rates["per_minute_of_15"] == dict(zip(kinds, (0.2, 0.07, 0.07, 0), strict=True))
    assert (rates["error_rate"], rates["attempts_of_15_minutes"]) == (0.5, 2)
    db.pass_time("15 minutes")
    assert service.queue_health()["rates"]["attempts_of_15_minutes"] == 0


def test_an_alert_is_raised_above_its_threshold_and_the_worst_gives_the_status(db, alice, service):
    db.execute("update private.alert_rules set threshold = 1 where alert = 'depth'")
    alice.enqueue()
    assert "depth" not in service.alerts()
    alice.enqueue()

    health = service.queue_health()

    raised = [(each["alert"], each["severity"]) for each in health["alerts"]]
    assert raised == [("no_worker", "critical"), ("depth", "warning")]
    assert health["status"] == "critical"
    assert all(each["detail"] and each["hint"] for each in health["alerts"])
    db.execute("update private.alert_rules set threshold = null")
    assert service.alerts() == {}


def test_an_alert_rests_on_enough_cases(db, alice, service, worker):
    db.execute("update private.alert_rules set min_cases = 2 where alert = 'error_rate'")
    alice.enqueue()
    worker.fail_job(worker.claimed(), "provider_busy")
    assert service.alerts() == {}
    db.pass_time("2 seconds")

    worker.fail_job(worker.claimed(), "moderated")

    assert service.alerts() == {
        "error_rate": "of 2 attempts in 15 minutes, 100 % ended in an error"
    }


OK, ERROR, USERS = "completed", "provider_error", ("moderated", "invalid_input", "canceled")


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([ERROR], None),
        ([OK, OK, OK, ERROR], None),
        ([OK, ERROR, OK, ERROR], "2 of the last 4 jobs failed, most of them with provider_error"),
        ([ERROR] * 4 + [OK] * 8, "4 of the last 12 jobs failed, most of them with provider_error"),
        ([ERROR] * 4 + [OK] * 9, None),
        ([OK, OK, OK, ERROR, *USERS, *USERS], None),
        ([OK, ERROR, ERROR, *USERS], None),
    ],
)
def test_a_quarter_of_the_last_jobs_failed_however_long_ago_and_not_by_their_users(
    alice, service, worker, ends, said
):
    db = alice.db
    db.lift_limits()
    db.execute("update private.settings set max_attempts = 1")
    for end in ends:
        alice.enqueue()
        job = worker.claimed()
        if end == OK:
            worker.complete_job(job)
        elif end == "canceled":
            alice.cancel_generation(job.id)
            worker.cancel_job(job)
        else:
            worker.fail_job(job, end)
        db.pass_time("3 hours")

    assert service.alerts() == ({"recent_failures": said} if said else {})


@pytest.mark.parametrize(
    "begin",
    [
        "begin isolation level repeatable read; select 'a secret'",
        "begin; select pg_current_xact_id(), 'a secret'",  # no snapshot, but a number of its own
    ],
)
def test_what_holds_back_vacuum_is_named_without_what_it_runs(db, service, begin):
    db.execute("update private.alert_rules set threshold = 9 where alert = 'vacuum_held_back'")
    holder = db.connect()
    holder.execute("set application_name = 'a report'")
    holder.execute(begin)
    for _ in range(11):
        db.execute("select pg_current_xact_id()")

    said = service.alerts()["vacuum_held_back"]

    named = f'session {holder.info.backend_pid} "a report" idle in transaction since 00:00:0'
    assert said.startswith(named)
    assert "a secret" not in json.dumps(service.queue_health())
    holder.execute("rollback")
    assert service.alerts() == {}


# The books.

INSERT = "insert into public.credit_ledger (user_id, kind, amount, balance_after) values"
NO_REFUND = "delete from public.credit_ledger where kind = 'refund'"
SHORT_REFUND = (
    "update public.credit_ledger set amount = 1, balance_after = 9 where kind = 'refund';"
    "update public.entitlements set credits = 9 where user_id = '{alice}'"
)
REFUND = "update public.credit_ledger set kind = 'refund', amount = 1 where kind = 'charge'"
FAULTS = [
    # How far a job has come, what is wrong then, and the rule that it breaks.
    ("queued", "update public.entitlements set credits = 11 where user_id = '{alice}'", "balance"),
    ("queued", f"{INSERT} ('{{alice}}', 'grant', 1, 10)", "ledger"),
    ("queued", f"{INSERT} ('{{alice}}', 'grant', 2147483647, 2147483647)", "ledger"),
    ("queued", "update private.ready_jobs set user_id = '{bob}'", "place"),
    ("running", "update private.running_jobs set user_id = '{bob}'", "place"),
    ("running", "update public.generations set status = 'queued'", "place"),
    ("queued", "update public.generations set price_credits = 3", "charge"),
    ("moderated", NO_REFUND, "refund"),
    ("canceled", NO_REFUND, "refund"),
    *((state, SHORT_REFUND, "refund") for state in ("moderated", "canceled")),
    ("completed", REFUND, "refund"),
    ("completed", "update public.generations set image_count = 2", "refund"),
]


def broken(db):
    rows = db.execute("select * from private.broken_books")
    return {(row["rule"], str(row["generation_id"] or row["user_id"])) for row in rows}


@pytest.mark.parametrize(("state", "fault", "rule"), FAULTS)
def test_a_fault_in_the_books_is_found_and_raises_an_alert(db, service, state, fault, rule):
    alice, bob, worker = User(db), User(db), Worker(db)
    db.execute("update public.models set price_credits = 2")
    job_id = alice.enqueued()
    if state == "canceled":
        alice.cancel_generation(job_id)
    elif state != "queued":
        job = worker.claimed()
        if state == "completed":
            worker.complete_job(job)
        elif state == "moderated":
            worker.fail_job(job, state)
    assert_books_balance(db)

    db.execute("alter table public.credit_ledger disable trigger all")
    db.execute(fault.format(alice=alice.id, bob=bob.id))

    found = broken(db)
    assert (rule, alice.id if rule in ("balance", "ledger") else job_id) in found
    assert {who for _, who in found} <= {alice.id, job_id}
    # A charge is for the nightly check; the others are seen at once.
    assert ("books" in service.alerts()) == (rule != "charge")


def test_the_nightly_check_finds_what_has_not_moved_and_keeps_it_until_it_finds_nothing(
    db, alice, service
):
    db.execute("update public.entitlements set credits = 11")
    assert service.alerts() == {}

    assert db.value("select private.check_books()") == 1

    books = service.queue_health()["books"]
    assert (books["recent_problems"], books["problems"]) == (0, 1)
    assert books["examples"][0]["detail"] == "credits are 11, the ledger ends at 10"
    assert service.alerts()["books"].startswith("0 problems among what moved last, 1 at the check")
    db.execute("update public.entitlements set credits = 10")
    assert db.value("select private.check_books()") == 0
    assert service.alerts() == {}


def test_what_is_given_back_may_change_without_breaking_what_was_given(db, alice, worker):
    for percent in (0, 50, 100, 30):
        db.execute("update private.settings set running_cancel_refund_percent = %s", percent)
        db.execute("update private.error_codes set refund_percent = %s", percent)
        assert_books_balance(db)
        canceled = alice.enqueued(params={"num_outputs": 2})
        job = worker.claimed()
        alice.cancel_generation(canceled)
        worker.cancel_job(job)
        alice.enqueue(params={"num_outputs": 2})
        worker.fail_job(worker.claimed(), "moderated")

    assert [-amount for kind, amount in alice.ledger() if kind == "charge"] == [2] * 8
    assert [back for kind, back in alice.ledger() if kind == "refund"] == [0, 0, 1, 1, 2, 2, 1, 1]
    assert_books_balance(db)
