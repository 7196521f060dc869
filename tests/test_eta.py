"""sql/48_eta.sql: the ETA, its parts, and how far it is off in an hour of simulated traffic."""

import heapq
import json
import math
import random
import statistics
import uuid
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from actors import PREVIEW, User, Worker
from database import Database, assert_books_balance
from psycopg.types.json import Jsonb

SECONDS = {"test/quick": 2, "test/usual": 8, "test/slow": 30}
SHARES = {"test/quick": 0.5, "test/usual": 0.35, "test/slow": 0.15}
PRICES = {"test/quick": 1, "test/usual": 2, "test/slow": 8}
LOADS = (0.4, 1.25, 0.9, 0.6)  # of the slots, five minutes each, over and over: queues come and go
SLOTS = 4
HOUR = 3600


@dataclass(order=True)
class Event:
    """Something that happens at a simulated time."""

    at: float
    number: int
    kind: str = field(compare=False)
    what: Any = field(compare=False, default=None)


@dataclass
class Reading:
    """An ETA as a client was told it."""

    job_id: str
    at: float
    position: int
    eta: float


class Simulation:
    """Users, slots and a clock. The functions called are the real ones, only time is not.

    Nothing sleeps: before each event the claims move into the past, and before each refresh of the
    statistics the rest of the record does. One event is one round trip.
    """

    def __init__(self, db: Database, seed: int) -> None:
        self.db, self.chance = db, random.Random(seed)
        self.now = self.refreshed_at = 0.0
        self.events: list[Event] = []
        self.model_of: dict[str, str] = {}
        self.ended: dict[str, float] = {}
        self.readings: list[Reading] = []
        self.cursor = psycopg.ClientCursor(db.connect())  # takes several statements at once
        self.worker_id = Worker(db, SLOTS).id
        self.free = SLOTS
        self.users = [str(uuid.UUID(int=number)) for number in range(1, 81)]
        self._given_models_and_users()
        self._given_requests()
        for second in range(10, HOUR, 10):
            self._at(second, "read")
        for second in range(30, HOUR, 30):
            self._at(second, "refresh")

    def _given_models_and_users(self) -> None:
        self.db.lift_limits()
        self.db.execute("update private.settings set lease = '1 hour'")
        for model, price in PRICES.items():
            given_model(self.db, model, price)
        self.db.execute("insert into auth.users (id) select unnest(%s::uuid[])", self.users)
        self.db.execute(
            "select public.grant_credits(u, 100000, 'grant', u::text) from unnest(%s::uuid[]) as u",
            self.users,
        )
        query = "select public.set_paid(u, 'infinity') from unnest(%s::uuid[]) as u"
        self.db.execute(query, self.users[::4])

    def _given_requests(self) -> None:
        """Poisson arrivals; one in twenty is of a user who wants several at once."""
        at, mean = 0.0, sum(SHARES[model] * SECONDS[model] for model in SHARES)
        while at < HOUR:
            per_second = LOADS[int(at // 300) % len(LOADS)] * SLOTS / mean / 1.3
            at += self.chance.expovariate(per_second)
            model = self.chance.choices(list(SHARES), list(SHARES.values()))[0]
            count = self.chance.randint(4, 10) if self.chance.random() < 0.05 else 1
            user = self.chance.choice(self.users)
            for _ in range(count):
                self._at(at, "request", (user, model))

    def _at(self, at: float, kind: str, what: Any = None) -> None:
        self.count = getattr(self, "count", 0) + 1
        heapq.heappush(self.events, Event(at, self.count, kind, what))

    def run(self) -> None:
        """Play all events; afterwards no job is left."""
        while self.events:
            event = heapq.heappop(self.events)
            passed, self.now = event.at - self.now, event.at
            getattr(self, f"_on_{event.kind}")(passed, event.what)

    def _do(self, passed: float, query: str, *arguments: Any) -> list[Any]:
        """Let time pass, run one statement, and claim if a slot is free; answer its rows."""
        self.cursor.execute(
            "update private.running_jobs set claimed_at = claimed_at - %s * interval '1 second';"
            f" {query}; select job_id::text, token from private.claim_jobs(%s, %s)",
            [passed, *arguments, self.worker_id, self.free],
        )
        self.cursor.nextset()
        rows = self.cursor.fetchall()
        self.cursor.nextset()
        self.claimed = self.cursor.fetchall()
        return rows

    def _begin(self) -> None:
        for job_id, token in self.claimed:
            self.free -= 1
            ends_at = self.now + self._duration(self.model_of[job_id])
            self._at(ends_at, "end", (job_id, token))

    def _duration(self, model: str) -> float:
        """Lognormal: two of three within 30 % of the mean; one in fifty has a cold start."""
        seconds = SECONDS[model] * math.exp(self.chance.gauss(-0.045, 0.3))
        return seconds * (2.5 if self.chance.random() < 0.02 else 1)

    def _on_request(self, passed: float, what: tuple[str, str]) -> None:
        user, model = what
        ((answer,),) = self._do(
            passed,
            "select public.enqueue_generation(%s, 'a lighthouse')"
            " from set_config('request.jwt.claims', %s, false) as a"
            " cross join set_config('request.jwt.claim.sub', %s, false) as b",
            model,
            json.dumps({"sub": user}),
            user,
        )
        self.model_of[answer["job_id"]] = model
        self._begin()

    def _on_end(self, passed: float, job: tuple[str, int]) -> None:
        job_id, token = job
        image = {"position": 0, "content_type": "image/png", "bytes": 1}
        self.free += 1
        self._do(
            passed,
            "select private.complete_jobs(array[g.id], array[%s::bigint], array[jsonb_build_array("
            " %s || jsonb_build_object('storage_path', concat(g.user_id, '/', g.id, '/0.png')))],"
            " null)"
            " from public.generations as g where g.id = %s::uuid",
            token,
            Jsonb(image),
            job_id,
        )
        self.ended[job_id] = self.now
        self._begin()

    def _on_read(self, passed: float, _: None) -> None:
        """Everybody who waits looks again."""
        for job_id, position, eta in self._do(
            passed,
            "select g.id::text, f.queue_position, f.eta_seconds from private.ready_jobs as r"
            " inner join public.generations as g on g.id = r.job_id"
            " cross join lateral private.forecast(g) as f",
        ):
            self._note(job_id, position, eta)
        self._begin()

    def _on_refresh(self, passed: float, _: None) -> None:
        since, self.refreshed_at = self.now - self.refreshed_at, self.now
        for table, columns in {
            "private.model_stats": ["refreshed_at"],
            "private.attempts": ["started_at", "ended_at"],
            "public.generations": ["created_at"],
        }.items():
            changes = ", ".join(f"{c} = {c} - {since} * interval '1 second'" for c in columns)
            self.db.execute(f"update {table} set {changes}")
        self._do(passed, "select private.recover_stale_jobs()")
        self._begin()

    def _note(self, job_id: str, position: int, eta: Any) -> None:
        if eta is not None:
            self.readings.append(Reading(job_id, self.now, position, float(eta)))

    def error(self, reading: Reading) -> float:
        """How far off an ETA was, relative to the seconds that it really took from then on."""
        really = self.ended[reading.job_id] - reading.at
        return abs(reading.eta - really) / really

    def errors(self, by: Callable[[Reading], Any]) -> dict[Any, float]:
        """Median error of each group of readings."""
        groups: dict[Any, list[float]] = {}
        for reading in self.readings:
            groups.setdefault(by(reading), []).append(self.error(reading))
        return {group: statistics.median(errors) for group, errors in groups.items()}


def given_model(db: Database, model: str, price: int = 1) -> None:
    """Have one more model like the preview model."""
    db.execute(
        "insert into public.models select (jsonb_populate_record(m, jsonb_build_object("
        " 'id', %s::text, 'price_credits', %s::int, 'paid_price_credits', %s::int))).*"
        " from public.models as m where id = %s",
        model,
        price,
        price,
        PREVIEW,
    )


def measured(db: Database, model: str, seconds: float, count: int = 10, **columns: Any) -> None:
    """Have attempts of this model on record, as refresh_model_stats leaves them."""
    db.execute(
        "insert into private.model_stats select (jsonb_populate_record("
        " null::private.model_stats, jsonb_build_object('model_id', %s::text, 'mean_seconds',"
        " %s::float, 'sample_count', %s::int, 'requests_per_second', 0, 'refreshed_at', now())"
        " || %s)).*",
        model,
        seconds,
        count,
        Jsonb(columns),
    )


def etas(user: User) -> list[float | None]:
    """Return the ETA of each of the user's active jobs, oldest first."""
    return [job["eta_seconds"] for job in reversed(user.list_active_jobs())]


def eta(user: User, **request: Any) -> float | None:
    """Have the user ask for a picture; return the ETA that the first look at it tells."""
    told = user.get_job_status(user.enqueued(**request))["eta_seconds"]
    return None if told is None else float(told)


def test_without_measurements_the_eta_is_not_known(db, alice, worker):
    assert eta(alice) is None

    worker.claimed()
    assert etas(alice) == [None]


def test_without_a_live_worker_the_eta_of_a_queued_job_is_not_known(db, alice):
    measured(db, PREVIEW, 8)
    worker = Worker(db, slots=1)
    assert eta(alice) == 8

    db.pass_time("61 seconds")
    assert etas(alice) == [None]

    worker.heartbeat()
    assert etas(alice) == [8]


def test_jobs_share_the_slots_in_the_order_they_will_be_claimed(db, alice, bob):
    db.lift_limits()
    measured(db, PREVIEW, 8)
    Worker(db, slots=2)

    for _ in range(5):
        alice.enqueue()

    assert etas(alice) == [8, 8, 16, 16, 24]
    assert eta(bob) == 8  # behind alice's first alone: the users take turns


def test_each_model_counts_with_its_own_length(db, alice):
    given_model(db, "test/slow")
    measured(db, PREVIEW, 2)
    measured(db, "test/slow", 30)
    worker = Worker(db, slots=1)
    alice.enqueue(model="test/slow")
    worker.claimed()
    db.pass_time("10 seconds")
    worker.heartbeat()

    alice.enqueue(model="test/slow")

    assert etas(alice) == pytest.approx([20, 50], abs=1)
    assert eta(alice) == pytest.approx(52, abs=1)


def test_the_order_of_those_before_counts(db, alice):
    db.lift_limits()
    given_model(db, "test/slow")
    measured(db, PREVIEW, 2)
    measured(db, "test/slow", 30)
    Worker(db, slots=2)
    for model in ("test/slow", PREVIEW, PREVIEW):
        alice.enqueue(model=model)

    assert eta(alice) == 6  # the slow one keeps one slot, the quick the other


def test_a_late_job_has_still_a_quarter_to_go(db, alice, worker):
    measured(db, PREVIEW, 8)
    alice.enqueue()
    worker.claimed()

    db.pass_time("30 seconds")

    assert etas(alice) == [2]


@pytest.mark.parametrize(
    ("progress", "eta"),
    [
        (("generating", None), 10),
        (("generating", 50), 10),
        (("generating", 20), 25),
        (("storing", 90), 5),
    ],
)
def test_the_providers_progress_counts_as_much_as_the_clock(db, alice, worker, progress, eta):
    measured(db, PREVIEW, 20)
    alice.enqueue()
    worker.report_progress(worker.claimed(), *progress)

    db.pass_time("10 seconds")

    assert etas(alice) == pytest.approx([eta], abs=1)


def test_a_job_put_off_counts_from_its_time(db, alice, worker):
    measured(db, PREVIEW, 8)
    alice.enqueue()
    worker.fail_job(worker.claimed(), "provider_busy", retry_after=100)

    assert etas(alice) == pytest.approx([108], abs=1)


def test_a_paused_provider_is_waited_for(db, alice, worker):
    measured(db, PREVIEW, 8)
    alice.enqueue()
    worker.pause_provider("preview", 60)

    assert etas(alice) == pytest.approx([68], abs=1)


def test_the_end_of_a_pause_without_end_or_of_a_probe_is_not_known(db, alice, worker, service):
    measured(db, PREVIEW, 8)
    alice.enqueue()
    service.pause_model(PREVIEW)
    worker.claim_jobs(1)
    assert etas(alice) == [None]

    service.resume_model(PREVIEW)
    assert etas(alice) == [8]
    worker.pause_provider("preview", 0)
    assert etas(alice) == [None]


def test_what_is_likely_to_be_put_before_a_job_is_counted(db, alice):
    db.lift_limits()
    worker = Worker(db, slots=1)
    measured(db, PREVIEW, 10, requests_per_second=0.05, queue_distance=1000)
    alice.enqueue()
    worker.claimed()
    for _ in range(3):
        alice.enqueue()

    *_, last = etas(alice)

    # Three slots' work of 10 s; of those 10 s in 20 of others, who will be put before two thirds.
    assert last == pytest.approx(10 + 30 / (1 - 0.5 * 2 / 3), abs=1)


def test_behind_more_jobs_than_are_counted_the_eta_is_not_known(db, alice):
    db.lift_limits()
    measured(db, PREVIEW, 8)
    Worker(db, slots=1)
    alice.has(credits=20)
    for _ in range(4):
        alice.enqueue()

    query = "select f.* from public.generations as g, private.forecast(g, 3) as f order by g.id"
    told = [(row["queue_position"], row["eta_seconds"]) for row in db.execute(query)]

    assert told == [(0, 8), (1, 16), (2, 24), (3, None)]


def test_the_mean_takes_in_each_completed_attempt_once(db, alice, worker):
    db.lift_limits()
    for seconds in (10, 20):
        alice.enqueue()
        job = worker.claimed()
        db.pass_time(f"{seconds} seconds")
        worker.complete_job(job)
    alice.enqueue()
    worker.fail_job(worker.claimed(), "moderated")

    for _ in range(3):
        worker.recover_stale_jobs()
        db.pass_time("16 seconds")

    stats = db.row("select * from private.model_stats")
    assert (stats["model_id"], stats["sample_count"]) == (PREVIEW, 2)
    assert stats["mean_seconds"] == pytest.approx(15, abs=1)
    assert stats["requests_per_second"] == pytest.approx(3 / 300)
    assert stats["queue_distance"] == 1000


def test_a_mean_forgets_what_is_long_past(db, alice, worker):
    measured(db, PREVIEW, 100, count=200)
    db.pass_time("16 seconds")
    db.execute("select private.refresh_model_stats(p_memory => 1)")
    alice.enqueue()
    worker.complete_job(worker.claimed())
    db.pass_time("16 seconds")

    db.execute("select private.refresh_model_stats(p_memory => 1)")

    assert db.value("select mean_seconds from private.model_stats") < 1


def test_the_statistics_are_renewed_by_one_at_a_time_and_not_too_often(db, alice, worker):
    measured(db, PREVIEW, 100)
    alice.enqueue()
    worker.complete_job(worker.claimed())

    worker.recover_stale_jobs()

    assert db.value("select mean_seconds from private.model_stats") == 100


def test_in_an_hour_of_traffic_the_median_error_is_under_a_quarter(db):
    simulation = Simulation(db, seed=1)

    simulation.run()

    model_of = simulation.model_of
    by_model = simulation.errors(by=lambda reading: model_of[reading.job_id])
    by_depth = simulation.errors(by=lambda reading: bisect((1, 6, 21), reading.position))
    print("jobs", len(model_of), "readings", len(simulation.readings), by_model, by_depth)
    assert len(simulation.readings) > 3 * len(model_of) > 3000
    assert max(by_model.values()) < 0.25
    assert max(by_depth.values()) < 0.3
    assert db.value("select count(*) from private.running_jobs") == 0
    assert_books_balance(db)
