"""How long an idle worker takes to notice a new job, and how much memory it takes meanwhile."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from typing import Any

import darkroom
import peers
import psycopg
from core import Part, Sizes, Task, percentiles
from lab import Contender, Lab

P50, P95, P99, WORST = "p50 ms", "p95 ms", "p99 ms", "worst ms"
MEMORY = "idle MB"
ENQUEUES, QUICK_ENQUEUES = 100, 10  # each round
GAP_SECONDS = (0.03, 0.08)
IDLE_SECONDS = 3.0  # before the first enqueue: the worker has gone to sleep
LAST_SECONDS = 6.0  # after the last: longer than any backstop that is measured
IDLE, CUT = "idle worker", "LISTEN cut"
LISTENING = Contender("Darkroom's worker.py", "../noop_worker.py", {})
DEAF = Contender("Darkroom's worker.py", "../noop_worker.py", {"listen": False})
ONE_AT_A_TIME = {"batch": 1, "concurrency": 1}
PEERS = (
    Contender("LISTEN + claim, bare loop", "run_baseline.py", {"batch": 1, "notify": True}),
    peers.PROCRASTINATE,
    peers.PGQUEUER,
    peers.GRAPHILE,
    Contender("pg-boss, notify", "run_pgboss.mjs", {**ONE_AT_A_TIME, "notify": True}),
)

Enqueue = Callable[[int], str]  # the n-th job; answers the key its handler will know it by


def make_tasks(lab: Lab, sizes: Sizes) -> list[Task]:
    count = sizes.pick(ENQUEUES, QUICK_ENQUEUES)
    return [
        Task(situation, contender.name, functools.partial(measure, lab, contender, count))
        for situation, contenders in ((IDLE, (*PEERS, LISTENING)), (CUT, (DEAF,)))
        for contender in contenders
    ]


def measure(lab: Lab, contender: Contender, count: int) -> dict[str, float]:
    """Enqueue now and then; match commits with the calls of the handler."""
    is_ours = contender in (LISTENING, DEAF)
    template = darkroom.base(lab) if is_ours else peers.tables(lab, contender)
    with lab.copy(template) as db:
        url = darkroom.worker_url(db) if is_ours else db.url
        as_user = darkroom.AS_USER["PGOPTIONS"] if is_ours else ""
        with (
            lab.work(contender, url, jobs=count, seconds=600, keys=True) as worker,
            psycopg.connect(db.url, autocommit=True, options=as_user) as connection,
        ):
            enqueue = our_way(connection) if is_ours else their_way(lab, contender, connection)
            worker.go()
            time.sleep(IDLE_SECONDS)
            megabytes = worker.resident_megabytes()
            committed = enqueue_now_and_then(enqueue, count)
            report = worker.report(within=LAST_SECONDS)
    started = dict(zip(report["keys"], report["moments"], strict=True))
    waits = [1000 * (started[key] - moment) for key, moment in committed.items()]
    p50, p95, p99 = percentiles(waits, 50, 95, 99)
    return {P50: p50, P95: p95, P99: p99, WORST: max(waits), MEMORY: megabytes}


def enqueue_now_and_then(enqueue: Enqueue, count: int) -> dict[str, float]:
    """Return when each commit was known to the client, by key."""
    committed = {}
    for number in range(count):
        key = enqueue(number)
        committed[key] = time.monotonic()
        time.sleep(random.uniform(*GAP_SECONDS))
    return committed


def their_way(lab: Lab, peer: Contender, connection: psycopg.Connection[Any]) -> Enqueue:
    """Enqueue as the library does."""
    statement = peers.statement(lab, peer)
    cursor = psycopg.RawCursor(connection)

    def enqueue(number: int) -> str:
        key = f"job-{number:04}"
        cursor.execute(statement.text.encode(), statement.with_key(key))
        return key

    return enqueue


def our_way(connection: psycopg.Connection[Any]) -> Enqueue:
    """Enqueue as a user, another one each time."""
    query = (
        "select set_config('request.jwt.claims', %s, false),"
        " public.enqueue_generation('darkroom/preview', %s, '{}', null)"
    )

    def enqueue(number: int) -> str:
        claims = darkroom.claims(darkroom.FIRST_USER + number)
        cursor = connection.execute(query, [claims, darkroom.PROMPT])
        return str(cursor.fetchone()[1]["job_id"])  # type: ignore[index]

    return enqueue


PART = Part(
    name="latency",
    title="Latency",
    about=(
        f"From the commit of an enqueue until the handler is called, with an idle worker:"
        f" {ENQUEUES} enqueues each round, 30 to 80 ms between them. LISTEN cut: notifications"
        " never reach the worker, which then lives on its backstop. Memory is the worker's own,"
        " resident, before the first job."
    ),
    metric=P50,
    reference=PEERS[0].name,
    make_tasks=make_tasks,
    is_less_better=True,
)
