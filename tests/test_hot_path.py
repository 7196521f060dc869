"""What every job costs, told by what its calls do and not by how long they take.

A call that is planned anew each time, a batch that repeats statements for each job, an update that
touches indexes: each would be slow, and each shows.
"""

from __future__ import annotations

from typing import Any

from actors import User, Worker, polled
from database import Database
from explain import explained

BAR = " 50%|█████     | 2/4 [00:01<00:01,  1.60it/s]"
HOT_TABLES = {"entitlements", "generations", "running_jobs", "workers"}


def a_day_of(user: User, worker: Worker, jobs: int = 1) -> None:
    """Have jobs go all the way, with a look at each on the way."""
    for _ in range(jobs):
        job_id = user.enqueued()
        job = worker.claimed()
        worker.checkpoint(job, bought := f"prediction-{job.id}")
        worker.next_step(job, polled(bought, "processing", logs=BAR))
        worker.next_step(job, polled(bought, "succeeded", output="https://replicate.delivery/a"))
        worker.heartbeat(job, progress=[50])
        worker.report_progress(job, "storing", 90)
        user.get_job_status(job_id)
        worker.complete_job(job)
        user.get_job_status(job_id)


def left(db: Database, *actors: Any) -> Database:
    """Close the connections of these actors: only then is all they did on record."""
    for actor in actors:
        actor.connection.close()
    return db


def test_no_function_that_every_job_calls_is_planned_at_each_call(db):
    """One in SQL is, before PostgreSQL 18, unless it can be inlined. Workers register once."""
    db.execute(f"alter database {db.name} set track_functions = 'all'")
    db.buys_previews()
    alice, worker = User(db), Worker(db)
    a_day_of(alice, worker)
    alice.enqueue_batch(["one", "two"])
    alice.list_active_jobs()

    planned = left(db, alice, worker).execute(
        "select s.schemaname || '.' || s.funcname as name from pg_stat_user_functions as s"
        " inner join pg_proc as p on p.oid = s.funcid inner join pg_language as l"
        " on l.oid = p.prolang where l.lanname = 'sql' and s.schemaname in ('public', 'private')"
        " and s.funcname <> 'register_worker'"
    )

    assert [row["name"] for row in planned] == []


def test_a_batch_takes_as_many_statements_as_one_job(db, alice):
    db.lift_limits()
    alice.has_paid().enqueue_batch(["one"])

    with explained(alice.connection) as of_one:
        alice.enqueue_batch(["one"])
    with explained(alice.connection) as of_twenty:
        alice.enqueue_batch(["one"] * 20)

    assert len(of_twenty) == len(of_one) > 0


def test_what_changes_with_every_job_is_updated_in_place(db, alice, worker):
    """HOT: no index is touched. Without room on the page, or with an index on it, it would be."""
    db.lift_limits()
    db.buys_previews()
    alice.has(credits=300)

    a_day_of(alice, worker, jobs=300)

    rows = left(db, alice, worker).execute(
        "select relname, n_tup_upd, n_tup_hot_upd from pg_stat_user_tables where relname = any(%s)",
        list(HOT_TABLES),
    )
    shares = {row["relname"]: row["n_tup_hot_upd"] / row["n_tup_upd"] for row in rows}
    assert set(shares) == HOT_TABLES
    assert {name: share for name, share in shares.items() if share < 0.9} == {}
