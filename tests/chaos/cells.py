"""Cells under chaos: two of them and an entry, workers of both, users who move meanwhile.

    clients ──► PostgREST ──► entry ──► home, two ◄── workers

Half of the users move to and fro; the others stay, and no fault of the other cell may reach them.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
from chaos.clients import USERS, Accepted, sign_up
from chaos.director import Scenario
from chaos.faults import fault
from chaos.world import Databases, Fleet, Reconnecting, World
from http_client import SignedUp
from worker_process import eventually

from cells import CELLS, CellStack
from processes import StackError
from stack import Cluster, answers

MOVED_WITHIN = 90.0  # seconds, whatever else strikes
# Where users have rows, and where the directory says that they live.
LIVING = """
select user_id::text from public.entitlements union select user_id::text from public.generations
union select user_id::text from public.credit_ledger
union select user_id::text from private.credit_buckets
union select user_id::text from private.ready_jobs
union select user_id::text from private.running_jobs
"""
DIRECTORY = "select user_id::text, cell from cells.users order by 1"


class CellFleet(Fleet):
    """Workers of one cell, of the other, and of both."""

    world: CellWorld

    def serving(self, number: int) -> dict[str, str]:
        home, two = self.world.worker_urls
        return {"DATABASE_URL": [home, two, f"{home} {two}"][number % 3]}


class CellWorld(World):
    """A stack of cells in a temporary folder."""

    stack: CellStack
    fleet_of = CellFleet

    def make_stack(self, fsync: bool) -> CellStack:
        return CellStack(self.folder / "stack", fsync=fsync)

    def __enter__(self) -> CellWorld:
        super().__enter__()
        self.all = Databases(*(Reconnecting(self.stack.url_of(name), name) for name in CELLS))
        self.db = self.all.each[0]
        self.entry = Reconnecting(self.stack.url_of("entry"), "entry")
        for each in (*self.all.each, self.entry):
            self._ending.callback(each.close)
        self.worker_urls = self.stack.worker_environment()["DATABASE_URL"].split()
        self.hits: list[tuple[str, float, float]] = []  # what was away, from when to when
        self.stays: dict[str, str] = {}  # users who do not move, and their cells
        return self

    def shorten(self) -> None:
        """Shorten lease, heartbeat and pauses, and lift the limits; have users in both cells."""
        super().shorten()
        arrived = "select 1 from private.plans where max_active < 1000000"
        eventually(lambda: self.all.execute(arrived) == [])
        eventually(lambda: len(self.all.execute("select 1 from private.budgets")) == len(CELLS))
        self.db.execute("call cells.share_limits()")
        while len(self.users) < USERS:
            cell = CELLS[len(self.users) % len(CELLS)]
            self.db.execute("update cells.cells set weight = (name = %s)::integer", cell)
            user = sign_up(self, len(self.users) // len(CELLS))
            self.users.append(user)
            if len(self.users) > USERS / 2:
                self.stays[user.id] = cell
        self.movers = [user for user in self.users if user.id not in self.stays]

    def restart_gateway(self) -> None:
        """Start anew what alone may not live through the loss of home."""
        with self._gateway_lock:
            self.stack.lite.stop()
            self.stack.lite.start(self.stack.database_url)

    @contextlib.contextmanager
    def without(self, name: str) -> Iterator[None]:
        """End a cell or the entry at once, as a machine that loses power, and start it again."""
        cluster, began = self.stack.clusters[name], time.monotonic()
        kill(cluster)
        try:
            yield
        finally:
            start(cluster)
            if name == "home":
                self.restart_gateway()
            self.note(name, began)

    def note(self, name: str, began: float) -> None:
        """Note what was killed, once PostgREST knows the entry again."""
        eventually(lambda: answers(f"{self.stack.entry.address()}/rpc/ping"), within=60)
        # Each connection of the entry to a cell that was away fails once, when it is used next.
        what, after = ("entry", 1) if name in ("entry", "PostgREST") else (name, 15)
        self.hits.append((what, began, time.monotonic() + after))
        self.done[f"{name} killed"] += 1

    def move(self, user: SignedUp, cell: str) -> None:
        """Move a user, however often that breaks off."""
        deadline = time.monotonic() + MOVED_WITHIN
        state = None
        while state != "moved":
            assert time.monotonic() < deadline, f"{user.id} is not moved to {cell}: {state}"
            try:
                with psycopg.connect(self.stack.database_url, autocommit=True) as home:
                    query = "call cells.move_user(%s, %s)"
                    ((state,),) = home.execute(query, [user.id, cell]).fetchall()
            except psycopg.Error as error:
                state = f"broken off: {error}"
            self.done[f"moves {state.split(':')[0]}"] += 1
            if state != "moved":
                time.sleep(0.05)

    def judge(self, accepted: Accepted) -> dict[str, list[str]]:
        """Return who lives in no cell or in two, and whom another cell's end has hurt."""
        has = {db.name: {row["user_id"] for row in db.execute(LIVING)} for db in self.all.each}
        eventually(lambda: self.db.execute(DIRECTORY) == self.entry.execute(DIRECTORY))
        says = {row["user_id"]: row["cell"] for row in self.db.execute(DIRECTORY)}
        lives = {user.id: [name for name in CELLS if user.id in has[name]] for user in self.users}
        return {
            "lives elsewhere": [
                f"{user_id}: has rows in {cells}, belongs to {says.get(user_id, 'home')}"
                for user_id, cells in lives.items()
                if cells != [says.get(user_id, "home")]
            ],
            "hurt by another": [
                f"{user_id} of {self.stays[user_id]}: {call['function']} {call['said']}"
                for user_id, call, began, ended in accepted.failed
                if user_id in self.stays
                and not any(
                    start < ended and began < end
                    for what, start, end in self.hits
                    if what in self.concerns(user_id, call)
                )
            ],
        }

    def concerns(self, user_id: str, call: dict[str, Any]) -> set[str]:
        """Return what a call cannot do without; home has the files."""
        source = {"home"} if "image" in call.get("params", {}) else set()
        return {"entry", self.stays[user_id]} | source


def kill(cluster: Cluster) -> None:
    """End a server and all its processes."""
    process = cluster._processes.get("postgres")
    assert process
    stats = [stat.read_text().rpartition(")") for stat in Path("/proc").glob("[0-9]*/stat")]
    children = [
        int(head.split()[0]) for head, _, rest in stats if rest.split()[1] == str(process.pid)
    ]
    for pid in (process.pid, *children):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while process.is_running():
        time.sleep(0.01)


def start(cluster: Cluster) -> None:
    """Start a server again; what is left of the last may need a moment to go."""

    def started() -> bool:
        with contextlib.suppress(StackError):
            cluster.start()
        return cluster.is_running()

    eventually(started, within=60)


@fault("cells", 0.2, 2)
def cell_killed(world: CellWorld, chance: random.Random) -> Iterator[None]:
    with world.without("two"):
        yield


@fault("cells", 0.2, 2)
def home_killed(world: CellWorld, chance: random.Random) -> Iterator[None]:
    with world.without("home"):
        yield


@fault("entry", 0, 1)
def entry_killed(world: CellWorld, chance: random.Random) -> Iterator[None]:
    with world.without("entry"):
        yield


@fault("entry", 0, 1)
def postgrest_killed(world: CellWorld, chance: random.Random) -> Iterator[None]:
    process, began = world.stack.entry._processes.get("postgrest"), time.monotonic()
    assert process
    os.kill(process.pid, signal.SIGKILL)
    yield
    world.stack.entry.start(world.stack.url_of("entry"))
    world.note("PostgREST", began)


@fault("moves", 0, 0.5)
def users_moved(world: CellWorld, chance: random.Random) -> Iterator[None]:
    for user in chance.sample(world.movers, 4):
        world.move(user, chance.choice(CELLS))
    yield


KINDS_OF_CELLS = ["cell_killed", "home_killed", "entry_killed", "postgrest_killed", "users_moved"]
CELLS_KILLED = Scenario(
    "Cells: two and an entry, killed; users move meanwhile",
    [
        *KINDS_OF_CELLS,
        "users_moved",
        "users_moved",
        "worker_killed",
        "all_workers_killed",
        "storage_misbehaving",
        "provider_misbehaving",
    ],
)
