"""sql/86, 88: queue_health, its alerts, the books. Every alert comes and goes for real."""

import json

import pytest
from actors import User, Worker, refused
from database import assert_books_balance


def set_rule(db, alert, **columns):
    """Change columns of one alert's rule."""
    for column, value in columns.items():
        db.execute(f"update private.alert_rules set {column} = %s where alert = %s", value, alert)


def use_transactions(db, count):
    """Let transactions pass that write."""
    for _ in range(count):
        db.execute("select pg_current_xact_id()")


def test_a_database_nobody_uses_is_well(service):
    health = service.queue_health()

    assert (health["status"], health["alerts"]) == ("ok", [])
    assert health["depth"] == {
        "ready": 0,
        "delayed": 0,
        "paused": 0,
        "oldest_ready_seconds": None,
    }
    assert health["workers"]["alive"] == 0
    assert health["rates"]["error_rate"] is None


def test_it_counts_what_waits_and_what_runs(db, alice, service, worker):
    db.lift_limits()
    for _ in range(4):
        alice.enqueue()
    worker.claimed()
    worker.fail_job(worker.claimed(), "provider_busy", retry_after=600)

    health = service.queue_health()

    depth = health["depth"]
    assert (depth["ready"], depth["delayed"], depth["paused"]) == (2, 1, 0)
    assert 0 <= depth["oldest_ready_seconds"] < 60
    assert health["running"] == {"jobs": 1, "stale": 0, "stale_seconds": None}
    slots = {"alive": 1, "asleep": 0, "listening": 1, "slots": 4, "slots_used": 1}
    assert health["workers"] == slots


def test_a_delayed_job_is_ready_when_its_time_has_come(db, alice, service, worker):
    alice.enqueue()
    worker.fail_job(worker.claimed(), "provider_busy", retry_after=600)

    db.pass_time("11 minutes")

    assert service.queue_health()["depth"]["ready"] == 1


def test_it_counts_the_last_minute_and_the_last_fifteen(db, alice, service, worker):
    db.lift_limits()
    for _ in range(3):
        alice.enqueue()
    worker.complete_job(worker.claimed())
    db.pass_time("2 minutes")
    worker.fail_job(worker.claimed(), "moderated")

    rates = service.queue_health()["rates"]

    assert rates["last_minute"] == {"enqueued": 0, "completed": 0, "failed": 1, "retried": 0}
    assert rates["per_minute_of_15"] == {
        "enqueued": 0.2,
        "completed": 0.07,
        "failed": 0.07,
        "retried": 0,
    }
    assert (rates["error_rate"], rates["attempts_of_15_minutes"]) == (0.5, 2)
    db.pass_time("15 minutes")
    assert service.queue_health()["rates"]["attempts_of_15_minutes"] == 0


def test_a_worker_that_only_went_silent_lives_as_long_as_its_lease(db, service, worker):
    db.pass_time("59 seconds")
    assert service.queue_health()["workers"]["alive"] == 1

    db.pass_time("2 seconds")

    assert service.queue_health()["workers"]["alive"] == 0


def test_the_worst_alert_gives_the_status(db, alice, service):
    set_rule(db, "depth", threshold=0)
    alice.enqueue()

    health = service.queue_health()

    assert [(each["alert"], each["severity"]) for each in health["alerts"]] == [
        ("no_worker", "critical"),
        ("depth", "warning"),
    ]
    assert health["status"] == "critical"
    assert all(each["detail"] and each["hint"] for each in health["alerts"])


def test_a_rule_without_threshold_never_speaks(db, alice, service):
    alice.enqueue()
    assert "no_worker" in service.alerts()

    set_rule(db, "no_worker", threshold=None)

    assert service.alerts() == {}


def test_alert_depth(db, alice, service, worker):
    set_rule(db, "depth", threshold=1)
    alice.enqueue()
    assert service.alerts() == {}

    alice.enqueue()
    assert service.alerts() == {"depth": "2 jobs are ready"}

    worker.claimed()
    assert service.alerts() == {}


def test_alert_oldest_age(db, alice, service, worker):
    alice.enqueue()
    db.pass_time("301 seconds")
    worker.heartbeat()
    assert service.alerts() == {"oldest_age": "a job has waited for 301 s"}

    worker.claimed()

    assert service.alerts() == {}


def test_alert_error_rate(db, alice, service, worker):
    set_rule(db, "error_rate", min_cases=3)
    alice.enqueue()
    alice.enqueue()
    worker.complete_job(worker.claimed())
    worker.fail_job(worker.claimed(), "provider_busy", retry_after=0)
    assert service.alerts() == {}  # of too few to say

    worker.fail_job(worker.claimed(), "moderated")
    said = "of 3 attempts in 15 minutes, 67 % ended in an error"
    assert service.alerts() == {"error_rate": said}

    db.pass_time("15 minutes")
    assert service.alerts() == {}


def test_alert_stuck(db, alice, service, worker):
    alice.enqueue()
    worker.claimed()
    db.pass_time("90 seconds")
    assert service.queue_health()["running"]["stale"] == 1
    assert service.alerts() == {}  # recovery may be on its way

    db.pass_time("91 seconds")
    assert service.alerts() == {"stuck": "1 running jobs are past lease or deadline, one for 121 s"}

    Worker(db).recover_stale_jobs()
    assert "stuck" not in service.alerts()


def test_alert_no_worker(db, alice, service):
    assert service.alerts() == {}  # nobody is missed
    alice.enqueue()
    assert service.alerts() == {"no_worker": "1 jobs are ready and no worker is alive"}

    Worker(db)

    assert service.alerts() == {}


def test_alert_not_listening(db, service, worker):
    Worker(db)
    worker.heartbeat(is_listening=False)
    assert service.alerts() == {"not_listening": "1 of 2 workers"}

    worker.heartbeat()

    assert service.alerts() == {}


def test_alert_cron_silent(db, service):
    db.execute("insert into private.routines (name, every) values ('recover', '1 minute')")
    db.execute("insert into private.routines (name) values ('by hand')")
    db.pass_time("239 seconds")
    assert service.alerts() == {}

    db.pass_time("1 second")
    assert service.alerts()["cron_silent"].startswith("recover last ran at ")

    db.execute("select private.note_run('recover')")
    assert service.alerts() == {}


def test_alert_paused(db, alice, service, worker):
    alice.enqueue()
    worker.pause_provider("preview", 60, "402: no credit")
    assert "402: no credit" in service.alerts()["paused"]
    assert service.queue_health()["depth"]["paused"] == 1

    db.pass_time("61 seconds")
    worker.heartbeat()

    assert service.alerts() == {}


@pytest.mark.parametrize(
    "begin",
    [
        "begin isolation level repeatable read; select 'a secret'",
        "begin; select pg_current_xact_id(), 'a secret'",  # no snapshot, but a number of its own
    ],
)
def test_alert_vacuum_held_back(db, service, begin):
    set_rule(db, "vacuum_held_back", threshold=9)
    holder = db.connect()
    holder.execute("set application_name = 'a report'")
    holder.execute(begin)
    use_transactions(db, 8)
    assert service.alerts() == {}

    use_transactions(db, 3)
    said = service.alerts()["vacuum_held_back"]
    assert said.startswith(
        f'session {holder.info.backend_pid} "a report" idle in transaction since 00:00:0'
    )
    assert "a secret" not in json.dumps(service.queue_health())

    holder.execute("rollback")
    assert service.alerts() == {}


def test_a_transaction_in_another_database_holds_back_nothing_here(server, db, service, template):
    set_rule(db, "vacuum_held_back", threshold=1)
    other = server.create(template)
    other.connect().execute("begin isolation level repeatable read; select 1")

    use_transactions(db, 5)
    alerts = service.alerts()
    server.drop(other)

    assert alerts == {}


def test_alert_dead_deliveries(db, alice, service, worker):
    db.execute("update private.settings set delivery_retries = '{}'")
    hook = service.register_webhook()["webhook_id"]
    alice.enqueue()
    worker.complete_job(worker.claimed())
    assert service.queue_health()["outbox"]["pending"] == 1
    (delivery,) = worker.claim_deliveries(hook)
    worker.finish_delivery(delivery, "failed", 500)
    assert service.alerts() == {"dead_deliveries": "1 deliveries to webhooks were given up"}

    service.redeliver_dead(hook)

    assert service.alerts() == {}


def test_nobody_misses_the_deliveries_of_a_webhook_that_was_deleted(db, alice, service, worker):
    hook = service.register_webhook()["webhook_id"]
    alice.enqueue()
    worker.complete_job(worker.claimed())

    service.delete_webhook(hook)
    worker.claim_deliveries(hook)

    assert service.alerts() == {}


# The books.


def broken(db):
    """Return which rule is broken for whom."""
    return [
        (each["rule"], str(each["generation_id"] or each["user_id"]))
        for each in db.execute("select * from private.broken_books")
    ]


def test_alert_books(db, alice, bob, service, worker):
    alice.enqueue()
    db.execute("update public.entitlements set credits = credits + 1")
    # Of alice, who moved; bob is for the nightly check.
    said = "1 problems among what moved last, none at the check of never"
    assert service.alerts() == {"books": said}

    db.execute("update public.entitlements set credits = credits - 1")

    assert service.alerts() == {}


def test_the_nightly_check_keeps_what_it_finds_until_it_finds_nothing(db, alice, service):
    db.execute("update public.entitlements set credits = 11")

    assert db.value("select private.check_books()") == 1

    books = service.queue_health()["books"]
    assert (books["recent_problems"], books["problems"]) == (0, 1)
    assert books["examples"][0]["detail"] == "credits are 11, the ledger ends at 10"
    assert "books" in service.alerts()
    db.execute("update public.entitlements set credits = 10")
    assert db.value("select private.check_books()") == 0
    assert service.alerts() == {}


def test_balances_are_held_against_the_ledger(db, alice, bob):
    db.execute("update public.entitlements set credits = 11 where user_id = %s", alice.id)

    assert broken(db) == [("balance", alice.id)]


def test_each_ledger_entry_follows_from_the_one_before(db, alice):
    db.execute(
        "insert into public.credit_ledger (user_id, kind, amount, balance_after)"
        " values (%s, 'grant', 1, 10)",
        alice.id,
    )

    assert broken(db) == [("ledger", alice.id)]


def test_a_sum_that_fits_no_integer_is_found_like_any_other(db, alice, bob):
    db.execute(
        "insert into public.credit_ledger (user_id, kind, amount, balance_after)"
        " values (%s, 'grant', 2147483647, 2147483647)",
        alice.id,
    )
    db.execute("update public.entitlements set credits = 11 where user_id = %s", bob.id)

    assert set(broken(db)) == {("ledger", alice.id), ("balance", alice.id), ("balance", bob.id)}


def test_what_is_ready_or_running_is_a_generation_of_its_user(db, alice, bob, worker):
    ids = [alice.enqueued(), alice.enqueued()]
    worker.claimed()
    db.execute("update private.ready_jobs set user_id = %s", bob.id)
    db.execute("update private.running_jobs set user_id = %s", bob.id)

    assert sorted(broken(db)) == sorted(("place", job_id) for job_id in ids)


def test_a_queued_job_is_ready_and_a_processing_one_is_running(db, alice, worker):
    job_id = alice.enqueued()
    worker.claimed()
    db.execute("update public.generations set status = 'queued'")

    assert broken(db) == [("place", job_id)]


def test_a_generation_is_charged_its_price(db, alice):
    job_id = alice.enqueued()
    db.execute("update public.generations set price_credits = 2")

    assert broken(db) == [("charge", job_id)]


NO_REFUND = "delete from public.credit_ledger where kind = 'refund'"
REFUND = "update public.credit_ledger set kind = 'refund', amount = 1 where kind = 'charge'"
FEWER = "update public.generations set image_count = 2"


@pytest.mark.parametrize(
    ("end", "wrong"),
    [
        ("moderated", NO_REFUND),
        ("canceled", NO_REFUND),
        ("completed", REFUND),
        ("completed", FEWER),
    ],
)
def test_what_was_not_made_is_refunded(db, service, worker, end, wrong):
    alice = User(db)
    db.execute("update public.models set price_credits = 2")
    job_id = alice.enqueued()
    if end == "canceled":
        alice.cancel_generation(job_id)
    elif end == "completed":
        worker.complete_job(worker.claimed())
    else:
        worker.fail_job(worker.claimed(), end)
    assert_books_balance(db)

    db.execute("alter table public.credit_ledger disable trigger all")
    db.execute(wrong)

    assert ("refund", job_id) in broken(db)
    assert "books" in service.alerts()


def test_the_rate_of_refund_for_running_jobs_may_change(db, alice, worker):
    db.execute("update private.settings set running_cancel_refund_percent = 0")
    job_id = alice.enqueued()
    job = worker.claimed()
    alice.cancel_generation(job_id)
    worker.cancel_job(job)

    db.execute("update private.settings set running_cancel_refund_percent = 100")

    assert broken(db) == []


def test_only_the_operator_asks(alice, anon):
    for somebody in (alice, anon):
        with refused("42501"):
            somebody.call("public.queue_health")


def test_jobs_of_a_deleted_model_still_count(db, alice, service):
    alice.enqueue()
    db.execute("delete from public.models")

    assert service.queue_health()["depth"]["ready"] == 1


def have_history(db, count):
    """Multiply the one completed generation of an hour ago."""
    db.execute(
        "insert into public.generations (user_id, model_id, prompt, input, provider_input, status,"
        "  price_credits, image_count, created_at, started_at, finished_at)"
        " select user_id, model_id, prompt, input, provider_input, status,"
        "  price_credits, image_count, created_at, started_at, finished_at"
        " from public.generations cross join generate_series(1, %s)",
        count,
    )
    db.execute(
        "insert into private.attempts"
        "  (generation_id, token, model_id, attempt, worker_id, started_at, ended_at, outcome)"
        " select id, 0, model_id, 1, 1, started_at, finished_at, status from public.generations"
    )
    db.execute("analyze")


def test_it_never_scans_what_grows_with_history(db, alice, worker):
    alice.enqueue()
    worker.complete_job(worker.claimed())
    db.pass_time("1 hour")
    have_history(db, 3000)
    alice.enqueue()
    alice.enqueue()
    worker.fail_job(worker.claimed(), "moderated")

    with db.connect().transaction() as transaction:
        connection = transaction.connection
        connection.execute("select public.queue_health()")
        scanned = connection.execute(
            "select relname from pg_stat_xact_user_tables where seq_scan > 0"
        ).fetchall()

    grow = {"attempts", "credit_ledger", "entitlements", "generations", "images"}
    assert ("ready_jobs",) in scanned
    assert grow & {name for (name,) in scanned} == set()
