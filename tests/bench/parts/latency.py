"""How long an idle worker takes to notice a new job, and how much memory it takes meanwhile."""

from __future__ import annotations

import functools
import random
import time

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
LISTENING = Contender("Darkroom's worker.py", "run_worker.py", {})
DEAF = Contender("Darkroom's worker.py", "run_worker.py", {"listen": False})
ONE_AT_A_TIME = {"batch": 1, "concurrency": 1, "notify": True}
PEERS = (
    Contender("LISTEN + claim, bare loop", "run_baseline.py", ONE_AT_A_TIME),
    *(peers.PROCRASTINATE, peers.PGQUEUER, peers.GRAPHILE),
    Contender("pg-boss, notify", "run_pgboss.mjs", ONE_AT_A_TIME),
)
ENQUEUE = (
    "select set_config('request.jwt.claims', $1, false),"
    " public.enqueue_generation('darkroom/preview', $2, '{}', null) ->> 'job_id'"
)


def make_tasks(lab: Lab, sizes: Sizes) -> list[Task]:
    count = sizes.pick(ENQUEUES, QUICK_ENQUEUES)
    return [
        Task(situation, contender.name, functools.partial(measure, lab, contender, count))
        for situation, contenders in ((IDLE, (*PEERS, LISTENING)), (CUT, (DEAF,)))
        for contender in contenders
    ]


def measure(lab: Lab, contender: Contender, count: int) -> dict[str, float]:
    """Enqueue now and then; match commits, as the client knows them, with calls of the handler."""
    peer = contender if contender in PEERS else None
    template = peers.tables(lab, peer) if peer else darkroom.base(lab)
    committed = {}  # when, by the key that the handler knows the job by
    with lab.copy(template) as db:
        url = db.url if peer else darkroom.worker_url(db)
        with (
            lab.work(contender, url, jobs=count, seconds=600, keys=True) as worker,
            psycopg.connect(db.url, autocommit=True)
            if peer
            else darkroom.as_user(db) as connection,
        ):
            cursor = psycopg.RawCursor(connection)
            statement = peers.statement(lab, peer) if peer else None
            worker.say()
            time.sleep(IDLE_SECONDS)
            megabytes = worker.megabytes()
            for number in range(count):
                if statement:
                    key = f"job-{number:04}"
                    cursor.execute(statement.text.encode(), statement.with_key(key))
                else:
                    cursor.execute(ENQUEUE, [darkroom.claims(number), darkroom.PROMPT])
                    key = str(cursor.fetchall()[0][1])
                committed[key] = time.monotonic()
                time.sleep(random.uniform(*GAP_SECONDS))
            report = worker.report(within=LAST_SECONDS)
    started = dict(zip(report["keys"], report["moments"], strict=True))
    waits = [1000 * (started[key] - moment) for key, moment in committed.items()]
    figures = (*percentiles(waits, 50, 95, 99), max(waits), megabytes)
    return dict(zip((P50, P95, P99, WORST, MEMORY), figures, strict=True))


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
