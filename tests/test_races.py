"""Two sessions at once, in every order: what comes of it is what comes of one after the other.

For each two things that may happen to the same jobs, three runs. Twice the first is done in an open
transaction while the second starts, which then ends by itself or is seen waiting for a lock; the
first is committed or rolled back. And once both stop half-way, at a row that a third session holds,
and go on together. No rule is written down for a pair: the runs one after the other tell what is
allowed. Without `LONG=1`, `make test` rolls none back and holds only the user's balance.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import random
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from actors import Job, Refusal, Service, User, Worker, outcome, together
from database import Database, Server, assert_books_balance

LONG = pytest.mark.long
THREE_IMAGES = {"num_outputs": 3}


@dataclass
class Scene:
    """Two jobs of one batch of a user, the first enqueued first."""

    user_id: str
    batch_id: str
    job_ids: list[str]
    held: list[Job]  # as claimed, if they were

    def job(self) -> Job:
        """What the worker holds of the first job."""
        return next(job for job in self.held if job.id == self.job_ids[0])


class Session:
    """All actors once, each with a connection."""

    def __init__(self, db: Database) -> None:
        self.user, self.worker, self.service = User(db), Worker(db), Service(db)
        self.operator = db.connect()

    def connection(self, action: Action) -> psycopg.Connection[Any]:
        """What the action runs on."""
        actor = getattr(self, action.actor)
        return actor if action.actor == "operator" else actor.connection

    def do(self, action: Action, scene: Scene) -> object:
        """Do it and return what was answered, told shortly."""
        self.user.id = scene.user_id
        return told(outcome(lambda: action.call(self, scene)))


def told(answer: object) -> object:
    """What counts of an answer."""
    if isinstance(answer, Refusal):
        return answer.code, answer.token
    return answer.get("status", answer) if isinstance(answer, dict) else answer


@dataclass(frozen=True)
class Action:
    """Something that happens to a job. One that skips locked rows answers by what it met."""

    actor: str
    call: Callable[[Session, Scene], object]
    skips: bool = False


def claims(session: Session, scene: Scene) -> None:
    session.worker.let_the_next_claim_scan_all()
    session.worker.claim_jobs(2)


def recovers(session: Session, scene: Scene) -> None:
    session.worker.recover_stale_jobs()


ACTIONS = {
    "cancel_generation": Action("user", lambda s, c: s.user.cancel_generation(c.job_ids[0])),
    "cancel_batch": Action("user", lambda s, c: s.user.cancel_batch(c.batch_id)),
    "retry_generation": Action("user", lambda s, c: s.user.retry_generation(c.job_ids[0])),
    "enqueue": Action("user", lambda s, c: s.user.enqueue()),
    "enqueue_batch": Action("user", lambda s, c: s.user.enqueue_batch(["one", "two"])),
    "claim_jobs": Action("worker", claims, skips=True),
    "heartbeat": Action("worker", lambda s, c: s.worker.heartbeat(*reversed(c.held))),
    "report_progress": Action("worker", lambda s, c: s.worker.report_progress(c.job(), "storing")),
    "complete_job": Action("worker", lambda s, c: s.worker.complete_job(c.job(), images=2)),
    "fail_job for good": Action("worker", lambda s, c: s.worker.fail_job(c.job(), "moderated")),
    "fail_job": Action("worker", lambda s, c: s.worker.fail_job(c.job(), "provider_error")),
    "release_job": Action("worker", lambda s, c: s.worker.release_job(c.job())),
    "cancel_job": Action("worker", lambda s, c: s.worker.cancel_job(c.job())),
    "recover_stale_jobs": Action("worker", recovers, skips=True),
    "redrive_failed": Action(
        "service", lambda s, c: s.service.redrive_failed("moderated", "2020-01-01")
    ),
    "grant_credits": Action("service", lambda s, c: s.service.grant_credits(c.user_id, 5, "gift")),
    "delete user": Action(
        "operator",
        lambda s, c: s.operator.execute("delete from auth.users where id = %s", [c.user_id]) and 0,
    ),
}
USERS = ["cancel_generation", "cancel_batch", "retry_generation", "enqueue", "enqueue_batch"]
WORKERS = ["heartbeat", "report_progress", "complete_job", "fail_job for good", "fail_job"]
WORKERS += ["release_job", "cancel_job", "recover_stale_jobs", "claim_jobs"]
OPERATORS = ["redrive_failed", "grant_credits", "delete user"]
# How the two jobs are when the race begins, and what may then happen.
STATES = {
    "queued": [*USERS, "claim_jobs", *OPERATORS],
    "running and queued": [*USERS, *WORKERS, "delete user"],
    "running": [*USERS, *WORKERS, *OPERATORS],
    "asked to cancel": [*USERS[:3], *WORKERS, "delete user"],
    "failed": [*USERS, *OPERATORS],
    "canceled": [*USERS[:3], *OPERATORS],
}
# Without these a race is not about the jobs.
ENDS = {*USERS[:3], *WORKERS[2:], "redrive_failed", "delete user"}
# Those that meet the second job as well.
TAKE_BOTH = {"cancel_batch", "claim_jobs", "heartbeat", "recover_stale_jobs", "delete user"}
GATES = {
    "entitlement": "select from public.entitlements where user_id = %(user)s for update",
    "generation": "select from public.generations where id = %(second)s for update",
    "queue": "with ready as (select from private.ready_jobs where job_id = %(second)s for update)"
    ", running as (select from private.running_jobs where job_id = %(second)s for update)"
    " select (select count(*) from ready), (select count(*) from running)",
}
WHAT_CAME_OF_IT = """
select
  e.credits, (select count(*) from private.live_jobs as j where j.user_id = e.user_id) as active,
  (select jsonb_agg(jsonb_build_array(l.kind, l.amount) order by l.kind, l.amount)
   from public.credit_ledger as l where l.user_id = u.id) as ledger,
  (select count(*) from public.batches as b where b.user_id = u.id) as batches,
  (select jsonb_agg(jsonb_build_array(
     g.status, g.error_code, g.batch_id is not null, g.retry_of,
     ready.attempt, running.attempt, running.cancel_requested,
     (select sum(l.amount) from public.credit_ledger as l where l.generation_id = g.id),
     (select count(*) from public.images as i where i.generation_id = g.id),
     (select jsonb_agg(a.outcome order by a.token)
      from private.attempts as a where a.generation_id = g.id),
     (select jsonb_agg(d.event_type)
      from private.deliveries as d where d.generation_id = g.id)
   ) order by g.id)
   from public.generations as g
   left join private.ready_jobs as ready on ready.job_id = g.id
   left join private.running_jobs as running on running.job_id = g.id
   where g.user_id = u.id) as jobs
from (select %s::uuid) as u (id)
left join public.entitlements as e on e.user_id = u.id
"""


class Arena:
    """A database for many races, one after the other, each about a user of its own."""

    def __init__(self, db: Database) -> None:
        self.db = db
        db.lift_limits()
        db.execute(
            "update private.settings"
            " set welcome_credits = 60, running_cancel_refund_percent = 50, retry_base = '0',"
            " breaker_failures = 32767, breaker_provider_failures = 32767"
        )
        self.one, self.other, self.third = Session(db), Session(db), db.connect()
        self.one.service.register_webhook()
        self.pool = ThreadPoolExecutor(2)
        self.alone = functools.cache(self._alone)

    @contextlib.contextmanager
    def scene(self, state: str) -> Iterator[Scene]:
        """Have two jobs in this state; then see that the books balance, and clean up."""
        user = self.one.user
        user.id = str(uuid.uuid4())
        self.db.execute("insert into auth.users (id) values (%s)", user.id)
        batch = user.enqueue_batch(["first", "second"], params=THREE_IMAGES)
        scene = Scene(user.id, batch["batch_id"], batch["job_ids"], [])
        self._prepare(scene, state)
        try:
            yield scene
            assert_books_balance(self.db)
        finally:
            self.db.execute("delete from auth.users where id = %s", scene.user_id)

    def _prepare(self, scene: Scene, state: str) -> None:
        user, worker = self.one.user, self.one.worker
        worker.let_the_next_claim_scan_all()
        if state == "canceled":
            user.cancel_batch(scene.batch_id)
        elif state != "queued":
            scene.held = worker.claim_jobs(1 if state == "running and queued" else 2)
            assert [job.id for job in scene.held] == scene.job_ids[: len(scene.held)]
        for job in scene.held:
            if state == "failed":
                worker.fail_job(job, "moderated")
        if state == "asked to cancel":
            user.cancel_batch(scene.batch_id)
        # As if the worker had been silent for long: recovery may take them too.
        self.db.execute("update private.running_jobs set lease_until = now() - interval '1 second'")

    def came_of_it(self, scene: Scene, again: tuple[Action, ...], *answers: object) -> str:
        """Tell answers and end. What was locked and skipped is met when the caller comes again."""
        for action in again:
            if action.skips:
                self.one.do(action, scene)
        row = self.db.row(WHAT_CAME_OF_IT, scene.user_id)
        text = json.dumps([answers, row], default=str)
        return functools.reduce(lambda t, id: t.replace(id, "a job"), scene.job_ids, text)

    def _alone(self, state: str, *names: str) -> str:
        """What comes of it, one after the other; answers in alphabetical order of the actions."""
        actions = [ACTIONS[name] for name in names]
        with self.scene(state) as scene:
            answers = [self.one.do(action, scene) for action in actions]
            again = tuple(ACTIONS[name] for name in sorted(names))
            return self.came_of_it(scene, again, *in_order(names, answers))

    def allowed(self, state: str, one: str, other: str) -> set[str]:
        """What may come of both."""
        return {self.alone(state, one, other), self.alone(state, other, one)}

    def start(self, session: Session, action: Action, scene: Scene) -> Future[object]:
        """Start an action; return once it has ended or waits for a lock."""
        future = self.pool.submit(session.do, action, scene)
        waits = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
        pid, deadline = session.connection(action).info.backend_pid, time.monotonic() + 10
        while not future.done() and not self.db.value(waits, pid):
            assert time.monotonic() < deadline, "it neither ends nor waits"
            time.sleep(0.001)
        return future

    def race(self, state: str, one: str, other: str, commits: bool) -> str:
        """Do one in a transaction, start the other meanwhile; answer what came of it."""
        first, second = ACTIONS[one], ACTIONS[other]
        with self.scene(state) as scene:
            connection = self.one.connection(first)
            with connection.transaction(force_rollback=not commits):
                answer = self.one.do(first, scene)
                future = self.start(self.other, second, scene)
            answers = [answer, future.result(10)] if commits else [future.result(10)]
            names = [one, other] if commits else [other]
            again = tuple(ACTIONS[name] for name in sorted(names))
            return self.came_of_it(scene, again, *in_order(names, answers))

    def crossing(self, state: str, one: str, other: str, gate: str) -> str:
        """Have both go as far as they can while a third holds a row; then let them go on."""
        with self.scene(state) as scene:
            row = {"user": scene.user_id, "second": scene.job_ids[1]}
            with self.third.transaction():
                self.third.execute(GATES[gate], row)
                first = self.start(self.one, ACTIONS[one], scene)
                second = self.start(self.other, ACTIONS[other], scene)
            names = [one, other]
            again = tuple(ACTIONS[name] for name in sorted(names))
            answers = [first.result(10), second.result(10)]
            return self.came_of_it(scene, again, *in_order(names, answers))


def in_order(names: Any, answers: list[object]) -> list[object]:
    """The answers in alphabetical order of who got them."""
    return sorted(zip(names, answers, strict=True), key=str)


@pytest.fixture(scope="module")
def arena(server: Server, template: str) -> Iterator[Arena]:
    database = server.create(template)
    arena = Arena(database)
    yield arena
    arena.pool.shutdown()
    server.drop(database)


def pairs(state: str) -> list[tuple[str, str]]:
    """Each two actions in both orders, those with themselves included."""
    both = itertools.product(STATES[state], repeat=2)
    return [(one, other) for one, other in both if {one, other} & ENDS]


EACH_FIRST = [
    pytest.param(state, one, [b for a, b in pairs(state) if a == one], id=f"{state}-{one}")
    for state in STATES
    for one in dict.fromkeys(a for a, _ in pairs(state))
]


@pytest.mark.parametrize(("state", "one", "others"), EACH_FIRST)
def test_what_comes_second_waits_and_then_sees_what_came_first(arena, state, one, others):
    wrong = {}
    for other in others:
        came = arena.race(state, one, other, commits=True)
        if came not in (allowed := arena.allowed(state, one, other)):
            wrong[other] = came, allowed

    assert wrong == {}


@LONG
@pytest.mark.parametrize(("state", "one", "others"), EACH_FIRST)
def test_what_is_rolled_back_leaves_no_trace_in_what_came_second(arena, state, one, others):
    wrong = {}
    for other in others:
        came = arena.race(state, one, other, commits=False)
        if came != (allowed := arena.alone(state, other)):
            wrong[other] = came, allowed

    assert wrong == {}


def meets(gate: str, one: str, other: str) -> bool:
    """Whether the third session is in anybody's way, and is waited for and not passed."""
    if gate == "entitlement":
        return True
    skips = ACTIONS[one].skips or ACTIONS[other].skips
    return bool({one, other} & TAKE_BOTH) and not (gate == "queue" and skips)


@pytest.mark.parametrize(
    "gate",
    ["entitlement", pytest.param("generation", marks=LONG), pytest.param("queue", marks=LONG)],
)
@pytest.mark.parametrize(("state", "one", "others"), EACH_FIRST)
def test_two_that_meet_half_way_end_as_if_one_had_come_first(arena, state, one, others, gate):
    wrong = {}
    for other in others:
        if meets(gate, one, other):
            came = arena.crossing(state, one, other, gate)
            if came not in (allowed := arena.allowed(state, one, other)):
                wrong[other] = came, allowed

    assert wrong == {}


class Crowd:
    """Three users with a batch of twenty each, half of it running at two workers."""

    def __init__(self, db: Database) -> None:
        self.db = db
        db.lift_limits()
        db.execute("update private.plans set max_batch = 100")
        db.execute("update private.settings set retry_base = '0', breaker_failures = 32767")
        self.users = [User(db).has(credits=500) for _ in range(3)]
        self.batches = [user.enqueue_batch(["a lighthouse"] * 20) for user in self.users]
        self.workers = [Worker(db), Worker(db)]
        self.held = [job for worker in self.workers for job in worker.claim_jobs(15)]

    def cancels(self) -> list[Callable[[], object]]:
        """Each user cancels the whole batch on two devices."""
        batches = zip(self.users * 2, self.batches * 2, strict=True)
        devices = [(user.on_another_device(), batch["batch_id"]) for user, batch in batches]
        return [lambda u=user, b=batch_id: u.cancel_batch(b) for user, batch_id in devices]

    def twice(self, work: Callable[[Worker], object]) -> list[Callable[[], object]]:
        """Two more workers do this."""
        return [lambda w=worker: work(w) for worker in (Worker(self.db), Worker(self.db))]

    def beats(self, seed: random.Random) -> list[Callable[[], object]]:
        """Workers beat for all jobs in any order, again and again."""

        def beat(worker: Worker) -> None:
            for _ in range(10):
                worker.heartbeat(*seed.sample(self.held, len(self.held)))

        return self.twice(beat)

    def recoveries(self, _: random.Random) -> list[Callable[[], object]]:
        """All leases have run out."""
        self.db.execute("update private.running_jobs set lease_until = now() - interval '1 second'")
        return self.twice(lambda worker: worker.recover_stale_jobs(100))

    def endings(self, seed: random.Random) -> list[Callable[[], object]]:
        """Workers end all jobs, in any order and in every way."""

        def end(worker: Worker) -> None:
            for job in seed.sample(self.held, len(self.held)):
                ways = [worker.complete_job, worker.release_job]
                ways += [lambda job: worker.fail_job(job, "moderated")]
                answer = outcome(functools.partial(seed.choice(ways), job))
                assert not isinstance(answer, Refusal) or answer.code == "DR001", answer

        return self.twice(end)

    def claims(self, _: random.Random) -> list[Callable[[], object]]:
        """Workers take what is left in the queue."""

        def claim(worker: Worker) -> None:
            while worker.claim_jobs(7):
                pass

        return self.twice(claim)


@pytest.mark.parametrize("seed", ["a", *(pytest.param(each, marks=LONG) for each in "bc")])
@pytest.mark.parametrize("others", ["beats", "recoveries", "endings", "claims"])
def test_batches_are_canceled_while_workers_hold_many_jobs(db, others, seed):
    crowd = Crowd(db)
    calls = [*crowd.cancels(), *getattr(crowd, others)(random.Random(seed))]
    random.Random(seed).shuffle(calls)

    together(calls)

    assert_books_balance(db)
    left = "select count(*) from private.running_jobs where not cancel_requested"
    assert db.value("select count(*) from private.ready_jobs") == db.value(left) == 0


def test_all_is_redriven_by_several_operators_at_once_and_nothing_twice(db):
    crowd = Crowd(db)
    for job in crowd.held:
        crowd.workers[0].fail_job(job, "moderated")
    operators = [Service(db) for _ in range(4)]

    counts = together([lambda o=o: o.redrive_failed("moderated", "2020-01-01") for o in operators])

    assert sum(counts) == len(crowd.held) == 30
    assert_books_balance(db)


def test_a_redrive_passes_users_who_are_being_deleted(db, service):
    crowd = Crowd(db)
    for job in crowd.held:
        crowd.workers[0].fail_job(job, "moderated")
    failed = "select count(*) from public.generations where status = 'failed'"
    leaving, operator = crowd.users[1], db.connect()

    with ThreadPoolExecutor(1) as pool, operator.transaction():
        operator.execute("delete from auth.users where id = %s", [leaving.id])
        redriven = pool.submit(service.redrive_failed, "moderated", "2020-01-01")
        db.wait_for_lock(service.connection)

    assert redriven.result(10) == db.value(failed)
    assert_books_balance(db)
