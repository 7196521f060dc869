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
from actors import Job, Service, User, Worker
from database import Database, Server
from explain import explained, nodes, pages, rows_met
from scale import fill, user_id

GENERATIONS, READY = 50_000, 10_000
if os.environ.get("PLANS_AT_SCALE") == "1":
    GENERATIONS, READY = 1_000_000, 200_000
# What grows without end, or with the queue. Of what is as small as the fleet a scan costs nothing.
TABLES = {
    "generations",
    "images",
    "attempts",
    "credit_ledger",
    "ready_jobs",
    "entitlements",
    "batches",
    "generation_tags",
    "image_likes",
    "deliveries",
    "push_tokens",
    "expired_files",
    "objects",
}
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

    def one(self, condition: str, column: str = "id") -> str:
        return self.some(condition, 1, column)[0]

    def held(self, count: int) -> list[Job]:
        """Jobs that the worker holds."""
        self.worker.let_the_next_claim_scan_all()
        jobs = self.worker.claim_jobs(count)
        assert len(jobs) == count
        return jobs

    def fail(self, code: str) -> None:
        calls = [(job, code, None, None, None) for job in self.held(JOBS)]
        assert len(self.worker.of_many("fail_jobs", calls)) == JOBS

    def work(self) -> None:
        """Bring jobs from the queue to their end."""
        jobs = self.held(JOBS)
        assert self.worker.heartbeat(*jobs) == ["ok"] * JOBS
        self.worker.of_many("begin_creates", [(job, None) for job in jobs])
        self.worker.of_many("checkpoint_jobs", [(job, job.id) for job in jobs])
        self.worker.of_many("report_progress", [(job, "storing", None) for job in jobs])
        done = self.worker.complete_jobs(*[(job, 1) for job in jobs])
        assert list(done.values()) == ["completed"] * JOBS

    def deliver(self) -> None:
        (lane, *_) = self.worker.due_lanes()
        deliveries = self.worker.claim_deliveries(lane, JOBS)
        assert len(deliveries) == JOBS
        for delivery in deliveries:
            self.worker.finish_delivery(delivery)

    def run(self, call: str) -> None:
        """Call a function as pg_cron does."""
        self.operator.execute(f"select private.{call}")


@dataclass(frozen=True)
class Call:
    """A call, and how many rows of a table it may meet at most."""

    make: Callable[[Scene], object]
    most: int = 30
    passes_queue: bool = False  # once, over all that waits


ALL = {
    "enqueue": Call(lambda s: s.user.enqueue(idempotency_key=str(uuid.uuid4())), most=30 + LIVE),
    "enqueue again": Call(
        lambda s: [s.user.enqueue(idempotency_key="again") for _ in range(2)], most=60 + LIVE
    ),
    "reuse what is there": Call(
        lambda s: s.user.enqueue(params={"seed": 8, "reuse": True}), most=60 + LIVE
    ),
    "enqueue a batch": Call(
        lambda s: s.user.enqueue_batch(["a lighthouse"] * JOBS), most=3 * JOBS + LIVE
    ),
    "status of a finished job": Call(
        lambda s: s.user.get_job_status(s.one("status = 'completed'"))
    ),
    "status of a failed job": Call(lambda s: s.user.get_job_status(s.one("status = 'failed'"))),
    "status of a queued job": Call(
        lambda s: s.user.get_job_status(s.one("status = 'queued'")), most=FORECAST
    ),
    "status of a running job": Call(lambda s: s.worker.heartbeat(*s.held(1))),
    "status of many finished jobs": Call(
        lambda s: [s.user.get_job_status(id) for id in s.some("status = 'completed'", JOBS)],
        most=3 * JOBS,
    ),
    "active jobs": Call(
        lambda s: s.user.list_active_jobs(*s.some("status = 'completed'", JOBS)),
        most=(JOBS + ACTIVE) * FORECAST,
    ),
    "status of a batch": Call(
        lambda s: s.user.get_batch_status(s.one("batch_id is not null", "batch_id")), most=120
    ),
    "entitlement": Call(lambda s: s.user.get_entitlement(), most=LIVE),
    "first page of the history": Call(lambda s: s.user.list_generations(), most=PAGE * FORECAST),
    "later page of the history": Call(
        lambda s: s.user.list_generations(before=s.one("status = 'completed'")), most=300
    ),
    "favorites": Call(lambda s: s.user.list_generations(only_favorites=True), most=120),
    "a tag that is rare": Call(lambda s: s.user.list_generations(tag="rare"), most=120),
    "a status that is rare": Call(lambda s: s.user.list_generations(status="failed"), most=600),
    "first page of the feed": Call(lambda s: s.user.call("public.list_public_images"), most=300),
    "set_favorite": Call(lambda s: s.user.set_favorite(s.one("status = 'completed'"))),
    "set_tags": Call(lambda s: s.user.set_tags(s.one("status = 'completed'"), "a", "b")),
    "share": Call(lambda s: s.user.share_image(s.one("status = 'completed'"))),
    "delete": Call(lambda s: s.user.delete_generation(s.one("status = 'completed'"))),
    "retry": Call(
        lambda s: s.user.retry_generation(s.one("status = 'failed' and not input ? 'seed'")),
        most=60 + LIVE,
    ),
    "cancel": Call(lambda s: s.user.cancel_generation(s.one("status = 'queued'"))),
    "grant": Call(lambda s: s.service.grant_credits(s.user, 1, str(uuid.uuid4())), most=200),
    "health": Call(lambda s: s.service.queue_health(), most=READY, passes_queue=True),
    "dead deliveries": Call(
        lambda s: s.service.list_deliveries(state="dead", at_most=JOBS), most=DEAD + JOBS
    ),
    "claim one": Call(lambda s: s.worker.claim_jobs(1)),
    "claim many": Call(lambda s: s.held(JOBS), most=5 * JOBS),
    "claim, begin, checkpoint, report, complete": Call(lambda s: s.work(), most=20 * JOBS),
    "try again": Call(lambda s: s.fail("provider_error"), most=20 * JOBS),
    "fail": Call(lambda s: s.fail("moderated"), most=20 * JOBS),
    "release": Call(lambda s: s.worker.release_job(*s.held(1))),
    "recover": Call(
        lambda s: s.run(f"recover_stale_jobs({JOBS})"), most=20 * JOBS, passes_queue=True
    ),
    "expire what was deleted": Call(
        lambda s: s.run(f"take_step('expire_deleted', {WALK})"), most=20 * WALK
    ),
    "expire what is old": Call(lambda s: s.run(f"take_step('expire_old', {WALK})"), most=20 * WALK),
    "trim attempts": Call(lambda s: s.run(f"take_step('trim_attempts', {WALK})"), most=4 * WALK),
    "trim ledgers": Call(lambda s: s.run(f"take_step('trim_ledger', {WALK})"), most=12 * WALK),
    "expire orphans": Call(lambda s: s.run(f"take_step('expire_orphans', {WALK})"), most=4 * WALK),
    "expired files": Call(lambda s: s.worker.list_expired_files(JOBS), most=4 * JOBS),
    "deliver": Call(lambda s: s.deliver(), most=10 * JOBS),
    "trim deliveries": Call(
        lambda s: s.run(f"take_step('trim_deliveries', {WALK})"), most=4 * WALK
    ),
}


@pytest.fixture(scope="module")
def db(server: Server, template: str) -> Iterator[Database]:
    db = server.create(template)
    db.lift_limits()
    fill(db, GENERATIONS, READY)
    yield db
    server.drop(db)


@pytest.fixture(scope="module", params=["custom", "generic"])
def scene(request: pytest.FixtureRequest, db: Database) -> Scene:
    user = User(db, user_id(7 if request.param == "custom" else 8))
    scene = Scene(user, Service(db), Worker(db, slots=1000), db.connect())
    for connection in scene.connections():
        connection.execute(f"set plan_cache_mode = force_{request.param}_plan")
    return scene


@pytest.mark.parametrize("name", ALL)
def test_it_reaches_what_it_reads_by_an_index_and_reads_little_else(scene, name):
    call = ALL[name]
    call.make(scene)  # what is read once in a session does not count
    with contextlib.ExitStack() as stack:
        heard = [stack.enter_context(explained(each)) for each in scene.connections()]
        call.make(scene)
    plans = [plan for each in heard for plan in each]
    assert plans

    met: Counter[str] = Counter()
    scanned = set()
    for node in (node for plan in plans for node in nodes(plan)):
        if (table := node.get("Relation Name")) in TABLES and node["Node Type"].endswith("Scan"):
            met[table] += rows_met(node)
            scanned |= {table} if node["Node Type"] == "Seq Scan" else set()
    if call.passes_queue:
        scanned -= {"ready_jobs"}
        met["ready_jobs"] = max(0, met["ready_jobs"] - READY)
    assert scanned == set()
    assert [plan["JIT"] for plan in plans if plan["JIT"]] == []
    assert {table: count for table, count in met.items() if count > call.most} == {}
    assert max(pages([plan]) for plan in plans) <= PAGES_A_ROW * call.most
