"""A long history costs the hot calls nothing: no statement in them, at any depth, reads much of it.

auto_explain tells the plan of every statement that a call runs, with the rows that each node met.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from actors import User, Worker, refused
from database import Database, Server
from explain import explained, nodes, rows_met

HISTORY, USERS = 20_000, 20
TABLES = {"generations", "images", "attempts", "credit_ledger", "batches", "deliveries"}


@dataclass
class Scene:
    """A user with a thousand generations among many, of which a batch is queued and one running."""

    db: Database
    user: User
    worker: Worker
    finished: str
    failed: str
    running: str
    queued: str
    batch: str

    def claimed(self) -> Any:
        """What the worker holds next."""
        self.user.enqueue()
        self.worker.let_the_next_claim_scan_all()
        return self.worker.claimed()


@pytest.fixture(scope="module")
def scene(server: Server, template: str) -> Iterator[Scene]:
    db = server.create(template)
    db.lift_limits()
    db.execute("update private.plans set max_batch = 100")
    user = User(db)
    user.has_history(HISTORY)
    others = [User(db).id for _ in range(USERS - 1)]
    # As if all had come at the same time: each page holds rows of many users. Each with a seed, an
    # input of its own, and a key.
    db.execute(
        "update public.generations as g set user_id = (%s::uuid[])[1 + n %% %s],"
        " input = jsonb_build_object('seed', n), provider_input = jsonb_build_object('seed', n),"
        " idempotency_key = n"
        " from (select id, row_number() over () as n from public.generations) as numbered"
        " where numbered.id = g.id",
        [user.id, *others],
        USERS,
    )
    yield begun(db, user.has(credits=1000), Worker(db))
    server.drop(db)


def begun(db: Database, user: User, worker: Worker) -> Scene:
    """Bring the jobs to where they are."""
    finished = db.value(
        "select id::text from public.generations where user_id = %s limit 1", user.id
    )
    failed = user.enqueued(idempotency_key="a key", params={"seed": 7})
    worker.fail_job(worker.claimed(), "moderated")
    user.enqueue("done", params={"seed": 7})
    worker.complete_job(worker.claimed())
    running = user.enqueued()
    worker.claimed()
    batch = user.enqueue_batch(["a lighthouse"] * 20)
    db.execute("vacuum analyze")
    return Scene(
        db, user, worker, finished, failed, running, batch["job_ids"][-1], batch["batch_id"]
    )


CALLS: dict[str, Callable[[Scene], object]] = {
    "status of a finished job": lambda s: s.user.get_job_status(s.finished),
    "status of a failed job": lambda s: s.user.get_job_status(s.failed),
    "status of a queued job": lambda s: s.user.get_job_status(s.queued),
    "status of a running job": lambda s: s.user.get_job_status(s.running),
    "status of a batch": lambda s: s.user.get_batch_status(s.batch),
    "active jobs": lambda s: s.user.list_active_jobs(),
    "first page of the history": lambda s: s.user.call("public.list_generations"),
    "enqueue": lambda s: s.user.enqueue(idempotency_key=str(uuid.uuid4())),
    "enqueue again": lambda s: s.user.enqueue(idempotency_key="a key", params={"seed": 7}),
    "enqueue a batch": lambda s: s.user.enqueue_batch(["a lighthouse"] * 20),
    "reuse what is there": lambda s: s.user.enqueue("done", params={"seed": 7, "reuse": True}),
    "reuse what is not": lambda s: s.user.enqueue("new", params={"seed": 8, "reuse": True}),
    "retry": lambda s: s.user.retry_generation(s.failed),
    "cancel": lambda s: s.user.cancel_generation(s.user.enqueued()),
    "cancel a batch": lambda s: s.user.cancel_batch(
        s.user.enqueue_batch(["a lighthouse"] * 20)["batch_id"]
    ),
    "claim one": lambda s: s.worker.claim_jobs(1),
    "claim ten": lambda s: s.worker.claim_jobs(10),
    "complete": lambda s: s.worker.complete_job(s.claimed()),
    "fail": lambda s: s.worker.fail_job(s.claimed(), "moderated"),
    "try again": lambda s: s.worker.fail_job(s.claimed(), "provider_error"),
    "heartbeat": lambda s: s.worker.heartbeat(s.claimed()),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_hot_call_reads_little_however_long_the_history(scene, name):
    with explained(scene.user.connection) as plans, explained(scene.worker.connection) as more:
        CALLS[name](scene)

    met: Counter[str] = Counter()
    for node in (node for plan in plans + more for node in nodes(plan)):
        if (table := node.get("Relation Name")) in TABLES and "Scan" in node["Node Type"]:
            met[table] += rows_met(node)
    assert plans + more
    assert all(count <= 300 for count in met.values()), met


def test_the_measure_sees_what_reads_all(scene):
    with explained(scene.user.connection) as plans:
        scene.user.query("select count(*) from public.generations where prompt = 'none'")

    assert max(rows_met(node) for plan in plans for node in nodes(plan)) >= HISTORY / USERS


def test_a_request_counts_the_users_jobs_no_further_than_to_the_limit(db, alice, worker):
    db.lift_limits()
    alice.has(credits=100)
    for number in range(60):
        alice.enqueue(idempotency_key=str(number))
    worker.claim_jobs(20)
    db.execute("update private.plans set max_active = 5")

    with explained(alice.connection) as plans, refused("PT429", "too_many_active"):
        alice.enqueue()

    live = {"ready_jobs", "running_jobs"}
    every = [node for plan in plans for node in nodes(plan) if node.get("Relation Name") in live]
    assert 5 <= sum(map(rows_met, every)) <= 2 * 5


HOT = {"ready_jobs", "running_jobs", "generations", "entitlements"}


def wants_all_running(plan: dict[str, Any]) -> bool:
    """Whether it is the one of forecast_jobs that asks of every running job when it ends."""
    return any("due_seconds" in str(node.get("Sort Key")) for node in nodes(plan))


def test_what_every_job_needs_walks_indexes_though_the_tables_were_empty_when_it_was_planned(
    db, alice, worker
):
    db.lift_limits()
    alice.has(credits=100)
    db.execute(  # so that the answers reckon with what runs
        "insert into private.model_stats (model_id, mean_seconds, sample_count, refreshed_at)"
        " select id, 1, 1, now() from public.models"
    )
    db.execute("select private.refresh_queue_state()")  # too old a state has the queue looked at
    db.execute("vacuum analyze")  # a table known to be empty is scanned
    with explained(worker.connection) as plans, explained(alice.connection) as of_users:
        for turn in range(3):
            for number in range(3):
                alice.enqueue(params={"num_outputs": 2}, idempotency_key=f"{turn} {number}")
            alice.enqueue_batch(["a lighthouse"])
            jobs = worker.claim_jobs(4)
            alice.get_job_status(jobs[0].id)
            worker.of_many("begin_creates", [(job, None) for job in jobs])
            worker.of_many("checkpoint_jobs", [(job, job.id) for job in jobs])
            worker.of_many("report_progress", [(job, "storing", None) for job in jobs])
            worker.of_many("fail_jobs", [(jobs[0], "moderated", None, None, None)])
            worker.complete_jobs(*[(job, job.image_count) for job in jobs[1:]])
            alice.retry_generation(jobs[0].id)

    judged = plans + [plan for plan in of_users if not wants_all_running(plan)]
    assert len(judged) < len(plans + of_users)
    scans = [
        (node["Relation Name"], node["Node Type"])
        for plan in judged
        for node in nodes(plan)
        if node.get("Relation Name") in HOT and node["Node Type"].endswith("Scan")
    ]
    assert {table for table, _ in scans} == HOT
    assert {scan for scan in scans if not scan[1].startswith("Index")} == set()
