"""Darkroom's worker: claims jobs from PostgreSQL, has a provider make the images, stores them.

    register, listen
    claim a job for every free slot, and run each:
        create at the provider -> checkpoint its id -> wait -> download -> upload -> complete
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
                            pgbouncer=true and the like, as platforms show it, it is taken, too
    SUPABASE_URL *          where /storage/v1 is
    SUPABASE_SERVICE_KEY *  service_role or secret key, for uploads
    REPLICATE_API_TOKEN     without it, jobs for Replicate fail
    REPLICATE_API_URL       https://api.replicate.com/v1
    REPLICATE_SETTLE_SECONDS  20      how long a create whose answer was lost is looked for
    WORKER_SLOTS            4         jobs at once
    WORKER_GRACE_SECONDS    30        to finish jobs after SIGTERM
    WORKER_POLL_SECONDS     5         backstop: longest wait without a look at the queue
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

import asyncio
import contextlib
import errno
import hashlib
import io
import ipaddress
import json
import logging
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar
from urllib.parse import quote, urlencode, urlsplit
from uuid import UUID, uuid4

import httpx
import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from outbox import Outbox, asked_seconds
from pictures import NoPicture, Pictures

BUCKET = "generations"
RECOVERY_SECONDS = 5.0  # between two looks for stale jobs; with the lease, how long one waits
SECOND_LOOK_SECONDS = 0.2  # at most, between going to sleep and the last claim before waiting
LISTEN_ANSWER_SECONDS = 3.0  # within which a NOTIFY to ourselves must arrive
CALL_SECONDS = 15.0  # for one call; later, whoever stands in between may have lost the connection
POOL_SIZE = 6  # connections at most: each kind of call for many jobs has one under way
RETRY_BASE_SECONDS, RETRY_CAP_SECONDS = 0.25, 10.0  # backoff between repeated calls
DETAIL_CHARS = 500  # of others' words that are kept for operators
QUOTED_CHARS = 5_000  # of them that are looked through for secrets first, which come out whole so
PROVIDER_POLL_SECONDS = 0.5  # at first, between two looks at a prediction; later up to 3
HTTP_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
HTTP_TRIES = 4  # for requests that may be repeated
CHUNK_BYTES = 64 * 1024  # times several for each job in flight
DOWNLOAD_SECONDS = 120.0  # at most, for one output
MAX_REDIRECTS = 3
MAX_PAGES = 50  # of 100 predictions each, when a lost create is looked for
MAX_COUNT = 1_000_000  # of images or seconds that a provider is believed to have taken
REFUSALS = (401, 402, 403)  # of who may: the key, the account's credit, this model or this file
CREATE_WITHIN_SECONDS = 5.0  # of holding the lease; later, another worker may have it
PROVIDER_JOB_ID = re.compile(r"[\w.:-]{1,200}", re.ASCII)  # becomes part of addresses
DELIVERY_HOST = re.compile(r"([a-z0-9-]+\.)*replicate\.delivery")  # its OpenAPI file, "output"
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
T = TypeVar("T")
Connection = psycopg.AsyncConnection[Any]


# --- settings -----------------------------------------------------------------------------------


class ConfigError(Exception):
    """A variable of the environment is missing or wrong; the message begins with its name."""


class Settings:
    """What the environment says, checked; an empty variable counts as unset. Raises ConfigError."""

    def __init__(self, env: Mapping[str, str]) -> None:
        env = {
            "REPLICATE_API_URL": "https://api.replicate.com/v1",
            "EXPO_PUSH_URL": "https://exp.host/--/api/v2/push/send",
            "LOG_LEVEL": "INFO",
            **{name: value for name, value in env.items() if value},
        }
        self.database_url = _url(env, "DATABASE_URL", "postgres", "postgresql")
        self.supabase_url = _url(env, "SUPABASE_URL", "http", "https").rstrip("/")
        self.supabase_service_key = _required(env, "SUPABASE_SERVICE_KEY")
        self.replicate_api_token = env.get("REPLICATE_API_TOKEN")
        self.replicate_api_url = _url(env, "REPLICATE_API_URL", "http", "https").rstrip("/")
        self.replicate_settle_seconds = _number(env, "REPLICATE_SETTLE_SECONDS", 20, 0, 600)
        self.slots = int(_number(env, "WORKER_SLOTS", 4, 1, 1000))
        self.grace_seconds = _number(env, "WORKER_GRACE_SECONDS", 30, 0, 3600)
        self.poll_seconds = _number(env, "WORKER_POLL_SECONDS", 5, 0.1, 60)
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
    def secrets(self) -> list[str]:
        """What nobody else may read, in every spelling it may come back in."""
        url = libpq_url(self.database_url)
        password = psycopg.conninfo.conninfo_to_dict(url).get("password")
        keys = [self.supabase_service_key, self.replicate_api_token, self.expo_access_token]
        known = [str(each) for each in (self.database_url, url, password, *keys) if each]
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
        raise ConfigError(f"{name}: not a {schemes[0]}:// address")
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


class UnknownOutcome(Exception):
    """A create was sent and its answer lost: it may have been bought."""


class JobError(Exception):
    """The attempt failed, with a code of private.error_codes. The detail is for operators.

    The reason is what the log says: without the words of others, which may repeat a prompt.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        retry_after: float | None = None,
        metrics: dict[str, Any] | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(f"{code}: {detail}")
        self.code, self.retry_after, self.metrics = code, retry_after, metrics or {}
        self.reason = detail if reason is None else reason
        # As PostgreSQL can store it: providers' texts may hold NUL or broken surrogates.
        self.detail = detail.encode(errors="replace").decode().replace("\0", "�")


class Refused(JobError):
    """The provider refuses this job, or its model, or our account."""

    def __init__(self, detail: str, reason: str, *, may_have_bought: bool) -> None:
        metrics = {} if may_have_bought else {"is_asked": False}
        super().__init__("provider_refused", detail, metrics=metrics, reason=reason)
        self.may_have_bought = may_have_bought


class ProviderDown(Refused):
    """It is our account: its jobs wait, and none is to blame. If sure, everybody's."""

    is_sure = False


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
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self.secrets = secrets

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record), self.secrets)


def only(rows: list[dict[str, Any]]) -> Any:
    """The one value of the one row that a function answered."""
    ((answer,),) = [row.values() for row in rows]
    return answer


def backoff(attempt: int) -> float:
    """Seconds to wait before try number attempt + 1: exponential, with jitter."""
    longest = RETRY_BASE_SECONDS * 2.0 ** min(attempt, 16)  # 2.0**1024 raises
    return random.uniform(0.5, 1.0) * min(RETRY_CAP_SECONDS, longest)


def fingerprint(provider_input: Any) -> bytes:
    """SHA-256 of a JSON value. 1 is 1.0 there, but not true; null is not nothing."""

    def number(text: str) -> float:
        return int(value) if (value := float(text)).is_integer() else value

    plain = json.loads(json.dumps(provider_input), parse_float=number)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).digest()


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
        *("adopt_provider_job", "apply_retention", "begin_creates", "cancel_job", "check_setup"),
        *("checkpoint_jobs", "claim_deliveries", "claim_jobs", "claim_receipts", "complete_jobs"),
        *("due_lanes", "fail_jobs", "finish_delivery", "finish_receipts", "forget_files"),
        *("heartbeat", "list_expired_files", "pause_provider", "recall_create"),
        *("recover_stale_jobs", "register_worker", "release_job", "report_progress", "sleep"),
        *("unregister_worker",),
    )

    def __init__(self, url: str, secrets: Iterable[str] = ()) -> None:
        self.url, self.secrets = libpq_url(url), secrets
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
        self.begin_create = Batch(self.insist, "begin_creates")
        self.checkpoint = Batch(self.insist, "checkpoint_jobs")
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

    async def register_worker(self, slots: int) -> dict[str, Any]:
        """Raises ConfigError if the database itself says that the role is another one."""
        try:
            rows = await self.call("register_worker", socket.gethostname(), slots, version())
        except psycopg.errors.InsufficientPrivilege:
            async with await self.connect() as connection:
                query = "select pg_has_role('darkroom_worker', 'usage')"
                if await (await connection.execute(query)).fetchone() == (False,):
                    raise ConfigError("DATABASE_URL: its role is not darkroom_worker") from None
            raise
        return dict(rows[0])

    async def claim_jobs(self, worker_id: int, slots: int) -> list[Job]:
        return [Job(**row) for row in await self.call("claim_jobs", worker_id, slots)]

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


@dataclass(frozen=True)
class Result:
    """What a provider made. Each output is something its own read() can stream."""

    outputs: list[Any]
    metrics: dict[str, Any]  # as complete_jobs takes them


class Preview:
    """Draws placeholder pictures, so that everything runs without a key.

    A prompt with [fail:CODE] in it fails with that code, as a real provider might.
    """

    FAILURE = re.compile(
        r"\[fail:(moderated|invalid_input|provider_(?:busy|timeout|error)|result_lost)\]"
    )
    settle_seconds = 0.0  # nothing is bought
    fetches_sources = False

    def __init__(self, pictures: Pictures, seconds: float, failure_rate: float) -> None:
        self.pictures, self.seconds, self.failure_rate = pictures, seconds, failure_rate

    async def create(self, job: Job, provider_input: dict[str, Any]) -> str:
        self.pictures.start()  # meanwhile
        return f"preview-{job.token}{provider_input.get('image') or ''}"

    async def find(self, job: Job, since: datetime, sent: bytes | None = None) -> list[str]:
        return []

    async def upload(self, name: str, file: IO[bytes]) -> str:
        """Keep only the blurhash of a source: as its address, which goes into the job's id."""
        try:
            source = await self.pictures.inspect(file, 0)
        except NoPicture as error:
            raise JobError("invalid_input", f"source: {error}") from None
        if not source.blurhash:
            raise JobError("invalid_input", f"source: takes too much {source.lacks}")
        return f"-{source.blurhash.encode().hex()}"

    async def result(self, job: Job, provider_job_id: str, report: Callable[[int], None]) -> Result:
        for percent in range(0, 100, 10):
            report(percent)
            await asyncio.sleep(self.seconds / 10)
        prompt, seed = job.provider_input["prompt"], int(job.provider_input["seed"])
        if wanted := self.FAILURE.search(prompt):
            raise JobError(wanted[1], "asked for by the prompt")
        if random.random() < self.failure_rate:
            raise JobError("provider_error", "PREVIEW_FAILURE_RATE")
        size = (int(job.provider_input["width"]), int(job.provider_input["height"]))
        _, _, source = provider_job_id.removeprefix("preview-").partition("-")
        wish = (prompt, size, bytes.fromhex(source).decode())
        outputs = [await self.pictures.draw(*wish, seed + n) for n in range(job.image_count)]
        return Result(outputs, {"provider_seconds": self.seconds, "images": len(outputs)})

    async def read(self, output: bytes) -> AsyncGenerator[bytes, None]:
        yield output

    async def cancel(self, provider_job_id: str) -> dict[str, Any]:
        return {"is_billed": False}


class Replicate:
    """Replicate's HTTP API: create without waiting, then poll (its OpenAPI file, /predictions).

    Every method may raise JobError with one of our codes, or ProviderDown.
    """

    MODERATION = re.compile(r"nsfw|sensitive|moderat|safety|\bE005\b", re.IGNORECASE)
    # A line of a progress bar as tqdm draws it: " 50%|█████     | 2/4 [00:01<00:01, ...". Those
    # with words before are of downloads and the like.
    BAR = re.compile(r"(?:^|[\r\n]) *\d{1,3}%\|[^|\r\n]*\| *(\d{1,9})/(\d{1,9}) \[")

    fetches_sources = True  # itself, by a signed address, where Storage can be reached from outside

    def __init__(
        self, http: httpx.AsyncClient, base_url: str, token: str, settle_seconds: float = 20.0
    ) -> None:
        self.http, self.base_url = http, base_url
        self.settle_seconds = settle_seconds  # until what a lost create bought must have shown
        self.headers = {"Authorization": f"Bearer {token}"}
        self.bars: dict[tuple[str, int], int] = {}  # of a model's last job of so many images

    async def create(self, job: Job, provider_input: dict[str, Any]) -> str:
        """Create a prediction without waiting for it; answer its id. Replicate knows no idempotency
        key. Raises UnknownOutcome: never repeat it.
        """
        body = {"version": job.provider_ref, "input": provider_input}
        headers = {**self.headers, "Cancel-After": f"{max(5, int(job.deadline_seconds))}s"}
        try:
            response = await self.http.post(
                f"{self.base_url}/predictions", json=body, headers=headers
            )
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise JobError("provider_busy", f"create: {type(error).__name__}") from None
        except httpx.HTTPError as error:
            raise UnknownOutcome(type(error).__name__) from None
        status, reason = response.status_code, f"create: HTTP {response.status_code}"
        detail = f"{reason}: {response.text[:QUOTED_CHARS]}"
        if status in REFUSALS:
            raise await self._refusal(response, "create", may_have_bought=False)
        if status == 429:
            raise JobError("provider_busy", detail, retry_after_seconds(response), reason=reason)
        if status in (400, 422):
            raise JobError("invalid_input", detail, reason=reason)
        if status == 408 or status >= 500:
            raise UnknownOutcome(f"HTTP {status}")
        if not response.is_success:
            raise JobError("internal", detail, reason=reason)
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            prediction = response.json()
            said = set(addresses(prediction.get("input")))  # others': it answers somebody else
            if PROVIDER_JOB_ID.fullmatch(prediction["id"]) and said <= set(
                addresses(provider_input)
            ):
                return str(prediction["id"])
        raise UnknownOutcome(f"HTTP {status} without an id of its own")

    async def _refusal(
        self, response: httpx.Response, step: str, *, may_have_bought: bool
    ) -> Exception:
        """Whose refusal it is: the account's, or, where that is open, this job's or its model's."""
        status = response.status_code
        reason = f"{step}: HTTP {status}"
        detail = f"{reason}: {response.text[:QUOTED_CHARS]}"
        try:
            account = await self.http.get(f"{self.base_url}/account", headers=self.headers)
            is_sure = account.status_code in REFUSALS
        except httpx.HTTPError:
            is_sure = False
        if status == 403 and not is_sure:
            return Refused(detail, reason, may_have_bought=may_have_bought)
        error = ProviderDown(detail, reason, may_have_bought=may_have_bought)
        error.is_sure = is_sure  # the account of one without credit opens all the same
        return error

    async def find(self, job: Job, since: datetime, sent: bytes | None = None) -> list[str]:
        """Ids of what was created since then from exactly the job's input, oldest first.

        If sent is given, from the input that has this fingerprint. Reads the list of predictions
        back to a minute before.
        """
        sent = sent or fingerprint(job.provider_input)
        after = (since - timedelta(minutes=1)).astimezone(UTC).isoformat()
        url = f"{self.base_url}/predictions?{urlencode({'created_after': after})}"
        found: list[str] = []
        for _ in range(MAX_PAGES):
            page = await self._get(url)
            ids = [each["id"] for each in page["results"] if self._is_of(each, job, sent)]
            found += filter(PROVIDER_JOB_ID.fullmatch, map(str, ids))
            if not page.get("next"):
                return found[::-1]
            url = f"{self.base_url}/predictions?{urlsplit(page['next']).query}"
        raise JobError("timeout", "create: outcome unknown: too many predictions to look through")

    @staticmethod
    def _is_of(prediction: dict[str, Any], job: Job, sent: bytes) -> bool:
        """Same model, same whole input: less could be another's. None is left of an old one.

        A version is a model by itself. Models that run by name show none that could be asked for.
        """
        model, _, wanted = job.provider_ref.partition(":")
        version, given = str(prediction.get("version")), prediction.get("input")
        is_by_name = prediction.get("model") == model and not re.fullmatch("[0-9a-f]{64}", version)
        is_same = version == wanted if wanted else is_by_name
        return is_same and bool(given) and fingerprint(given) == sent

    async def upload(self, name: str, file: IO[bytes]) -> str:
        """Hand over a source image through the files API; answer its address."""
        file.seek(0)
        try:
            response = await self.http.post(
                f"{self.base_url}/files", files={"content": (name, file)}, headers=self.headers
            )
        except httpx.HTTPError as error:
            raise JobError("internal", f"files: {type(error).__name__}") from None
        if response.status_code in REFUSALS:  # an earlier attempt may have bought
            raise await self._refusal(response, "files", may_have_bought=True)
        if not response.is_success:
            raise JobError("internal", f"files: HTTP {response.status_code}")
        return str(response.json()["urls"]["get"])

    async def result(self, job: Job, provider_job_id: str, report: Callable[[int], None]) -> Result:
        """Wait for the end, reporting percent on the way. May be called again after a crash."""
        attempt = 0
        while True:
            url = f"{self.base_url}/predictions/{provider_job_id}"
            prediction = await self._get(url, may_be_gone=True)
            if prediction.get("id", provider_job_id) != provider_job_id:
                prediction = {}  # the answer to another's question
            status = prediction.get("status")  # one we do not know is one more to wait for
            self._follow(job, str(prediction.get("logs") or ""), status == "succeeded", report)
            metrics = self._metrics(prediction)
            if status == "succeeded":
                if prediction.get("data_removed") or prediction.get("output") is None:
                    raise JobError("result_lost", "the output was removed", metrics=metrics)
                outputs = list(addresses(prediction["output"]))
                return Result(outputs, {"images": min(len(outputs), MAX_COUNT)} | metrics)
            if status in ("failed", "canceled", "aborted"):  # nothing to resume
                detail = str(prediction.get("error") or f"prediction {status}")[:QUOTED_CHARS]
                moderated = status == "failed" and self.MODERATION.search(detail)
                code = "moderated" if moderated else "provider_error"
                raise JobError(code, detail, metrics=metrics, reason=f"prediction {status}")
            pause = min(3.0, PROVIDER_POLL_SECONDS * 1.2**attempt)
            await asyncio.sleep(pause * random.uniform(0.8, 1.0))
            attempt += 1

    def _follow(self, job: Job, logs: str, is_over: bool, report: Callable[[int], None]) -> None:
        """Report the percentage of the whole from the progress bars in the logs.

        Some models draw one bar for each image, some one for all, some two: as many as the last
        time are expected; at first, one for each image.
        """
        bars, done, total = 0, 0, 0
        for found in self.BAR.finditer(logs[-200_000:]):
            before = (done, total)
            done, total = int(found[1]), int(found[2])
            bars += not bars or done < before[0] or total != before[1]
        key = (job.provider_ref, job.image_count)
        if bars and total:
            expected = max(bars, self.bars.get(key, job.image_count))
            report(min(100, int(100 * (bars - 1 + done / total) / expected)))
        if bars and is_over:
            self.bars[key] = bars

    @staticmethod
    def _metrics(prediction: dict[str, Any]) -> dict[str, Any]:
        """What a prediction that has ended is billed by; what failed by itself costs nothing."""
        said = prediction.get("metrics")
        said = said if isinstance(said, dict) else {}
        known: dict[str, Any] = {}
        for ours, theirs in (
            ("provider_seconds", "predict_time"),
            ("images", "image_output_count"),
            ("images", "image_count"),
        ):
            if isinstance(number := said.get(theirs), int | float) and 0 < number <= MAX_COUNT:
                known[ours] = number + 0
        if prediction.get("status") in ("failed", "aborted"):
            known["is_billed"] = False
        return known

    async def _get(self, url: str, *, may_be_gone: bool = False) -> dict[str, Any]:
        """Read, however long it takes: the job's deadline ends it.

        A single 404 proves nothing, and what it would prove is that we may buy again.
        """
        attempt = 0
        while True:
            with contextlib.suppress(httpx.TransportError, json.JSONDecodeError):
                response = await self.http.get(url, headers=self.headers)
                if response.is_success:
                    return dict(response.json())
                if response.status_code == 404 and may_be_gone and attempt >= HTTP_TRIES:
                    raise JobError("result_lost", "no such prediction")
                if response.status_code in REFUSALS:
                    raise await self._refusal(response, "poll", may_have_bought=True)
                log.warning("replicate.retry status=%s", response.status_code)
            await asyncio.sleep(backoff(attempt))
            attempt += 1

    async def read(self, output: str) -> AsyncGenerator[bytes, None]:
        """Download from Replicate's own hosts only: outputs come from third-party code.

        Nothing packed: a few bytes, packed twice, unpack to gigabytes at once.
        """
        url, plain = self._allowed(output), {"accept-encoding": "identity"}
        for _ in range(MAX_REDIRECTS + 1):
            async with self.http.stream("GET", url, headers=plain) as response:
                if response.has_redirect_location:
                    url = self._allowed(response.headers["location"], url)
                    continue
                if response.status_code in (404, 410):
                    raise JobError("result_lost", f"output: HTTP {response.status_code}")
                if not response.is_success:
                    raise JobError("internal", f"output: HTTP {response.status_code}")
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise JobError("provider_error", "output: packed, although not asked for")
                async for chunk in response.aiter_bytes(CHUNK_BYTES):
                    yield chunk
                return
        raise JobError("provider_error", "output: too many redirects")

    def _allowed(self, address: str, base: httpx.URL | None = None) -> httpx.URL:
        """The address if it may be fetched, read by the parser that fetches it."""
        try:
            url = base.join(address) if base else httpx.URL(address)
        except (httpx.InvalidURL, ValueError):
            raise JobError("provider_error", "output: not an address") from None
        api = httpx.URL(self.base_url)
        delivered = url.scheme == "https" and DELIVERY_HOST.fullmatch(url.host)
        if not delivered and (url.scheme, url.netloc) != (api.scheme, api.netloc):
            detail, reason = f"output: host {url.host[:100]} is not allowed", "output: host"
            raise JobError("provider_error", detail, reason=reason)
        return url

    async def cancel(self, provider_job_id: str) -> dict[str, Any]:
        """Stop the job if it still runs. Best effort. Answers its metrics, if they are known."""
        url = f"{self.base_url}/predictions/{provider_job_id}/cancel"
        with contextlib.suppress(httpx.HTTPError, ValueError, AttributeError):
            response = await self.http.post(url, headers=self.headers, timeout=5.0)
            return self._metrics(response.json())
        return {}


Provider = Preview | Replicate


def addresses(output: Any) -> Iterable[str]:
    """Every address in an output, in order: some models answer one, some lists or objects."""
    if isinstance(output, str) and "://" in output:
        yield output
    elif isinstance(output, list | dict):
        for each in output.values() if isinstance(output, dict) else output:
            yield from addresses(each)


def retry_after_seconds(response: httpx.Response) -> float:
    """How long a 402 or 429 asks to wait: header, body field, the text's "~30s", else a minute."""
    asked: list[object] = [response.headers.get("retry-after")]
    with contextlib.suppress(ValueError, TypeError, KeyError):
        asked.append(response.json()["retry_after"])
    asked += re.findall(r"~(\d+)s", response.text)[:1]
    return next((s for s in map(asked_seconds, asked) if s is not None), 60.0)


# --- storage ------------------------------------------------------------------------------------


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

        Of the answer only the token is taken: servers differ in the rest, and leave it unescaped.
        """
        url = f"{self.root}/object/sign/{source_key(path)}"
        lasting = {"expiresIn": int(seconds) + random.randrange(300, 900)}  # so that two differ
        response = await self.http.post(url, json=lasting, headers=self.headers)
        if not response.is_success:
            raise source_error(response)
        answer = response.json()
        token = str(answer.get("signedURL") or answer["signedUrl"]).rpartition("?")[2]
        return f"{url}?{token}"

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

    async def store(
        self, job: Job, position: int, body: AsyncGenerator[bytes, None]
    ) -> dict[str, Any]:
        """Check and upload one output; answer its row for complete_jobs. Raises JobError."""
        base = f"{job.user_id}/{job.job_id}/{position}"
        with tempfile.TemporaryFile() as file:
            self.pictures.start()  # meanwhile
            await self._receive(file, body)
            try:
                image = await self.pictures.inspect(file, self.settings.image_preview_pixels)
            except NoPicture as error:
                raise JobError("provider_error", f"output: {error}") from None
            if image.lacks:
                log.warning("picture.bare job=%s lacks=%s", job.job_id, image.lacks)
            extension, content_type = FORMATS[image.format]
            served_as = INERT_TYPE if image.format == "SVG" else content_type
            size = await self._upload(f"{base}.{extension}", file, served_as)
        if image.preview:
            await self._upload(f"{base}.preview.webp", io.BytesIO(image.preview), "image/webp")
        return {
            "position": position,
            "storage_path": f"{base}.{extension}",
            "preview_path": f"{base}.preview.webp" if image.preview else None,
            "content_type": content_type,
            "width": image.width,
            "height": image.height,
            "bytes": size,
            "blurhash": image.blurhash,
        }

    async def _receive(self, file: IO[bytes], body: AsyncGenerator[bytes, None]) -> None:
        """Write an output to disk, within the caps. Raises JobError."""
        size, most = 0, self.settings.max_image_bytes
        try:
            async with asyncio.timeout(DOWNLOAD_SECONDS), contextlib.aclosing(body):
                async for chunk in body:
                    size += len(chunk)
                    if size > most:
                        raise JobError("provider_error", f"output: more than {most} bytes")
                    file.write(chunk)
        except TimeoutError:
            late = f"output: not received within {DOWNLOAD_SECONDS:g} s"
            raise JobError("provider_timeout", late) from None
        except httpx.HTTPError as error:
            raise JobError("internal", f"output: {type(error).__name__}") from None

    async def _upload(self, path: str, file: IO[bytes], content_type: str) -> int:
        """Upload with upsert, so that repeating it after a lost answer is harmless.

        Answers how many bytes. Raises JobError.
        """
        size = file.seek(0, io.SEEK_END)
        headers = {**self.headers, "content-type": content_type, "content-length": str(size)}
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
                # 423: another upload of this path is under way. 403: Supabase Lite answers so to
                # most of the uploads that come at once after its start.
                if 400 <= status < 500 and status not in (403, 408, 423, 429):
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
    provider_job_id: str | None = None  # once it is known
    progress: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)  # of what was bought, once they are known
    is_lost: bool = False  # a heartbeat said so: drop it, do not release it
    is_canceled: bool = False  # so it said: stop it at the provider, then end it as canceled
    is_ending: bool = False  # its last call is under way; a beat may find the row gone

    def __post_init__(self) -> None:
        self.provider_job_id = self.job.provider_job_id
        if not self.provider_job_id:  # nobody has asked the provider, or this attempt has not yet
            self.metrics = {"is_billed" if self.job.begun_before else "is_asked": False}

    def report(self, percent: int) -> None:
        """Take in progress. It never goes back, whatever a provider says."""
        if self.progress is None or percent > self.progress:
            self.progress = percent
            self.on_progress()


class Worker:
    """Keeps the slots full until told to stop."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        providers: Mapping[str, Provider],
        storage: Storage,
        outbox: Outbox,
    ) -> None:
        self.settings, self.db, self.providers, self.storage = settings, db, providers, storage
        self.outbox = outbox
        self.running: dict[int, Running] = {}  # by token: a lost job may be claimed again here
        self.wake = asyncio.Event()
        self.freed = asyncio.Event()  # to claim again: a slot, or who could not beat
        self.news = asyncio.Event()  # for the next heartbeat, which does not wait for its time then
        self.news_due: asyncio.TimerHandle | None = None
        self.stopping = asyncio.Event()
        self.worker_id = 0
        self.is_full = True  # until a largest output proves to have room on the disk
        self.lease_seconds = 0.0
        self.last_beat = 0.0
        self.last_told = 0.0  # systemd

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
                return await self.db.register_worker(self.settings.slots)
            except psycopg.Error:
                self._tell_systemd()
                await self._pause(self.stopping, backoff(attempt))
                attempt += 1
        return None

    def on_notify(self, payload: str) -> None:
        """Look for work, or hear from the next heartbeat, made now, which jobs to stop."""
        self.wake.set()
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
                self.freed.clear()
                has_slots = len(self.running) < self.settings.slots
                if not (has_slots and self._may_claim() and await self._has_room()):
                    await self._pause(self.freed, self.settings.poll_seconds)
                elif not await self._claim():
                    await self._sleep()
                attempt = 0
                self._tell_systemd()
            except psycopg.Error:
                self._tell_systemd()
                self.wake.clear()
                await self._pause(self.wake, backoff(attempt))
                attempt += 1

    def _tell_systemd(self) -> None:
        """Feed the watchdog once for each beat that was answered, or with each turn while the
        database says that it cannot. It goes hungry when this loop or the database hangs.
        """
        if self.db.is_listening is not None and self.last_beat > self.last_told:
            way = "is woken by NOTIFY" if self.db.is_listening else "polls, as LISTEN does not work"
            slots = f"{len(self.running)} of {self.settings.slots} slots busy"
            tell_systemd("READY=1", f"STATUS=worker {self.worker_id}: {slots}, {way}")
            self.last_told = time.monotonic()
        elif self.db.trouble:
            tell_systemd(f"STATUS=waits for the database: {self.db.trouble}")

    def _may_claim(self) -> bool:
        """A worker that cannot beat would lose what it claims."""
        return time.monotonic() - self.last_beat < self.lease_seconds

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
        began = time.monotonic()
        jobs = await self.db.claim_jobs(self.worker_id, self.settings.slots - len(self.running))
        for job in jobs:
            running = self.running[job.token] = Running(job, began, self.on_progress)
            running.task = asyncio.create_task(self.process(running))
        await asyncio.sleep(0)  # jobs first, then the next claim
        return bool(jobs)

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
        for event in (self.stopping, self.wake, self.freed):
            event.set()

    async def beat(self) -> None:
        """One heartbeat for all jobs: progress in, lost leases and cancels out."""
        if self.news_due:
            self.news_due.cancel()
            self.news_due = None
        beating = sorted(self.running.values(), key=lambda running: running.job.job_id)
        verdicts = await self.db.heartbeat(self.worker_id, beating)
        if not self._may_claim():
            self.freed.set()
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
        tell_systemd("STOPPING=1", f"STATUS=ends {len(self.running)} jobs")
        with contextlib.suppress(psycopg.Error):
            await self.db.call("unregister_worker", self.worker_id)  # or it loses a wake-up
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
            self.freed.set()
            self.outbox.due.set()

    async def _make(self, running: Running) -> list[dict[str, Any]]:
        """Have the provider make the images, and store them."""
        job = running.job
        provider = self.providers.get(job.provider)
        if provider is None:
            raise JobError("internal", f"provider {job.provider} is not configured on this worker")
        try:
            provider_job_id = job.provider_job_id or await self._buy(provider, running)
            result = await provider.result(job, provider_job_id, running.report)
        except asyncio.CancelledError:  # by the user, the deadline, a lost lease, or a stop
            is_over = running.is_canceled or not (running.is_lost or self.stopping.is_set())
            if running.provider_job_id and is_over:
                running.metrics = await provider.cancel(running.provider_job_id)
            raise
        running.metrics = result.metrics
        outputs = result.outputs[: job.image_count]
        if not outputs:
            raise JobError("provider_error", "no output")
        if await self.db.report_progress(job, "storing", None) == "canceled":
            running.is_canceled = True
            raise asyncio.CancelledError  # as if a heartbeat had said so
        return [
            await self.storage.store(job, position, provider.read(output))
            for position, output in enumerate(outputs)
        ]

    async def _buy(self, provider: Provider, running: Running) -> str:
        """Have the provider create the job, once: look first for what an earlier try has bought."""
        job = running.job
        if job.begun_before and (bought := await self._look(provider, running)):
            return bought
        provider_input = await self._with_sources(provider, job)
        if provider_input != job.provider_input:  # nobody could know its addresses again
            running.held_at = time.monotonic()
            await self.db.begin_create(job, fingerprint(provider_input))
        try:
            return await finish_first(self._create(provider, running, provider_input))
        except UnknownOutcome as error:
            if bought := await self._look(provider, running):
                return bought
            raise JobError("provider_timeout", f"create: {error}; nothing was bought") from None

    async def _create(
        self, provider: Provider, running: Running, provider_input: dict[str, Any]
    ) -> str:
        """Create and save the id at once: together, also when the worker stops meanwhile."""
        while time.monotonic() - running.held_at > CREATE_WITHIN_SECONDS:
            running.held_at = time.monotonic()
            await self.db.begin_create(running.job, None)  # proves the lease once more
        running.metrics = {}
        running.provider_job_id = await provider.create(running.job, provider_input)
        try:
            await self.db.checkpoint(running.job, running.provider_job_id)
        except psycopg.errors.UniqueViolation:
            running.provider_job_id = None  # neither read nor stopped
            raise UnknownOutcome("the answer names another job's") from None
        return running.provider_job_id

    async def _look(self, provider: Provider, running: Running) -> str | None:
        """Take over what a lost create bought; None once it had time to show and did not."""
        job = running.job
        (begun,) = await self.db.insist("recall_create", job.job_id, job.token)
        give_up_at, attempt = time.monotonic() + provider.settle_seconds, 0
        while True:
            is_last = time.monotonic() >= give_up_at
            candidates = await provider.find(job, begun["create_started_at"], begun["input_sha256"])
            if bought := await finish_first(self._adopt(running, candidates)):
                return bought
            if is_last:
                return None
            await asyncio.sleep(min(backoff(attempt), max(0.0, give_up_at - time.monotonic())))
            attempt += 1

    async def _adopt(self, running: Running, candidates: list[str]) -> str | None:
        """Take over a purchase and know it at once, also when the job is stopped meanwhile."""
        job = running.job
        rows = await self.db.insist("adopt_provider_job", job.job_id, job.token, candidates)
        running.provider_job_id = only(rows)
        if running.provider_job_id:
            running.metrics = {}
            log.warning("job.found job=%s candidates=%s", job.job_id, len(candidates))
        return running.provider_job_id

    async def _with_sources(self, provider: Provider, job: Job) -> dict[str, Any]:
        """The provider's input with an address in place of each source image's path."""
        provider_input = dict(job.provider_input)
        for name in job.image_inputs:
            given = provider_input.get(name)
            if isinstance(given, str):
                provider_input[name] = await self._source(provider, job, given)
            elif isinstance(given, list):
                provider_input[name] = [await self._source(provider, job, path) for path in given]
        return provider_input

    async def _source(self, provider: Provider, job: Job, path: str) -> str:
        """An address of a source image that has proven to be one: its file's or that of a copy."""
        try:
            with tempfile.TemporaryFile() as file:
                await self.storage.fetch(path, file)
                kind, is_as_given = await self.storage.pictures.look_at_source(file)
                is_public = provider.fetches_sources and self.storage.is_reachable_from_outside
                if is_public and is_as_given:
                    return await self.storage.sign(path, job.deadline_seconds)
                # Its user's name for it may be any, and is nobody's business.
                return await provider.upload(f"{uuid4().hex}.{FORMATS[kind][0]}", file)
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
            detail, metrics = self.db.quoted(error.detail), Jsonb(running.metrics | error.metrics)
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
        if running.provider_job_id:
            with contextlib.suppress(psycopg.Error):
                if await self.db.heartbeat(self.worker_id, [running]) == ["canceled"]:
                    await self.providers[job.provider].cancel(running.provider_job_id)

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


def make_replicate(settings: Settings, http: httpx.AsyncClient) -> Replicate | None:
    """Answer Replicate, if there is a key for it."""
    url, key = settings.replicate_api_url, settings.replicate_api_token
    return Replicate(http, url, key, settings.replicate_settle_seconds) if key else None


async def serve(settings: Settings) -> int:
    """Wire everything together and run one worker."""
    db, pictures = Database(settings.database_url, settings.secrets), Pictures()
    async with httpx.AsyncClient(timeout=HTTP_TIMEOUT) as http:
        preview = Preview(pictures, settings.preview_seconds, settings.preview_failure_rate)
        providers: dict[str, Provider] = {"preview": preview}
        if replicate := make_replicate(settings, http):
            providers["replicate"] = replicate
        storage, outbox = Storage(settings, http, pictures), Outbox(settings, db, http)
        worker = Worker(settings, db, providers, storage, outbox)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, worker.stop)
        try:
            pictures.start()  # meanwhile, for the first job
            await db.pool.open()
            await worker.run()
        except ConfigError as error:
            log.error("worker.refused %s", error)
            return EXIT_CONFIG
        finally:
            await db.pool.close()
            pictures.close()
    return EXIT_OK


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


async def check_replicate(replicate: Replicate | None) -> Findings:
    """Whether the key opens the account; nothing is bought."""
    if not replicate:
        yield "note", "replicate", "REPLICATE_API_TOKEN is not set: jobs for its models fail here"
        return
    response = await replicate.http.get(f"{replicate.base_url}/account", headers=replicate.headers)
    if response.is_success:
        yield "ok", "replicate", "the key opens the account"
    else:
        why = "the key is refused" if response.status_code in (401, 403) else "no answer to trust"
        yield "wrong", "replicate", f"REPLICATE_API_TOKEN: {why}: HTTP {response.status_code}"


async def check(settings: Settings) -> int:
    """Try all that a worker needs, and change nothing; print what is found, a line each."""
    db, is_well = Database(settings.database_url, settings.secrets), True

    def say(verdict: str, part: str, detail: object) -> None:
        nonlocal is_well
        is_well = is_well and verdict != "wrong"
        print(f"{verdict:5}  {part:9}  {' '.join(str(detail).split())}", flush=True)

    async with httpx.AsyncClient(timeout=HTTP_TIMEOUT) as http:
        for part, look, variable in (
            ("database", check_database(db), "DATABASE_URL"),
            ("listen", check_listen(db), "DATABASE_URL"),
            ("storage", check_storage(Storage(settings, http, Pictures())), "SUPABASE_URL"),
            ("replicate", check_replicate(make_replicate(settings, http)), "REPLICATE_API_URL"),
        ):
            try:
                async for finding in look:
                    say(*finding)
            except (JobError, StorageRefused, Deaf) as error:
                say("wrong", part, error)
            except psycopg.Error as error:
                say("wrong", part, f"{type(error).__name__}: {error}")
            except httpx.HTTPError as error:
                say("wrong", part, f"{variable}: {type(error).__name__}")
        await db.pool.close()
    return EXIT_OK if is_well else EXIT_ERROR


def main(arguments: Iterable[str] = ()) -> int:
    """Run until told to stop, or `check`; answer the exit code."""
    output = logging.StreamHandler(sys.stderr)
    output.setFormatter(SafeFormatter())
    logging.basicConfig(handlers=[output])
    if (asked := list(arguments)) not in ([], ["check"]):
        log.error("worker.misconfigured arguments: only `check` is one")
        return EXIT_CONFIG
    try:
        settings = Settings(with_credentials(os.environ))
    except ConfigError as error:
        log.error("worker.misconfigured %s", error)
        return EXIT_CONFIG
    output.setFormatter(SafeFormatter(settings.secrets))
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # it tells of each try to connect
    log.setLevel(settings.log_level)
    try:
        return asyncio.run(check(settings) if asked else serve(settings))
    except Exception:
        log.critical("worker.crashed", exc_info=True)
        return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
