"""What goes wrong. Each fault is a function: up to `yield` it strikes, after it it heals.

A fault gets the world and its own chance, drawn from the run's seed. It lasts as long as its kind
says; those of one lane come one after the other, those of different lanes at the same time.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import psycopg
from chaos.world import LEASE_SECONDS, StorageProxy, World
from fake_replicate import MODERATED

# What a create may meet, and the prediction it buys.
CREATES: list[dict[str, Any]] = [
    *({"answer": None, "stored": stored} for stored in (True, True, False)),
    *({"answer": answer, "stored": True} for answer in (200, 408, 500, 504)),
    *({"answer": answer, "stored": False} for answer in (200, 302, 500, 503)),
    *({"answer": 429, "retry_after": 3}, {"answer": 422}),
]
PREDICTIONS: list[dict[str, Any]] = [
    *({"ends": "failed", "error": error} for error in (MODERATED, "CUDA out of memory (E1001)")),
    *({"ends": "canceled"}, {"ends": "aborted"}, {"polls": float("inf")}, {"removed": True}),
    *({"images": count} for count in (0, 1, 1, 2, 9)),
    {"running": "pondering", "polls": 5},
    {"output": {"picture": "http://169.254.169.254/latest/meta-data"}},
    *({"failing_gets": 3, "get_status": status} for status in (None, 404, 429, 500)),
    *({"file": f} for f in ("gone", "junk", "bomb", "large", "unsized", "broken", "redirect")),
]


class Kind(NamedTuple):
    lane: str
    at_least: float  # seconds
    at_most: float
    strike: Callable[[World, random.Random], contextlib.AbstractContextManager[object]]


class Fault(NamedTuple):
    """One of a run's faults."""

    number: int
    kind: str
    seconds: float
    seed: int

    def striking(self, world: World) -> contextlib.AbstractContextManager[object]:
        """Strike now, heal at the end."""
        return KINDS[self.kind].strike(world, random.Random(self.seed))


KINDS: dict[str, Kind] = {}


def fault(lane: str, at_least: float, at_most: float) -> Callable[..., None]:
    """Enter a kind of fault, named like the function, which lasts so many seconds."""

    def enter(strike: Callable[[World, random.Random], Iterator[None]]) -> None:
        kind = Kind(lane, at_least, at_most, contextlib.contextmanager(strike))
        KINDS[strike.__name__] = kind

    return enter


def plan(seed: int, kinds: Sequence[str], count: int) -> list[Fault]:
    """Draw a run's faults: every kind comes about as often as any other."""
    chance = random.Random(seed)
    faults: list[Fault] = []
    bag: list[str] = []
    for number in range(count):
        bag = bag or chance.sample(kinds, len(kinds))
        kind = bag.pop()
        seconds = chance.uniform(KINDS[kind].at_least, KINDS[kind].at_most)
        faults.append(Fault(number, kind, seconds, chance.randrange(2**32)))
    return faults


# --- the workers ---


@fault("workers", 0, 1)
def worker_killed(world: World, chance: random.Random) -> Iterator[None]:
    with world.fleet.held(chance.randrange(100)) as process:
        process.kill()
        yield


@fault("workers", 0, 1)
def all_workers_killed(world: World, chance: random.Random) -> Iterator[None]:
    with contextlib.ExitStack() as fleet:
        for number in range(len(world.fleet.slots)):
            fleet.enter_context(world.fleet.held(number)).kill()
        yield


@fault("workers", LEASE_SECONDS * 1.2, LEASE_SECONDS * 1.8)
def worker_frozen(world: World, chance: random.Random) -> Iterator[None]:
    with world.fleet.held(chance.randrange(100)) as process:
        process.signal(signal.SIGSTOP)
        yield
        process.signal(signal.SIGCONT)


@fault("workers", 0, 0.5)
def worker_stopped(world: World, chance: random.Random) -> Iterator[None]:
    with world.fleet.held(chance.randrange(100)) as process:
        with contextlib.suppress(Exception):
            process.stop(within=40)
        yield


@fault("clock", 1, 4)
def clock_moved(world: World, chance: random.Random) -> Iterator[None]:
    for _ in range(3):
        most = chance.choice([86_400, 3600, 600, 30])
        world.fleet.clock.write_text(str(chance.uniform(-most, most)))
        time.sleep(0.5)
    yield
    if chance.random() < 0.5:
        world.fleet.clock.write_text("0")


# --- the database ---


@contextlib.contextmanager
def restarted(world: World, how: signal.Signals) -> Iterator[None]:
    cluster = world.stack.cluster
    cluster.stop_signal = how
    cluster.stop()
    yield
    cluster.start()
    world.restart_gateway()


@fault("database", 0, 0)
def postgres_backend_crashed(world: World, chance: random.Random) -> Iterator[None]:
    query = "select pid from pg_stat_activity where usename = 'darkroom_worker' order by pid"
    if pids := [row["pid"] for row in world.db.execute(query)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(pids), signal.SIGKILL)  # the server resets all others, too
    yield
    time.sleep(0.5)
    world.db.execute("select 1")
    world.restart_gateway()


@fault("database", 0, 1)
def backends_terminated(world: World, chance: random.Random) -> Iterator[None]:
    for _ in range(chance.randint(1, 4)):
        world.fleet.terminate_backends(chance.choice(["true", "true", "random() < 0.5"]))
        time.sleep(chance.uniform(0, 0.3))
    yield


@fault("database", 2, 6)
def connections_exhausted(world: World, chance: random.Random) -> Iterator[None]:
    url = world.stack.worker_database_url
    world.proxy.cut()
    with contextlib.ExitStack() as taken:
        with contextlib.suppress(psycopg.OperationalError):
            for _ in range(200):
                taken.callback(psycopg.connect(url, connect_timeout=5).close)
        yield


@fault("database", 2, 8)
def database_read_only(world: World, chance: random.Random) -> Iterator[None]:
    """As a full disk or a standby makes it, for all who connect meanwhile. Supabase Lite does not
    start on such a database, and what it opened meanwhile stays so: it starts anew afterwards.
    """
    switch = "default_transaction_read_only"
    world.db.execute(f"alter database postgres set {switch} = on")
    try:
        world.fleet.terminate_backends("true")
        yield
    finally:
        world.db.execute(f"alter database postgres reset {switch}")
        world.restart_gateway()


@fault("snapshot", 5, 15)
def snapshot_held(world: World, chance: random.Random) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        with contextlib.suppress(psycopg.OperationalError):  # the server may be down just now
            holder = psycopg.connect(world.db.url)
            held.callback(holder.close)
            holder.execute("set transaction isolation level repeatable read")
            holder.execute("select count(*) from private.ready_jobs")
        yield


# --- Storage and provider ---


@fault("storage", 1, 6)
def storage_misbehaving(world: World, chance: random.Random) -> Iterator[None]:
    world.storage.behaviour = chance.choice(StorageProxy.BEHAVIOURS)
    yield
    world.storage.behaviour = ""


@fault("provider", 0.5, 2)
def provider_misbehaving(world: World, chance: random.Random) -> Iterator[None]:
    for _ in range(chance.randint(3, 8)):
        changes: dict[str, Any] = {"slow": {"create": chance.choice([0, 0, 0.5, 2])}}
        changes |= chance.choice(CREATES) if chance.random() < 0.6 else {}
        changes |= chance.choice(PREDICTIONS) if chance.random() < 0.5 else {}
        world.provider.next(**changes, hidden=chance.choice([0, 0, 2]))
    world.provider.list_answers.extend(chance.choice([[], [], [429, 500, None]]))
    yield


@fault("provider", 1, 5)
def provider_out_of_order(world: World, chance: random.Random) -> Iterator[None]:
    world.provider.outage = chance.choice([429, 500, 503, 503, None])
    yield
    world.provider.outage = ""


@fault("provider", 1, 4)
def account_refused(world: World, chance: random.Random) -> Iterator[None]:
    """The provider's jobs wait; once the bill is paid, the operator says so."""
    world.provider.outage = chance.choice([401, 402, 403])
    yield
    world.provider.outage = ""
    time.sleep(1)  # what was refused last has paused the provider once more
    world.db.execute("select public.resume_model('replicate')")


# --- what is one call ---

done = contextlib.nullcontext
KINDS |= {
    "postgres_restarted_fast": Kind("database", 0, 2, lambda w, _: restarted(w, signal.SIGINT)),
    "postgres_restarted_immediate": Kind(
        "database", 0, 2, lambda w, _: restarted(w, signal.SIGQUIT)
    ),
    # The network between workers and database.
    "connections_cut": Kind("network", 0, 0.5, lambda w, _: done(w.proxy.cut())),
    "connections_refused": Kind("network", 1, 5, lambda w, _: w.proxy.refusing()),
    "connections_stalled": Kind("network", 1, 8, lambda w, _: w.proxy.stalled()),
    "connections_half_open": Kind("network", 0, 1, lambda w, _: done(w.proxy.half_open())),
}
