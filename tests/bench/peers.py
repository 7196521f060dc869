"""The queues that Darkroom is compared with, each at the settings its own documentation advises."""

from __future__ import annotations

import json

from database import Database
from lab import Contender, Lab, Statement

BASELINE = Contender("plain insert", "run_baseline.py", {"batch": 10})
BASELINE_NOTIFY = Contender("insert + NOTIFY", "run_baseline.py", {"batch": 10, "notify": True})
PROCRASTINATE = Contender("procrastinate", "run_procrastinate.py", {"concurrency": 10}, 10)
PGQUEUER = Contender("pgqueuer", "run_pgqueuer.py", {"batch": 10}, 20)
GRAPHILE = Contender(
    "graphile-worker", "run_graphile.mjs", {"concurrency": 24, "isBatching": False}, 24
)
GRAPHILE_BATCHING = Contender(
    "graphile-worker, batching", "run_graphile.mjs", {"concurrency": 24, "isBatching": True}, 524
)
PGBOSS = Contender("pg-boss", "run_pgboss.mjs", {"batch": 50, "concurrency": 1}, 50)
PGBOSS_500 = Contender(
    "pg-boss, batch 500", "run_pgboss.mjs", {"batch": 500, "concurrency": 2}, 1000
)
PGBOSS_NOTIFY = Contender(
    "pg-boss, notify", "run_pgboss.mjs", {"batch": 50, "concurrency": 1, "notify": True}, 50
)
PAYLOAD = {
    "key": Statement.KEY,
    "model": "darkroom/preview",
    "prompt": "a lighthouse at dusk, " * 9,
    "width": 512,
    "height": 512,
}


def tables(lab: Lab, contender: Contender) -> str:
    kind = "notify" if contender.options.get("notify") else "quiet"
    return lab.template(
        f"{contender.program} {kind}", lambda db: lab.run(contender.command("install", db.url))
    )


def statement(lab: Lab, contender: Contender) -> Statement:
    """Return how a contender's library enqueues, as it says itself."""
    if contender.name not in lab.statements:
        with lab.copy(tables(lab, contender), "spoken") as db:
            printed = lab.run(contender.command("statement", db.url, payload=PAYLOAD))
        lab.statements[contender.name] = Statement(**json.loads(printed))
    return lab.statements[contender.name]


def enqueue(lab: Lab, contender: Contender, db: Database, *options: str, **env: str) -> float:
    """Enqueue with pgbench as the library does; return how many a second."""
    said = statement(lab, contender)
    return lab.pgbench(db.url, said.text, *options, values=said.values, **env)


def fill(lab: Lab, contender: Contender, db: Database, count: int) -> None:
    """Enqueue about that many jobs, at least as many as asked for."""
    clients = min(count, 8)
    options = (f"-c{clients}", "-j2", f"-t{-(-count // clients)}")
    enqueue(lab, contender, db, *options, PGOPTIONS="-c synchronous_commit=off")
