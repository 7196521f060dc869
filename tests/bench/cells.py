"""What the entry costs: calls direct to a cell and through the entry, in turn, in one run.

    python tests/bench/cells.py [rounds] [calls]      # with the stack of scripts/cells.py up

Each call is a transaction as PostgREST makes it: role and claims, then the function. CPU is that of
the server processes, from /proc, so what the entry does and what the cells do are told apart.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import psycopg

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT / "scripts"))
from cells import CellStack  # noqa: E402

ENQUEUE = "select public.enqueue_generation(model => 'darkroom/preview', prompt => 'a harbour')"
STATUS = "select public.get_job_status(%s)"
PREPARE = (
    "select set_config('role', 'authenticated', true), set_config('request.method', 'POST', true),"
    " set_config('request.jwt.claims', %s, true)"
)


class Caller:
    def __init__(self, url: str, user_id: str) -> None:
        self.connection = psycopg.connect(url)
        self.claims = json.dumps({"sub": user_id, "role": "authenticated"})
        self.job_id = ""

    def call(self, query: str, *arguments: Any) -> Any:
        with self.connection.transaction():
            self.connection.execute(PREPARE, [self.claims])
            return self.connection.execute(query, arguments).fetchone()[0]

    def timed(self, query: str, calls: int, *arguments: Any) -> list[float]:
        times = []
        for _ in range(calls):
            began = time.perf_counter()
            self.call(query, *arguments)
            times.append((time.perf_counter() - began) * 1000)
        return times


def cpu(stack: CellStack, name: str) -> float:
    """Seconds of CPU that a cluster's processes have used, those that ended included."""
    parent = stack.clusters[name]._processes.get("postgres").pid
    total = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(stat.parent.name) == parent:
            total += sum(map(int, fields[11:15]))
        elif int(fields[1]) == parent:
            total += sum(map(int, fields[11:13]))
    return total / os.sysconf("SC_CLK_TCK")


def main() -> None:
    rounds, calls = (int(word) for word in (*sys.argv[1:], "7", "300")[:2])
    stack = CellStack(os.environ.get("DARKROOM_STATE", PROJECT / ".local-cells"))
    home = psycopg.connect(stack.database_url, autocommit=True)
    home.execute("update private.plans set max_active = 1e9, max_per_minute = 1e9")
    users = {}
    for cell in ("home", "two"):
        home.execute("update cells.cells set weight = (name = %s)::integer", [cell])
        users[cell] = [str(uuid.uuid4()) for _ in range(8)]
        for user in users[cell]:
            home.execute(
                "insert into auth.users (id, email) values (%s, %s)",
                [user, f"{user}@x.y"],
            )
    home.execute("update cells.cells set weight = 1")
    time.sleep(1)
    for cell in ("home", "two"):
        with psycopg.connect(stack.url_of(cell), autocommit=True) as db:
            for user in users[cell]:
                db.execute("select public.grant_credits(%s, 10000000, 'grant', %s)", [user, user])
    ways = {
        "direct, home": ("home", "home"),
        "direct, two": ("two", "two"),
        "entry, home": ("entry", "home"),
        "entry, two": ("entry", "two"),
    }
    callers = {way: Caller(stack.url_of(at), users[cell][0]) for way, (at, cell) in ways.items()}
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for way, caller in callers.items():
            caller.job_id = caller.call(ENQUEUE)["job_id"]
            for what, query, arguments in (
                ("enqueue", ENQUEUE, []),
                ("status", STATUS, [caller.job_id]),
                ("ping", "select public.ping()", []),
            ):
                took = caller.timed(query, calls, *arguments)
                if number:  # the first is to warm up
                    times.setdefault((what, way), []).extend(took)
    print(f"p50 ms (p95) of {rounds} x {calls} calls, one after the other")
    for (what, way), took in sorted(times.items()):
        p95 = statistics.quantiles(took, n=20)[-1]
        print(f"  {what:8} {way:14} {statistics.median(took):6.2f} ({p95:.2f})")
    saturate(stack, users, ways, seconds=4)


def saturate(
    stack: CellStack, users: dict[str, list[str]], ways: dict[str, tuple[str, str]], seconds: float
) -> None:
    """Eight clients at once, half of them of each cell: calls a second, and whose CPU it was."""
    print("8 clients at once, enqueue: calls/s, and ms of CPU for each call")
    for _ in range(3):
        for way in ("direct", "entry"):
            names = ("home", "two", "entry")
            before = {name: cpu(stack, name) for name in names}
            counts: list[int] = []
            end = time.monotonic() + seconds

            def run(way: str, cell: str, user: str, end: float, counts: list[int]) -> None:
                caller = Caller(stack.url_of(cell if way == "direct" else "entry"), user)
                done = 0
                while time.monotonic() < end:
                    caller.call(ENQUEUE)
                    done += 1
                counts.append(done)

            threads = [
                threading.Thread(target=run, args=(way, cell, users[cell][n], end, counts))
                for cell in ("home", "two")
                for n in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            total = sum(counts)
            used = {n: 1000 * (cpu(stack, n) - before[n]) / total for n in names}
            said = ", ".join(f"{name} {ms:.2f}" for name, ms in used.items())
            print(f"  {way:8} {total / seconds:7.0f}   {said}")


if __name__ == "__main__":
    main()
