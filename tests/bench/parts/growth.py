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
from psycopg.rows import namedtuple_row
from psycopg.types.json import Jsonb
from run_bare import COMPLETE, complete, image_of

CALLS, QUICK_CALLS = 100, 30  # each turn
COUNTS, QUICK_COUNTS = (0, 1_000_000, 5_000_000), (0, 10_000, 50_000)
BATCH = 10
P50, P99 = "p50 ms", "p99 ms"
TABLE, INDEXES = "table bytes/generation", "index bytes/generation"
STATUS = "select public.get_job_status(%s)"
ENQUEUE = "select public.enqueue_generation('darkroom/preview', %s, '{\"width\": 512}', null)"
CLAIM = "select * from private.claim_jobs(%s, %s)"
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
    worker: psycopg.Connection[Any]
    worker_id: int

    def become(self, claims: str) -> None:
        """Let the user be another one."""
        self.user.execute("select set_config('request.jwt.claims', %s, false)", [claims])

    def claim(self, count: int) -> list[Any]:
        """Take jobs."""
        return self.worker.execute(CLAIM, [self.worker_id, count]).fetchall()


@contextmanager
def open_side(db: Database) -> Iterator[Side]:
    """Connect with a database."""
    as_user = darkroom.AS_USER["PGOPTIONS"]
    with (
        psycopg.connect(db.url, autocommit=True, options=as_user) as user,
        psycopg.connect(
            darkroom.worker_url(db), autocommit=True, row_factory=namedtuple_row
        ) as worker,
    ):
        user.prepare_threshold = worker.prepare_threshold = 0
        query = "select worker_id from private.register_worker('bench', 1000, '1')"
        side = Side(db, user, worker, worker.execute(query).fetchone()[0])  # type: ignore[index]
        yield side
        worker.execute("select private.unregister_worker(%s)", [side.worker_id])


def timed(connection: psycopg.Connection[Any], query: str, *arguments: Any) -> tuple[float, Any]:
    """Return the milliseconds that a call took, and its rows."""
    began = time.perf_counter()
    rows = connection.execute(query.encode(), arguments).fetchall()
    return 1000 * (time.perf_counter() - began), rows


def enqueue(side: Side, count: int) -> Iterator[float]:
    for _ in range(count):
        side.become(darkroom.claims(darkroom.FIRST_USER + random.randrange(darkroom.USERS)))
        yield timed(side.user, ENQUEUE, darkroom.PROMPT)[0]


def claim(side: Side, count: int) -> Iterator[float]:
    darkroom.fill(side.db, BATCH * count)
    for _ in range(count):
        milliseconds, jobs = timed(side.worker, CLAIM, side.worker_id, BATCH)
        assert len(jobs) == BATCH
        complete(side.worker, jobs)
        yield milliseconds


def complete_each(side: Side, count: int) -> Iterator[float]:
    darkroom.fill(side.db, count)
    for job in side.claim(count):
        images, metrics = [Jsonb([image_of(job)])], [Jsonb({"images": 1})]
        yield timed(side.worker, COMPLETE, [job.job_id], [job.token], images, metrics)[0]


def look_at(sample: str, side: Side, count: int) -> Iterator[float]:
    darkroom.run_script(side.db, darkroom.LAST_QUEUED)
    for job in random.choices(side.db.execute(f"select * from bench.{sample}"), k=count):
        side.become(job["claims"])
        yield timed(side.user, STATUS, job["job_id"])[0]


def list_active(side: Side, count: int) -> Iterator[float]:
    for _ in range(count):
        side.become(darkroom.claims(darkroom.FIRST_USER + random.randrange(darkroom.USERS)))
        yield timed(side.user, "select public.list_active_jobs()")[0]


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
    histories = QUICK_COUNTS if sizes.is_quick else COUNTS
    calls = [
        Task(call, name_of(history), functools.partial(measure, lab, history, way, count))
        for call, way in WAYS.items()
        for history in histories
    ]
    weights = [
        Task(
            f"{table or 'all tables'} on disk",
            name_of(history),
            functools.partial(weigh, lab, history, table),
        )
        for table in (*TABLES, None)
        for history in filter(None, histories)
    ]
    return calls + weights


def name_of(history: int) -> str:
    """Name a contender."""
    return f"Darkroom, {history:,} finished generations" if history else NEW


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
    return {
        TABLE: float(row["in_table"] / history),
        INDEXES: float(row["in_indexes"] / history),
    }


NEW = "Darkroom, no history"
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
