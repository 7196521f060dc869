"""What is called all the time reads no more where there are a million generations.

For every statement that a call runs, at any depth, auto_explain tells the plan, the rows that each
node met, and the pages it touched. Each call is made with plans for its very arguments and with
plans for any arguments.

`make test` has 50,000 generations, of which 10,000 wait. `PLANS_AT_SCALE=1` has a million and
200,000, which takes some minutes and 3 GB.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from actors import Job, Service, User, Worker, polled
from database import PROJECT, Database, Server
from explain import explained, nodes, pages, rows_met
from psycopg.types.json import Jsonb

GENERATIONS, READY, RUNNING = 50_000, 10_000, 100
if os.environ.get("PLANS_AT_SCALE") == "1":
    GENERATIONS, READY = 1_000_000, 200_000
# What grows without end, or with the queue. Of what is as small as the fleet a scan costs nothing.
TABLES = (
    *("generations", "images", "attempts", "credit_ledger", "ready_jobs", "entitlements"),
    *("batches", "generation_tags", "image_likes", "deliveries", "push_tokens"),
    *("expired_files", "objects", "purchases"),
)
OUTPUT = "https://replicate.delivery/a.png"
DEAD = GENERATIONS // 1000  # deliveries
ACTIVE = 250 * READY // GENERATIONS  # of each user
JOBS = 20
LIVE = ACTIVE + 3 * JOBS  # of the one who calls, by the end: a request counts them
WALK = 50  # rows that a step of retention looks at
FORECAST = 2 * 1000 + 30  # a queued job: those before it are counted, and how long they take
PAGE = 20
PAGES_A_ROW = 30  # index pages from the root down, of all indexes that a row is in


@dataclass
class Scene:
    """Those who call, each with one kind of plans."""

    user: User
    service: Service
    worker: Worker
    operator: psycopg.Connection[Any]

    @property
    def connections(self) -> list[psycopg.Connection[Any]]:
        callers = (self.user, self.service, self.worker)
        return [*(caller.connection for caller in callers), self.operator]

    def some(self, condition: str, count: int = 1, column: str = "id") -> list[str]:
        """Some of the user's generations that nobody has seen yet."""
        rows = self.user.db.execute(
            f"update public.generations set updated_at = 'infinity' where id = any (array("
            "  select id from public.generations where user_id = %s and updated_at <> 'infinity'"
            f"  and deleted_at is null and {condition} order by id desc limit %s"
            f")) returning {column}::text as value",
            self.user.id,
            count,
        )
        assert len(rows) == count
        return [row["value"] for row in rows]

    def one(self, condition: str = "status = 'completed'", column: str = "id") -> str:
        return self.some(condition, 1, column)[0]

    def change(self) -> None:
        """Change one thing each."""
        self.user.set_favorite(self.one())
        self.user.set_tags(self.one(), "a", "b")
        self.user.share_image(self.one())
        self.user.delete_generation(self.one())
        self.user.cancel_generation(self.one("status = 'queued'"))
        self.user.query("select private.may_store_input('a/b')")

    def held(self, count: int = JOBS) -> list[Job]:
        """Jobs that the worker holds."""
        self.worker.let_the_next_claim_scan_all()
        jobs = self.worker.claim_jobs(count)
        assert len(jobs) == count
        return jobs

    def work(self) -> None:
        """Bring jobs from the queue to their end, good or bad."""
        jobs = self.held()
        assert self.worker.heartbeat(*jobs) == ["ok"] * JOBS
        self.worker.buy(*[(job, job.id) for job in jobs])
        done = [(job, Jsonb(polled(job.id, "succeeded", output=OUTPUT))) for job in jobs]
        steps = self.worker.of_many("next_steps", done)
        assert [step["do"] for _, step in steps] == ["store"] * JOBS
        self.worker.of_many("report_progress", [(job, "storing", None) for job in jobs])
        done = self.worker.complete_jobs(*[(job, 1) for job in jobs])
        assert list(done.values()) == ["completed"] * JOBS
        for code in ("provider_error", "moderated"):
            calls = [(job, code, None, None, None) for job in self.held()]
            assert len(self.worker.of_many("fail_jobs", calls)) == JOBS
        self.worker.release_job(*self.held(1), resumes=False)

    def deliver(self) -> None:
        (lane, *_) = self.worker.due_lanes()
        deliveries = self.worker.claim_deliveries(lane, JOBS)
        assert len(deliveries) == JOBS
        for delivery in deliveries:
            self.worker.finish_delivery(delivery)

    def retain(self) -> None:
        """Take each step of retention as pg_cron does."""
        for row in self.user.db.execute("select name from private.retention_walks"):
            self.operator.execute("select private.take_step(%s, %s)", [row["name"], WALK])
        self.worker.list_expired_files(JOBS)


# How many rows of a table each may meet at most, and the call.
CALLS: dict[str, tuple[int, Callable[[Scene], object]]] = {
    "enqueue": (30 + LIVE, lambda s: s.user.enqueue(idempotency_key=str(uuid.uuid4()))),
    "again": (60 + LIVE, lambda s: [s.user.enqueue(idempotency_key="again") for _ in "ab"]),
    "reuse": (200 + LIVE, lambda s: s.user.enqueue(params={"seed": 8, "reuse": True})),
    "batch": (3 * JOBS + LIVE, lambda s: s.user.enqueue_batch(["a lighthouse"] * JOBS)),
    "retry": (
        60 + LIVE,
        lambda s: s.user.retry_generation(s.one("status = 'failed' and not input ? 'seed'")),
    ),
    "finished": (30, lambda s: s.user.get_job_status(s.one())),
    "queued": (FORECAST, lambda s: s.user.get_job_status(s.one("status = 'queued'"))),
    "a batch": (
        120,
        lambda s: s.user.get_batch_status(s.one("batch_id is not null", "batch_id")),
    ),
    "active jobs": (
        (JOBS + ACTIVE) * FORECAST,
        lambda s: s.user.list_active_jobs(*s.some("status = 'completed'", JOBS)),
    ),
    "entitlement": (LIVE, lambda s: s.user.get_entitlement()),
    "history": (PAGE * FORECAST, lambda s: s.user.list_generations()),
    "later page": (300, lambda s: s.user.list_generations(before=s.one())),
    "favorites": (120, lambda s: s.user.list_generations(only_favorites=True)),
    "rare tag": (120, lambda s: s.user.list_generations(tag="rare")),
    "rare status": (600, lambda s: s.user.list_generations(status="failed")),
    "feed": (300, lambda s: s.user.list_public_images()),
    "change": (100, Scene.change),
    "grant": (200, lambda s: s.service.grant_credits(s.user, 1, str(uuid.uuid4()))),
    "health": (READY, lambda s: s.service.queue_health()),
    "dead": (DEAD + JOBS, lambda s: s.service.list_deliveries(state="dead", at_most=JOBS)),
    "claim one": (30, lambda s: s.worker.claim_jobs(1)),
    "claim many": (6 * JOBS, Scene.held),
    "work": (50 * JOBS, Scene.work),
    "recover": (20 * JOBS, lambda s: s.operator.execute("select private.recover_stale_jobs(20)")),
    "retain": (40 * WALK, Scene.retain),
    "deliver": (10 * JOBS, Scene.deliver),
}
PASS_QUEUE = {"health", "recover"}  # once, over all that waits


@pytest.fixture(scope="module")
def large(server: Server, template: str) -> Iterator[Database]:
    db = server.create(template)
    db.lift_limits()
    db.buys_previews()
    sizes = {"users": GENERATIONS // 250 + 1, "running": RUNNING, "ready": READY}
    sizes["finished"] = GENERATIONS - READY - RUNNING
    settings = [f"\\set {name} {size}" for name, size in sizes.items()]
    script = (PROJECT / "tests" / "scale.sql").read_text()
    done = db.psql(script="\n".join([*settings, script]))
    assert done.returncode == 0, done.stderr
    with db.connect() as connection:
        connection.execute("set statement_timeout = 0")
        connection.execute("vacuum analyze")
    yield db
    server.drop(db)


@pytest.fixture(scope="module", params=["custom", "generic"])
def scene(request: pytest.FixtureRequest, large: Database) -> Scene:
    user = User(large, f"00000000-0000-4000-8000-{7 if request.param == 'custom' else 8:012}")
    scene = Scene(user, Service(large), Worker(large, slots=1000), large.connect())
    for connection in scene.connections:
        connection.execute(f"set plan_cache_mode = force_{request.param}_plan")
    return scene


@pytest.mark.parametrize("name", CALLS)
def test_it_reaches_what_it_reads_by_an_index_and_reads_little_else(scene, name):
    most, call = CALLS[name]
    call(scene)  # what is read once in a session does not count
    with contextlib.ExitStack() as stack:
        heard = [stack.enter_context(explained(each)) for each in scene.connections]
        call(scene)
    plans = [plan for each in heard for plan in each]
    assert plans

    met: Counter[str] = Counter()
    scanned = set()
    for node in (node for plan in plans for node in nodes(plan)):
        if (table := node.get("Relation Name")) in TABLES and node["Node Type"].endswith("Scan"):
            met[table] += rows_met(node)
            scanned |= {table} if node["Node Type"] == "Seq Scan" else set()
    if name in PASS_QUEUE:
        scanned -= {"ready_jobs"}
        met["ready_jobs"] = max(0, met["ready_jobs"] - READY)
    assert scanned == set()
    assert [plan["JIT"] for plan in plans if plan["JIT"]] == []
    assert {table: count for table, count in met.items() if count > most} == {}
    assert max(pages([plan]) for plan in plans) <= PAGES_A_ROW * most


HOT = {"ready_jobs", "running_jobs", "generations", "entitlements"}


def test_what_every_job_needs_walks_indexes_though_the_tables_were_empty_when_it_was_planned(
    db, alice, worker
):
    db.lift_limits()
    db.buys_previews()
    alice.has(credits=100)
    db.execute(  # so that the answers reckon with what runs
        "insert into private.model_stats (model_id, mean_seconds, sample_count, refreshed_at)"
        " select id, 1, 1, now() from public.models"
    )
    db.execute("select private.refresh_queue_state()")  # too old a state has the queue looked at
    db.execute("vacuum analyze")  # a table known to be empty is scanned
    with explained(worker.connection) as plans, explained(alice.connection) as of_users:
        for key in "abc":
            job_id = alice.enqueued(params={"num_outputs": 2}, idempotency_key=key)
            alice.get_job_status(job_id)
            alice.enqueue_batch(["a lighthouse"])
            jobs = worker.claim_jobs(2)
            alice.get_job_status(jobs[0].id)
            worker.buy(*[(job, job.id) for job in jobs])
            done = [(job, Jsonb(polled(job.id, "succeeded", output=OUTPUT))) for job in jobs]
            worker.of_many("next_steps", done)
            worker.of_many("report_progress", [(job, "storing", None) for job in jobs])
            worker.of_many("fail_jobs", [(jobs[0], "moderated", None, None, None)])
            worker.complete_jobs(*[(job, job.image_count) for job in jobs[1:]])
            alice.retry_generation(jobs[0].id)

    # But for the one of forecast_jobs that asks of every running job when it ends.
    judged = [plan for plan in plans + of_users if "due_seconds" not in str(plan)]
    scans = [
        (node["Relation Name"], node["Node Type"])
        for plan in judged
        for node in nodes(plan)
        if node.get("Relation Name") in HOT and node["Node Type"].endswith("Scan")
    ]
    assert {table for table, _ in scans} == HOT
    assert {scan for scan in scans if not scan[1].startswith("Index")} == set()
