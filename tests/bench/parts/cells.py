"""What an entry before cells costs a call, and whose CPU it is."""

from __future__ import annotations

import contextlib
import functools
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import darkroom
from core import Part, Sizes, Task, percentiles
from database import Database, seconds_of_a_core
from lab import Lab
from worker_process import eventually

from cells import CellStack
from parts.http import PICTURE, load, requests_of

USERS = 2_000  # of each cell
FIRST = {"home": 20_000, "two": 30_000}
HISTORY, SHARED = 30, 400  # pictures of each user, of each cell
SECONDS, QUICK_SECONDS, WARM_SECONDS = 2, 1, 0.5
RATE, P50, P99 = "requests/s", "p50 ms", "p99 ms"
PARTIES = ("PostgREST", "entry", "cells", "WAL senders")
DIRECT = "direct to home"
WAYS = {DIRECT: "home", "entry, user of home": "home", "entry, user of two": "two"}
CALLS: dict[str, dict[str, Any]] = {
    "enqueue_generation": PICTURE,
    "get_job_status": {},
    "ping": {},
    "list_generations": {},
    "list_public_images": {},
}
MANY = """
insert into auth.users (id) select ('{user_id}' || n)::uuid from generate_series({first}, {last}) n;
select public.set_paid(e.user_id, 'infinity'),
  public.grant_credits(e.user_id, 1000000, 'adjust', e.user_id::text)
from public.entitlements as e where e.user_id::text like '{user_id}%'
"""
THERE = """
insert into cells.users (user_id, cell)
select ('{user_id}' || n)::uuid, 'two' from generate_series({first}, {last}) n
"""
# One job of each user, and pictures in the feed.
JOBS = """
select
  set_config('request.jwt.claims', json_build_object('sub', e.user_id)::text, false),
  public.enqueue_generation('darkroom/preview', 'a harbour')
from public.entitlements as e where e.user_id::text like '{user_id}%' order by e.user_id
"""
SHARE = """
select
  set_config('request.jwt.claims', json_build_object('sub', g.user_id)::text, false),
  public.share_image(g.id)
from public.generations as g where g.status = 'completed' limit {shared}
"""


@dataclass(frozen=True)
class Site:
    """Two cells and an entry, with users in both."""

    lab: Lab
    stack: CellStack
    cells: dict[str, Database]

    def address(self, way: str) -> str:
        rest = self.stack.postgrest if way == DIRECT else self.stack.entry
        assert rest
        return rest.address()

    def cpu(self) -> Counter[str]:
        """Return the seconds of CPU that each has used."""
        used = Counter[str]()
        for name, cluster in self.stack.clusters.items():
            process = cluster._processes.get("postgres")
            assert process
            party = "entry" if name == "entry" else "cells"
            used[party] += seconds_of_the_dead(process.pid)
            for pid in (process.pid, *children(process.pid)):
                with contextlib.suppress(OSError):  # it has just ended
                    title = Path(f"/proc/{pid}/cmdline").read_text()
                    sends = title.startswith("postgres: walsender")
                    used["WAL senders" if sends else party] += seconds_of_a_core(pid)
        for rest in (self.stack.postgrest, self.stack.entry):
            assert rest
            process = rest._processes.get("postgrest")
            assert process
            used["PostgREST"] += seconds_of_a_core(process.pid)
        return used


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            head, _, rest = stat.read_text().rpartition(")")
            found += [int(head.split()[0])] * (rest.split()[1] == str(parent))
    return found


def seconds_of_the_dead(pid: int) -> float:
    """Return what the ended children of a process have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")


def make_tasks(lab: Lab, sizes: Sizes) -> list[Task]:
    seconds = sizes.pick(SECONDS, QUICK_SECONDS)
    site = functools.cache(functools.partial(open_site, lab))
    return [
        Task(
            f"{call}, {connections} connection{'s' if connections > 1 else ''}",
            way,
            functools.partial(measure, site, way, call, connections, seconds),
        )
        for call in CALLS
        for connections in (1, 8)
        for way in WAYS
    ]


def open_site(lab: Lab) -> Site:
    """Start the stack, with users, a finished job of each, and some of them shared."""
    stack = CellStack(lab.folder / "cells")
    lab.part_end.callback(stack.clean)
    stack.up()
    cells = {name: Database(stack.url_of(name), name) for name in FIRST}
    home = cells["home"]
    home.execute(f"{darkroom.LIMITS}, max_active = 1000000")
    for name, db in cells.items():
        lab.part_end.callback(db.close)
        darkroom.let_workers_in(db)
        place = {"user_id": darkroom.USER_ID, "first": FIRST[name], "last": FIRST[name] + USERS - 1}
        if name != "home":
            home.execute(THERE.format(**place))
        db.execute("set statement_timeout = 0")
        until = "select count(*) from private.plans where busy_after is not null"
        eventually(lambda db=db, until=until: db.value(until) == 0)
        for statement in (MANY.format(**place), JOBS.format(**place)):
            for each in statement.split(";\n"):
                db.execute(each)
        darkroom.work_off(db)
        darkroom.add_history(db, HISTORY * USERS)
        db.execute(SHARE.format(shared=SHARED))
        db.execute(JOBS.format(**place))  # one to look at
        db.execute("vacuum analyze")
    site = Site(lab, stack, cells)
    for way in WAYS:
        send(site, way, "ping", 8, 3)
    return site


def measure(
    site: Callable[[], Site], way: str, call: str, connections: int, seconds: int
) -> dict[str, float]:
    """Make a call again and again over so many connections, then complete all jobs but those that
    others look at.
    """
    opened = site()
    send(opened, way, call, connections, WARM_SECONDS)
    before = opened.cpu()
    report = send(opened, way, call, connections, seconds)
    used = opened.cpu()
    if call == "enqueue_generation":
        darkroom.work_off(opened.cells[WAYS[way]], USERS)
    calls = len(report["milliseconds"])
    p50, p99 = percentiles(report["milliseconds"], 50, 99)
    cpu = {f"CPU ms, {each}": 1000 * (used[each] - before[each]) / calls for each in PARTIES}
    return {RATE: calls / report["seconds"], P50: p50, P99: p99, **cpu}


def send(site: Site, way: str, call: str, connections: int, seconds: float) -> dict[str, Any]:
    """Send requests over so many connections, each of another user."""
    query = (
        "select e.user_id::text, (select max(g.id::text) from public.generations as g"
        "   where g.user_id = e.user_id) as job_id"
        " from public.entitlements as e where e.user_id::text like %s order by 1"
    )
    asked = [
        (row["user_id"], {"job_id": row["job_id"]} if call == "get_job_status" else CALLS[call])
        for row in site.cells[WAYS[way]].execute(query, f"{darkroom.USER_ID}%")
    ]
    url = f"{site.address(way)}/rpc/{call}"
    requests = requests_of(url, site.stack.jwt_secret, asked)
    return load(site.lab, url, requests, connections, warm_seconds=0, seconds=seconds)


PART = Part(
    name="cells",
    title="Cells",
    about=(
        "Calls of users through PostgREST: direct to home, and through the entry to either of two"
        " cells, one request after the other over each kept connection, every request of another"
        f" user, who has {HISTORY} pictures. All of it is on one machine, so the rates tell little:"
        " what counts is the CPU that a call takes, read from /proc, of PostgREST, of the entry, of"
        " the cells, and of home's processes that send its WAL to the others. list_public_images"
        " asks both cells. What machines of their own carry is calculated from it:"
        " `python tests/bench/cells_model.py`."
    ),
    metric=RATE,
    reference=DIRECT,
    make_tasks=make_tasks,
    turns=2,
)
