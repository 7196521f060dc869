"""All that runs in a chaos run: the local stack, real workers, and what stands between them.

    workers ──Proxy──► PostgreSQL ◄── Supabase Lite ◄── clients
       │  └──StorageProxy──────────────────┘
       └──► Provider (the fake Replicate)

Lease and pauses are shortened, so that thousands of jobs go through hundreds of faults in minutes.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
from chaos.proxy import Proxy
from chaos.storage import StorageProxy
from database import Database
from fake_replicate import Answer, Behaviour, FakeReplicate, Request, refusal
from http_client import Endpoints, SignedUp
from misbehaviour import MORE_MODELS
from worker_process import WorkerProcess, Workers

from processes import StackError
from stack import Stack

LEASE_SECONDS, HEARTBEAT_SECONDS = 6.0, 1.5
RESTART_SECONDS = 1.0  # until a supervisor starts a dead worker again
MAX_CONNECTIONS = 80
LARGE_BYTES = 200_000  # of the provider's too large outputs
CLOCK = Path(__file__).resolve().parent / "clock"  # holds the sitecustomize.py that moves a clock
MARK = "a lighthouse of chaos"  # in every prompt, so that logs can be searched for prompts
SHORT = f"""
update private.settings set
  lease = '{LEASE_SECONDS} seconds', heartbeat = '{HEARTBEAT_SECONDS} seconds',
  retry_base = '1 second', retry_cap = '5 seconds',
  breaker_pause = '2 seconds', breaker_pause_cap = '4 seconds';
update public.models set is_active = true, deadline = '30 seconds';
update private.plans set max_active = 1000000, max_per_minute = 1000000,
  max_burned_per_day = 1000000, busy_after = null;
"""
WORKER = {
    "WORKER_SLOTS": "6",
    "WORKER_GRACE_SECONDS": "2",
    "WORKER_POLL_SECONDS": "1",
    "REPLICATE_SETTLE_SECONDS": "6",
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
    """The fake, which may also be out of order as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.large_bytes = LARGE_BYTES
        self._creates = itertools.count()
        self.outage: int | str | None = ""  # a status, or None to hang up
        self.is_forbidding = False  # every other create

    def _route(self, request: Request) -> Answer:
        is_create = (request.method, request.path) == ("POST", "/v1/predictions")
        if self.is_forbidding and is_create and next(self._creates) % 2:
            return refusal(Behaviour(answer=403))
        if self.outage != "":
            return refusal(Behaviour(answer=self.outage))
        return super()._route(request)

    @contextlib.contextmanager
    def out_of_order(self, answer: int | None) -> Iterator[None]:
        """Answer everything so, and do nothing, for a while."""
        self.outage = answer
        try:
            yield
        finally:
            self.outage = ""


class Fleet(Workers):
    """Workers under a supervisor that starts again whatever ends, as systemd does."""

    def __init__(self, world: World, provider: Provider, size: int) -> None:
        super().__init__(world.db, world.stack, world.folder)
        address = urlsplit(self.environment["DATABASE_URL"])
        netloc = f"{address.netloc.rpartition(':')[0]}:{world.proxy.port}"
        self.environment |= WORKER | {
            "DATABASE_URL": address._replace(netloc=netloc).geturl(),
            "SUPABASE_URL": world.storage.url,
            "REPLICATE_API_URL": provider.url,
            "REPLICATE_API_TOKEN": provider.token,
        }
        self.clock = world.folder / "clock"
        self.clock.write_text("0")
        self.extra_secrets = {MARK, provider.token}
        self.ended_by_themselves: list[WorkerProcess] = []
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
        return self.launch(**clock)

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
                        self.ended_by_themselves.append(self.slots[number])
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

    def tracebacks(self) -> list[str]:
        """Return the log files that tell of an error nobody expected."""
        signs = ("Traceback", "job.unexpected")
        return [
            f"{process.log_file.name}: {sign}"
            for process in self.processes
            for sign in signs
            if sign in process.log
        ]


class World:
    """A stack in a temporary folder, with proxies in front of it; all of it is gone afterwards."""

    def __init__(self, *, fsync: bool = True) -> None:
        self._ending = contextlib.ExitStack()
        folder = self._ending.enter_context(tempfile.TemporaryDirectory(prefix="darkroom-chaos-"))
        self.folder = Path(folder)
        self.folder.chmod(0o711)  # PostgreSQL's user passes through
        (self.folder / "stack").mkdir()
        self.stack = Stack(self.folder / "stack", fsync=fsync)
        self.stack.cluster.tuning = {"max_connections": str(MAX_CONNECTIONS)}
        self._gateway_lock = threading.RLock()
        self._closing = threading.Event()
        self.users: list[SignedUp] = []
        self.provider: Provider
        self.fleet: Fleet

    def __enter__(self) -> World:
        with contextlib.ExitStack() as starting:
            starting.callback(self.stack.clean)
            self.stack.up()
            self.db = Reconnecting(self.stack.database_url, "postgres")
            starting.callback(self.db.close)
            self.proxy = starting.enter_context(Proxy(self._postgres))
            self.storage = starting.enter_context(StorageProxy(self.stack.api_url))
            limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
            http = starting.enter_context(httpx.Client(timeout=10, limits=limits))
            api = self.stack.api_url
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
        for statement in SHORT.strip().split(";\n"):
            self.db.execute(statement)

    def restart_gateway(self) -> None:
        """Start Supabase Lite anew.

        It never answers a request whose connection to the database died under it, and after a few
        of these it answers nothing any more.
        """
        with self._gateway_lock:
            self.stack.gateway.stop()
            self.stack.gateway.start(self.stack.database_url)

    def _watch_gateway(self) -> None:
        """Do so as an orchestrator would: when it has not answered three times."""
        silent = 0
        while not self._closing.wait(1):
            try:
                with self._gateway_lock:
                    httpx.post(f"{self.endpoints.rest}/rpc/ping", json={}, timeout=5)
                silent = 0
            except httpx.TransportError:
                silent += 1
            if silent >= 3:
                with contextlib.suppress(StackError):  # the database may be down: next time
                    self.restart_gateway()
                silent = 0

    def _postgres(self) -> tuple[str, int]:
        return "127.0.0.1", self.stack.settings.port("DATABASE_PORT")

    @contextlib.contextmanager
    def working(self, workers: int) -> Iterator[Fleet]:
        """Have a provider without a past, and workers that use it."""
        with Provider() as self.provider, Fleet(self, self.provider, workers) as self.fleet:
            yield self.fleet
