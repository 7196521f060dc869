"""sql/72_claim.sql, put_off: while a look at the queue is dear, one session looks for all."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from actors import Worker

CLOCK = 1_000_000_000
RECOVERED = "select private.recover_stale_jobs()"


def due_in(db, name: str, seconds: float) -> None:
    """Say when somebody may look next."""
    query = "select setval(%s::regclass, (1000 * (extract(epoch from now()) + %s))::bigint)"
    db.execute(query, f"private.{name}", seconds)


def seconds_until(db, name: str) -> float:
    """Return when somebody may look next: the past is 0."""
    seconds = "last_value / 1000.0 - extract(epoch from clock_timestamp())"
    return max(0.0, float(db.value(f"select {seconds} from private.{name}")))


@pytest.fixture
def below(db, alice, worker) -> str:
    """A job that lies below the clock."""
    job_id = alice.enqueued()
    worker.release_job(worker.claimed())
    query = "select setval('private.virtual_clock', fair_key + %s) from private.ready_jobs"
    db.execute(query, CLOCK)
    return job_id


def test_what_lies_below_the_clock_is_found_when_somebody_may_look(db, below):
    due_in(db, "scan_due", 30)
    sessions = Worker(db), Worker(db)
    assert [session.claim_jobs() for session in sessions] == [[], []]

    due_in(db, "scan_due", -1)

    assert sessions[0].claimed().id == below


def test_what_lies_below_the_clock_goes_first_also_where_enough_lies_above(db, bob, below):
    bob.enqueue()
    due_in(db, "scan_due", -1)

    assert Worker(db).claimed().id == below


def test_a_look_is_not_put_off_by_a_clock_that_was_wrong(db, below):
    due_in(db, "scan_due", 3600)

    assert Worker(db).claimed().id == below


@pytest.mark.parametrize("name", ["scan_due", "recovery_due"])
@pytest.mark.parametrize(
    ("took", "waits"), [("4 milliseconds", 0), ("0.1 seconds", 5), ("1 hour", 10)]
)
def test_a_look_that_took_long_puts_the_next_off(db, name, took, waits):
    began = "clock_timestamp() - %s::interval"

    db.execute(f"select private.put_off(%s, {began})", f"private.{name}", took)

    assert seconds_until(db, name) == pytest.approx(waits, abs=0.4)


def test_recovery_waits_until_somebody_may_look(db, alice, worker):
    alice.enqueue()
    worker.claimed()
    db.pass_time("61 seconds")
    due_in(db, "recovery_due", 10)
    assert db.value(RECOVERED) == 0

    due_in(db, "recovery_due", -1)

    assert db.value(RECOVERED) == 1


def test_a_look_for_stale_jobs_that_took_long_puts_the_next_off(db, worker):
    db.execute("alter function private.recover_stale_jobs(integer) reset lock_timeout")
    worker.connection.execute(RECOVERED)  # else it waits where it is compiled
    with ThreadPoolExecutor(1) as pool, db.connect() as other, other.transaction():
        other.execute("lock table private.running_jobs in access exclusive mode")
        looking = pool.submit(worker.connection.execute, RECOVERED)
        db.wait_for_lock(worker.connection)
        time.sleep(0.1)
        other.execute("rollback")
        looking.result()

    assert 1 < seconds_until(db, "recovery_due") <= 10
