"""What the calls of an app cost over HTTP, in calls of a function that does nothing."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import darkroom
from core import Part, Sizes, Task, percentiles
from database import Database
from lab import CONTENDERS, Lab

from stack import Stack, postgrest, sign_jwt

CONNECTIONS = (1, 8)
SECONDS, QUICK_SECONDS, WARM_SECONDS = 2, 1, 0.5
WARM_UP_SECONDS = 5  # of a gateway that has just started
RATE, P50, P99 = "requests/s", "p50 ms", "p99 ms"
CLIENT = "client's CPU, % of a core"
EMPTY = "an empty function"
NOTHING = """
create function public.bench_nothing() returns json language sql stable set search_path = ''
as $$ select '{}'::json $$;
grant execute on function public.bench_nothing() to authenticated;
"""
# Who asks, each in turn, and for which job.
USERS = (
    "select user_id, null as job_id from public.entitlements"
    f" where user_id::text like '{darkroom.USER_ID}%' limit 2000"
)
FINISHED = "select user_id, id as job_id from public.generations where finished_at is not null"
QUEUED = (
    "select user_id, job_id from private.ready_jobs order by fair_key, seq"
    f" offset {darkroom.BEFORE}"
)
PICTURE = {"model": "darkroom/preview", "prompt": darkroom.PROMPT, "params": {"width": 512}}
CALLS: dict[str, tuple[str, str, dict[str, Any]]] = {
    EMPTY: ("bench_nothing", USERS, {}),
    "Darkroom, ping": ("ping", USERS, {}),
    "Darkroom, get_job_status, finished": ("get_job_status", FINISHED, {}),
    "Darkroom, get_job_status, queued": ("get_job_status", QUEUED, {}),
    "Darkroom, enqueue_generation": ("enqueue_generation", USERS, PICTURE),
}
LITE, POSTGREST = "Supabase Lite", "PostgREST"
BINARY = postgrest()


@dataclass(frozen=True)
class Site:
    """The gateways, in front of a database with users."""

    lab: Lab
    db: Database
    gateways: dict[str, str]  # where functions and tables are, by name
    jwt_secret: str


def make_tasks(lab: Lab, sizes: Sizes) -> list[Task]:
    seconds = sizes.pick(SECONDS, QUICK_SECONDS)
    site = functools.cache(functools.partial(open_site, lab))
    return [
        Task(
            f"{connections} connection{'s' if connections > 1 else ''}, {gateway}",
            call,
            functools.partial(measure, site, gateway, call, connections, seconds),
        )
        for gateway in ((LITE, POSTGREST) if BINARY else (LITE,))
        for connections in CONNECTIONS
        for call in CALLS
    ]


def open_site(lab: Lab) -> Site:
    """Start the gateways; they stop when the part ends."""
    stack = Stack(lab.folder)  # its cluster is the one that runs already
    lab.part_end.callback(stack.stop_http)
    stack.up()
    db = Database(stack.database_url, "postgres")
    lab.part_end.callback(db.close)
    darkroom.let_workers_in(db)
    darkroom.run_script(db, darkroom.SETUP)
    db.execute(NOTHING)
    darkroom.fill(db, darkroom.QUEUE)
    darkroom.work_off(db)
    stack.stop_http()  # Lite reads the list of functions once, at its start
    stack.start_http()
    gateways = {LITE: f"{stack.lite.address()}/rest/v1"}
    if stack.postgrest:
        gateways[POSTGREST] = stack.postgrest.address()
    site = Site(lab, db, gateways, stack.jwt_secret)
    for gateway in gateways:
        send(site, gateway, EMPTY, max(CONNECTIONS), WARM_UP_SECONDS)
    return site


def measure(
    site: Callable[[], Site], gateway: str, call: str, connections: int, seconds: int
) -> dict[str, float]:
    """Make a call again and again over so many connections, then complete all jobs."""
    opened = site()
    darkroom.fill(opened.db, darkroom.QUEUE)
    report = send(opened, gateway, call, connections, seconds)
    darkroom.work_off(opened.db)
    p50, p99 = percentiles(report["milliseconds"], 50, 99)
    return {
        RATE: len(report["milliseconds"]) / report["seconds"],
        P50: p50,
        P99: p99,
        CLIENT: 100 * report["cpu_seconds"] / report["seconds"],
    }


def send(site: Site, gateway: str, call: str, connections: int, seconds: int) -> dict[str, Any]:
    """Send requests over so many connections, each of another user."""
    function, who, arguments = CALLS[call]
    asked = [
        (row["user_id"], arguments | ({"job_id": str(row["job_id"])} if row["job_id"] else {}))
        for row in site.db.execute(who)
    ]
    url = f"{site.gateways[gateway]}/rpc/{function}"
    requests = requests_of(url, site.jwt_secret, asked)
    return load(site.lab, url, requests, connections, warm_seconds=WARM_SECONDS, seconds=seconds)


def requests_of(url: str, jwt_secret: str, asked: list[tuple[object, dict[str, Any]]]) -> list[str]:
    """Return requests to a function, each with a user's id and the arguments."""
    parts, requests = urlsplit(url), []
    for user_id, arguments in asked:
        claims = {"sub": str(user_id), "role": "authenticated", "exp": 4_102_444_800}
        body = json.dumps(arguments)
        requests.append(
            f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Authorization: Bearer {sign_jwt(jwt_secret, claims)}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        )
    return requests


def load(
    lab: Lab, url: str, requests: list[str], connections: int, **times: float
) -> dict[str, Any]:
    """Send them over so many connections: warm_seconds, then seconds, of which it reports."""
    options = {
        **{"host": urlsplit(url).hostname, "port": urlsplit(url).port},
        "requests": [requests[n::connections] for n in range(connections)],
        **times,
    }
    file = lab.folder / "requests.json"
    file.write_text(json.dumps(options))
    program = [sys.executable, str(CONTENDERS / "load_http.py"), str(file)]
    return dict(json.loads(lab.run(program)))


PART = Part(
    name="http",
    title="HTTP",
    about=(
        "The calls of an app as users who have signed up, one request after the other over each"
        " kept connection, every request of another user. The client is one process that"
        f" does little beside; a queued job has {darkroom.BEFORE} before it. An empty function"
        " answers {}: what the gateway itself takes. Targets: 0.5 of it for enqueue_generation, 0.8"
        " for get_job_status."
    ),
    metric=RATE,
    reference=EMPTY,
    make_tasks=make_tasks,
    turns=4,
    notes=() if BINARY else ("PostgREST is not measured: there is none for this machine",),
)
