"""Darkroom's worker: claims jobs from PostgreSQL, has a provider make the images, stores them.

    register, listen
    claim a job for every free slot, and run each:
        send what SQL says, hand in the answer … -> download -> upload -> complete
    nothing to claim: sleep in the database, look twice more, wait for NOTIFY or the backstop
    beside it: one heartbeat for all jobs (progress in, cancels out), recovery of what dead workers
        left, erasure of files, and the outbox: webhooks and push messages that tell of ended jobs
    SIGTERM: claim no more, finish within the grace time, release the rest

It may die at any instruction: the lease runs out, another worker resumes the checkpointed id.

`worker.py check` tries all it needs (rights, LISTEN, pg_cron, Storage, the provider's key), says in
one line each what is wrong, and does no work.

Environment (* required). A file of that name in $CREDENTIALS_DIRECTORY, where systemd puts what
LoadCredential names, goes before the variable:
    DATABASE_URL *          PostgreSQL, as role darkroom_worker; direct or session mode, for LISTEN.
                            Behind a transaction pooler it polls, and prepares no statements. With
                            pgbouncer=true and the like, as platforms show it, it is taken, too.
                            Several with white space between, to serve all cells
    SUPABASE_URL *          where /storage/v1 is
    SUPABASE_SERVICE_KEY *  service_role or secret key, for uploads
    …_KEY, …_TOKEN          of providers, by the name that private.providers.secret says:
                            REPLICATE_API_TOKEN, FAL_KEY. It takes jobs of no others
    WORKER_SLOTS            4         jobs at once, of all cells together
    WORKER_GRACE_SECONDS    30        to finish jobs after SIGTERM
    WORKER_POLL_SECONDS     5         backstop: longest wait without a look at the queue
    WORKER_WATCHDOG_SECONDS 0         ends a worker that makes no progress for so long, where no
                                      systemd does; 180 in a container. 0: none
    MAX_IMAGE_BYTES         33554432  larger outputs and sources are refused
    IMAGE_PREVIEW_PIXELS    512       longest side of the previews for galleries; 0: none
    WEBHOOK_ALLOWED_HOSTS             host:port, …: webhooks called although not public, for
                                      development
    EXPO_PUSH_URL           https://exp.host/--/api/v2/push/send
    EXPO_ACCESS_TOKEN                 of an Expo account that wants one for push notifications
    PREVIEW_SECONDS         1         how long the preview provider takes
    PREVIEW_FAILURE_RATE    0         share of preview jobs that fail, 0 to 1
    LOG_LEVEL               INFO
    TMPDIR                  for outputs on their way to Storage. Without room for MAX_IMAGE_BYTES
                            there, a worker that had to do without claims nothing

Exit codes: 0 stopped as asked, 1 something unexpected, 2 bad configuration, 3 ended by a second
signal or the hard deadline, with jobs left to their leases. A database that does not answer, or
takes no writes, is waited for, at the start as later. Of a check: 0 all is well, 1 something is
wrong, 2 bad configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import errno
import faulthandler
import hashlib
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar
from urllib.parse import quote, urlsplit
from uuid import UUID, uuid4

import httpx
import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from outbox import Outbox
from pictures import NoPicture, Picture, Pictures

BUCKET = "generations"
RECOVERY_SECONDS = 5.0  # between two looks for stale jobs; with the lease, how long one waits
AWAY_SECONDS = 2 * RECOVERY_SECONDS  # without an answer; then a cell's slots are the others'
TAKE_SECONDS = 1.0  # that free slots are kept for a cell which does not answer its claim
SECOND_LOOK_SECONDS = 0.2  # at most, between going to sleep and the last claim before waiting
LISTEN_ANSWER_SECONDS = 3.0  # within which a NOTIFY to ourselves must arrive
CALL_SECONDS = 15.0  # for one call; later, whoever stands in between may have lost the connection
POOL_SIZE = 6  # connections at most: each kind of call for many jobs has one under way
RETRY_BASE_SECONDS, RETRY_CAP_SECONDS = 0.25, 10.0  # backoff between repeated calls
DETAIL_CHARS = 500  # of others' words that are kept for operators
QUOTED_CHARS = 5_000  # of them that are looked through for secrets first, which come out whole so
HTTP_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
HTTP_TRIES = 4  # for requests that may be repeated
CHUNK_BYTES = 64 * 1024  # times several for each job in flight
DOWNLOAD_SECONDS = 120.0  # at most, for one output
MAX_REDIRECTS = 3
MAX_ANSWER_BYTES = 64 << 20  # of a provider, pictures in base64 included
CREATE_WITHIN_SECONDS = 5.0  # of holding the lease; later, another worker may have it
KEY_NAME = re.compile(r"[A-Z][A-Z0-9_]*_(KEY|TOKEN)")  # as private.providers has it
TEXT_CHARS = 200_000  # of one text in it that SQL sees, from its end: logs may be long
BLOB_CHARS = 10_000  # of a text in base64 that it sees a name of instead
BASE64 = re.compile(r"(?:data:[\w.+-]+/[\w.+-]+;base64,)?([A-Za-z0-9+/\r\n]++={0,2}\s*)")
FORMATS = {
    "PNG": ("png", "image/png"),
    "JPEG": ("jpg", "image/jpeg"),
    "WEBP": ("webp", "image/webp"),
    "AVIF": ("avif", "image/avif"),
    "GIF": ("gif", "image/gif"),
    "SVG": ("svg.bin", "image/svg+xml"),  # some servers go by the name, whatever type was stored
}
INERT_TYPE = "application/octet-stream"  # of SVGs in Storage: browsers save it and do not run it
SHORTAGES = {  # of the machine: no space, no files left, a broken disk; ENOENT: no folder at all
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
}
KEEPALIVES: dict[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # milliseconds
}
FOREIGN_PARAMETERS = {  # of Prisma's, node's and other drivers, in addresses of PostgreSQL
    *("pgbouncer", "connection_limit", "pool_timeout", "pool_mode", "socket_timeout", "schema"),
    *("statement_cache_size", "statement_cache_mode", "prepared_statements", "supa", "workaround"),
}
CANCEL, PROBE = "cancel", "probe"  # payloads of NOTIFY: jobs to stop, and a test of LISTEN
# Classes of SQLSTATE: what is wrong with what was said of a job (data, constraints, limits of size,
# errors that functions raise), and what is wrong with the database, whatever is said. Of others
# (rights, internal errors, what a migration does to a call) a single error does not tell.
JOBS_FAULT = {"21", "22", "23", "54", "P0", "PT", "DR"}
DATABASES_FAULT = dict.fromkeys(("08", "25", "40", "53", "55", "57", "58"), "database")
EXIT_OK, EXIT_ERROR, EXIT_CONFIG, EXIT_FORCED = 0, 1, 2, 3

REDACTED = "[redacted]"
SECRETS = [  # what looks like one, and what stays of it
    (r"(?i)\b(bearer)\s+[^\s\"',;]+", rf"\1 {REDACTED}"),
    (r"(?i)\b(basic)\s+[\w+/=-]{16,}", rf"\1 {REDACTED}"),
    (r"\beyJ[\w-]{8,}(\.[\w-]*){0,2}", REDACTED),  # a JWT
    (r"\b(r8_|sb_secret_|sbp_|whsec_|sk-)[\w+/=-]{4,}", rf"\1{REDACTED}"),
    (r"(\w://)[^\s/@]+@", rf"\1{REDACTED}@"),  # user and password
    (r"(https?://[^\s?#\"'<>]+)\?[^\s\"'<>]+", rf"\1?{REDACTED}"),  # a signature, perhaps
    (
        r"(?i)\b((?:password|secret|api-?key|[\w-]*token|authorization|signature)[\"']?\s*[=:]\s*"
        r"[\"']?)(?!\[redacted|bearer|basic)[^\s\"'&,;]+",
        rf"\1{REDACTED}",
    ),
]

log = logging.getLogger("darkroom")
cell = ContextVar("cell", default="")  # which database a task works for, if there are several
T = TypeVar("T")
Connection = psycopg.AsyncConnection[Any]


# --- settings -----------------------------------------------------------------------------------


class ConfigError(Exception):
    """A variable of the environment is missing or wrong; the message begins with its name."""


class Settings:
    """What the environment says, checked; an empty variable counts as unset. Raises ConfigError."""

    def __init__(self, env: Mapping[str, str]) -> None:
        env = {
            "EXPO_PUSH_URL": "https://exp.host/--/api/v2/push/send",
            "LOG_LEVEL": "INFO",
            **{name: value for name, value in env.items() if value},
        }
        self.database_url = _required(env, "DATABASE_URL")
        urls = self.database_url.split() or [""]
        for url in urls:
            _url({"DATABASE_URL": url}, "DATABASE_URL", "postgres", "postgresql")
        if len(self.databases) < len(urls):
            raise ConfigError("DATABASE_URL: the same database twice")
        self.supabase_url = _url(env, "SUPABASE_URL", "http", "https").rstrip("/")
        self.supabase_service_key = _required(env, "SUPABASE_SERVICE_KEY")
        own = ("SUPABASE_SERVICE_KEY", "EXPO_ACCESS_TOKEN")
        self.keys = {k: v for k, v in env.items() if KEY_NAME.fullmatch(k) and k not in own}
        self.slots = int(_number(env, "WORKER_SLOTS", 4, 1, 1000))
        self.grace_seconds = _number(env, "WORKER_GRACE_SECONDS", 30, 0, 3600)
        self.poll_seconds = _number(env, "WORKER_POLL_SECONDS", 5, 0.1, 60)
        self.watchdog_seconds = _number(env, "WORKER_WATCHDOG_SECONDS", 0, 0, 3600)
        self.max_image_bytes = int(_number(env, "MAX_IMAGE_BYTES", 32 << 20, 1, 1 << 30))
        self.image_preview_pixels = int(_number(env, "IMAGE_PREVIEW_PIXELS", 512, 0, 4096))
        hosts = {each.strip() for each in env.get("WEBHOOK_ALLOWED_HOSTS", "").split(",")}
        self.webhook_allowed_hosts = frozenset(hosts - {""})
        if not all(re.fullmatch(r"[^\s/]+:\d+", each) for each in self.webhook_allowed_hosts):
            raise ConfigError("WEBHOOK_ALLOWED_HOSTS: not host:port, separated by commas")
        self.expo_push_url = _url(env, "EXPO_PUSH_URL", "http", "https")
        self.expo_access_token = env.get("EXPO_ACCESS_TOKEN")
        self.preview_seconds = _number(env, "PREVIEW_SECONDS", 1, 0, 3600)
        self.preview_failure_rate = _number(env, "PREVIEW_FAILURE_RATE", 0, 0, 1)
        self.log_level = env["LOG_LEVEL"]
        if self.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ConfigError("LOG_LEVEL: not one of DEBUG, INFO, WARNING, ERROR")

    @property
    def databases(self) -> dict[str, str]:
        """Each cell's address by what the log calls it: nothing, if there is one."""
        urls = self.database_url.split()
        return {database_name(url): url for url in urls} if len(urls) > 1 else {"": urls[0]}

    @property
    def secrets(self) -> list[str]:
        """What nobody else may read, in every spelling it may come back in."""
        said: list[Any] = [self.supabase_service_key, self.expo_access_token, *self.keys.values()]
        for url in self.databases.values():
            plain = libpq_url(url)
            said += [url, plain, psycopg.conninfo.conninfo_to_dict(plain).get("password")]
        known = [str(each) for each in said if each]
        spelled = {*known, *(quote(each, "") for each in known)}
        return sorted((each for each in spelled if len(each) >= 6), key=len)[::-1]  # else words


def with_credentials(env: Mapping[str, str]) -> dict[str, str]:
    """The environment and, before it, the files of $CREDENTIALS_DIRECTORY. Raises ConfigError."""
    values = dict(env)
    if folder := env.get("CREDENTIALS_DIRECTORY"):
        try:
            for file in filter(Path.is_file, Path(folder).iterdir()):
                if text := file.read_text().strip():
                    # LoadCredential=darkroom:FOLDER puts this before a file's name.
                    values[file.name.removeprefix("darkroom_")] = text
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"CREDENTIALS_DIRECTORY: {type(error).__name__}") from None
    return values


def _required(env: Mapping[str, str], name: str) -> str:
    if name not in env:
        raise ConfigError(f"{name}: missing")
    return env[name]


def _url(env: Mapping[str, str], name: str, *schemes: str) -> str:
    value = _required(env, name)
    try:
        parts = urlsplit(value)
    except ValueError:
        raise ConfigError(f"{name}: not an address") from None
    if parts.scheme not in schemes:
        several = ", or several with spaces between" if "postgres" in schemes else ""
        raise ConfigError(f"{name}: not a {schemes[0]}:// address{several}")
    if value.count("@") > 1 or ("@" in value and "@" not in parts.netloc):
        raise ConfigError(f"{name}: / ? # @ in a password must be percent-encoded")  # else logged
    if parts.scheme.startswith("postgres"):
        try:
            psycopg.conninfo.conninfo_to_dict(libpq_url(value))
        except psycopg.ProgrammingError as error:  # it shows the password, which would be logged
            if unknown := re.search(r'query parameter: "(\w{1,40})"$', str(error).strip()):
                raise ConfigError(f"{name}: libpq knows no parameter {unknown[1]}") from None
            raise ConfigError(f"{name}: % and spaces must be percent-encoded") from None
    return value


def libpq_url(url: str) -> str:
    """The address without the parameters of other programs, which platforms show with it."""
    address, _, query = url.partition("?")
    known = [each for each in query.split("&") if each.partition("=")[0] not in FOREIGN_PARAMETERS]
    return f"{address}?{'&'.join(known)}".rstrip("?")


def database_name(url: str) -> str:
    """Which database an address leads to: HOST:PORT/NAME. A shared pooler goes by the user, too."""
    parts = psycopg.conninfo.conninfo_to_dict(libpq_url(url))
    who = f"{parts.get('user', '')}@".removeprefix("darkroom_worker@")
    return f"{who}{parts.get('host', '')}:{parts.get('port', 5432)}/{parts.get('dbname', '')}"


def _number(env: Mapping[str, str], name: str, default: float, low: float, high: float) -> float:
    try:
        value = float(env.get(name, default))
    except ValueError:
        raise ConfigError(f"{name}: not a number") from None
    if not low <= value <= high:
        raise ConfigError(f"{name}: not between {low:g} and {high:g}")
    return value


# --- errors and small helpers -------------------------------------------------------------------


class LeaseLost(Exception):
    """DR001: another worker has the job, or it is gone. Drop everything."""


class Outdated(psycopg.OperationalError):
    """The database has no such function: it is of another release. No job is to blame."""


class NoAnswer(psycopg.OperationalError):
    """The database was asked and said nothing in time, neither that it works nor that it cannot."""


class Deaf(psycopg.OperationalError):
    """LISTEN was accepted, and a NOTIFY did not arrive: a transaction pooler is in between."""


class JobError(Exception):
    """The attempt failed, with a code of private.error_codes. The detail is for operators.

    The reason is what the log says: without the words of others, which may repeat a prompt.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        retry_after: float | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(f"{code}: {detail}")
        self.code, self.retry_after = code, retry_after
        self.reason = detail if reason is None else reason
        # As PostgreSQL can store it: providers' texts may hold NUL or broken surrogates.
        self.detail = detail.encode(errors="replace").decode().replace("\0", "�")


class ProviderDown(JobError):
    """The account is refused: its jobs wait, and none is to blame. If sure, everybody's."""

    def __init__(self, step: dict[str, Any]) -> None:
        detail = step.get("detail") or step["reason"]
        super().__init__("provider_refused", detail, reason=step["reason"])
        self.is_sure, self.may_have_bought = step["is_sure"], step["may_have_bought"]


class UploadRefused(Exception):
    """The provider did not take a source: its answer is for SQL to read."""


class StorageRefused(Exception):
    """Storage did not delete what it was asked to; or whatever it may be asked, as of now."""

    def __init__(self, reason: str, *, is_outage: bool = True) -> None:
        super().__init__(reason)
        self.is_outage = is_outage


@dataclass(frozen=True)
class Job:
    """One claimed job, as private.claim_jobs answers it."""

    job_id: UUID
    user_id: UUID
    token: int
    attempt: int
    provider: str
    provider_ref: str
    provider_input: dict[str, Any]
    provider_job_id: str | None
    image_inputs: list[str]
    image_count: int
    deadline_seconds: float
    begun_before: datetime | None
    base_url: str | None
    secret: str | None
    key_hosts: list[str]
    hosts: list[str]
    max_running: int | None


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without these secrets, the longest first, and without what looks like one.

    Providers and Storage answer in words of their own, which may repeat what they were sent.
    """
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    for pattern, rest in SECRETS:
        text = re.sub(pattern, rest, text)
    return text


class SafeFormatter(logging.Formatter):
    """Lets no secret into a line or a traceback, whoever logs it."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        super().__init__("%(asctime)s %(levelname)s %(cell)s%(message)s")
        self.secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        record.cell = f"cell={cell.get()} " if cell.get() else ""
        return redact(super().format(record), self.secrets)


def only(rows: list[dict[str, Any]]) -> Any:
    """The one value of the one row that a function answered."""
    ((answer,),) = [row.values() for row in rows]
    return answer


def backoff(attempt: int) -> float:
    """Seconds to wait before try number attempt + 1: exponential, with jitter."""
    longest = RETRY_BASE_SECONDS * 2.0 ** min(attempt, 16)  # 2.0**1024 raises
    return random.uniform(0.5, 1.0) * min(RETRY_CAP_SECONDS, longest)


async def finish_first(work: Awaitable[T]) -> T:
    """Await work to its end, however often the caller is cancelled meanwhile; then be cancelled."""
    task = asyncio.ensure_future(work)
    is_cancelled = False
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError:
            is_cancelled = True
    if is_cancelled:
        if not task.cancelled():
            task.exception()  # looked at, or asyncio would log it with all its text
        raise asyncio.CancelledError
    return task.result()


# --- database -----------------------------------------------------------------------------------


async def mind_pooler(connection: Connection) -> None:
    """Prepare no statements where a pooler is in between: the next may run in another session.

    A pooler names a process of its own, if any, for the one to send a cancel to.
    """
    cursor = await connection.execute("select pg_backend_pid() as pid")
    row = await cursor.fetchone()
    if row is None or row["pid"] != connection.info.backend_pid:
        connection.prepare_threshold = None


def fault(error: BaseException) -> str:
    """Whose fault an error of a call is: "job" (what was said of one), "database", or "either".

    By the class of the SQLSTATE: a class of exceptions says what went wrong, not with whom.
    """
    if state := getattr(error, "sqlstate", None):
        return "job" if state[:2] in JOBS_FAULT else DATABASES_FAULT.get(state[:2], "either")
    lost = (psycopg.OperationalError, psycopg.InterfaceError)  # the connection, or an answer
    return "database" if isinstance(error, lost) else "job"


class Batch:
    """One function that takes many jobs. Calls made while one is under way go together in the next.

    So a call waits for nothing while there is little to do, and for one trip where there is much:
    ten times as many jobs a second as with a call for each. Who is cancelled does not go, or is
    not answered; the others do and are.
    """

    def __init__(self, call: Callable[..., Awaitable[list[Any]]], function: str) -> None:
        self.call, self.function = call, function
        self.waiting: list[tuple[asyncio.Future[Any], tuple[Any, ...]]] = []  # answer, what is said
        self.trips: asyncio.Task[None] | None = None
        self.alone: set[asyncio.Task[None]] = set()

    async def __call__(self, job: Job, *said: Any) -> Any:
        """Answer what is said of this job. Raises LeaseLost if nothing is."""
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((answer, (job.job_id, job.token, *said)))
        if self.trips is None:
            self.trips = asyncio.create_task(self._travel())
        return await answer

    async def _travel(self) -> None:
        while self.waiting:
            trip, self.waiting = self.waiting[:100], self.waiting[100:]
            await self._make(trip)
        self.trips = None

    async def _make(self, trip: list[tuple[asyncio.Future[Any], tuple[Any, ...]]]) -> None:
        trip = [call for call in trip if not call[0].done()]
        if not trip:
            return
        columns = map(list, zip(*(arguments for _, arguments in trip), strict=True))
        said: dict[int, Any] = {}
        failure: BaseException = LeaseLost()
        try:
            rows = await self.call(self.function, *columns)
            said = dict(tuple(row.values()) for row in rows)
        except BaseException as error:  # whatever it is, nobody is left waiting
            failure = error
            if len(trip) > 1 and isinstance(error, Exception) and fault(error) != "database":
                for each in trip:  # one of them is at fault, not all; it may take its time alone
                    self.alone.add(task := asyncio.create_task(self._make([each])))
                    task.add_done_callback(self.alone.discard)
                return
        for answer, (_, token, *_) in trip:
            if not answer.done():
                answer.set_result(said[token]) if token in said else answer.set_exception(failure)


class Database:
    """The worker's functions of schema private. Other SQL is LISTEN and NOTIFY."""

    FUNCTIONS: ClassVar = (
        *("apply_retention", "cancel_job", "check_setup", "claim_deliveries", "claim_jobs"),
        *("claim_receipts", "complete_jobs", "due_lanes", "fail_jobs", "finish_delivery"),
        *("finish_receipts", "forget_files", "heartbeat", "list_expired_files", "list_providers"),
        *("next_steps", "pause_provider", "recover_stale_jobs", "register_worker", "release_job"),
        *("report_progress", "sleep", "unregister_worker"),
    )

    def __init__(self, url: str, secrets: Iterable[str] = (), name: str = "") -> None:
        self.url, self.secrets, self.name = libpq_url(url), secrets, name
        self.answered_at = 0.0
        self.keys: list[str] = []  # names of those it may claim with
        self.is_listening: bool | None = None  # until it is known
        self.troubles: dict[str, dict[str, str]] = {}  # function → kinds of errors since it worked
        options = {"autocommit": True, "row_factory": dict_row, **KEEPALIVES}
        if "pgbouncer=true" in urlsplit(url).query.split("&"):
            options["prepare_threshold"] = None
        # Left alone, the pool doubles its pause between tries: long after the database is back.
        self.pool = AsyncConnectionPool(
            self.url,
            min_size=1,
            max_size=POOL_SIZE,
            open=False,
            reconnect_timeout=5,
            kwargs=options,
            configure=mind_pooler,
        )
        self.next_step = Batch(self.insist, "next_steps")
        self.report_progress = Batch(self.insist, "report_progress")
        self.complete_job = Batch(self.insist, "complete_jobs")
        self.fail_job = Batch(self.insist, "fail_jobs")

    async def call(self, function: str, *args: Any) -> list[Any]:
        """Call private.<function> once; answer its rows as dicts."""
        marks = ", ".join(["%b"] * len(args))  # binary: nothing to escape, which takes long
        query = f"select * from private.{function}({marks})".encode()
        try:
            rows = await self._ask(function, query, args)
        except psycopg.Error as error:
            if error.sqlstate == "DR001":
                raise LeaseLost from None
            self._note(function, error)
            raise
        self.answered_at = time.monotonic()
        if self.troubles.pop(function, None):
            log.info("database.back call=%s", function)
        return rows

    async def _ask(self, function: str, query: bytes, args: tuple[Any, ...]) -> list[Any]:
        """Raises psycopg.Error, whatever it is that does not work."""
        try:
            async with (
                self.pool.connection(timeout=10) as connection,
                asyncio.timeout(CALL_SECONDS),
            ):
                try:
                    return await (await connection.execute(query, args, binary=True)).fetchall()
                except psycopg.Error as error:
                    if fault(error) != "job":  # it may be wrong in this session only
                        await connection.close()
                    raise
        except psycopg.errors.UndefinedFunction:
            raise Outdated(f"no private.{function} for worker {version()}: upgrade it") from None
        except PoolTimeout:
            async with await self.connect():  # says why, which the pool keeps for itself
                raise NoAnswer("no connection within 10 s, although one can be made") from None
        except TimeoutError:
            raise NoAnswer(f"no answer within {CALL_SECONDS:g} s") from None

    def _note(self, function: str, error: psycopg.Error) -> None:
        """Log what is wrong, once for each kind until the function works again."""
        kind = f"{type(error).__name__} {error.sqlstate or ''}".strip()
        known = self.troubles.setdefault(function, {})
        if kind not in known:
            # What is said of data may tell it.
            said = "" if fault(error) == "job" else error.diag.message_primary or str(error)
            said = " ".join(said.split())[:DETAIL_CHARS]
            log.warning("database.lost call=%s error=%s %s", function, kind, said)
        known[kind] = known.pop(kind, kind)

    @property
    def trouble(self) -> str | None:
        """What the database says that it cannot do now; None if it works, or says nothing."""
        last = [list(kinds)[-1] for kinds in self.troubles.values()]
        return next((kind for kind in last if kind != NoAnswer.__name__), None)

    @property
    def is_away(self) -> bool:
        """Whether it has answered nothing for so long that others need not wait for it."""
        return time.monotonic() - self.answered_at > AWAY_SECONDS

    async def insist(self, function: str, *args: Any) -> list[Any]:
        """Call again while the database cannot: these functions may be repeated.

        Of many jobs one may be at fault: then it raises, for them to be tried one by one.
        """
        attempt, is_of_many = 0, bool(args) and isinstance(args[0], list) and len(args[0]) > 1
        while True:
            try:
                return await self.call(function, *args)
            except psycopg.Error as error:
                whose = fault(error)
                if self.pool.closed or whose == "job" or (whose == "either" and is_of_many):
                    raise
                await asyncio.sleep(backoff(attempt))
                attempt += 1

    async def register_worker(self, slots: int, keys: Iterable[str]) -> dict[str, Any]:
        """Raises ConfigError if the database itself says that the role is another one."""
        self.keys, host = list(keys), socket.gethostname()
        try:
            rows = await self.call("register_worker", host, slots, version(), self.keys)
        except psycopg.errors.InsufficientPrivilege:
            async with await self.connect() as connection:
                query = "select pg_has_role('darkroom_worker', 'usage')"
                if await (await connection.execute(query)).fetchone() == (False,):
                    raise ConfigError("DATABASE_URL: its role is not darkroom_worker") from None
            raise
        return dict(rows[0])

    async def claim_jobs(self, worker_id: int, slots: int) -> list[Job]:
        return [Job(**row) for row in await self.call("claim_jobs", worker_id, slots, self.keys)]

    async def heartbeat(self, worker_id: int, running: list[Running]) -> list[str]:
        """Beat for these jobs, sorted by job_id; answer the verdict on each, in their order."""
        facts = [(each.job.job_id, each.job.token, each.progress) for each in running]
        columns = map(list, zip(*facts, strict=True)) if facts else ([], [], [])
        rows = await self.call("heartbeat", worker_id, *columns, self.is_listening is not False)
        return [row["verdict"] for row in rows]

    def quoted(self, words: str) -> str:
        """Others' words as they may be stored: for operators, but without secrets."""
        return redact(words, self.secrets)[:DETAIL_CHARS]

    def connect(self) -> Awaitable[Connection]:
        """Open a connection beside the pool. Its error says what is wrong, as the pool's do not."""
        return psycopg.AsyncConnection.connect(
            self.url, autocommit=True, connect_timeout=10, **KEEPALIVES
        )

    async def listen(self, channel: str, on_notify: Callable[[str], None]) -> None:
        """Hand on every NOTIFY, for ever, from a connection of its own; reconnect when it dies.

        Whatever was sent while there was no connection is lost, so each reconnect counts as one.
        """
        attempt = 0
        while True:
            try:
                async with await self.connect() as connection:
                    await self.hear(connection, channel, on_notify)
                    log.info("listen.started channel=%s", channel)
                    attempt = 0
                    async for notice in connection.notifies():
                        on_notify(notice.payload)
            except (psycopg.Error, TimeoutError) as error:
                self.is_listening = False
                is_deaf = isinstance(error, Deaf)
                if attempt == 0:
                    log.warning("listen.lost error=%s", error if is_deaf else type(error).__name__)
                await asyncio.sleep(60 if is_deaf else backoff(attempt))
                attempt += 1

    async def hear(
        self, connection: Connection, channel: str, on_notify: Callable[[str], None]
    ) -> None:
        """Listen, have another connection send a NOTIFY, and hand on what comes before it.

        Raises Deaf. Not the same connection: a pooler may have the session that listens answer it
        by chance.
        """
        await connection.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
        on_notify(CANCEL)
        async with self.pool.connection(timeout=10) as other, asyncio.timeout(CALL_SECONDS):
            await other.execute("select pg_notify(%s, %s)", (channel, PROBE))
        give_up_at, has_heard = time.monotonic() + LISTEN_ANSWER_SECONDS, False
        while not has_heard:
            if (left := give_up_at - time.monotonic()) <= 0:
                raise Deaf(
                    "DATABASE_URL: a NOTIFY did not arrive, as through a transaction pooler: jobs "
                    "are found by polling. Use a direct or session-mode connection"
                )
            async for notice in connection.notifies(timeout=left, stop_after=1):
                if notice.payload == PROBE:
                    has_heard = True
                else:
                    on_notify(notice.payload)
        self.is_listening = True


# --- providers ----------------------------------------------------------------------------------


class Preview:
    """Draws placeholder pictures, so that everything runs without a key.

    A prompt with [fail:CODE] in it fails with that code, as a real provider might.
    """

    FAILURE = re.compile(
        r"\[fail:(moderated|invalid_input|provider_(?:busy|timeout|error)|result_lost)\]"
    )

    fetches_sources = False

    def __init__(self, pictures: Pictures, seconds: float, failure_rate: float) -> None:
        self.pictures, self.seconds, self.failure_rate = pictures, seconds, failure_rate

    async def upload(self, name: str, content_type: str, file: IO[bytes]) -> str:
        """Keep only the blurhash of a source: as its address."""
        try:
            source = await self.pictures.inspect(file, 0)
        except NoPicture as error:
            raise JobError("invalid_input", f"source: {error}") from None
        if not source.blurhash:
            raise JobError("invalid_input", f"source: takes too much {source.lacks}")
        return source.blurhash.encode().hex()

    async def make(
        self, job: Job, provider_input: dict[str, Any], report: Callable[[int], None]
    ) -> list[bytes]:
        self.pictures.start()  # meanwhile
        for percent in range(0, 100, 10):
            report(percent)
            await asyncio.sleep(self.seconds / 10)
        prompt, seed = provider_input["prompt"], int(provider_input["seed"])
        if wanted := self.FAILURE.search(prompt):
            raise JobError(wanted[1], "asked for by the prompt")
        if random.random() < self.failure_rate:
            raise JobError("provider_error", "PREVIEW_FAILURE_RATE")
        size = (int(provider_input["width"]), int(provider_input["height"]))
        wish = (prompt, size, bytes.fromhex(provider_input.get("image") or "").decode())
        return [await self.pictures.draw(*wish, seed + n) for n in range(job.image_count)]

    async def read(self, output: bytes) -> AsyncGenerator[bytes, None]:
        yield output


class Provider:
    """One that SQL knows: sends what it is told to and hands back what comes.

    The key goes into headers alone, and to the provider's own hosts, wherever an answer leads. What
    is large and base64 stays here: SQL sees `blob:<SHA-256>` in its place.
    """

    def __init__(self, http: httpx.AsyncClient, row: Mapping[str, Any], key: str | None) -> None:
        self.http, self.key, self.base = http, key or "", httpx.URL(row["base_url"])
        self.key_hosts, self.hosts = row["key_hosts"], [*row["hosts"], *row["key_hosts"]]
        self.asked = list((row.get("provider_input") or {}).values())
        self.blobs: dict[str, str] = {}
        self.way: dict[str, Any] | None = None  # to hand over sources, where it has one of its own

    @property
    def fetches_sources(self) -> bool:
        """Itself, by a signed address, where Storage can be reached from outside."""
        return not (self.way and self.way.get("always"))

    async def upload(self, name: str, content_type: str, file: IO[bytes]) -> str:
        """Hand over a source; answer what stands for it in the input. Raises UploadRefused."""
        file.seek(0)
        if not self.way:
            text = base64.b64encode(file.read()).decode()
            return self.keep(f"data:{content_type};base64,{text}")
        form = {self.way["field"]: (name, file, content_type)}
        answer = await self.send(self.way, files=form)
        said = answer.get("body")
        for key in self.way["address"]:
            said = said.get(key) if isinstance(said, dict) else None
        if not isinstance(said, str):
            raise UploadRefused(answer)
        return said

    async def send(self, request: dict[str, Any], **content: Any) -> dict[str, Any]:
        """Answer {status, headers, body, error} as next_steps takes them. Raises JobError."""
        body = request.get("body")
        content = content or {"json": self._swapped(body, self.blobs.get) if self.blobs else body}
        headers = {k: v.replace("{{secret}}", self.key) for k, v in request["headers"].items()}
        headers["accept-encoding"] = "identity"  # see read
        seconds = httpx.Timeout(request["seconds"] or HTTP_TIMEOUT.read, connect=10.0)
        in_all = (request["seconds"] or 0) + DOWNLOAD_SECONDS  # it may come drop by drop
        try:
            async with (
                asyncio.timeout(in_all),
                self.http.stream(
                    request["method"],
                    self._allowed(request["url"], self.key_hosts),
                    headers=headers,
                    timeout=seconds,
                    **content,
                ) as response,
            ):
                text = bytearray()
                async for chunk in response.aiter_bytes(CHUNK_BYTES):
                    text += chunk
                    if len(text) > MAX_ANSWER_BYTES:
                        return {"status": None, "error": "too long"}
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            return {"status": 0, "error": type(error).__name__}
        except (httpx.HTTPError, TimeoutError) as error:
            return {"status": None, "error": type(error).__name__}
        try:
            said = json.loads(text, parse_constant=str, parse_float=finite)
            if len(text) >= BLOB_CHARS or b"\\u" in text:  # else there is nothing to swap
                said = self._swapped(said, self._kept)
        except (ValueError, RecursionError):
            said = self._kept(text[:QUOTED_CHARS].decode(errors="replace"))
        headers = {"retry-after": response.headers.get("retry-after")}
        return {"status": response.status_code, "headers": headers, "body": said}

    def keep(self, text: str) -> str:
        """Keep what is large; answer what stands for it."""
        name = f"blob:{hashlib.sha256(text.encode()).hexdigest()}"
        self.blobs[name] = text
        return name

    def _kept(self, text: str) -> str:
        """A text of an answer as PostgreSQL can take it: no NUL, no broken surrogates."""
        is_large = len(text) > BLOB_CHARS and text not in self.asked  # a prompt may look like it
        if is_large and BASE64.fullmatch(text):
            return self.keep(text)
        return text[-TEXT_CHARS:].encode(errors="replace").decode().replace("\0", "\ufffd")

    def _swapped(self, value: Any, swap: Callable[[str], str | None]) -> Any:
        """The same JSON with some texts swapped for others."""
        if isinstance(value, dict):
            return {self._swapped(k, swap): self._swapped(v, swap) for k, v in value.items()}
        if isinstance(value, list):
            return [self._swapped(each, swap) for each in value]
        return swap(value) or value if isinstance(value, str) else value

    async def read(self, output: str) -> AsyncGenerator[bytes, None]:
        """An output: what is kept, or a download from the provider's hosts only.

        Outputs come from third-party code. Nothing packed: a few bytes, packed twice, unpack to
        gigabytes at once.
        """
        if packed := BASE64.fullmatch(self.blobs.get(output, output)):
            try:
                yield base64.b64decode(packed[1] + "==")
            except ValueError:
                raise JobError("provider_error", "output: cut short within its base64") from None
            return
        url, plain = self._allowed(output, self.hosts), {"accept-encoding": "identity"}
        for _ in range(MAX_REDIRECTS + 1):
            async with self.http.stream("GET", url, headers=plain) as response:
                if response.has_redirect_location:
                    url = self._allowed(response.headers["location"], self.hosts, url)
                    continue
                if response.status_code in (404, 410):
                    raise JobError("result_lost", f"output: HTTP {response.status_code}")
                if not response.is_success:
                    raise JobError("internal", f"output: HTTP {response.status_code}")
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise JobError("output_refused", "output: packed, although not asked for")
                async for chunk in response.aiter_bytes(CHUNK_BYTES):
                    yield chunk
                return
        raise JobError("output_refused", "output: too many redirects")

    def _allowed(self, address: str, hosts: list[str], base: httpx.URL | None = None) -> httpx.URL:
        """The address, as who asks it reads it, if it is at base_url's host or at one of these.
        Raises JobError.
        """
        try:
            url = base.join(address) if base else httpx.URL(address)
        except (httpx.InvalidURL, ValueError):
            raise JobError("output_refused", "not an address") from None
        is_base = (url.scheme, url.netloc) == (self.base.scheme, self.base.netloc)
        known = [re.escape(name).replace(r"\*", "[a-z0-9.-]+") for name in hosts]
        is_named = any(re.fullmatch(each, url.host) for each in known)
        if not is_base and not (url.scheme == "https" and is_named):
            detail = f"host {url.host[:100]} is not allowed"
            raise JobError("output_refused", detail, reason="a host that is not allowed")
        return url


def finite(number: str) -> float | str:
    """A number as PostgreSQL takes it; one too large stays a text."""
    return value if math.isfinite(value := float(number)) else number


# --- storage ------------------------------------------------------------------------------------

Read = Callable[[], AsyncGenerator[bytes, None]]  # reads an output, from its start each time


class Storage:
    """Stores images in the private bucket, through Supabase's Storage API."""

    def __init__(self, settings: Settings, http: httpx.AsyncClient, pictures: Pictures) -> None:
        self.settings, self.http, self.pictures = settings, http, pictures
        self.root, key = f"{settings.supabase_url}/storage/v1", settings.supabase_service_key
        self.base_url = f"{self.root}/object/{BUCKET}"
        self.is_reachable_from_outside = is_public_host(urlsplit(self.root).hostname or "")
        self.headers = {"Authorization": f"Bearer {key}", "apikey": key, "x-upsert": "true"}

    async def sign(self, path: str, seconds: float) -> str:
        """An address of a source image that works for so long or a little longer. Raises JobError.

        Of the answer only the token is taken: the rest comes unescaped.
        """
        url = f"{self.root}/object/sign/{source_key(path)}"
        lasting = {"expiresIn": int(seconds) + random.randrange(300, 900)}  # so that two differ
        response = await self.http.post(url, json=lasting, headers=self.headers)
        if not response.is_success:
            raise source_error(response)
        signed = str(response.json()["signedURL"])
        return f"{url}?{signed.rpartition('?')[2]}"

    async def fetch(self, path: str, file: IO[bytes]) -> None:
        """Download a source image into a file, within the cap. Raises JobError."""
        url, most = f"{self.root}/object/{source_key(path)}", self.settings.max_image_bytes
        async with self.http.stream("GET", url, headers=self.headers) as response:
            if not response.is_success:
                await response.aread()
                raise source_error(response)
            async for chunk in response.aiter_bytes(CHUNK_BYTES):
                if file.tell() + len(chunk) > most:
                    raise JobError("invalid_input", f"source: more than {most} bytes")
                file.write(chunk)

    async def remove(self, bucket: str, paths: list[str]) -> None:
        """Delete files; one that is gone already counts as deleted. Raises StorageRefused."""
        url = f"{self.root}/object/{bucket}"
        try:
            response = await self.http.request(
                "DELETE", url, json={"prefixes": paths}, headers=self.headers
            )
        except httpx.HTTPError as error:
            raise StorageRefused(type(error).__name__) from None
        if not response.is_success:
            status = storage_status(response)
            is_outage = not 400 <= status < 500 or status in (401, 403, 408, 429)
            raise StorageRefused(f"HTTP {response.status_code}", is_outage=is_outage)

    async def store(self, job: Job, position: int, read: Read) -> dict[str, Any]:
        """Check and upload one output; answer its row for complete_jobs. Raises JobError."""
        base, preview_path = f"{job.user_id}/{job.job_id}/{position}", None
        with tempfile.TemporaryFile() as file:
            image = await self._receive(job, file, read)
            if image.lacks:
                log.warning("picture.bare job=%s lacks=%s", job.job_id, image.lacks)
            extension, content_type = FORMATS[image.format]
            served_as = INERT_TYPE if image.format == "SVG" else content_type
            size = await self._upload(f"{base}.{extension}", file, served_as)
        if image.preview:
            with contextlib.suppress(JobError):  # the picture is there without
                path = f"{base}.preview.webp"
                await self._upload(path, io.BytesIO(image.preview), "image/webp")
                preview_path = path
        return {
            "position": position,
            "storage_path": f"{base}.{extension}",
            "preview_path": preview_path,
            "content_type": content_type,
            "width": image.width,
            "height": image.height,
            "bytes": size,
            "blurhash": image.blurhash,
        }

    async def _receive(self, job: Job, file: IO[bytes], read: Read, attempt: int = 1) -> Picture:
        """Write an output to disk, within the caps, and look at it. What comes broken is asked for
        again, for it is paid; what is refused is not. Raises JobError.
        """
        self.pictures.start()  # meanwhile
        most, late = self.settings.max_image_bytes, f"not received within {DOWNLOAD_SECONDS:g} s"
        file.truncate(file.seek(0))
        try:
            async with asyncio.timeout(DOWNLOAD_SECONDS), contextlib.aclosing(read()) as body:
                async for chunk in body:
                    file.write(chunk)
                    if file.tell() > most:
                        raise JobError("output_refused", f"output: more than {most} bytes")
            return await self.pictures.inspect(file, self.settings.image_preview_pixels)
        except TimeoutError:
            raise JobError("provider_timeout", f"output: {late}") from None
        except httpx.HTTPError as error:
            failure = JobError("internal", f"output: {type(error).__name__}")
        except NoPicture as error:
            failure = JobError(error.code, f"output: {error}")
        except JobError as error:
            failure = error
        if failure.code == "output_refused" or attempt == HTTP_TRIES:
            raise failure
        log.warning("output.retry job=%s reason=%r", job.job_id, failure.reason)
        await asyncio.sleep(backoff(attempt))
        return await self._receive(job, file, read, attempt + 1)

    async def _upload(self, path: str, file: IO[bytes], content_type: str) -> int:
        """Upload with upsert, so that repeating it after a lost answer is harmless.

        Answers how many bytes. Raises JobError.
        """
        size = file.seek(0, io.SEEK_END)
        headers = {**self.headers, "content-type": content_type, "content-length": str(size)}
        headers["cache-control"] = "max-age=31536000, immutable"  # a path's bytes never change
        code = reason = text = ""
        for attempt in range(HTTP_TRIES):
            try:
                response = await self.http.post(
                    f"{self.base_url}/{path}", content=_chunks(file), headers=headers
                )
                if response.is_success:
                    return size
                reason, text = f"HTTP {response.status_code}", response.text[:QUOTED_CHARS]
                code, status = storage_code(response), storage_status(response)
                # 423: another upload of this path is under way.
                if 400 <= status < 500 and status not in (408, 423, 429):
                    break
            except httpx.TransportError as error:
                code, reason, text = "storage_unavailable", type(error).__name__, ""
            log.warning("storage.retry job=%s reason=%r", path.split("/")[1], reason)
            await asyncio.sleep(backoff(attempt))
        raise JobError(code, f"upload: {reason}: {text}", reason=f"upload: {reason}")


def is_public_host(host: str) -> bool:
    """Whether others can reach it: a public IP address, or a name that is not of this machine."""
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return "." in host and not host.endswith((".localhost", ".local", ".internal"))


async def _chunks(file: IO[bytes]) -> AsyncGenerator[bytes, None]:
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def storage_status(response: httpx.Response) -> int:
    """The real status: Supabase answers 400 to nearly everything and tells it in the body."""
    with contextlib.suppress(ValueError, KeyError, TypeError, httpx.ResponseNotRead):
        return int(response.json()["statusCode"])
    return response.status_code


def storage_code(response: httpx.Response) -> str:
    """What a job fails with that Storage refused: an outage passes, and is not the job's fault."""
    status = storage_status(response)
    if status in (413, 415):  # too large for the bucket, or of a type that it does not take
        return "output_refused"
    return "storage_unavailable" if status >= 500 or status in (408, 429) else "internal"


def source_key(path: str) -> str:
    """Bucket and name of a source image as its user gave them, escaped as parts of an address."""
    named = path.startswith((f"{BUCKET}/", "inputs/"))
    return quote(path if named else f"inputs/{path}", safe="/!$&'()*+,;=:@")


def source_error(response: httpx.Response) -> JobError:
    """What a job fails with whose source Storage does not give.

    That it is gone is believed where Storage itself says so, and of the file, not of its bucket.
    """
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = response.json()
        if int(said["statusCode"]) == 404 and "ucket" not in said["message"]:
            return JobError("invalid_input", "source: no such file any more")
    return JobError(storage_code(response), f"source: HTTP {response.status_code}")


# --- the worker ---------------------------------------------------------------------------------


@dataclass
class Running:
    """A job in a slot."""

    job: Job
    held_at: float  # the lease was: time.monotonic() before the database was asked
    on_progress: Callable[[], None]
    task: asyncio.Task[None] = field(init=False)
    provider: Provider | None = None  # but for the preview's
    said: dict[str, Any] | None = None  # to next_steps, last
    cancel: list[dict[str, Any]] = field(default_factory=list)  # what stops it at the provider
    progress: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)  # of what was bought, once they are known
    is_lost: bool = False  # a heartbeat said so: drop it, do not release it
    is_canceled: bool = False  # so it said: stop it at the provider, then end it as canceled
    is_ending: bool = False  # its last call is under way; a beat may find the row gone

    def __post_init__(self) -> None:
        # Nobody has asked the provider, or this attempt has not yet.
        if not self.job.provider_job_id:
            self.metrics = {"is_billed" if self.job.begun_before else "is_asked": False}

    def report(self, percent: int) -> None:
        """Take in progress. It never goes back, whatever a provider says."""
        if self.progress is None or percent > self.progress:
            self.progress = percent
            self.on_progress()


class Slots:
    """The slots of one process, for the workers of all its cells."""

    def __init__(self, count: int, worker: Worker) -> None:
        self.count, self.workers = count, [worker]  # who took some last stands last
        self.freed = asyncio.Event()  # to claim again: a slot, or who could not beat

    def share(self, worker: Worker) -> int:
        """How many a cell may take: the free ones are dealt out among those that wait for one,
        each to the cell with the fewest jobs.

        Jobs of a cell that is away do not count for others: they may be waiting for its answer.
        When it is back, more jobs than there are slots run until some of them have ended.
        """
        if self.workers == [worker]:
            return self.count - len(worker.running)
        jobs = {
            each: 0 if each.db.is_away and each is not worker else len(each.running) + each.taken
            for each in self.workers
        }
        free, had = max(0, self.count - sum(jobs.values())), jobs[worker]
        waiting = [e for e in self.workers if e is worker or (e.waits and not e.db.is_away)]
        for _ in range(free):
            jobs[min(waiting, key=jobs.__getitem__)] += 1
        return jobs[worker] - had

    @contextlib.contextmanager
    def taken(self, worker: Worker) -> Iterator[int]:
        """Take them for a claim, and put back what it has not filled; or what it has not filled in
        time: then jobs that come after all are more than there are slots, as above.
        """
        worker.taken = self.share(worker)
        self.workers.sort(key=lambda each: each is worker)
        late = asyncio.get_running_loop().call_later(TAKE_SECONDS, self.put_back, worker)
        try:
            yield worker.taken
        finally:
            late.cancel()
            self.put_back(worker)

    def put_back(self, worker: Worker) -> None:
        worker.taken = 0
        if any(each.waits for each in self.workers):
            self.freed.set()

    @property
    def status(self) -> str:
        """What all workers say of themselves, or the one."""
        if len(self.workers) == 1:
            return self.workers[0].status
        silent = [each for each in self.workers if each.db.is_away and not each.db.trouble]
        said = {e.db.name: "no answer" if e in silent else e.status for e in self.workers}
        return "; ".join(f"{name}: {status}" for name, status in sorted(said.items()))


class Worker:
    """Keeps the slots full until told to stop. For several cells there is one for each."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        preview: Preview,
        storage: Storage,
        outbox: Outbox,
    ) -> None:
        self.settings, self.db, self.preview, self.storage = settings, db, preview, storage
        self.outbox = outbox
        self.slots = Slots(settings.slots, self)
        self.taken = 0  # slots, for the claim that is under way
        self.waits = False  # for a slot
        self.status = "waits for the database"
        self.running: dict[int, Running] = {}  # by token: a lost job may be claimed again here
        self.wake = asyncio.Event()
        self.news = asyncio.Event()  # for the next heartbeat, which does not wait for its time then
        self.news_due: asyncio.TimerHandle | None = None
        self.stopping = asyncio.Event()
        self.worker_id = 0
        self.is_full = True  # until a largest output proves to have room on the disk
        self.lease_seconds = 0.0
        self.last_beat = 0.0
        self.last_told = 0.0  # systemd

    def share_with(self, other: Worker) -> None:
        """Have only once, for several cells, what a process has or may have once."""
        self.slots = other.slots
        self.slots.workers.append(self)
        self.outbox.webhooks, self.outbox.expo = other.outbox.webhooks, other.outbox.expo

    async def run(self) -> None:
        """Register, then work until stopping is set and the jobs have ended or are released."""
        if not (registered := await self._register()):
            return
        self.worker_id = registered["worker_id"]
        self.lease_seconds = registered["lease_seconds"]
        self.last_beat = time.monotonic()
        log.info("worker.started worker=%s slots=%s", self.worker_id, self.settings.slots)
        async with asyncio.TaskGroup() as background:
            beside = (
                self.db.listen(registered["channel"], self.on_notify),
                self._every(registered["heartbeat_seconds"], self.beat, self.news),
                self._every(RECOVERY_SECONDS, self.recover),
                self._every(60, self.erase),
                self._every(60, self.outbox.read_receipts),
                self.outbox.run(self.stopping),
            )
            tasks = [background.create_task(each) for each in beside]
            await self._claim_until_stopped()
            await self._drain()
            for task in tasks:
                task.cancel()
        log.info("worker.stopped worker=%s", self.worker_id)

    async def _register(self) -> dict[str, Any] | None:
        """Register, however long the database cannot; None if it is to stop before."""
        attempt = 0
        while not self.stopping.is_set():
            try:
                return await self.db.register_worker(self.settings.slots, self.settings.keys)
            except psycopg.Error:
                self._tell_systemd()
                await self._pause(self.stopping, backoff(attempt))
                attempt += 1
        return None

    def on_notify(self, payload: str) -> None:
        """Look for work, or hear from the next heartbeat, made now, which jobs to stop."""
        self.wake.set()
        if self.waits:
            self.slots.freed.set()  # not for it, but it has another worker woken
        if payload == CANCEL:
            self.news.set()

    def on_progress(self) -> None:
        """Have a heartbeat carry it within a second, but not each step of each job by itself."""
        if self.news_due is None:
            self.news_due = asyncio.get_running_loop().call_later(1.0, self.news.set)

    @staticmethod
    async def _every(
        seconds: float, action: Callable[[], Awaitable[None]], early: asyncio.Event | None = None
    ) -> None:
        """Do it again and again; before the time is over if there is cause."""
        failures, early = 0, early or asyncio.Event()
        while True:
            pause = seconds * random.uniform(0.9, 1.0)
            early.clear()
            try:
                await action()
                failures = 0
            except psycopg.Error:
                pause = min(pause, backoff(failures))  # the pool may hold more dead connections
                failures += 1
                early.clear()  # or each failure would cause the next
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(early.wait(), pause)

    async def _claim_until_stopped(self) -> None:
        attempt = 0
        while not self.stopping.is_set():
            try:
                self.slots.freed.clear()
                may_claim = self._may_claim() and await self._has_room()
                if may_claim and self.slots.share(self):
                    if not await self._claim():
                        await self._sleep()
                elif not await self._pass_on():
                    self.waits = may_claim
                    await self._pause(self.slots.freed, self.settings.poll_seconds)
                    self.waits = False
                attempt = 0
                self._tell_systemd()
            except psycopg.Error:
                self._tell_systemd()
                self.wake.clear()
                await self._pause(self.wake, backoff(attempt))
                attempt += 1

    def _tell_systemd(self) -> None:
        """Feed the watchdog once for each beat that was answered, or with each turn while the
        database says that it cannot. It goes hungry when this loop or the database hangs; of
        several, when all do.
        """
        if self.db.is_listening is not None and self.last_beat > self.last_told:
            self._feed_watchdog()
            way = "is woken by NOTIFY" if self.db.is_listening else "polls, as LISTEN does not work"
            slots = f"{len(self.running)} of {self.settings.slots} slots busy"
            self.status = f"worker {self.worker_id}: {slots}, {way}"
            tell_systemd("READY=1", f"STATUS={self.slots.status}")
            self.last_told = time.monotonic()
        elif self.db.trouble:
            self._feed_watchdog()
            self.status = f"waits for the database: {self.db.trouble}"
            tell_systemd(f"STATUS={self.slots.status}")

    def _feed_watchdog(self) -> None:
        """Put off the end, with exit code 1 and where each thread was, of a worker that hangs."""
        if self.settings.watchdog_seconds:
            faulthandler.dump_traceback_later(self.settings.watchdog_seconds, exit=True)

    @property
    def is_cut_off(self) -> bool:
        """Whether the others of several should not wait for this one's database."""
        return len(self.slots.workers) > 1 and self.db.is_away

    def _may_claim(self) -> bool:
        """A worker that cannot beat would lose what it claims."""
        is_beating = time.monotonic() - self.last_beat < self.lease_seconds
        return is_beating and not self.is_cut_off

    async def _has_room(self) -> bool:
        """Look for room where there was none: what a full worker has made cannot be stored."""
        if self.is_full:
            try:
                await asyncio.to_thread(reserve, self.settings.max_image_bytes)
                self.is_full = False
                log.info("worker.has_room folder=%s", tempfile.gettempdir())
            except OSError as error:
                log.error("worker.full error=%s", shortage(error))
        return not self.is_full

    async def _claim(self) -> bool:
        if self.is_full:  # since it began to go to sleep: what it gave back is not for it
            return False
        began, jobs = time.monotonic(), list[Job]()
        with self.slots.taken(self) as slots:
            if slots:  # else another cell's worker was faster
                jobs = await self.db.claim_jobs(self.worker_id, slots)
            for job in jobs:
                running = self.running[job.token] = Running(job, began, self.on_progress)
                running.task = asyncio.create_task(self.process(running))
        await asyncio.sleep(0)  # jobs first, then the next claim
        return bool(jobs)

    async def _pass_on(self) -> bool:
        """If it was woken while jobs of other cells fill the slots, have another worker woken."""
        if not self.wake.is_set() or len(self.slots.workers) == 1 or self.db.is_away:
            return False
        self.wake.clear()
        await self.db.claim_jobs(self.worker_id, 0)
        return True

    async def _sleep(self) -> None:
        """Go to sleep, and look twice more: an enqueue in flight may have seen us awake.

        Whoever wakes us marks us awake, whether or not the job is left for us: then from the top.
        """
        self.wake.clear()
        await self.db.call("sleep", self.worker_id)
        if await self._claim():
            return
        await self._pause(self.wake, random.uniform(0.25, 1.0) * SECOND_LOOK_SECONDS)
        if self.stopping.is_set() or self.wake.is_set():
            return
        if not await self._claim():
            await self._pause(self.wake, self.settings.poll_seconds * random.uniform(0.8, 1.0))

    async def _pause(self, event: asyncio.Event, seconds: float) -> None:
        """Wait for the event, a stop, or the time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0 if self.stopping.is_set() else seconds):
                await event.wait()

    def stop(self) -> None:
        """The first signal asks to stop, and has nothing wait longer; the second does not ask."""
        if self.stopping.is_set():
            force_exit()
        for event in (self.stopping, self.wake, self.slots.freed):
            event.set()

    async def beat(self) -> None:
        """One heartbeat for all jobs: progress in, lost leases and cancels out."""
        if self.news_due:
            self.news_due.cancel()
            self.news_due = None
        beating = sorted(self.running.values(), key=lambda running: running.job.job_id)
        verdicts = await self.db.heartbeat(self.worker_id, beating)
        if not self._may_claim():
            self.slots.freed.set()
        self.last_beat = time.monotonic()
        self.wake.set()  # an enqueue that met our row locked by this beat has not woken us
        for running, verdict in zip(beating, verdicts, strict=True):
            known = running.is_canceled and verdict == "canceled"
            if verdict != "ok" and not running.is_ending and not known:
                running.is_lost, running.is_canceled = verdict == "lost", verdict == "canceled"
                running.task.cancel()

    async def recover(self) -> None:
        if recovered := only(await self.db.call("recover_stale_jobs")):
            log.warning("jobs.recovered count=%s", recovered)

    async def erase(self) -> None:
        """Erase what has been kept long enough, one request at a time, until nothing is left.

        What Storage does not delete now stays on the list for another time.
        """
        try:
            while only(await self.db.call("apply_retention")) + await self._erase_files():
                pass
        except StorageRefused as error:
            log.warning("files.kept error=%s", error)
        except psycopg.Error as error:  # in a minute, not at once
            log.error("files.kept error=%s", type(error).__name__)

    async def _erase_files(self) -> int:
        erased = 0
        while rows := await self.db.call("list_expired_files", 100):  # in one request
            for bucket in {row["bucket"] for row in rows}:
                paths = [row["path"] for row in rows if row["bucket"] == bucket]
                erased += await self._erase_some(bucket, paths)
        return erased

    async def _erase_some(self, bucket: str, paths: list[str]) -> int:
        """Answer how many are gone. Of files that Storage refuses together, each is tried alone."""
        try:
            await self.storage.remove(bucket, paths)
        except StorageRefused as error:
            if error.is_outage:
                raise
            log.warning("files.kept error=%s count=%s", error, len(paths))
            if len(paths) == 1:
                return 0
            await asyncio.sleep(5)
            return sum([await self._erase_some(bucket, [path]) for path in paths])
        if kept := only(await self.db.call("forget_files", [bucket] * len(paths), paths)):
            log.warning("files.kept error=%s of %s are still there", kept, len(paths))
        log.info("files.erased bucket=%s count=%s", bucket, len(paths) - kept)
        return len(paths) - int(kept)

    async def _drain(self) -> None:
        """Let jobs and deliveries finish within the grace time; the rest are cancelled: jobs are
        released, deliveries sent again by others.
        """
        log.info("worker.stopping running=%s", len(self.running))
        jobs = sum(len(each.running) for each in self.slots.workers)
        tell_systemd("STOPPING=1", f"STATUS=ends {jobs} jobs")
        faulthandler.cancel_dump_traceback_later()  # the grace may be longer
        with contextlib.suppress(psycopg.Error):
            if not self.is_cut_off:  # or it loses a wake-up
                await self.db.call("unregister_worker", self.worker_id)
        tasks = [*(each.task for each in self.running.values()), *self.outbox.lanes]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self.settings.grace_seconds)
            for task in late:
                task.cancel()
            if late and (await asyncio.wait(late, timeout=10))[1]:
                force_exit()

    async def process(self, running: Running) -> None:
        """One job from claim to end: every way out completes, fails, releases or drops it."""
        job, started = running.job, time.monotonic()
        log.info("job.claimed job=%s attempt=%s provider=%s", job.job_id, job.attempt, job.provider)
        try:
            async with asyncio.timeout(job.deadline_seconds):
                images = await self._make(running)
            running.is_ending = True
            await self.db.complete_job(job, Jsonb(images), Jsonb(running.metrics))
            done = (job.job_id, len(images), time.monotonic() - started)
            log.info("job.completed job=%s images=%s seconds=%.2f", *done)
        except LeaseLost:
            await finish_first(self._drop(running))
        except asyncio.CancelledError:
            await finish_first(self._give_up(running))
        except ProviderDown as error:
            await finish_first(self._pause_provider(running, error))
        except Exception as error:
            await finish_first(self._fail(running, as_job_error(error)))
        finally:
            del self.running[job.token]
            self.slots.freed.set()
            if job.max_running:  # it may have kept another from being claimed
                self.wake.set()
            self.outbox.due.set()

    async def _make(self, running: Running) -> list[dict[str, Any]]:
        """Have the provider make the images, and store them."""
        job, outputs = running.job, []
        if job.base_url is not None:
            key = self.settings.keys.get(job.secret or "")
            running.provider = Provider(self.storage.http, vars(job), key)
        elif job.provider != "preview":
            raise JobError("internal", f"there is no provider {job.provider}, or no recipe of it")
        try:
            outputs = await (self._follow(running) if running.provider else self._draw(running))
        except asyncio.CancelledError:  # by the user, the deadline, a lost lease, or a stop
            if running.is_canceled or not (running.is_lost or self.stopping.is_set()):
                await self._stop(running)
            raise
        read = running.provider.read if running.provider else self.preview.read
        outputs = [partial(read, output) for output in outputs[: job.image_count]]
        return await self._store(running, outputs)

    async def _store(self, running: Running, outputs: list[Read]) -> list[dict[str, Any]]:
        """Store what is good, numbered without gaps. Raises JobError, the first, if nothing is."""
        job = running.job
        images: list[dict[str, Any]] = []
        failures: list[JobError] = []
        for output in outputs:
            try:
                images.append(await self.storage.store(job, len(images), output))
            except JobError as error:
                if error.code == "storage_unavailable":  # another attempt will have them all
                    raise
                what = (job.job_id, error.code, error.reason)
                log.warning("output.lost job=%s code=%s reason=%r", *what)
                failures.append(error)
            except asyncio.CancelledError:
                if not images or running.is_lost or running.is_canceled or self.stopping.is_set():
                    raise
                break  # it was the deadline
        if not images:
            raise failures[0]
        return images

    async def _draw(self, running: Running) -> list[Any]:
        job = running.job
        running.metrics = {"is_billed": False}
        drawn = await self.preview.make(
            job, await self._with_sources(self.preview, job), running.report
        )
        if await self.db.report_progress(job, "storing", None) == "canceled":
            self._cancel(running)
        running.metrics = {"provider_seconds": self.preview.seconds, "images": len(drawn)}
        return drawn

    async def _follow(self, running: Running) -> list[Any]:
        """Send what SQL says and hand in what is answered, until there are outputs."""
        step = await self._next(running, None)
        while step["do"] in ("send", "sources"):
            await asyncio.sleep(step["wait"] * random.uniform(1.0, 1.2))
            if step["do"] == "sources":
                step = await self._next(running, await self._sources(running, step))
            elif step["step"] != "create":
                step = await self._send(running, step)
            elif time.monotonic() - running.held_at > CREATE_WITHIN_SECONDS:
                step = await self._next(running, running.said)  # proves the lease once more
            else:  # together with saving the id, also when the worker stops meanwhile
                running.metrics = {}
                step = await finish_first(self._send(running, step))
        match step["do"]:
            case "store":
                return list(step["outputs"])
            case "cancel":
                self._cancel(running)
            case "drop":
                raise LeaseLost
            case "pause":
                raise ProviderDown(step)
        asked = step.get("retry_after")
        wait = None if asked is None else float(asked)  # a list of them is of one type
        detail = step.get("detail") or step["reason"]
        raise JobError(step["code"], detail, wait, reason=step["reason"])

    def _cancel(self, running: Running) -> None:
        """As if a heartbeat had said so."""
        running.is_canceled = True
        raise asyncio.CancelledError

    async def _send(self, running: Running, step: dict[str, Any]) -> dict[str, Any]:
        assert running.provider
        answer = await running.provider.send(step["request"])
        if answer["status"] not in range(200, 300):
            what = (running.job.job_id, running.job.provider, step["step"], answer["status"])
            log.warning("provider.answered job=%s provider=%s step=%s status=%s", *what)
        of_step = {"step": step["step"], "memo": step["memo"], "provider": running.job.provider}
        return await self._next(running, of_step | answer)

    async def _next(self, running: Running, said: dict[str, Any] | None) -> dict[str, Any]:
        """Ask what to do, and know what stops the job, also when it is stopped meanwhile."""
        running.said, running.held_at = said, time.monotonic()

        async def ask() -> dict[str, Any]:
            step: dict[str, Any] = await self.db.next_step(running.job, Jsonb(said))
            running.cancel = step.get("cancel") or running.cancel
            return step

        step = await finish_first(ask())
        if (metrics := step.get("metrics")) is not None:
            running.metrics = metrics
        if step.get("is_found"):
            log.warning("job.found job=%s", running.job.job_id)
        if (percent := step.get("percent")) is not None:
            running.report(percent)
        return step

    async def _sources(self, running: Running, step: dict[str, Any]) -> dict[str, Any]:
        assert running.provider
        running.provider.way = step["upload"]
        try:
            given = await self._with_sources(running.provider, running.job)
        except UploadRefused as refused:
            return {"step": "upload", "memo": step["memo"], **refused.args[0]}
        return {"step": "sources", "input": given}

    async def _stop(self, running: Running) -> None:
        """Stop what was bought, best effort, and learn what it costs."""
        answer: dict[str, Any] | None = None
        with contextlib.suppress(JobError, LeaseLost, psycopg.Error):
            for request in running.cancel:
                assert running.provider
                answer = await running.provider.send(request)
            if answer:
                await self._next(running, {"step": "cancel", **answer})

    async def _with_sources(self, provider: Provider | Preview, job: Job) -> dict[str, Any]:
        """The provider's input with an address in place of each source image's path."""
        provider_input = dict(job.provider_input)
        for name in job.image_inputs:
            given = provider_input.get(name)
            if isinstance(given, str):
                provider_input[name] = await self._source(provider, job, given)
            elif isinstance(given, list):
                provider_input[name] = [await self._source(provider, job, path) for path in given]
        return provider_input

    async def _source(self, provider: Provider | Preview, job: Job, path: str) -> str:
        """An address of a source image that has proven to be one: its file's or that of a copy."""
        try:
            with tempfile.TemporaryFile() as file:
                await self.storage.fetch(path, file)
                kind, is_as_given = await self.storage.pictures.look_at_source(file)
                is_public = provider.fetches_sources and self.storage.is_reachable_from_outside
                if is_public and is_as_given:
                    return await self.storage.sign(path, job.deadline_seconds)
                # Its user's name for it may be any, and is nobody's business.
                extension, content_type = FORMATS[kind]
                return await provider.upload(f"{uuid4().hex}.{extension}", content_type, file)
        except NoPicture as error:
            raise JobError("invalid_input", f"source: {error}") from None
        except httpx.HTTPError as error:
            is_down = isinstance(error, httpx.TransportError)
            code = "storage_unavailable" if is_down else "internal"
            raise JobError(code, f"source: {type(error).__name__}") from None

    async def _fail(self, running: Running, error: JobError) -> None:
        running.is_ending = True
        job = running.job
        self.is_full = self.is_full or error.code == "worker_full"
        try:
            detail, metrics = self.db.quoted(error.detail), Jsonb(running.metrics)
            outcome = await self.db.fail_job(job, error.code, detail, error.retry_after, metrics)
            what = (outcome, job.job_id, error.code, error.reason)
            log.warning("job.%s job=%s code=%s reason=%r", *what)
        except LeaseLost:
            log.warning("job.lost job=%s", job.job_id)

    async def _pause_provider(self, running: Running, error: ProviderDown) -> None:
        """The provider refused the account: put the job back and let its like wait."""
        running.is_ending = True
        job = running.job
        what = (job.provider, job.job_id, error.is_sure)
        log.error("provider.refused provider=%s job=%s is_sure=%s", *what)
        with contextlib.suppress(LeaseLost):
            whose = None if error.is_sure else job.user_id
            said = (job.provider, 60, self.db.quoted(error.detail), whose)  # seconds
            if only(await self.db.insist("pause_provider", *said)):  # no job is to blame
                await self.db.insist("release_job", job.job_id, job.token, error.may_have_bought)
            else:
                await self._fail(running, error)

    async def _drop(self, running: Running) -> None:
        """The lease is lost. If the job went with its user, nobody else stops what it bought."""
        job = running.job
        log.warning("job.lost job=%s", job.job_id)
        if running.cancel:
            with contextlib.suppress(psycopg.Error):
                if await self.db.heartbeat(self.worker_id, [running]) == ["canceled"]:
                    await self._stop(running)

    async def _give_up(self, running: Running) -> None:
        """The job was stopped here: by a lost lease, by its user, or because the worker stops."""
        job = running.job
        if running.is_lost:
            log.warning("job.lost job=%s", job.job_id)
            return
        running.is_ending = True
        with contextlib.suppress(LeaseLost):
            if running.is_canceled:
                await self.db.insist("cancel_job", job.job_id, job.token, Jsonb(running.metrics))
            else:
                resumes = "is_asked" not in running.metrics
                await self.db.insist("release_job", job.job_id, job.token, resumes)
        log.info("job.%s job=%s", "canceled" if running.is_canceled else "released", job.job_id)


def reserve(size: int) -> None:
    """Raises OSError unless a temporary file can have this many bytes."""
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size)


def shortage(error: OSError) -> str:
    """What there is none of, without the names of files."""
    number = error.errno or 0
    return f"{errno.errorcode.get(number, number)} {os.strerror(number)}"


def as_job_error(error: Exception) -> JobError:
    """What fail_jobs is told. A library's message may hold addresses or input: only its type."""
    if isinstance(error, JobError):
        return error
    if isinstance(error, TimeoutError):
        return JobError("timeout", "deadline passed")
    if isinstance(error, OSError) and error.errno in SHORTAGES:
        return JobError("worker_full", shortage(error))
    frame = traceback.extract_tb(error.__traceback__)[-1]
    detail = f"{type(error).__name__} at {frame.name}:{frame.lineno}"
    log.error("job.unexpected error=%s", detail)
    return JobError("internal", detail)


# --- start and stop -----------------------------------------------------------------------------


def version() -> str:
    """Version of the installed project; 0 when worker.py was copied by itself."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("darkroom")
    return "0"


def tell_systemd(*assignments: str) -> None:
    """Say that all is well, and STATUS=… or the like, to systemd where it started this."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)
            try:
                said = "\n".join([assignments[0], "WATCHDOG=1", *assignments[1:]])
                channel.sendto(said.encode(), re.sub("^@", "\0", address))
            except OSError as error:
                log.warning("systemd.unreachable error=%s", error)


def force_exit() -> None:
    """End now. Jobs in flight are left to their leases."""
    log.error("worker.forced")
    logging.shutdown()
    os._exit(EXIT_FORCED)


async def serve(settings: Settings) -> int:
    """Wire everything together and run one worker; for several cells one for each."""
    pictures, workers = Pictures(), list[Worker]()
    async with httpx.AsyncClient(timeout=HTTP_TIMEOUT) as http:
        preview = Preview(pictures, settings.preview_seconds, settings.preview_failure_rate)
        storage = Storage(settings, http, pictures)
        for name, url in settings.databases.items():
            db = Database(url, settings.secrets, name)
            workers.append(Worker(settings, db, preview, storage, Outbox(settings, db, http)))
        for each in workers[1:]:
            each.share_with(workers[0])

        def stop() -> None:
            for worker in workers:
                worker.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        try:
            pictures.start()  # meanwhile, for the first job
            were_let_in = await asyncio.gather(*map(tend, workers))
        finally:
            pictures.close()
    return EXIT_OK if any(were_let_in) else EXIT_CONFIG


async def tend(worker: Worker) -> bool:
    """Run the worker of one cell; answer whether its database let it in.

    What goes wrong with one of several is not the others' business: it is begun again.
    """
    cell.set(worker.db.name)
    await worker.db.pool.open()
    try:
        for attempt in itertools.count():
            try:
                await worker.run()
                break
            except ConfigError as error:
                log.error("worker.refused %s", error)
                worker.status = f"is refused: {error}"
                return False
            except Exception:
                if not worker.db.name:
                    raise
                log.critical("worker.crashed", exc_info=True)
                await worker._pause(worker.stopping, backoff(attempt + 3))
    finally:
        await worker.db.pool.close()
    return True


Findings = AsyncGenerator[tuple[str, str, str], None]  # ok, note or wrong; part; what is found


async def check_database(db: Database) -> Findings:
    """Rights, pg_cron and Storage's policies, as the database itself sees them."""
    async with await db.connect():  # says why it cannot, which the pool keeps for itself
        await db.pool.open(wait=True, timeout=15)
    try:
        for row in await db.call("check_setup", list(Database.FUNCTIONS)):
            yield row["verdict"], row["part"], row["detail"]
    except (Outdated, psycopg.errors.InvalidSchemaName):
        yield "wrong", "database", "no Darkroom of this version here: apply supabase/migrations"
    except psycopg.errors.InsufficientPrivilege:
        yield "wrong", "database", "DATABASE_URL: its role is not darkroom_worker"


async def check_listen(db: Database) -> Findings:
    if not db.pool.closed:  # else there is no database
        began = time.monotonic()
        async with await db.connect() as connection:
            await db.hear(connection, f"darkroom_check_{uuid4().hex}", lambda _: None)
        yield "ok", "listen", f"a NOTIFY arrived within {1000 * (time.monotonic() - began):.0f} ms"


async def check_storage(storage: Storage) -> Findings:
    """Write a file where images go, and delete it again."""
    path = f"darkroom-check/{uuid4()}.bin"
    await storage._upload(path, io.BytesIO(b"check"), INERT_TYPE)
    await storage.remove(BUCKET, [path])
    left = await storage.http.get(f"{storage.base_url}/{path}", headers=storage.headers)
    if left.is_success:
        yield "wrong", "storage", f"{BUCKET}/{path} was not deleted"
    else:
        yield "ok", "storage", f"a file was written to bucket {BUCKET} and deleted"


async def check_providers(
    databases: Iterable[Database], http: httpx.AsyncClient, keys: Mapping[str, str]
) -> Findings:
    """Whether each key opens its account; nothing is bought."""
    rows: dict[str, dict[str, Any]] = {}
    said_before = (Outdated, psycopg.errors.InvalidSchemaName, psycopg.errors.InsufficientPrivilege)
    for db in databases:
        with contextlib.suppress(*said_before):
            known = [] if db.pool.closed else await db.call("list_providers")
            rows |= {row["name"]: row for row in known}
    for name, row in rows.items():
        secret = row["secret"]
        if secret and secret not in keys:
            yield "note", name, f"{secret} is not set: its jobs are not taken here"
        elif not row["account"]:
            yield "note", name, "nothing but a job can tell whether it works"
        else:
            answer = await Provider(http, row, keys.get(secret)).send(row["account"])
            what = answer.get("error") or f"HTTP {answer['status']}"
            if what == "HTTP 200":
                yield "ok", name, "the key opens the account"
            elif answer["status"] in (401, 403):
                yield "wrong", name, f"{secret}: the key is refused: {what}"
            else:
                yield "wrong", name, f"{row['base_url']}: no answer to trust: {what}"


async def check(settings: Settings) -> int:
    """Try all that a worker needs, and change nothing; print what is found, a line each."""
    is_well, databases = True, settings.databases.items()
    dbs = [Database(url, settings.secrets, name) for name, url in databases]

    def say(verdict: str, part: str, detail: object) -> None:
        nonlocal is_well
        is_well = is_well and verdict != "wrong"
        which = f"{cell.get()}: " if cell.get() else ""
        print(f"{verdict:5}  {part:9}  {which}{' '.join(str(detail).split())}", flush=True)

    async with httpx.AsyncClient(timeout=HTTP_TIMEOUT) as http:
        looks = [
            look
            for db in dbs
            for look in (
                (db.name, "database", check_database(db), "DATABASE_URL"),
                (db.name, "listen", check_listen(db), "DATABASE_URL"),
            )
        ] + [
            ("", "storage", check_storage(Storage(settings, http, Pictures())), "SUPABASE_URL"),
            ("", "providers", check_providers(dbs, http, settings.keys), "provider"),
        ]
        for name, part, look, variable in looks:
            cell.set(name)
            try:
                async for finding in look:
                    say(*finding)
            except (JobError, StorageRefused, Deaf) as error:
                say("wrong", part, error)
            except psycopg.Error as error:
                say("wrong", part, f"{type(error).__name__}: {error}")
            except httpx.HTTPError as error:
                say("wrong", part, f"{variable}: {type(error).__name__}")
        for db in dbs:
            await db.pool.close()
    return EXIT_OK if is_well else EXIT_ERROR


def main(arguments: Iterable[str] = ()) -> int:
    """Run until told to stop, or `check`; answer the exit code."""
    parser = argparse.ArgumentParser(
        "worker.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=["check"], help="without it: work")
    is_check = parser.parse_args([*arguments]).command == "check"
    output = logging.StreamHandler(sys.stderr)
    output.setFormatter(SafeFormatter())
    logging.basicConfig(handlers=[output])
    try:
        settings = Settings(with_credentials(os.environ))
    except ConfigError as error:
        log.error("worker.misconfigured %s", error)
        return EXIT_CONFIG
    output.setFormatter(SafeFormatter(settings.secrets))
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # it tells of each try to connect
    log.setLevel(settings.log_level)
    try:
        return asyncio.run(check(settings) if is_check else serve(settings))
    except Exception:
        log.critical("worker.crashed", exc_info=True)
        return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
