"""How fast one worker process empties a queue."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import darkroom
import peers
import psycopg
from core import Part, Sizes, Task, percentiles
from database import Database
from lab import Contender, Lab

RATE = "jobs/s"
CLAIM_P50, CLAIM_P99 = "claim p50 ms", "claim p99 ms"
FIRST_QUARTER, LAST_QUARTER = "jobs/s, first quarter", "jobs/s, last quarter"
MEMORY = "MB afterwards"
EMPTY, BACKLOG, HISTORY = "nothing else", "backlog", "history"
CHURNED, HELD = "churned, {:g} s", "snapshot held, {:g} s"
PEERS = (
    *(peers.BASELINE, peers.PROCRASTINATE, peers.PGQUEUER, peers.GRAPHILE),
    *(peers.GRAPHILE_BATCHING, peers.PGBOSS, peers.PGBOSS_500),
)
OURS = (
    *(
        Contender(f"Darkroom's functions, batch {batch}", "run_bare.py", {"batch": batch}, batch)
        for batch in (1, 10, 50, 200)
    ),
    Contender("Darkroom's worker.py", "run_worker.py", {}, 200),
)


@dataclass(frozen=True)
class Load:
    jobs: int
    backlog: int
    history: int
    seconds: float  # at most, for one drain
    hold_seconds: float


def make_tasks(lab: Lab, sizes: Sizes) -> list[Task]:
    load = Load(
        jobs=sizes.pick(20_000, 400),
        backlog=sizes.pick(200_000, 2_000),
        history=sizes.pick(1_000_000, 2_000),
        seconds=sizes.pick(8, 2),
        hold_seconds=sizes.hold_seconds,
    )
    return [
        Task(
            situation.format(load.hold_seconds),
            contender.name,
            functools.partial(measure, lab, contender, situation, load),
        )
        for situation in (EMPTY, BACKLOG, HISTORY, CHURNED, HELD)
        for contender in (OURS if situation in (BACKLOG, HISTORY) else (*PEERS, *OURS))
    ]


def measure(lab: Lab, contender: Contender, situation: str, load: Load) -> dict[str, float]:
    is_ours = contender in OURS
    with lab.copy(full_queue(lab, contender, situation, load)) as db, contextlib.ExitStack() as end:
        if situation == HELD:
            end.enter_context(held_snapshot(db))
        if situation in (CHURNED, HELD):
            churn(lab, contender, db, load)
        before = darkroom.finished(db) if is_ours else 0
        report = drain(lab, contender, db, load.jobs, load.seconds)
        if is_ours and darkroom.finished(db) - before < len(report["moments"]):
            raise RuntimeError("not every job that was counted is completed")
    return numbers(report, load)


def fill(lab: Lab, contender: Contender, db: Database, count: int) -> None:
    if contender in OURS:
        darkroom.fill(db, count)
    else:
        peers.fill(lab, contender, db, count)


def full_queue(lab: Lab, contender: Contender, situation: str, load: Load) -> str:
    """Return the template of a queue with the jobs to drain, and what else is there."""

    def fill_it(db: Database) -> None:
        if situation == BACKLOG:
            darkroom.fill(db, load.backlog, users=1)
        elif situation == HISTORY:
            darkroom.add_history(db, load.history)
        fill(lab, contender, db, load.jobs)

    if contender in OURS:
        name = f"darkroom {situation if situation in (BACKLOG, HISTORY) else 'filled'}"
        return lab.template(name, fill_it, base=darkroom.base(lab))
    return lab.template(f"{contender.program} filled", fill_it, base=peers.tables(lab, contender))


def drain(
    lab: Lab, contender: Contender, db: Database, jobs: int, seconds: float
) -> dict[str, Any]:
    url = darkroom.worker_url(db) if contender in OURS else db.url
    with lab.work(contender, url, jobs=jobs, seconds=seconds, keys=False) as worker:
        worker.say()
        return worker.report(within=seconds + 30)


def numbers(report: dict[str, Any], load: Load) -> dict[str, float]:
    """Compute the rates of a drain, stopped by time or not."""
    began, moments, claims = report["began"], report["moments"], report["claims"]
    if not moments:
        return {RATE: 0.0}
    seconds = moments[-1] - began
    if len(moments) < load.jobs:
        if seconds < load.seconds / 2:
            raise RuntimeError(f"it stood still after {len(moments)} jobs")
        seconds = load.seconds
    quarter = len(moments) // 4
    found = {
        RATE: len(moments) / seconds,
        FIRST_QUARTER: quarter / (moments[quarter] - began),
        LAST_QUARTER: quarter / (moments[-1] - moments[-1 - quarter]),
        MEMORY: report["megabytes"],
    }
    if claims:
        found[CLAIM_P50], found[CLAIM_P99] = percentiles([1000 * each for each in claims], 50, 99)
    return found


@contextlib.contextmanager
def held_snapshot(db: Database) -> Iterator[None]:
    """Have another session see the database as it is now, so that vacuum removes nothing since."""
    with psycopg.connect(db.url) as connection:
        connection.execute("set transaction isolation level repeatable read")
        connection.execute("select count(*) from pg_class")
        yield


def churn(lab: Lab, contender: Contender, db: Database, load: Load) -> None:
    """Drain and refill for a while; no fewer jobs are queued in the end.

    Between its last count and its end a worker may claim some batches more.
    """
    until = time.monotonic() + load.hold_seconds
    while (left := until - time.monotonic()) > 0:
        report = drain(lab, contender, db, load.jobs, min(left, load.seconds))
        fill(lab, contender, db, len(report["moments"]) + 10 * contender.holds + 1)


PART = Part(
    name="drain",
    title="Drain",
    about=(
        "One worker process, from its start signal until 20,000 jobs are handled or 8 s are over."
        " Peers' jobs count when their handler is called; Darkroom's when they are completed, with"
        " attempt and image. Darkroom's functions are called in a bare loop (claim,"
        " complete); worker.py is the whole worker, with 64 slots and a provider and a storage that"
        " do nothing. Backlog: 200,000 more jobs of one user. History: a million finished"
        " generations. Churned: for so many seconds before, jobs were drained and refilled."
        " Snapshot held: the same, while another session holds a REPEATABLE READ snapshot from"
        " before, so that vacuum removes nothing since."
    ),
    metric=RATE,
    reference=peers.BASELINE.name,
    make_tasks=make_tasks,
    own_situation=EMPTY,
)
