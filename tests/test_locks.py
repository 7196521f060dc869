"""Locks: whoever waits for whom, nobody waits in a circle.

There is one scene with jobs of two users in every state, and everything that changes any of it. All
is tried in transactions that are rolled back, so the scene stays as it is.

In which order a call locks rows is found out by watching: somebody else holds one row, the call
runs up against it, and what it has locked by then is seen from outside. If the orders of all calls
together have no circle, no number of sessions can deadlock on rows that are there. (What is
answered and written when two calls overlap is in test_money_model.)
"""

from __future__ import annotations

import graphlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from actors import Service, User, Worker, created, outcome, polled
from database import Database
from psycopg.types.json import Jsonb

# Every table in which a row may be there before a call and be locked by it, and its key.
TABLES = {
    "public.entitlements": "user_id",
    "public.generations": "id",
    "public.batches": "id",
    "public.images": "generation_id",
    "public.credit_ledger": "id",
    "public.models": "id",
    "private.ready_jobs": "job_id",
    "private.running_jobs": "job_id",
    "private.attempts": "token",
    "private.breakers": "name",
    "private.budgets": "id",
    "private.budget_spendings": "budget_id",
    "private.workers": "id",
    "private.plans": "name",
    "private.model_stats": "model_id",
    "private.retention_walks": "name",
    "private.webhook_endpoints": "id",
}
SETTINGS = """
update private.settings set retry_base = '0', welcome_credits = 100, keep_deleted = '0',
  keep_generations = '101 days', breaker_failures = 3, breaker_users = 1
"""
BUDGETS = """
update public.models set cost_usd = 1 where id = 'darkroom/preview';
insert into private.budgets (period, limit_usd) values ('month', 1000), ('day', 1000)
"""
# Claims find no room in one for all that waits, and ends of jobs give some back.
TIGHT = """
update private.running_jobs set reserved_usd = 3;
update private.budgets set limit_usd = (
  select spent_usd + reserved_usd + 1 from private.budget_states where period = 'month'
) where period = 'month'
"""
DONE = polled("prediction", "succeeded", output="https://replicate.delivery/a")
TWO_IMAGES = {"num_outputs": 2}
SECONDS = 10

Row = tuple[str, str]


def unlocked_rows(strength: str) -> str:
    """A query of all rows that can be locked so without waiting."""
    parts = [
        f"t{n} as materialized"
        f" (select '{table}' as t, {key}::text as k from {table} for {strength} skip locked)"
        for n, (table, key) in enumerate(TABLES.items())
    ]
    return f"with {', '.join(parts)} " + " union all ".join(
        f"select t, k from t{n}" for n in range(len(parts))
    )


FREE, NOT_TAKEN = unlocked_rows("update"), unlocked_rows("share")


@dataclass(frozen=True)
class Wait:
    """A call that waits for a row, and what it has locked by then."""

    call: str
    wanted: Row
    held: frozenset[Row]
    taken: frozenset[Row]  # of those held, the ones nobody else can hold at the same time

    def may_wait_for(self, other: Wait) -> bool:
        """Whether the other can hold what this one wants, while each has what it holds."""
        return self.wanted in other.held and not self.taken & other.taken


class Scene:
    """Of each user: two running jobs of a batch, three queued, the rest ended in every way."""

    def __init__(self, db: Database) -> None:
        self.jobs: dict[str, Any] = {}
        self.batches: dict[str, str] = {}
        self.ids: dict[str, str] = {}
        worker = Worker(db)
        # Whoever has the older jobs has the later id: the order of users is not that of jobs.
        users = sorted([User(db), User(db)], key=lambda user: user.id, reverse=True)
        for name, user in zip(("alice", "bob"), users, strict=True):
            self.ids[name] = user.id
            for end in ("failed", "completed", "deleted"):
                self.jobs[f"{name} {end}"] = user.enqueued(params=TWO_IMAGES)
                job = worker.claimed()
                if end == "failed":
                    worker.fail_job(job, "moderated")
                else:
                    worker.complete_job(job)
            user.share_image(self.jobs[f"{name} completed"])
            user.delete_generation(self.jobs[f"{name} deleted"])
        # A guest who can be merged: nothing is live, and the id is between the others' or not.
        guest = User(db)
        self.ids["guest"] = guest.id
        self.jobs["guest completed"] = guest.enqueued()
        worker.complete_job(worker.claimed())
        db.execute("update auth.users set is_anonymous = true where id = %s", guest.id)
        for name, user in zip(("alice", "bob"), users, strict=True):
            self.batches[name] = user.enqueue_batch(["a", "b", "c"], params=TWO_IMAGES)["batch_id"]
            first, second = worker.claim_jobs(2)
            worker.fail_job(worker.claimed(), "provider_error", retry_after=3600)
            user.cancel_generation(second.id)
            self.jobs |= {f"{name} first": first, f"{name} second": second}
        for name, user in zip(("alice", "bob"), users, strict=True):
            self.jobs[f"{name} queued"] = user.enqueued()
        # Silent and stuck for long, but for one that is only stuck.
        db.pass_time("100 days")
        db.execute(
            "update private.running_jobs set lease_until = now() + interval '1 hour'"
            " where token = (select max(token) from private.running_jobs)"
        )
        worker.heartbeat()
        worker.sleep()


@dataclass(frozen=True)
class Action:
    """Something that changes rows, and who does it."""

    actor: str
    call: Callable[[Any, Scene], object]


def claims(worker: Worker, _: Scene) -> None:
    worker.let_the_next_claim_scan_all()
    worker.claim_jobs(3)


def limits(operator: Service, period: str) -> None:
    query = "update private.budgets set limit_usd = limit_usd + 0.5 where period = %s"
    operator.connection.execute(query, [period])


def deletes(name: str) -> Action:
    query = "delete from auth.users where id = %s"
    return Action("operator", lambda o, s: o.connection.execute(query, [s.ids[name]]))


def blocks(name: str) -> Action:
    query = "update auth.users set banned_until = 'infinity' where id = %s"

    def call(o: Service, s: Scene) -> None:
        o.connection.execute(query, [s.ids[name]])
        o.connection.execute("set constraints all immediate")  # what else the commit does

    return Action("operator", call)


def merges(name: str, into: str) -> Action:
    return Action("service", lambda o, s: o.merge_user(s.ids[name], s.ids[into]))


def of_user(name: str) -> dict[str, Action]:
    own = {
        "enqueue": lambda u, s: u.enqueue(params=TWO_IMAGES),
        "enqueue with a key": lambda u, s: u.enqueue(idempotency_key="key"),
        "enqueue_batch": lambda u, s: u.enqueue_batch(["a", "b"]),
        "cancel_generation, queued": lambda u, s: u.cancel_generation(s.jobs[f"{name} queued"]),
        "cancel_generation, running": lambda u, s: u.cancel_generation(s.jobs[f"{name} first"].id),
        "cancel_batch": lambda u, s: u.cancel_batch(s.batches[name]),
        "retry_generation": lambda u, s: u.retry_generation(s.jobs[f"{name} failed"]),
        "set_favorite": lambda u, s: u.set_favorite(s.jobs[f"{name} completed"]),
        "share_image": lambda u, s: u.share_image(s.jobs[f"{name} completed"]),
        "delete_generation": lambda u, s: u.delete_generation(s.jobs[f"{name} completed"]),
        "restore_generation": lambda u, s: u.restore_generation(s.jobs[f"{name} deleted"]),
    }
    return {f"{name}: {what}": Action(name, call) for what, call in own.items()}


def of_worker(place: str) -> dict[str, Action]:
    own = {
        "next_step": lambda w, s: w.next_step(s.jobs[place]),
        "next_step: created": lambda w, s: w.next_step(s.jobs[place], created("prediction")),
        "next_step: done": lambda w, s: w.next_step(s.jobs[place], DONE),
        "report_progress": lambda w, s: w.report_progress(s.jobs[place], "storing"),
        "complete_job": lambda w, s: w.complete_job(s.jobs[place]),
        "fail_job: moderated": lambda w, s: w.fail_job(s.jobs[place], "moderated"),
        "fail_job: provider_error": lambda w, s: w.fail_job(s.jobs[place], "provider_error"),
        "release_job": lambda w, s: w.release_job(s.jobs[place]),
        "cancel_job": lambda w, s: w.cancel_job(s.jobs[place]),
    }
    return {f"{what} {place}": Action("worker", call) for what, call in own.items()}


def of_many(function: str, *rest: object) -> Action:
    """What a worker does with all jobs in one call, in no order; of some, by where a job stands."""

    def call(w: Worker, s: Scene) -> object:
        told = [(s.jobs[p], *(each(p) if callable(each) else each for each in rest)) for p in HEARD]
        return w.of_many(function, told)

    return Action("worker", call)


PLACES = [f"{name} {which}" for name in ("alice", "bob") for which in ("first", "second")]
HEARD = [PLACES[n] for n in (3, 0, 2, 1)]
ACTIONS = {
    **of_user("alice"),
    **of_user("bob"),
    **{name: action for place in PLACES for name, action in of_worker(place).items()},
    "claim_jobs": Action("worker", claims),
    "heartbeat": Action("worker", lambda w, s: w.heartbeat(*[s.jobs[p] for p in HEARD])),
    "next_steps: created": of_many("next_steps", lambda place: Jsonb(created(place))),
    "report_progress": of_many("report_progress", "storing", 50),
    "complete_jobs": Action(
        "worker", lambda w, s: w.complete_jobs(*[(s.jobs[p], 1) for p in HEARD])
    ),
    "fail_jobs: moderated": of_many("fail_jobs", "moderated", None, None, None),
    "fail_jobs: provider_error": of_many("fail_jobs", "provider_error", None, None, None),
    "fail_jobs: model_withdrawn": of_many("fail_jobs", "model_withdrawn", None, None, None),
    "recover_stale_jobs": Action("worker", lambda w, s: w.recover_stale_jobs()),
    "apply_retention": Action("worker", lambda w, s: w.apply_retention()),
    "grant_credits": Action("service", lambda o, s: o.grant_credits(s.ids["alice"], 5, "gift")),
    "set_paid": Action("service", lambda o, s: o.set_paid(s.ids["alice"], "infinity")),
    "redrive_failed": Action("service", lambda o, s: o.redrive_failed("moderated", "2020-01-01")),
    "pause_model": Action("service", lambda o, s: o.pause_model("darkroom/preview")),
    "resume_model": Action("service", lambda o, s: o.resume_model("darkroom/preview")),
    "grant_credits to bob": Action("service", lambda o, s: o.grant_credits(s.ids["bob"], 5, "b")),
    "a budget is changed": Action("operator", lambda o, s: limits(o, "month")),
    "another budget is changed": Action("operator", lambda o, s: limits(o, "day")),
    "delete alice": deletes("alice"),
    "delete bob": deletes("bob"),
    "delete guest": deletes("guest"),
    "block alice": blocks("alice"),
    "block bob": blocks("bob"),
    "block guest": blocks("guest"),
    "merge guest into alice": merges("guest", "alice"),
    "merge guest into bob": merges("guest", "bob"),
    "guest: delete_generation": Action(
        "guest", lambda u, s: u.delete_generation(s.jobs["guest completed"])
    ),
    "guest: enqueue": Action("guest", lambda u, s: u.enqueue()),
}


class Stage:
    """The scene, everybody who acts in it, one who holds rows and one who looks on."""

    def __init__(self, db: Database, has_budgets: bool) -> None:
        self.db = db
        db.execute(SETTINGS)
        db.lift_limits()
        db.buys_previews()
        if has_budgets:
            db.execute(BUDGETS)
        self.scene = Scene(db)
        if has_budgets:
            db.execute(TIGHT)
        self.actors = {
            "alice": User(db, self.scene.ids["alice"]),
            "bob": User(db, self.scene.ids["bob"]),
            "guest": User(db, self.scene.ids["guest"]),
            **{"worker": Worker(db), "service": Service(db), "operator": Service(db)},
        }
        self.actors["worker"].sleep()  # who calls may be the one who is woken
        self.holder, self.pool = db.connect(), ThreadPoolExecutor(1)
        self.rows = {(row["t"], row["k"]) for row in db.execute(FREE)}

    def start(self, action: Action) -> Future[object]:
        """Do something in a transaction that stays open; return once it has ended or waits."""
        actor = self.actors[action.actor]
        actor.connection.execute("begin")
        future = self.pool.submit(lambda: outcome(lambda: action.call(actor, self.scene)))
        waits = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
        deadline = time.monotonic() + SECONDS
        while not future.done() and not self.db.value(waits, actor.connection.info.backend_pid):
            assert time.monotonic() < deadline, "it neither ends nor waits"
            time.sleep(0.0005)
        return future

    def end(self, action: Action) -> None:
        self.actors[action.actor].connection.execute("rollback")

    def locked(self, unlocked: str = FREE) -> frozenset[Row]:
        """All rows that somebody has locked."""
        free = {(row["t"], row["k"]) for row in self.db.execute(unlocked)}
        return frozenset(self.rows - free)

    def waits(self, name: str, action: Action) -> Iterator[Wait]:
        """Every row that a call would have to wait for if it were locked."""
        self.start(action).result(0)
        wanted = self.locked()
        self.end(action)
        for table, key in wanted:
            self.holder.execute("begin")
            query = f"select from {table} where {TABLES[table]}::text = %s for update"
            self.holder.execute(query, [key])
            future = self.start(action)
            if not future.done():
                row = frozenset([(table, key)])
                yield Wait(name, (table, key), self.locked() - row, self.locked(NOT_TAKEN) - row)
            self.holder.execute("rollback")
            future.result(SECONDS)
            self.end(action)


def circle_in(graph: dict[Wait, set[Wait]]) -> list[tuple[str, Row]]:
    """Calls that wait for one another, each with what it waits for."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [(wait.call, wait.wanted) for wait in error.args[1]]
    return []


# Where there is a budget, all that ends a job takes turns at it, which hides what comes after.
@pytest.fixture(params=[False, True], ids=["no budgets", "budgets"])
def stage(db: Database, request: pytest.FixtureRequest) -> Stage:
    return Stage(db, request.param)


def test_nobody_can_wait_in_a_circle(stage):
    waits = [w for name, a in ACTIONS.items() for w in stage.waits(name, a)]

    graph = {wait: {other for other in waits if wait.may_wait_for(other)} for wait in waits}
    assert circle_in(graph) == []
    assert len({wait.call for wait in waits}) > 0.8 * len(ACTIONS)
