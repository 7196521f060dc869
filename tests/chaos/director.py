"""One scenario from start to end: jobs come in, faults strike, all heals, and the rules are judged.

Jobs and faults keep pace with each other: fault number i of f is due when i/f of the jobs have been
sent, and jobs wait while faults lag behind. So a run takes as long as the machine needs, and a seed
gives the same faults at the same points of the work again.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx
from chaos.clients import Clients
from chaos.faults import KINDS, Fault, plan
from chaos.invariants import Evidence, judge
from chaos.world import MARK, Fleet, World
from worker_process import eventually

BACKLOG = 60  # live jobs, above which clients wait
LAG = 4  # faults that may be due and not yet begun, before clients wait
REST_SECONDS = 1.5  # of a lane after each fault: recovery is seen
DRAIN_SECONDS = 240.0  # at most, from the end of all faults to the end of all jobs
LIVE = "select count(*) from private.live_jobs"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Scenario:
    """What may go wrong together."""

    title: str
    kinds: Sequence[str]


SCENARIOS = [
    Scenario("Worker killed (SIGKILL), one or all", ["worker_killed", "all_workers_killed"]),
    Scenario("Worker frozen for longer than its lease (SIGSTOP)", ["worker_frozen"]),
    Scenario("Worker stopped (SIGTERM)", ["worker_stopped"]),
    Scenario("Worker's clock moved, by seconds to a day", ["clock_moved"]),
    Scenario(
        "PostgreSQL restarted, fast or immediate, or crashed",
        ["postgres_restarted_fast", "postgres_restarted_immediate", "postgres_backend_crashed"],
    ),
    Scenario("Workers' backends terminated", ["backends_terminated"]),
    Scenario("Connection limit reached", ["connections_exhausted"]),
    Scenario(
        "Connections cut, refused, stalled, half-open",
        [f"connections_{each}" for each in ("cut", "refused", "stalled", "half_open")],
    ),
    Scenario("Storage: errors, slow, answer lost", ["storage_misbehaving"]),
    Scenario(
        "Provider: misbehaves, out of order, account refused",
        ["provider_misbehaving", "provider_out_of_order", "account_refused"],
    ),
    Scenario("Long REPEATABLE READ transaction", ["snapshot_held"]),
    Scenario("Database read-only", ["database_read_only"]),
]
EVERYTHING = Scenario("All of these at once", list(KINDS))


@dataclass
class Outcome:
    """What came of one run of a scenario. Times in seconds."""

    scenario: str
    seed: int
    faults: int
    jobs: int
    statuses: dict[str, int]
    violations: dict[str, list[str]]
    recoveries: list[tuple[str, float]]  # kind of fault, from its end to the next completed job
    seconds: float
    restarts: int  # of workers that ended by themselves
    done: dict[str, int]  # what else is worth telling


class Director:
    """Runs a scenario in a world."""

    def __init__(self, world: World, scenario: Scenario, seed: int, say: Say = print) -> None:
        self.world, self.scenario, self.seed, self.say = world, scenario, seed, say
        self.live = self.begun = 0
        self.healed: list[tuple[str, float]] = []  # kind, time.time()
        self.errors: list[str] = []

    def run(self, jobs: int, faults: int, workers: int = 4) -> Outcome:
        """Let faults strike while jobs are done; answer what came of it."""
        began = time.monotonic()
        clients = Clients(self.world, self.seed, jobs)
        with self.world.working(workers) as fleet:
            self._strike(clients, plan(self.seed, self.scenario.kinds, faults))
            drain = []
            try:
                eventually(lambda: self._live() == 0, within=DRAIN_SECONDS)
            except AssertionError:
                drain = [f"jobs are live after {DRAIN_SECONDS:g} s"]
            self._sweep(fleet)
            evidence = self._evidence(clients)
            logs = fleet.leaks()
            for process in fleet.processes:
                signs = [sign for sign in ("Traceback", "job.unexpected") if sign in process.log]
                logs += [f"{process.log_file.name}: {sign}" for sign in signs]
            return Outcome(
                self.scenario.title,
                self.seed,
                self.begun,
                len(clients.accepted.jobs),
                dict(Counter(row["status"] for row in evidence.generations())),
                judge(evidence)
                | self.world.judge(clients.accepted)
                | {"drain": drain, "faults": self.errors, "logs": logs},
                self._recoveries(),
                time.monotonic() - began,
                fleet.restarts,
                dict(self.world.done),
            )

    def _live(self) -> int:
        return sum(row["count"] for row in self.world.all.execute(LIVE))

    def _strike(self, clients: Clients, faults: list[Fault]) -> None:
        """Have all jobs sent and all faults strike, side by side."""
        jobs_per_fault = clients.count / max(1, len(faults))

        def may_send(number: int) -> bool:
            lags = self.begun < len(faults) and number >= (self.begun + LAG) * jobs_per_fault
            return self.live < BACKLOG and not lags

        def strike(lane: str) -> None:
            for fault in faults:
                if KINDS[fault.kind].lane != lane:
                    continue
                while clients.sent < (fault.number + 0.5) * jobs_per_fault:
                    time.sleep(0.05)
                self.begun += 1
                try:
                    with fault.striking(self.world):
                        time.sleep(fault.seconds)
                except Exception as error:  # the run goes on, and fails in the end
                    self.errors.append(f"{fault.kind}: {type(error).__name__}: {error}")
                self.healed.append((fault.kind, time.time()))
                time.sleep(REST_SECONDS)

        clients.may_send = may_send
        names = {KINDS[fault.kind].lane for fault in faults}
        lanes = [threading.Thread(target=strike, args=(name,), daemon=True) for name in names]
        for each in (clients, *lanes):
            each.start()
        said = 0.0
        while any(lane.is_alive() for lane in lanes) or not clients.is_done():
            self.live = self._live()
            if time.monotonic() - said > 10:
                sent = f"{clients.sent} of {clients.count} jobs sent, {self.live} live"
                self.say(f"  {self.scenario.title}: {sent}, {self.begun} faults")
                said = time.monotonic()
            time.sleep(0.1)

    def _sweep(self, fleet: Fleet) -> None:
        """Stop the workers, let a day pass for the files, have workers erase what is left."""
        fleet.stop_all()
        for column in ("created_at", "updated_at"):
            old = f"update storage.objects set {column} = {column} - interval '2 days'"
            self.world.db.execute(old)
        self.world.all.execute("update private.retention_walks set place = default")
        self.world.all.execute("select private.apply_retention(1000000)")
        sweepers = [fleet.launch(**fleet.serving(n)) for n, _ in enumerate(self.world.all.each)]
        expired = "select path from private.expired_files"
        eventually(lambda: self.world.all.execute(expired) == [], within=120)
        for sweeper in sweepers:
            sweeper.stop(within=60)

    def _evidence(self, clients: Clients) -> Evidence:
        stack = self.world.stack
        headers = {"Authorization": f"Bearer {stack.service_role_key}"}

        def stored(path: str) -> bytes | None:
            url = f"{stack.api_url}/storage/v1/object/generations/{path}"
            response = httpx.get(url, headers=headers)
            return response.content if response.is_success else None

        prefix = f"{MARK} chaos-{self.seed}-"
        return Evidence(self.world.all, clients.accepted, self.world.provider, stored, prefix)

    def _recoveries(self) -> list[tuple[str, float]]:
        """How long after the end of each fault the next job was completed."""
        query = (
            "select extract(epoch from finished_at)::float8 as at from public.generations"
            " where status = 'completed'"
        )
        times = sorted(row["at"] for row in self.world.all.execute(query))
        places = [(kind, at, bisect_right(times, at)) for kind, at in self.healed]
        return [(kind, times[place] - at) for kind, at, place in places if place < len(times)]
