"""Whether finished generations make the calls slower that every job needs, and what they weigh."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import darkroom
import psycopg
from core import Part, Sizes, Task, percentiles
from database import Database
from lab import Lab
from psycopg.types.json import Jsonb
from run_bare import COMPLETE, Bare, complete, image_of

CALLS, QUICK_CALLS = 100, 30  # each turn
COUNTS, QUICK_COUNTS = (0, 1_000_000, 5_000_000), (0, 10_000, 50_000)
BATCH = 10
P50, P99 = "p50 ms", "p99 ms"
TABLE, INDEXES = "table bytes/generation", "index bytes/generation"
NEW = "Darkroom, no history"
ENQUEUE = "select public.enqueue_generation('darkroom/preview', %s, '{\"width\": 512}', null)"
TABLES = ("public.generations", "public.images", "private.attempts", "public.credit_ledger")
SIZES = """
select sum(pg_table_size(c.oid)) as in_table, sum(pg_indexes_size(c.oid)) as in_indexes
from pg_catalog.pg_class as c
where c.relkind = 'r' and c.relnamespace::regnamespace::text in ('public', 'private')
and coalesce(c.oid = %s::regclass, true)
"""


@dataclass(frozen=True)
class Side:
    """One of the databases, with a user and a worker who call its functions."""

    db: Database
    user: psycopg.Connection[Any]
    worker: Bare

    def become(self, claims: str = "") -> None:
        drawn = darkroom.claims(random.randrange(darkroom.USERS))
        self.user.execute("select set_config('request.jwt.claims', %s, false)", [claims or drawn])


@contextmanager
def open_side(db: Database) -> Iterator[Side]:
    worker = Bare(darkroom.worker_url(db), 1000)
    with darkroom.as_user(db) as user, worker.connection:
        user.prepare_threshold = worker.connection.prepare_threshold = 0
        yield Side(db, user, worker)
        worker.connection.execute("select private.unregister_worker(%s)", [worker.id])


def timed(connection: psycopg.Connection[Any], query: str, *arguments: Any) -> float:
    began = time.perf_counter()
    connection.execute(query.encode(), arguments).fetchall()
    return 1000 * (time.perf_counter() - began)


def enqueue(side: Side, count: int) -> Iterator[float]:
    for _ in range(count):
        side.become()
        yield timed(side.user, ENQUEUE, darkroom.PROMPT)


def claim(side: Side, count: int) -> Iterator[float]:
    darkroom.fill(side.db, BATCH * count)
    side.worker.slots = BATCH
    for _ in range(count):
        began = time.perf_counter()
        jobs = side.worker.claim()
        yield 1000 * (time.perf_counter() - began)
        assert len(jobs) == BATCH
        complete(side.worker.connection, jobs)


def complete_each(side: Side, count: int) -> Iterator[float]:
    darkroom.fill(side.db, count)
    side.worker.slots = count
    for job in side.worker.claim():
        images, metrics = [Jsonb([image_of(job)])], [Jsonb({"images": 1})]
        what = ([job.job_id], [job.token], images, metrics)
        yield timed(side.worker.connection, COMPLETE, *what)


def look_at(sample: str, side: Side, count: int) -> Iterator[float]:
    darkroom.run_script(side.db, darkroom.LAST_QUEUED)
    for job in random.choices(side.db.execute(f"select * from bench.{sample}"), k=count):
        side.become(job["claims"])
        yield timed(side.user, "select public.get_job_status(%s)", job["job_id"])


def list_active(side: Side, count: int) -> Iterator[float]:
    for _ in range(count):
        side.become()
        yield timed(side.user, "select public.list_active_jobs()")


WAYS: dict[str, Callable[[Side, int], Iterator[float]]] = {
    "enqueue_generation": enqueue,
    f"claim_jobs({BATCH})": claim,
    "complete_jobs(1)": complete_each,
    "get_job_status, finished": functools.partial(look_at, "finished"),
    "get_job_status, queued": functools.partial(look_at, "queued"),
    "list_active_jobs": list_active,
}


def make_tasks(lab: Lab, sizes: Sizes) -> list[Task]:
    count = sizes.pick(CALLS, QUICK_CALLS)
    names = {
        history: f"Darkroom, {history:,} finished generations" if history else NEW
        for history in (QUICK_COUNTS if sizes.is_quick else COUNTS)
    }
    return [
        Task(call, name, functools.partial(measure, lab, history, way, count))
        for call, way in WAYS.items()
        for history, name in names.items()
    ] + [
        Task(
            f"{table or 'all tables'} on disk", name, functools.partial(weigh, lab, history, table)
        )
        for table in (*TABLES, None)
        for history, name in names.items()
        if history
    ]


def measure(
    lab: Lab, history: int, way: Callable[[Side, int], Iterator[float]], count: int
) -> dict[str, float]:
    """Make a call many times, and leave the queue as long as it was."""
    db = darkroom.aged(lab, history)
    try:
        with open_side(db) as side:
            times = list(way(side, count + count // 10))[count // 10 :]
    finally:
        darkroom.work_off(db, darkroom.QUEUE)
    p50, p99 = percentiles(times, 50, 99)
    return {P50: p50, P99: p99}


def weigh(lab: Lab, history: int, table: str | None) -> dict[str, float]:
    """Return what a generation takes on disk, in a table or in all."""
    row = darkroom.aged(lab, history).row(SIZES, table)
    return {TABLE: float(row["in_table"] / history), INDEXES: float(row["in_indexes"] / history)}


PART = Part(
    name="growth",
    title="Growth",
    about=(
        f"How long single calls take over one connection, {CALLS} in each round, in databases that"
        " differ in finished generations of a year (one in ten failed or canceled, one attempt"
        f" each), with {darkroom.QUEUE} jobs queued. No history means some ten thousand in the end:"
        " those that the measurement itself finishes. What they take on disk is the size of tables,"
        " TOAST included, and of their indexes, divided by the finished generations."
    ),
    metric=P50,
    reference=NEW,
    make_tasks=make_tasks,
    is_less_better=True,
    turns=3,
)
