"""All that runs in a chaos run: the local stack, real workers, and what stands between them.

    workers ──Proxy──► PostgreSQL ◄── PostgREST, Supabase Lite ◄── clients
       │  └──StorageProxy──────────────────┘
       └──► Provider (the fake Replicate)

Lease and pauses are shortened, so that thousands of jobs go through hundreds of faults in minutes.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import psycopg
import receiver
from chaos.proxy import Proxy
from database import Database
from fake_replicate import Behaviour, FakeReplicate, Request, refusal
from http_client import Endpoints, SignedUp
from receiver import Answer, HttpServer
from worker_process import WorkerProcess, Workers

from processes import StackError
from stack import Stack

LEASE_SECONDS = 6.0
RESTART_SECONDS = 1.0  # until a supervisor starts a dead worker again
LARGE_BYTES = 200_000  # of the provider's too large outputs
CLOCK = Path(__file__).resolve().parent / "clock"  # holds the sitecustomize.py that moves a clock
MARK = "a lighthouse of chaos"  # in every prompt, so that logs can be searched for prompts
PERIOD_CREDITS = 40
MODELS: dict[str, dict[str, Any]] = {  # with the params that are asked for
    "black-forest-labs/flux-schnell": {"num_outputs": 3},
    "black-forest-labs/flux-1.1-pro": {},
    "acme/seedless": {},
    "acme/edit": {},
}
MORE_MODELS = """
insert into public.models (
  id, provider, provider_ref, title, price_credits, paid_price_credits, client_inputs,
  image_inputs, input_schema, cost_usd, cost_unit
) values
('acme/seedless', 'replicate', 'acme/seedless', 'No seed', 3, 1, '{style}', '{}',
 '{"properties": {"prompt": {"type": "string"}, "style": {"type": "string"}}}', 0.04, 'image'),
('acme/edit', 'replicate', 'acme/edit:' || repeat('e', 64), 'Image to image', 2, 1, '{image,seed}',
 '{image}', '{"properties": {"prompt": {"type": "string"}, "image": {"type": "string"},
 "seed": {"type": "integer"}}}', 0.001, 'second')
"""
SHORT = f"""
update private.settings set
  lease = '{LEASE_SECONDS} seconds', heartbeat = '1.5 seconds',
  retry_base = '1 second', retry_cap = '5 seconds',
  breaker_pause = '2 seconds', breaker_pause_cap = '4 seconds';
update public.models set
  is_active = true, deadline = '30 seconds', cost_usd = 0.01, cost_unit = 'image';
insert into private.budgets (period, limit_usd) values ('month', 1000);
insert into public.credit_products (provider, product_id, credits, rollover_cap, grace)
values ('revenuecat', 'monthly', {PERIOD_CREDITS}, 10, '0');
update private.plans set max_active = 1000000, max_per_minute = 1000000,
  max_burned_per_day = 1000000, busy_after = null
"""
WORKER = {
    "WORKER_SLOTS": "6",
    "WORKER_GRACE_SECONDS": "2",
    "WORKER_POLL_SECONDS": "1",
    "MAX_IMAGE_BYTES": str(LARGE_BYTES // 2),
    "IMAGE_PREVIEW_PIXELS": "32",
    "LOG_LEVEL": "INFO",
}


class Reconnecting(Database):
    """The database as its superuser; connects again after each restart of the server."""

    def execute(self, query: str, *arguments: Any) -> list[dict[str, Any]]:
        """Run one statement, once the server answers. It may run twice."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return super().execute(query, *arguments)
            except psycopg.OperationalError:
                self._own = None
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)


class Provider(FakeReplicate):
    """The fake, which may also be out of order: then it answers everything so, and does nothing."""

    outage: int | str | None = ""  # a status, or None to hang up

    def route(self, request: Request) -> Answer:
        is_in_order = self.outage == ""
        return super().route(request) if is_in_order else refusal(Behaviour(answer=self.outage))


class StorageProxy(HttpServer):
    """Stands in front of the real Storage and is as bad as its behaviour says."""

    BEHAVIOURS = ("refuses", "slow", "lost", "late error")
    DROPPED = ("host", "content-length", "transfer-encoding", "connection")

    def __init__(self, http: httpx.Client, target: str) -> None:
        super().__init__()
        self.http, self.target, self.behaviour = http, target, ""

    def respond(self, request: receiver.Request) -> Answer:
        behaviour = self.behaviour
        if behaviour == "refuses":
            return Answer(random.choice([500, 502, 503, 429]), body=b"try later")
        wait = random.uniform(0.5, 3) if behaviour == "slow" else 0
        headers = {k: value for k, value in request.headers.items() if k not in self.DROPPED}
        try:
            response = self.http.request(
                request.method, self.target + request.path, content=request.body, headers=headers
            )
        except httpx.TransportError:
            return Answer(502, body=b"no Storage")
        if behaviour in ("lost", "late error"):  # and it was done
            return Answer(None if behaviour == "lost" else 504)
        kind = {"Content-Type": response.headers.get("content-type")}
        return Answer(response.status_code, kind, response.content, wait=wait)


class Fleet(Workers):
    """Workers under a supervisor that starts again whatever ends, as systemd does."""

    def __init__(self, world: World, provider: Provider, size: int) -> None:
        super().__init__(world.db, world.stack, world.folder)
        self.world = world
        address = urlsplit(self.environment["DATABASE_URL"])
        netloc = f"{address.netloc.rpartition(':')[0]}:{world.proxy.port}"
        self.environment |= WORKER | {
            "DATABASE_URL": address._replace(netloc=netloc).geturl(),
            "SUPABASE_URL": world.storage.origin,
            "REPLICATE_API_TOKEN": provider.token,
        }
        world.db.runs_at("replicate", provider.url, settle="6 seconds")
        self.clock = world.folder / "clock"
        self.clock.write_text("0")
        self.extra_secrets = {MARK, provider.token}
        self.restarts = 0  # of workers that ended by themselves
        self.slots: list[WorkerProcess] = []
        self._locks = [threading.RLock() for _ in range(size)]
        self._closing = threading.Event()
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)

    def __enter__(self) -> Fleet:
        self.slots = [self._launch(number) for number in range(len(self._locks))]
        self._supervisor.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._supervisor.join(10)
        for process in self.slots:
            process.kill()

    def _launch(self, number: int) -> WorkerProcess:
        """Start the worker of a slot; the clock of the first can be moved."""
        clock = {"PYTHONPATH": CLOCK, "CHAOS_CLOCK": self.clock} if number == 0 else {}
        return self.launch(**clock, **self.serving(number))

    def serving(self, number: int) -> dict[str, str]:
        """Return what a worker is told beside what all are."""
        return {}

    @contextlib.contextmanager
    def held(self, number: int) -> Iterator[WorkerProcess]:
        """Keep the supervisor off a worker; afterwards it is started again if it has ended."""
        number %= len(self.slots)
        with self._locks[number]:
            try:
                yield self.slots[number]
            finally:
                if not self.slots[number].is_running() and not self._closing.is_set():
                    self.slots[number] = self._launch(number)

    def _supervise(self) -> None:
        while not self._closing.wait(0.2):
            for number, lock in enumerate(self._locks):
                if not lock.acquire(blocking=False):
                    continue
                try:
                    if not self.slots[number].is_running():
                        self.restarts += 1
                        self._closing.wait(RESTART_SECONDS)
                        self.slots[number] = self._launch(number)
                finally:
                    lock.release()

    def stop_all(self) -> None:
        """Ask all to stop, and wait for it."""
        self._closing.set()
        self._supervisor.join(10)
        for process in self.slots:
            process.stop(within=60)

    def secrets(self) -> set[str]:
        """Return what must never be in a log; all prompts hold the mark."""
        password = urlsplit(self.environment["DATABASE_URL"]).password or ""
        keys = {self.stack.service_role_key, self.stack.jwt_secret, password}
        return keys | self.extra_secrets


class Databases:
    """What all of them have: the rows of one after the other."""

    def __init__(self, *each: Database) -> None:
        self.each = each

    def execute(self, query: str, *arguments: Any) -> list[dict[str, Any]]:
        return [row for db in self.each for row in db.execute(query, *arguments)]


class World:
    """A stack in a temporary folder, with proxies in front of it; all of it is gone afterwards."""

    provider: Provider
    fleet: Fleet
    fleet_of = Fleet

    def __init__(self, *, fsync: bool = True) -> None:
        self._ending = contextlib.ExitStack()
        folder = self._ending.enter_context(tempfile.TemporaryDirectory(prefix="darkroom-chaos-"))
        self.folder = Path(folder)
        self.folder.chmod(0o711)  # PostgreSQL's user passes through
        (self.folder / "stack").mkdir()
        self.stack = self.make_stack(fsync)
        self.done = Counter[str]()  # of faults, what else is worth telling
        self._gateway_lock = threading.RLock()
        self._closing = threading.Event()
        self.users: list[SignedUp] = []

    def make_stack(self, fsync: bool) -> Stack:
        stack = Stack(self.folder / "stack", fsync=fsync)
        stack.cluster.tuning = {"max_connections": "80"}
        return stack

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as starting:
            starting.callback(self.stack.clean)
            self.stack.up()
            self.db = Reconnecting(self.stack.database_url, "postgres")
            starting.callback(self.db.close)
            self.all = Databases(self.db)
            port = self.stack.settings.port("DATABASE_PORT")
            self.proxy = starting.enter_context(Proxy(lambda: ("127.0.0.1", port)))
            limits, api = httpx.Limits(max_connections=None), self.stack.api_url
            http = starting.enter_context(httpx.Client(timeout=10, limits=limits))
            self.storage = starting.enter_context(StorageProxy(http, api))
            self.endpoints = Endpoints(
                http, f"{api}/auth/v1", f"{api}/rest/v1", f"{api}/storage/v1"
            )
            self.db.execute(MORE_MODELS)
            watch = threading.Thread(target=self._watch_gateway, daemon=True)
            starting.callback(watch.join)
            starting.callback(self._closing.set)
            watch.start()
            self._ending.push(starting.pop_all())
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.close()

    def shorten(self) -> None:
        """Shorten lease, heartbeat and pauses, and lift the limits."""
        for statement in SHORT.split(";\n"):
            self.db.execute(statement)

    def restart_gateway(self) -> None:
        """Start Supabase Lite anew.

        It never answers a request whose connection to the database died under it, and after a few
        of these it answers nothing any more.
        """
        with self._gateway_lock:
            self.stack.stop_http()
            self.stack.start_http()

    def _watch_gateway(self) -> None:
        """Do so as an orchestrator would: when it has not answered three times."""
        silent = 0
        while not self._closing.wait(1):
            try:
                with self._gateway_lock:
                    for url in (self.stack.lite.address(), self.stack.api_url):
                        httpx.get(f"{url}/storage/v1/bucket", timeout=5)
                silent = 0
            except httpx.TransportError:
                silent += 1
            if silent >= 3:
                with contextlib.suppress(StackError, psycopg.Error):  # it may be down: next time
                    self.restart_gateway()
                silent = 0

    def judge(self, accepted: Any) -> dict[str, list[str]]:
        """Return what breaks rules of this world's own."""
        return {}

    @contextlib.contextmanager
    def working(self, workers: int) -> Iterator[Fleet]:
        """Have a provider without a past, and workers that use it."""
        with Provider() as self.provider, self.fleet_of(self, self.provider, workers) as self.fleet:
            self.provider.large_bytes = LARGE_BYTES
            yield self.fleet
