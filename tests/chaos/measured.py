"""Two promises, measured: a dead worker's jobs go on, and throughput comes back after a restart.

Each has a world of its own, where lease, heartbeat and pauses are those of a new installation.
"""

from __future__ import annotations

import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from chaos.clients import Clients
from chaos.faults import restarted
from chaos.world import World
from fake_replicate import Behaviour
from worker_process import eventually

DEAD_WORKER_SECONDS = 75.0  # at most, until its jobs are claimed by another
BACK_SECONDS = 10.0  # at most, from the start of PostgreSQL to the old throughput
SLOTS = 6
KILLS, RESTARTS = 3, 4
BASE_SECONDS, WATCH_SECONDS, WINDOW_SECONDS = 15.0, 20.0, 4.0
ENOUGH = 0.8  # of the throughput before

Say = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """Times in seconds, and the most that was promised."""

    title: str
    seconds: list[float]
    at_most: float

    @property
    def is_good(self) -> bool:
        return max(self.seconds) < self.at_most

    def line(self) -> str:
        """Say it in one line."""
        p50, most = statistics.median(self.seconds), max(self.seconds)
        return (
            f"- {self.title}: p50 {p50:.1f} s, max {most:.1f} s of {len(self.seconds)}"
            f" (promised: under {self.at_most:g} s)."
        )


def dead_worker(say: Say) -> Measured:
    """Kill a worker with jobs at the provider; how long until each is in other hands?"""
    seconds: list[float] = []
    with World() as world:
        open_models(world)
        for number in range(KILLS):
            with world.working(1) as fleet, fleet.held(0) as victim:
                world.provider.default = Behaviour(seconds=20)
                clients = Clients(world, number, SLOTS)
                clients.start()
                eventually(lambda: checkpointed(world) == SLOTS, within=60)
                killed_at = time.time()
                victim.kill()
                fleet.launch(WORKER_SLOTS=SLOTS)
                claims: dict[str, float] = {}
                while len(claims) < SLOTS:
                    for row in world.db.execute(CLAIMED_SINCE, killed_at, killed_at):
                        claims.setdefault(row["job_id"], row["at"])
                    assert time.time() - killed_at < 2 * DEAD_WORKER_SECONDS, "never restarted"
                    time.sleep(0.1)
                seconds += [at - killed_at for at in claims.values()]
                say(f"dead worker: jobs claimed after {sorted(round(s, 1) for s in seconds)} s")
                eventually(lambda: world.db.value(RUNNING) == 0, within=60)
                for process in fleet.processes:
                    if process.is_running():
                        process.stop(within=60)
    return Measured("Dead worker's job in another's hands", seconds, DEAD_WORKER_SECONDS)


def postgres_restart(say: Say) -> Measured:
    """Restart PostgreSQL under load; how long until as much is completed per second as before?"""
    seconds: list[float] = []
    with World() as world:
        open_models(world)
        with world.working(4):
            clients = Clients(world, 0, 1_000_000)
            clients.may_send = lambda number: world.db.value(BACKLOG) < 80
            clients.start()
            eventually(lambda: completed(world, 0, time.time()) > 20, within=60)
            for number in range(RESTARTS):
                began = time.time()
                time.sleep(BASE_SECONDS)
                before = completed(world, began, time.time()) / BASE_SECONDS
                restart = restarted(world, signal.SIGINT if number % 2 else signal.SIGQUIT)
                next(restart)
                next(restart, None)
                back_at = time.time()
                time.sleep(WATCH_SECONDS)
                seconds.append(until_back(world, back_at, before * ENOUGH))
                say(f"restart: {before:.1f} jobs/s before, back after {seconds[-1]:.1f} s")
            clients.stop()
    return Measured("Throughput back after a restart of PostgreSQL", seconds, BACK_SECONDS)


# With those that have ended already: what the provider has finished long ago takes no time.
CLAIMED_SINCE = """
select extract(epoch from claimed_at)::float8 as at, job_id::text
from private.running_jobs where claimed_at > to_timestamp(%s)
union all
select extract(epoch from started_at)::float8, generation_id::text
from private.attempts where started_at > to_timestamp(%s)
"""
RUNNING = "select count(*) from private.running_jobs"
BACKLOG = "select count(*) from private.ready_jobs"


def until_back(world: World, since: float, wanted: float) -> float:
    """Seconds until the first window in which enough is completed per second."""
    start = 0.0
    while start < WATCH_SECONDS - WINDOW_SECONDS:
        begin = since + start
        if completed(world, begin, begin + WINDOW_SECONDS) / WINDOW_SECONDS >= wanted:
            return start
        start += 0.25
    return float("inf")


def completed(world: World, since: float, until: float) -> int:
    query = (
        "select count(*) from public.generations where status = 'completed'"
        " and finished_at >= to_timestamp(%s) and finished_at < to_timestamp(%s)"
    )
    return int(world.db.value(query, since, until))


def checkpointed(world: World) -> int:
    query = "select count(*) from private.running_jobs where provider_job_id > ''"
    return int(world.db.value(query))


def open_models(world: World) -> None:
    """Let the models be used and lift the limits; all else is as installed."""
    world.db.execute("update public.models set is_active = true")
    world.db.lift_limits()


MEASUREMENTS = [dead_worker, postgres_restart]
