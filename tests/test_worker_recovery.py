"""How a worker gets over what goes wrong around it: leases, connections, and what the server says.

One worker that beats five times a second; its jobs at the fake of Replicate last as long as asked.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator

import pytest
from database import Database
from shared_worker import shared_worker
from test_worker_units import ENVIRONMENT
from worker_process import eventually

import worker

SMALL = {"width": 64, "height": 64}

world, db, workers = shared_worker(
    "retry_base = '0', heartbeat = '0.2 seconds', lease = '5 seconds'",
    WORKER_POLL_SECONDS=0.2,
    WORKER_SLOTS=3,
)


# --- leases ---


def test_a_dead_workers_job_is_in_other_hands_within_75_seconds(server, template):
    new = server.create(template)
    settings = new.row("select lease, retry_base from private.settings")
    server.drop(new)

    seconds = settings["lease"].total_seconds() + settings["retry_base"].total_seconds()

    assert seconds + worker.RECOVERY_SECONDS + worker.Settings(ENVIRONMENT).poll_seconds < 75


def test_heartbeats_extend_the_lease_tell_the_progress_and_hear_of_a_cancel(db, alice, workers):
    lease = "select lease_until from private.running_jobs where job_id = %s"
    job = workers.running(alice, seconds=60)
    first = db.value(lease, job)

    eventually(lambda: db.value(lease, job) > first)
    eventually(lambda: alice.get_job_status(job)["progress"] is not None)
    cancel = "update private.running_jobs set cancel_requested = true where job_id = %s"
    db.execute(cancel, job)  # without a NOTIFY
    workers.until(job, "canceled")


@pytest.mark.parametrize(
    ("percent", "progress"), [("100000", 100), ("-1", 0), ('"much"', None), ("12.5", 13)]
)
def test_no_progress_that_a_provider_tells_keeps_a_worker_from_beating(
    db, alice, workers, percent, progress
):
    put = "update private.providers set recipe = jsonb_set(recipe, '{poll,percent}', %s)"
    db.execute(f"{put} where name = 'replicate'", json.dumps(percent))
    job = workers.running(alice, seconds=60, running="pondering")
    lease = "select lease_until from private.running_jobs where job_id = %s"
    seen = "select progress from private.running_jobs where job_id = %s"

    if progress is not None:
        eventually(lambda: db.value(seen, job) == progress)
    first = db.value(lease, job)
    eventually(lambda: db.value(lease, job) > first)

    db.execute(
        "update private.providers set recipe = recipe #- '{poll,percent}' where name = 'replicate'"
    )
    alice.cancel_generation(job)
    workers.until(job, "canceled")


def test_a_beat_that_finds_the_lease_lost_drops_the_job_and_frees_its_slot(alice, workers):
    lost, *others = [workers.running(alice, seconds=60) for _ in range(3)]
    waiting = alice.enqueued(params=SMALL)

    workers.give_lease_away(lost)
    workers.until(waiting, "completed")

    assert f"job.lost job={lost}" in workers.process.log
    assert workers.status(lost) == "processing"  # its new holder's
    for job in (lost, *others):
        alice.cancel_generation(job)
    for job in others:
        workers.until(job, "canceled")


def test_a_worker_may_claim_its_own_lost_job_again(db, alice, workers):
    job = workers.running(alice, seconds=1.5)

    with db.connect().transaction() as recovery:  # no beat in between
        recovery.connection.execute(
            "update private.running_jobs set lease_until = now() - interval '1 second'"
            " where job_id = %s",
            [job],
        )
        recovery.connection.execute("select private.recover_stale_jobs()")
    workers.until(job, "completed")

    assert workers.outcomes(job) == ["retried", "completed"]
    assert workers.process.log.count(f"job.claimed job={job}") == 2
    assert workers.process.log.count(f"job.lost job={job}") == 1


# --- the database ---


def test_jobs_survive_the_loss_of_all_database_connections(alice, workers):
    jobs = [workers.running(alice, seconds=0.5) for _ in range(3)]

    def a_jobs_call_was_cut_off() -> bool:
        workers.terminate_backends("true")
        cut_off = r"database\.lost call=(next_steps|complete)"
        return bool(re.search(cut_off, workers.process.log))

    eventually(a_jobs_call_was_cut_off)
    for job in jobs:
        workers.until(job, "completed")

    assert [workers.outcomes(job) for job in jobs] == [["completed"]] * 3
    assert alice.credits() == 7


@contextlib.contextmanager
def saying(db: Database, state: str, *functions: str) -> Iterator[None]:
    """Have functions do nothing but fail with an SQLSTATE."""
    query = "select pg_get_functiondef(%s::regproc) as text"
    texts = [str(db.value(query, f"private.{name}")) for name in functions]
    says = f"AS $function$ begin raise sqlstate '{state}'; end $function$"
    for text in texts:
        head = re.sub(r"LANGUAGE \w+", "LANGUAGE plpgsql", text.split("AS $function$")[0])
        db.execute((head + says).replace("%", "%%"))
    try:
        yield
    finally:
        for text in texts:
            db.execute(text.replace("%", "%%"))


# Read-only, no right, disk full, timeout, gone, broken: each in another class of exceptions.
@pytest.mark.parametrize("state", ["25006", "42501", "53100", "57014", "08006", "XX000"])
def test_whatever_the_server_says_of_itself_is_waited_out(db, alice, workers, state):
    jobs = [workers.running(alice, seconds=1) for _ in range(2)]
    calls = ("claim_jobs", "heartbeat", "due_lanes", "complete_jobs")

    with saying(db, state, *calls, "sleep", "recover_stale_jobs"):
        jobs += [alice.enqueued(params=SMALL) for _ in range(2)]
        for call in calls:
            workers.process.logged(rf"database\.lost call={call} error=\w+ {state}")
    for job in jobs:
        workers.until(job, "completed")

    assert workers.process.is_running()
    assert [workers.outcomes(job) for job in jobs] == [["completed"]] * 4
    said = re.findall(rf"call=claim_jobs error=\w+ {state}", workers.process.log)
    assert len(said) == 1  # not one for each try


def test_a_worker_that_starts_where_nothing_can_be_written_waits(db, workers):
    with saying(db, "25006", "register_worker"):
        late = workers.launch()
        late.logged(r"database\.lost call=register_worker error=ReadOnlySqlTransaction")

    late.logged(r"worker\.started", within=20)
    assert late.stop() == 0
