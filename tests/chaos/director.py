"""One scenario from start to end: jobs come in, faults strike, all heals, and the rules are judged.

Jobs and faults keep pace with each other: fault number i of f is due when i/f of the jobs have been
sent, and jobs wait while faults lag behind. So a run takes as long as the machine needs, and a seed
gives the same faults at the same points of the work again.
"""

from __future__ import annotations

import queue
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from chaos.clients import Accepted, Clients
from chaos.faults import KINDS, Fault, plan
from chaos.invariants import Evidence, judge
from chaos.world import Fleet, World
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
    drain_seconds: float
    seconds: float
    swept_files: int = 0
    restarts: int = 0  # of workers that ended by themselves

    @property
    def is_good(self) -> bool:
        return not any(self.violations.values())


@dataclass
class Lane:
    """Faults that must not overlap, one after the other."""

    world: World
    healed: list[tuple[str, float]] = field(default_factory=list)  # kind, time.time()
    errors: list[str] = field(default_factory=list)
    begun: int = 0

    def __post_init__(self) -> None:
        self.waiting: queue.SimpleQueue[Fault | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def end(self) -> None:
        """Return once the last fault has healed."""
        self.waiting.put(None)
        self.thread.join()

    def _run(self) -> None:
        while fault := self.waiting.get():
            self.begun += 1
            try:
                with fault.striking(self.world):
                    time.sleep(fault.seconds)
            except Exception as error:  # the run goes on, and fails in the end
                self.errors.append(f"{fault.kind.name}: {type(error).__name__}: {error}")
            self.healed.append((fault.kind.name, time.time()))
            time.sleep(REST_SECONDS)


class Director:
    """Runs a scenario in a world."""

    def __init__(self, world: World, scenario: Scenario, seed: int, say: Say = print) -> None:
        self.world, self.scenario, self.seed, self.say = world, scenario, seed, say
        self.live = 0

    def run(self, jobs: int, faults: int, workers: int = 4) -> Outcome:
        """Let faults strike while jobs are done; answer what came of it."""
        began = time.monotonic()
        clients = Clients(self.world, self.seed, jobs)
        with self.world.working(workers) as fleet:
            lanes = self._strike(clients, plan(self.seed, self.scenario.kinds, faults))
            healed_at = time.monotonic()
            violations = self._drain()
            drained = time.monotonic() - healed_at
            swept = self._sweep(fleet)
            evidence = self._evidence(clients.accepted)
            violations |= judge(evidence)
            violations["faults"] = [error for lane in lanes for error in lane.errors]
            violations["logs"] = fleet.leaks() + fleet.tracebacks()
            statuses = count(row["status"] for row in evidence.generations())
        return Outcome(
            self.scenario.title,
            self.seed,
            sum(lane.begun for lane in lanes),
            len(clients.accepted.jobs),
            statuses,
            violations,
            self._recoveries([each for lane in lanes for each in lane.healed]),
            drained,
            time.monotonic() - began,
            swept,
            len(fleet.ended_by_themselves),
        )

    def _strike(self, clients: Clients, faults: list[Fault]) -> list[Lane]:
        """Have all jobs sent and all faults strike, side by side."""
        lanes = {name: Lane(self.world) for name in {fault.kind.lane for fault in faults}}
        jobs_per_fault = clients.count / max(1, len(faults))

        def may_send(number: int) -> bool:
            begun = sum(lane.begun for lane in lanes.values())
            lags = begun < len(faults) and number >= (begun + LAG) * jobs_per_fault
            return self.live < BACKLOG and not lags

        clients.may_send = may_send
        try:
            clients.start()
            self._pace(clients, lanes, faults, jobs_per_fault)
        finally:
            clients.stop()
            for lane in lanes.values():
                lane.end()
        return list(lanes.values())

    def _pace(
        self,
        clients: Clients,
        lanes: dict[str, Lane],
        faults: list[Fault],
        jobs_per_fault: float,
    ) -> None:
        """Hand each fault to its lane when it is due, until all are and all jobs are sent."""
        waiting, said = deque(faults), 0.0
        while waiting or not clients.is_done():
            while waiting and clients.sent >= (waiting[0].number + 0.5) * jobs_per_fault:
                fault = waiting.popleft()
                lanes[fault.kind.lane].waiting.put(fault)
            self.live = self.world.db.value(LIVE)
            if time.monotonic() - said > 10:
                self._tell(clients, lanes)
                said = time.monotonic()
            time.sleep(0.1)

    def _tell(self, clients: Clients, lanes: dict[str, Lane]) -> None:
        begun = sum(lane.begun for lane in lanes.values())
        self.say(
            f"  {self.scenario.title}: {clients.sent} of {clients.count} jobs sent,"
            f" {self.live} live, {begun} faults"
        )

    def _drain(self) -> dict[str, list[str]]:
        """Wait until every job has ended."""
        try:
            eventually(lambda: self.world.db.value(LIVE) == 0, within=DRAIN_SECONDS)
        except AssertionError:
            return {"drain": [f"jobs are live after {DRAIN_SECONDS:g} s"]}
        return {"drain": []}

    def _sweep(self, fleet: Fleet) -> int:
        """Stop the workers, let a day pass for the files, have one worker erase what is left."""
        db = self.world.db
        fleet.stop_all()
        for column in ("created_at", "updated_at"):
            db.execute(f"update storage.objects set {column} = {column} - interval '2 days'")
        db.execute("update private.retention_walks set place = default")
        db.execute("select private.apply_retention(1000000)")
        swept = int(db.value("select count(*) from private.expired_files"))
        sweeper = fleet.launch()
        eventually(lambda: db.value("select count(*) from private.expired_files") == 0, within=120)
        sweeper.stop(within=60)
        return swept

    def _evidence(self, accepted: Accepted) -> Evidence:
        stack = self.world.stack
        http = httpx.Client(
            base_url=f"{stack.api_url}/storage/v1/object/generations/",
            headers={"Authorization": f"Bearer {stack.service_role_key}"},
            limits=httpx.Limits(keepalive_expiry=2),
        )

        def stored(path: str) -> bytes | None:
            response = http.get(path)
            return response.content if response.is_success else None

        prefix = f"chaos-{self.seed}-"
        return Evidence(self.world.db, accepted, self.world.provider, stored, prefix)

    def _recoveries(self, healed: list[tuple[str, float]]) -> list[tuple[str, float]]:
        """How long after the end of each fault the next job was completed."""
        query = (
            "select extract(epoch from finished_at)::float8 as at from public.generations"
            " where status = 'completed' order by finished_at"
        )
        times = [row["at"] for row in self.world.db.execute(query)]
        found = []
        for kind, at in healed:
            place = bisect_right(times, at)
            if place < len(times):
                found.append((kind, times[place] - at))
        return found


def count(words: Any) -> dict[str, int]:
    """How often each word comes."""
    counts: dict[str, int] = {}
    for word in words:
        counts[word] = counts.get(word, 0) + 1
    return counts


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
        [
            "connections_cut",
            "connections_refused",
            "connections_stalled",
            "connections_half_open",
        ],
    ),
    Scenario("Storage: errors, slow, answer lost", ["storage_misbehaving"]),
    Scenario(
        "Provider: misbehaves, out of order, account refused",
        ["provider_misbehaving", "provider_out_of_order", "account_refused"],
    ),
    Scenario("Long REPEATABLE READ transaction", ["snapshot_held"]),
    Scenario("Database read-only", ["database_read_only"]),
    Scenario(
        "Hostile pictures, creates forbidden, poisoned rows",
        ["pictures_hostile", "creates_forbidden", "rows_poisoned"],
    ),
]
EVERYTHING = Scenario("All of these at once", list(KINDS))
