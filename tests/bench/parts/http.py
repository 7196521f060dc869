"""What the calls of an app cost over HTTP, in calls of a function that does nothing."""

from __future__ import annotations

import functools
import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import darkroom
import httpx
import stack_choice
from core import Part, Sizes, Task, percentiles
from database import Database
from http_client import PREVIEW, Endpoints, SignedUp, answer
from http_fixtures import LITE, POSTGREST, start_postgrest
from lab import CONTENDERS, Lab

from stack import Stack

CONNECTIONS = (1, 8)
SECONDS, QUICK_SECONDS, WARM_SECONDS = 2, 1, 0.5
WARM_UP_SECONDS = 5  # of a gateway that has just started
BATCH = 100
RATE, P50, P99 = "requests/s", "p50 ms", "p99 ms"
CLIENT = "client's CPU, % of a core"
EMPTY, QUEUED = "an empty function", "Darkroom, get_job_status, queued"
NOTHING = """
create function public.bench_nothing() returns json language sql stable set search_path = ''
as $$ select '{}'::json $$;
grant execute on function public.bench_nothing() to authenticated;
"""

Request = tuple[str, dict[str, Any]]  # function and arguments


@dataclass
class Site:
    """The gateways, in front of a database with users."""

    lab: Lab
    db: Database
    users: list[SignedUp]
    gateways: dict[str, str]  # where functions and tables are, by name
    finished: dict[str, str] = field(default_factory=dict)  # a job of each user, by user

    def fill_queue(self) -> dict[str, str]:
        """Let others queue jobs, and then each user one, by user."""
        crowd, prompts = self.users[0], [darkroom.PROMPT] * BATCH
        while darkroom.queued(self.db) < darkroom.BEFORE:
            answer(crowd.rpc("enqueue_batch", model=PREVIEW, prompts=prompts))
        return {user.id: user.enqueued() for user in self.users}


CALLS: dict[str, Callable[[Site], Callable[[SignedUp], Request]]] = {
    EMPTY: lambda site: lambda user: ("bench_nothing", {}),
    "Darkroom, ping": lambda site: lambda user: ("ping", {}),
    "Darkroom, get_job_status, finished": lambda site: look_at(site.finished),
    QUEUED: lambda site: look_at(site.fill_queue()),
    "Darkroom, enqueue_generation": lambda site: enqueue,
}


def look_at(jobs: dict[str, str]) -> Callable[[SignedUp], Request]:
    """Have users ask for their job."""
    return lambda user: ("get_job_status", {"job_id": jobs[user.id]})


def enqueue(user: SignedUp) -> Request:
    """Have users ask for a picture."""
    params = {"width": 512}
    return "enqueue_generation", {"model": PREVIEW, "prompt": darkroom.PROMPT, "params": params}


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
    lab.part_end.callback(stack.gateway.stop)
    stack.up()
    db = Database(stack.database_url, "postgres")
    lab.part_end.callback(db.close)
    darkroom.let_workers_in(db)
    darkroom.run_script(db, darkroom.NO_LIMITS)
    db.execute(NOTHING)
    stack.gateway.stop()  # it reads the list of functions once, at its start
    stack.gateway.start(stack.database_url)
    gateways = {LITE: f"{stack.api_url}/rest/v1"}
    if BINARY:
        process, gateways[POSTGREST] = start_postgrest(BINARY, stack, db)
        lab.part_end.callback(process.stop, signal.SIGTERM, 10)
    http = httpx.Client(timeout=30)
    lab.part_end.callback(http.close)
    endpoints = Endpoints(http, f"{stack.api_url}/auth/v1", gateways[LITE], "")
    site = Site(lab, db, [SignedUp(endpoints) for _ in range(max(CONNECTIONS))], gateways)
    populate(site)
    for gateway in gateways:
        send(site, gateway, CALLS[EMPTY](site), max(CONNECTIONS), WARM_UP_SECONDS)
    return site


def populate(site: Site) -> None:
    """Give the users credits, and a finished job each."""
    for user in site.users:
        query = "select public.grant_credits(%s, %s, 'adjust', 'bench-' || %s)"
        site.db.execute(query, user.id, darkroom.CREDITS, user.id)
        site.finished[user.id] = user.enqueued()
    darkroom.work_off(site.db)


def measure(
    site: Callable[[], Site], gateway: str, call: str, connections: int, seconds: int
) -> dict[str, float]:
    """Make a call again and again over so many connections, then complete all jobs."""
    opened = site()
    report = send(opened, gateway, CALLS[call](opened), connections, seconds)
    darkroom.work_off(opened.db)
    p50, p99 = percentiles(report["milliseconds"], 50, 99)
    return {
        RATE: len(report["milliseconds"]) / report["seconds"],
        P50: p50,
        P99: p99,
        CLIENT: 100 * report["cpu_seconds"] / report["seconds"],
    }


def send(
    site: Site,
    gateway: str,
    request: Callable[[SignedUp], Request],
    connections: int,
    seconds: int,
) -> dict[str, Any]:
    """Send requests over so many connections, each with a user of its own."""
    url = urlsplit(site.gateways[gateway])
    options = {
        "host": url.hostname,
        "port": url.port,
        "requests": [
            text_of(url.path, url.netloc, str(user.token), *request(user))
            for user in site.users[:connections]
        ],
        "warm_seconds": WARM_SECONDS,
        "seconds": seconds,
    }
    program = [sys.executable, str(CONTENDERS / "load_http.py"), json.dumps(options)]
    return dict(json.loads(site.lab.run(program)))


def text_of(path: str, host: str, token: str, function: str, arguments: dict[str, Any]) -> str:
    """Write a request as it is sent."""
    body = json.dumps(arguments)
    return (
        f"POST {path}/rpc/{function} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )


BINARY = stack_choice.postgrest_binary()
PART = Part(
    name="http",
    title="HTTP",
    about=(
        "The calls of an app as users who have signed up, one request after the other over each"
        " kept connection, every connection with a user of its own. The client is one process that"
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
