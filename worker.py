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
    MAX_IMAGE_BYTES         33554432  larger outputs are refused
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
import base64
import contextlib
import errno
import functools
import gc
import hashlib
import hmac
import io
import ipaddress
import json
import logging
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol, TypeVar
from urllib.parse import quote, urlencode, urljoin, urlsplit
from uuid import UUID, uuid4
from xml.parsers import expat

import blurhash  # type: ignore[import-untyped]
import httpcore
import httpx
import psycopg
from PIL import (
    AvifImagePlugin,
    Image,
    ImageDraw,
    ImageFile,
    ImageFont,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
)
from psycopg import sql
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool, PoolTimeout
from py_svg_hush import filter_svg

BUCKET, SOURCE_BUCKET = "generations", "inputs"
REPLICATE_API_URL = "https://api.replicate.com/v1"
EXPO_PUSH_URL, EXPO_LANE = "https://exp.host/--/api/v2/push/send", "expo"
RECOVERY_SECONDS = 5.0  # between two looks for stale jobs; with the lease, how long one waits
ERASE_SECONDS = 60.0  # between two looks for what has been kept long enough
ERASE_FILES = 100  # deleted in one request
ALONE_SECONDS = 5.0  # before files are tried one by one that Storage refused together
SECOND_LOOK_SECONDS = 0.2  # at most, between going to sleep and the last claim before waiting
LISTEN_CHECK_SECONDS = 10.0  # silence after which a NOTIFY to ourselves tests LISTEN
LISTEN_ANSWER_SECONDS = 3.0  # within which it must arrive
DEAF_SECONDS = 60.0  # between two tries to LISTEN where no NOTIFY arrives
PROGRESS_SECONDS = 1.0  # between two heartbeats that only bring news of progress
CANCEL_SECONDS = 5.0  # at most, for telling the provider to stop
RELEASE_SECONDS = 10.0  # hard deadline for releasing jobs once the grace time is over
MAX_BATCH = 100  # jobs in one call of a function that takes many
CALL_SECONDS = 15.0  # for one call; later, whoever stands in between may have lost the connection
POOL_SIZE = 6  # connections at most: each kind of call for many jobs has one under way
OUTBOX_SECONDS = 0.05  # at least, between two looks at the outbox
RETRY_BASE_SECONDS, RETRY_CAP_SECONDS = 0.25, 10.0  # backoff between repeated calls
MAX_COUNT = 1_000_000  # of images or seconds that a provider is believed to have taken
LOG_CHARS = 200_000  # of a provider's log that are read for progress
DETAIL_CHARS = 500  # of others' words that are kept for operators
QUOTED_CHARS = 5_000  # of them that are looked through for secrets first, which come out whole so
PROVIDER_POLL_SECONDS, PROVIDER_POLL_CAP_SECONDS = 0.5, 3.0
HTTP_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
HTTP_TRIES = 4  # for requests that may be repeated
CHUNK_BYTES = 64 * 1024  # times several for each job in flight
DOWNLOAD_SECONDS = 120.0  # at most, for one output
MAX_IMAGE_PIXELS = 50_000_000
SMALL_BYTES, LARGE_BYTES = 100_000_000, 450_000_000  # of memory, for what is done with one picture
SMALL_AT_ONCE = 3  # such pictures; beside them one large one, so that none waits for a dear one
PICTURE_SECONDS = 3  # of a core, for one picture
STALL_SECONDS = 10 * PICTURE_SECONDS  # on the clock, where there is no core for it
IDLE_SECONDS = 60  # without a picture, after which the process that is kept for them ends
MAX_PREVIEW_SOURCES = 64
PREVIEW_SOURCE_SIZE = (256, 256)
BLUR_PIXELS = 32  # longest side of what a blurhash is made of
BASE_BYTES, SVG_BYTES = 32_000_000, 30  # of memory: for any picture, and for each of an SVG's
MAX_SVG_BYTES, MAX_SVG_DEPTH, MAX_SVG_WEIGHT = 10 << 20, 200, 2_000_000  # weight: sum of depths
MAX_PROFILE_BYTES = 64 * 1024  # of colours, in a preview
MAX_REDIRECTS = 3
UNPACKED = {"accept-encoding": "identity"}  # a few bytes, packed twice, unpack to gigabytes at once
MAX_PAGES = 50  # of 100 predictions each, when a lost create is looked for
REFUSALS = (401, 402, 403)  # of who may: the key, the account's credit, this model or this file
CREATE_WITHIN_SECONDS = 5.0  # of holding the lease; later, another worker may have it
PROVIDER_PAUSE_SECONDS = 60  # before an account that was refused is tried again
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
SVG = "http://www.w3.org/2000/svg "  # before the name of an element, as expat tells it
FOREIGN = re.compile(rb"@import|(?:image-set|\bsrc)\s*\(|url\(\W*(?:\w+:)?//", re.IGNORECASE)
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    RuntimeError,
    Image.DecompressionBombError,
)  # Pillow
SIDEWAYS = (5, 6, 7, 8)  # EXIF's orientations that swap width and height
EXIF_TURNS = dict(zip(range(2, 9), map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), strict=True))
FIRST_BYTES = {
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "JPEG": rb"\xff\xd8\xff",
    "WEBP": rb"RIFF....WEBP",
    "AVIF": rb"....ftypavi[fs]",
    "GIF": rb"GIF8[79]a",
}
PIXEL_BYTES = {"RGB": 5, "L": 6, "RGBA": 9}  # at the peak, with a copy in another mode
PIXEL_CHUNKS = {
    *(b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"),
    *(b"acTL", b"fcTL", b"fdAT"),
}
SHORTAGES = {  # of the machine: no space, no files left, a broken disk; ENOENT: no folder at all
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ENOENT),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN),
}
INERT_TYPE = "application/octet-stream"  # of SVGs in Storage: browsers save it and do not run it
DELIVERY_SECONDS = 20.0  # for one try, from looking the name up to the status; far below the lease
LANE_SLOTS, EXPO_CONNECTIONS = 4, 6  # requests at once to one target; Expo wants no more than 6
BUSY_LANE_SECONDS = 1.0  # before a lane is looked at again whose deliveries are under way
MAX_PUSHES, MAX_RECEIPTS = 100, 1000  # in one request to Expo
RECEIPTS_SECONDS = 60.0  # between two looks for receipts that should be there
MAX_ASKED_SECONDS = 86_400.0  # of a pause that somebody asks for
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses as networks without IPv4 see them
IPV6_UNICAST = ipaddress.ip_network("2000::/3")
NOT_PUBLIC = [  # beside what ipaddress knows: protocol assignments, 6to4, Azure's agent
    ipaddress.ip_network(each)
    for each in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16", "2002::/16", "3fff::/20")
]
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
CREDENTIAL_PREFIX = "darkroom_"  # what LoadCredential=darkroom:FOLDER puts before a file's name
PICTURES = "pictures"  # argument of the process that serves a worker's
PUBLIC_VARIABLES = {"PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH"}  # it is started with
EXIT_OK, EXIT_ERROR, EXIT_CONFIG, EXIT_FORCED = 0, 1, 2, 3

MIN_SECRET_CHARS = 6  # shorter ones would take away words
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
Call = tuple[asyncio.Future[Any], tuple[Any, ...]]  # of one job: its answer, and what is said


# --- settings -----------------------------------------------------------------------------------


class ConfigError(Exception):
    """A variable of the environment is missing or wrong; the message begins with its name."""


@dataclass(frozen=True)
class Settings:
    """What the environment says, checked."""

    database_url: str
    supabase_url: str
    supabase_service_key: str
    replicate_api_token: str | None
    replicate_api_url: str
    replicate_settle_seconds: float
    slots: int
    grace_seconds: float
    poll_seconds: float
    max_image_bytes: int
    image_preview_pixels: int
    webhook_allowed_hosts: frozenset[str]
    expo_push_url: str
    expo_access_token: str | None
    preview_seconds: float
    preview_failure_rate: float
    log_level: str

    @property
    def secrets(self) -> list[str]:
        """What nobody else may read, in every spelling it may come back in."""
        url = libpq_url(self.database_url)
        password = psycopg.conninfo.conninfo_to_dict(url).get("password")
        keys = [self.supabase_service_key, self.replicate_api_token, self.expo_access_token]
        known = [str(each) for each in (self.database_url, url, password, *keys) if each]
        spelled = {*known, *(quote(each, "") for each in known)}
        return sorted((each for each in spelled if len(each) >= MIN_SECRET_CHARS), key=len)[::-1]

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Settings:
        """Read and check every variable. Raises ConfigError."""
        return cls(
            database_url=_url(env, "DATABASE_URL", "postgres", "postgresql"),
            supabase_url=_url(env, "SUPABASE_URL", "http", "https").rstrip("/"),
            supabase_service_key=_required(env, "SUPABASE_SERVICE_KEY"),
            replicate_api_token=env.get("REPLICATE_API_TOKEN") or None,
            replicate_api_url=_url(
                {"REPLICATE_API_URL": REPLICATE_API_URL} | _given(env),
                "REPLICATE_API_URL",
                "http",
                "https",
            ).rstrip("/"),
            replicate_settle_seconds=_number(env, "REPLICATE_SETTLE_SECONDS", 20, 0, 600),
            slots=int(_number(env, "WORKER_SLOTS", 4, 1, 1000)),
            grace_seconds=_number(env, "WORKER_GRACE_SECONDS", 30, 0, 3600),
            poll_seconds=_number(env, "WORKER_POLL_SECONDS", 5, 0.1, 60),
            max_image_bytes=int(_number(env, "MAX_IMAGE_BYTES", 32 << 20, 1, 1 << 30)),
            image_preview_pixels=int(_number(env, "IMAGE_PREVIEW_PIXELS", 512, 0, 4096)),
            webhook_allowed_hosts=_hosts(env, "WEBHOOK_ALLOWED_HOSTS"),
            expo_push_url=_url(
                {"EXPO_PUSH_URL": EXPO_PUSH_URL} | _given(env), "EXPO_PUSH_URL", "http", "https"
            ),
            expo_access_token=env.get("EXPO_ACCESS_TOKEN") or None,
            preview_seconds=_number(env, "PREVIEW_SECONDS", 1, 0, 3600),
            preview_failure_rate=_number(env, "PREVIEW_FAILURE_RATE", 0, 0, 1),
            log_level=_choice(env, "LOG_LEVEL", "INFO", ("DEBUG", "INFO", "WARNING", "ERROR")),
        )


def with_credentials(env: Mapping[str, str]) -> dict[str, str]:
    """The environment and, before it, the files of $CREDENTIALS_DIRECTORY. Raises ConfigError."""
    values = dict(env)
    if folder := env.get("CREDENTIALS_DIRECTORY"):
        try:
            for file in filter(Path.is_file, Path(folder).iterdir()):
                if text := file.read_text().strip():
                    values[file.name.removeprefix(CREDENTIAL_PREFIX)] = text
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"CREDENTIALS_DIRECTORY: {type(error).__name__}") from None
    return values


def _given(env: Mapping[str, str]) -> dict[str, str]:
    """What is set to something."""
    return {name: value for name, value in env.items() if value}


def _hosts(env: Mapping[str, str], name: str) -> frozenset[str]:
    hosts = frozenset(each.strip() for each in env.get(name, "").split(",") if each.strip())
    if not all(re.fullmatch(r"[^\s/]+:\d+", each) for each in hosts):
        raise ConfigError(f"{name}: not host:port, separated by commas")
    return hosts


def _required(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
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
        value = float(env.get(name) or default)
    except ValueError:
        raise ConfigError(f"{name}: not a number") from None
    if not low <= value <= high:
        raise ConfigError(f"{name}: not between {low:g} and {high:g}")
    return value


def _choice(env: Mapping[str, str], name: str, default: str, allowed: Iterable[str]) -> str:
    value = env.get(name) or default
    if value not in allowed:
        raise ConfigError(f"{name}: not one of {', '.join(allowed)}")
    return value


# --- errors and small helpers -------------------------------------------------------------------


class LeaseLost(Exception):
    """DR001: another worker has the job, or it is gone. Drop everything."""


class Outdated(psycopg.OperationalError):
    """The database has no such function: it is of another release. No job is to blame."""


class NoAnswer(psycopg.OperationalError):
    """The database was asked and said nothing in time, neither that it works nor that it cannot."""


class Canceled(Exception):
    """The user canceled the job. Stop it."""


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


class Deaf(psycopg.OperationalError):
    """LISTEN was accepted, and a NOTIFY did not arrive: a transaction pooler is in between."""


class UnknownOutcome(Exception):
    """A create was sent and its answer lost: it may have been bought."""


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


@dataclass(frozen=True, eq=False)
class Delivery:
    """Something to send, as private.claim_deliveries answers it; without an url, to Expo."""

    delivery_id: UUID
    token: int
    url: str | None
    secrets: list[str] | None
    body: str | None  # None: a push that nobody should get any more


@dataclass(frozen=True)
class Finding:
    """One line of a check, as private.check_setup answers it: ok, note or wrong."""

    part: str
    verdict: str
    detail: str


@dataclass(frozen=True)
class Verdict:
    """What became of a try: delivered, failed, or gone for good. The error names no address."""

    outcome: str
    status: int | None = None
    error: str | None = None
    retry_after: float | None = None
    ticket: str | None = None  # of a push, to ask for its receipt by


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
    """Await work to its end even if the caller is cancelled meanwhile, however often; then be
    cancelled.
    """
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


async def mind_pooler(connection: psycopg.AsyncConnection[Any]) -> None:
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

    So a call waits for nothing while there is little to do, and for one trip where there is much.
    Who is cancelled does not go, or is not answered; the others do and are.
    """

    def __init__(self, call: Callable[..., Awaitable[list[Any]]], function: str) -> None:
        self.call, self.function = call, function
        self.waiting: list[Call] = []
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
            trip, self.waiting = self.waiting[:MAX_BATCH], self.waiting[MAX_BATCH:]
            await self._make(trip)
        self.trips = None

    async def _make(self, trip: list[Call]) -> None:
        trip = [call for call in trip if not call[0].done()]
        if not trip:
            return
        columns = map(list, zip(*(arguments for _, arguments in trip), strict=True))
        try:
            rows = await self.call(self.function, *columns)
        except BaseException as error:  # whatever it is, nobody is left waiting
            if len(trip) > 1 and isinstance(error, Exception) and fault(error) != "database":
                for each in trip:  # one of them is at fault, not all; it may take its time alone
                    self.alone.add(task := asyncio.create_task(self._make([each])))
                    task.add_done_callback(self.alone.discard)
            else:
                for answer, _ in trip:
                    if not answer.done():
                        answer.set_exception(error)
            return
        said = dict(tuple(row.values()) for row in rows)
        for answer, (_, token, *_) in trip:
            if answer.done():
                continue
            if token in said:
                answer.set_result(said[token])
            else:
                answer.set_exception(LeaseLost())


class Database:
    """The worker's functions of schema private, one method each. Other SQL is LISTEN and NOTIFY."""

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
        self.is_listening = True  # until the contrary is known
        self.has_listened = asyncio.Event()  # or tried to: what is_listening says is known
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
        self._begin_creates = Batch(self._insist, "begin_creates")
        self._checkpoint_jobs = Batch(self._insist, "checkpoint_jobs")
        self._report_progress = Batch(self._insist, "report_progress")
        self._complete_jobs = Batch(self._insist, "complete_jobs")
        self._fail_jobs = Batch(self._insist, "fail_jobs")

    async def _call(self, function: str, *args: Any) -> list[Any]:
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

    async def _insist(self, function: str, *args: Any) -> list[Any]:
        """Call again while the database cannot: these functions may be repeated.

        Of many jobs one may be at fault: then it raises, for them to be tried one by one.
        """
        attempt, is_of_many = 0, bool(args) and isinstance(args[0], list) and len(args[0]) > 1
        while True:
            try:
                return await self._call(function, *args)
            except psycopg.Error as error:
                whose = fault(error)
                if self.pool.closed or whose == "job" or (whose == "either" and is_of_many):
                    raise
                await asyncio.sleep(backoff(attempt))
                attempt += 1

    async def register_worker(self, slots: int) -> dict[str, Any]:
        """Raises ConfigError if the database itself says that the role is another one."""
        try:
            rows = await self._call("register_worker", socket.gethostname(), slots, version())
        except psycopg.errors.InsufficientPrivilege:
            async with await self.connect() as connection:
                query = "select pg_has_role('darkroom_worker', 'usage')"
                if await (await connection.execute(query)).fetchone() == (False,):
                    raise ConfigError("DATABASE_URL: its role is not darkroom_worker") from None
            raise
        return dict(rows[0])

    async def unregister_worker(self, worker_id: int) -> None:
        await self._call("unregister_worker", worker_id)

    async def sleep(self, worker_id: int) -> None:
        await self._call("sleep", worker_id)

    async def claim_jobs(self, worker_id: int, slots: int) -> list[Job]:
        return [Job(**row) for row in await self._call("claim_jobs", worker_id, slots)]

    async def heartbeat(self, worker_id: int, running: list[Running]) -> list[str]:
        """Beat for these jobs, sorted by job_id; answer the verdict on each, in their order."""
        ids = [each.job.job_id for each in running]
        tokens = [each.job.token for each in running]
        rows = await self._call(
            "heartbeat",
            worker_id,
            ids,
            tokens,
            [each.progress for each in running],
            self.is_listening,
        )
        return [row["verdict"] for row in rows]

    async def begin_create(self, job: Job, sent: bytes | None = None) -> None:
        """Prove the lease once more, and save the fingerprint of an input that is made but once."""
        await self._begin_creates(job, sent)

    async def recall_create(self, job: Job) -> tuple[datetime, bytes | None]:
        """Since when something may have been bought, and the fingerprint that was saved."""
        (row,) = await self._insist("recall_create", job.job_id, job.token)
        return row["create_started_at"], row["input_sha256"]

    async def adopt_provider_job(self, job: Job, candidates: list[str]) -> str | None:
        rows = await self._insist("adopt_provider_job", job.job_id, job.token, candidates)
        adopted: str | None = rows[0]["adopt_provider_job"]
        return adopted

    async def pause_provider(
        self, provider: str, seconds: int, reason: str, user_id: UUID | None
    ) -> bool:
        """Answer whether no job is to blame."""
        said = (provider, seconds, self._quoted(reason), user_id)
        return bool((await self._insist("pause_provider", *said))[0]["pause_provider"])

    async def checkpoint(self, job: Job, provider_job_id: str) -> None:
        await self._checkpoint_jobs(job, provider_job_id)

    async def report_progress(self, job: Job, stage: str, progress: int | None) -> None:
        if await self._report_progress(job, stage, progress) == "canceled":
            raise Canceled

    async def complete_job(
        self, job: Job, images: list[dict[str, Any]], metrics: dict[str, Any]
    ) -> None:
        await self._complete_jobs(job, Jsonb(images), Jsonb(metrics))

    async def fail_job(self, job: Job, error: JobError, metrics: dict[str, Any]) -> str:
        detail = self._quoted(error.detail)
        what = (error.code, detail, error.retry_after, Jsonb(metrics))
        return str(await self._fail_jobs(job, *what))

    def _quoted(self, words: str) -> str:
        """Others' words as they may be stored: for operators, but without secrets."""
        return redact(words, self.secrets)[:DETAIL_CHARS]

    async def release_job(self, job: Job, resumes: bool = True) -> None:
        await self._insist("release_job", job.job_id, job.token, resumes)

    async def cancel_job(self, job: Job, metrics: dict[str, Any]) -> None:
        await self._insist("cancel_job", job.job_id, job.token, Jsonb(metrics))

    async def recover_stale_jobs(self) -> int:
        return int((await self._call("recover_stale_jobs"))[0]["recover_stale_jobs"])

    async def apply_retention(self) -> int:
        return int((await self._call("apply_retention"))[0]["apply_retention"])

    async def list_expired_files(self) -> dict[str, list[str]]:
        """Paths to delete, by bucket."""
        files: dict[str, list[str]] = {}
        for row in await self._call("list_expired_files", ERASE_FILES):
            files.setdefault(row["bucket"], []).append(row["path"])
        return files

    async def forget_files(self, bucket: str, paths: list[str]) -> int:
        """Answer how many of them are still there."""
        rows = await self._call("forget_files", [bucket] * len(paths), paths)
        return int(rows[0]["forget_files"])

    async def due_lanes(self) -> list[str]:
        return [row["due_lanes"] for row in await self._call("due_lanes")]

    async def claim_deliveries(self, lane: str, at_most: int) -> list[Delivery]:
        return [Delivery(**row) for row in await self._call("claim_deliveries", lane, at_most)]

    async def finish_delivery(self, delivery: Delivery, verdict: Verdict) -> str:
        """Answer the state the delivery has now."""
        rows = await self._insist(
            "finish_delivery",
            delivery.delivery_id,
            delivery.token,
            verdict.outcome,
            verdict.status,
            verdict.error and self._quoted(verdict.error),
            verdict.retry_after,
            verdict.ticket,
        )
        return str(rows[0]["finish_delivery"])

    async def claim_receipts(self) -> dict[str, UUID]:
        """Deliveries by the ticket that their receipt is asked for by."""
        rows = await self._call("claim_receipts", MAX_RECEIPTS)
        return {row["ticket"]: row["delivery_id"] for row in rows}

    async def finish_receipts(self, errors: dict[UUID, str | None]) -> None:
        await self._call("finish_receipts", list(errors), list(errors.values()))

    async def check_setup(self) -> list[Finding]:
        rows = await self._call("check_setup", list(self.FUNCTIONS))
        return [Finding(**row) for row in rows]

    def connect(self) -> Awaitable[psycopg.AsyncConnection[Any]]:
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
            has_heard = False
            try:
                async with await self.connect() as connection:
                    await connection.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
                    on_notify(CANCEL)
                    await self.hear(connection, channel, on_notify)
                    has_heard = True
                    log.info("listen.started channel=%s", channel)
                    attempt = 0
                    await self._forward(connection, channel, on_notify)
            except (psycopg.Error, TimeoutError) as error:
                self.is_listening = False
                self.has_listened.set()
                is_deaf = isinstance(error, Deaf) and not has_heard  # else the connection is lost
                if attempt == 0:
                    log.warning("listen.lost error=%s", error if is_deaf else type(error).__name__)
                await asyncio.sleep(DEAF_SECONDS if is_deaf else backoff(attempt))
                attempt += 1

    async def _forward(
        self,
        connection: psycopg.AsyncConnection[Any],
        channel: str,
        on_notify: Callable[[str], None],
    ) -> None:
        while True:
            is_silent = True
            async for notice in connection.notifies(timeout=LISTEN_CHECK_SECONDS, stop_after=1):
                on_notify(notice.payload)
                is_silent = False
            if is_silent:
                await self.hear(connection, channel, on_notify)

    async def hear(
        self,
        connection: psycopg.AsyncConnection[Any],
        channel: str,
        on_notify: Callable[[str], None],
    ) -> None:
        """Have another connection send a NOTIFY, and hand on what comes before it. Raises Deaf.

        Not the same connection: a pooler may have the session that listens answer it by chance.
        """
        async with self.pool.connection(timeout=10) as other, asyncio.timeout(CALL_SECONDS):
            await other.execute("select pg_notify(%s, %s)", (channel, PROBE))
        give_up_at, payloads = time.monotonic() + LISTEN_ANSWER_SECONDS, set[str]()
        while PROBE not in payloads:
            if (left := give_up_at - time.monotonic()) <= 0:
                raise Deaf(
                    "DATABASE_URL: a NOTIFY did not arrive, as through a transaction pooler: jobs "
                    "are found by polling. Use a direct or session-mode connection"
                )
            async for notice in connection.notifies(timeout=left, stop_after=1):
                payloads.add(notice.payload)
                if notice.payload != PROBE:
                    on_notify(notice.payload)
        self.is_listening = True
        self.has_listened.set()


# --- providers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What a provider made. Each output is something its own read() can stream."""

    outputs: list[Any]
    metrics: dict[str, Any]  # as complete_jobs takes them


class Provider(Protocol):
    """Runs a model. Every method may raise JobError with one of our codes, or ProviderDown."""

    settle_seconds: float  # until what a lost create bought must have shown
    fetches_sources: bool  # itself, by a signed address, where Storage can be reached from outside

    async def create(self, job: Job, provider_input: dict[str, Any]) -> str:
        """Start the job, answer the provider's id of it. Raises UnknownOutcome: never repeat it."""

    async def find(self, job: Job, since: datetime, sent: bytes | None = None) -> list[str]:
        """Ids of what was created since then from exactly the job's input, oldest first.

        If sent is given, from the input that has this fingerprint.
        """

    async def upload(self, name: str, file: IO[bytes]) -> str:
        """Hand over a source image the provider could not fetch; answer its address."""

    async def result(self, job: Job, provider_job_id: str, report: Callable[[int], None]) -> Result:
        """Wait for the end, reporting percent on the way. May be called again after a crash."""

    def read(self, output: Any) -> AsyncGenerator[bytes, None]:
        """Stream one output."""

    async def cancel(self, provider_job_id: str) -> dict[str, Any]:
        """Stop the job if it still runs. Best effort. Answers its metrics, if they are known."""


class Preview:
    """Draws placeholder pictures, so that everything runs without a key.

    A prompt with [fail:CODE] in it fails with that code, as a real provider might.
    """

    FAILURE = re.compile(
        r"\[fail:(moderated|invalid_input|provider_(?:busy|timeout|error)|result_lost)\]"
    )
    settle_seconds = 0.0  # nothing is bought
    fetches_sources = False

    def __init__(self, seconds: float, failure_rate: float) -> None:
        self.seconds, self.failure_rate = seconds, failure_rate
        self.pictures = Pictures()
        self.sources: dict[str, bytes] = {}  # small, by address, later by provider_job_id

    async def create(self, job: Job, provider_input: dict[str, Any]) -> str:
        self.pictures.start()  # meanwhile
        provider_job_id = f"preview-{job.token}"
        if address := provider_input.get("image"):
            self.sources[provider_job_id] = self.sources.pop(address)
        return provider_job_id

    async def find(self, job: Job, since: datetime, sent: bytes | None = None) -> list[str]:
        return []

    async def upload(self, name: str, file: IO[bytes]) -> str:
        address = f"preview:{uuid4()}"
        self.sources[address] = await self.pictures.shrink(file)
        while len(self.sources) > MAX_PREVIEW_SOURCES:
            del self.sources[next(iter(self.sources))]
        return address

    async def result(self, job: Job, provider_job_id: str, report: Callable[[int], None]) -> Result:
        for percent in range(0, 100, 10):
            report(percent)
            await asyncio.sleep(self.seconds / 10)
        prompt, seed = job.provider_input["prompt"], int(job.provider_input["seed"])
        if wanted := self.FAILURE.search(prompt):
            raise JobError(wanted[1], "asked for by the prompt")
        if random.random() < self.failure_rate:
            raise JobError("provider_error", "PREVIEW_FAILURE_RATE")
        source = self.sources.get(provider_job_id)
        if job.provider_input.get("image") and not source:
            raise JobError("result_lost", "the source went with the worker that had it")
        size = (int(job.provider_input["width"]), int(job.provider_input["height"]))
        outputs = [
            await self.pictures.draw(prompt, seed + n, size, source or b"")
            for n in range(job.image_count)
        ]
        return Result(outputs, {"provider_seconds": self.seconds, "images": len(outputs)})

    async def read(self, output: bytes) -> AsyncGenerator[bytes, None]:
        yield output

    async def cancel(self, provider_job_id: str) -> dict[str, Any]:
        return {"is_billed": False}


class Replicate:
    """Replicate's HTTP API: create without waiting, then poll (its OpenAPI file, /predictions)."""

    MODERATION = re.compile(r"nsfw|sensitive|moderat|safety|\bE005\b", re.IGNORECASE)
    # A line of a progress bar as tqdm draws it: " 50%|█████     | 2/4 [00:01<00:01, ...". Those
    # with words before are of downloads and the like.
    BAR = re.compile(r"(?:^|[\r\n]) *\d{1,3}%\|[^|\r\n]*\| *(\d{1,9})/(\d{1,9}) \[")

    fetches_sources = True

    def __init__(
        self, http: httpx.AsyncClient, base_url: str, token: str, settle_seconds: float = 20.0
    ) -> None:
        self.http, self.base_url, self.settle_seconds = http, base_url, settle_seconds
        self.headers = {"Authorization": f"Bearer {token}"}
        self.bars: dict[tuple[str, int], int] = {}  # of a model's last job of so many images

    async def create(self, job: Job, provider_input: dict[str, Any]) -> str:
        """Create a prediction without waiting for it. Replicate knows no idempotency key."""
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
        if response.status_code in REFUSALS:
            raise await self._refusal(response, "create", may_have_bought=False)
        self._raise_for_failure(response)
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            prediction = response.json()
            said = set(addresses(prediction.get("input")))  # others': it answers somebody else
            if PROVIDER_JOB_ID.fullmatch(prediction["id"]) and said <= set(
                addresses(provider_input)
            ):
                return str(prediction["id"])
        raise UnknownOutcome(f"HTTP {response.status_code} without an id of its own")

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

    @staticmethod
    def _raise_for_failure(response: httpx.Response) -> None:
        status = response.status_code
        reason = f"create: HTTP {status}"
        detail = f"{reason}: {response.text[:QUOTED_CHARS]}"
        if status == 429:
            raise JobError("provider_busy", detail, retry_after_seconds(response), reason=reason)
        if status in (400, 422):
            raise JobError("invalid_input", detail, reason=reason)
        if status == 408 or status >= 500:
            raise UnknownOutcome(f"HTTP {status}")
        if not response.is_success:
            raise JobError("internal", detail, reason=reason)

    async def find(self, job: Job, since: datetime, sent: bytes | None = None) -> list[str]:
        """Read the list of predictions back to a minute before, and compare model and input."""
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

    async def check(self) -> Finding:
        """Whether the key opens the account; nothing is bought."""
        response = await self.http.get(f"{self.base_url}/account", headers=self.headers)
        if response.is_success:
            return Finding("replicate", "ok", "the key opens the account")
        why = "the key is refused" if response.status_code in (401, 403) else "no answer to trust"
        detail = f"REPLICATE_API_TOKEN: {why}: HTTP {response.status_code}"
        return Finding("replicate", "wrong", detail)

    async def upload(self, name: str, file: IO[bytes]) -> str:
        """Upload through the files API, where Storage cannot be reached from outside."""
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
        attempt = 0
        while True:
            url = f"{self.base_url}/predictions/{provider_job_id}"
            prediction = await self._get(url, may_be_gone=True)
            if prediction.get("id", provider_job_id) != provider_job_id:
                prediction = {}  # the answer to another's question
            status = prediction.get("status")  # one we do not know is one more to wait for
            self._follow(job, str(prediction.get("logs") or ""), status == "succeeded", report)
            if status == "succeeded":
                return self._result(prediction)
            if status in ("failed", "canceled", "aborted"):  # nothing to resume
                detail = str(prediction.get("error") or f"prediction {status}")[:QUOTED_CHARS]
                moderated = status == "failed" and self.MODERATION.search(detail)
                code = "moderated" if moderated else "provider_error"
                metrics, reason = self._metrics(prediction), f"prediction {status}"
                raise JobError(code, detail, metrics=metrics, reason=reason)
            pause = min(PROVIDER_POLL_CAP_SECONDS, PROVIDER_POLL_SECONDS * 1.2**attempt)
            await asyncio.sleep(pause * random.uniform(0.8, 1.0))
            attempt += 1

    def _follow(self, job: Job, logs: str, is_over: bool, report: Callable[[int], None]) -> None:
        """Report the percentage of the whole from the progress bars in the logs.

        Some models draw one bar for each image, some one for all, some two: as many as the last
        time are expected; at first, one for each image.
        """
        bars, done, total = 0, 0, 0
        for found in self.BAR.finditer(logs[-LOG_CHARS:]):
            before = (done, total)
            done, total = int(found[1]), int(found[2])
            bars += not bars or done < before[0] or total != before[1]
        key = (job.provider_ref, job.image_count)
        if bars and total:
            expected = max(bars, self.bars.get(key, job.image_count))
            report(min(100, int(100 * (bars - 1 + done / total) / expected)))
        if bars and is_over:
            self.bars[key] = bars

    @classmethod
    def _result(cls, prediction: dict[str, Any]) -> Result:
        metrics = cls._metrics(prediction)
        if prediction.get("data_removed") or prediction.get("output") is None:
            raise JobError("result_lost", "the output was removed", metrics=metrics)
        outputs = list(addresses(prediction["output"]))
        return Result(outputs, {"images": min(len(outputs), MAX_COUNT)} | metrics)

    @staticmethod
    def _metrics(prediction: dict[str, Any]) -> dict[str, Any]:
        """What a prediction that has ended is billed by; what failed by itself costs nothing."""
        said = prediction.get("metrics")
        said = said if isinstance(said, dict) else {}
        known: dict[str, Any] = {}
        for name in (
            "provider_seconds predict_time",
            "images image_output_count",
            "images image_count",
        ):
            ours, theirs = name.split()
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
        """Download from Replicate's own hosts only: outputs come from third-party code."""
        url = self._allowed(output)
        for _ in range(MAX_REDIRECTS + 1):
            async with self.http.stream("GET", url, headers=UNPACKED) as response:
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
        with contextlib.suppress(httpx.HTTPError, ValueError, AttributeError):
            response = await self.http.post(
                f"{self.base_url}/predictions/{provider_job_id}/cancel",
                headers=self.headers,
                timeout=CANCEL_SECONDS,
            )
            return self._metrics(response.json())
        return {}


def addresses(output: Any) -> Iterator[str]:
    """Every address in an output, in order: some models answer one, some lists or objects."""
    if isinstance(output, str) and "://" in output:
        yield output
    elif isinstance(output, list | dict):
        for each in output.values() if isinstance(output, dict) else output:
            yield from addresses(each)


def asked_seconds(words: object) -> float | None:
    """How long somebody asks to wait, in seconds or until a date to come; None if it is neither.

    It may be anything that can be written: negative, NaN, infinite, or too long for a number.
    """
    text, seconds = str(words).strip(), math.nan
    if text.isascii() and len(text) < 100:
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            left = parsedate_to_datetime(text) - datetime.now(UTC)
            seconds = left.total_seconds() if left > timedelta(0) else math.nan
        with contextlib.suppress(ValueError):
            seconds = float(text)
    return None if math.isnan(seconds) else min(max(seconds, 0.0), MAX_ASKED_SECONDS)


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

    def __init__(
        self, http: httpx.AsyncClient, url: str, key: str, max_bytes: int, preview_pixels: int
    ) -> None:
        self.http, self.max_bytes, self.preview_pixels = http, max_bytes, preview_pixels
        self.pictures = Pictures()
        self.root = f"{url}/storage/v1"
        self.base_url = f"{self.root}/object/{BUCKET}"
        self.is_reachable_from_outside = is_public_host(urlsplit(url).hostname or "")
        self.headers = {"Authorization": f"Bearer {key}", "apikey": key, "x-upsert": "true"}

    async def sign(self, path: str) -> str:
        """An address of a source image that works for ten minutes or more. Raises JobError."""
        url = f"{self.root}/object/sign/{SOURCE_BUCKET}/{quote(path)}"
        lasting = {"expiresIn": random.randrange(600, 1200)}  # two of one second differ, too
        response = await self.http.post(url, json=lasting, headers=self.headers)
        if not response.is_success:
            raise JobError(storage_code(response), f"sign: HTTP {response.status_code}")
        answer = response.json()  # an address below /storage/v1, or below / with other servers
        signed = str(answer.get("signedURL") or answer["signedUrl"])
        return urljoin(self.root, signed) if signed.startswith("/storage/") else self.root + signed

    async def fetch(self, path: str, file: IO[bytes]) -> None:
        """Download a source image into a file. Raises JobError."""
        url = f"{self.root}/object/{SOURCE_BUCKET}/{quote(path)}"
        async with self.http.stream("GET", url, headers=self.headers) as response:
            if not response.is_success:
                raise JobError(storage_code(response), f"source: HTTP {response.status_code}")
            async for chunk in response.aiter_bytes(CHUNK_BYTES):
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

    async def check(self) -> Finding:
        """Write a file where images go, and delete it again. Raises JobError or StorageRefused."""
        path = f"darkroom-check/{uuid4()}.bin"
        await self._upload(path, io.BytesIO(b"check"), INERT_TYPE)
        await self.remove(BUCKET, [path])
        left = await self.http.get(f"{self.base_url}/{path}", headers=self.headers)
        if left.is_success:
            return Finding("storage", "wrong", f"{BUCKET}/{path} was not deleted")
        return Finding("storage", "ok", f"a file was written to bucket {BUCKET} and deleted")

    async def store(
        self, job: Job, position: int, body: AsyncGenerator[bytes, None]
    ) -> dict[str, Any]:
        """Check and upload one output; answer its row for complete_jobs. Raises JobError."""
        base = f"{job.user_id}/{job.job_id}/{position}"
        with tempfile.TemporaryFile() as file:
            self.pictures.start()  # meanwhile
            await self._receive(file, body)
            image = await self.pictures.inspect(file, self.preview_pixels)
            if image.lacks:
                log.warning("picture.bare job=%s lacks=%s", job.job_id, image.lacks)
            extension, content_type = FORMATS[image.format]
            served_as = INERT_TYPE if image.format == "SVG" else content_type
            size = await self._upload(f"{base}.{extension}", file, served_as)
        preview_path = f"{base}.preview.webp" if image.preview else None
        if preview_path and image.preview:
            await self._upload(preview_path, io.BytesIO(image.preview), "image/webp")
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

    async def _receive(self, file: IO[bytes], body: AsyncGenerator[bytes, None]) -> None:
        """Write an output to disk, within the caps. Raises JobError."""
        size, too_large = 0, f"output: more than {self.max_bytes} bytes"
        try:
            async with asyncio.timeout(DOWNLOAD_SECONDS), contextlib.aclosing(body):
                async for chunk in body:
                    size += len(chunk)
                    if size > self.max_bytes:
                        raise JobError("provider_error", too_large)
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
                code = storage_code(response)
                if is_final(response):
                    break
            except httpx.TransportError as error:
                code, reason, text = "storage_unavailable", type(error).__name__, ""
            log.warning("storage.retry job=%s reason=%r", path.split("/")[1], reason)
            await asyncio.sleep(backoff(attempt))
        raise JobError(code, f"upload: {reason}: {text}", reason=f"upload: {reason}")


def reserve(size: int) -> None:
    """Raises OSError unless a temporary file can have this many bytes."""
    with tempfile.TemporaryFile() as file:
        os.posix_fallocate(file.fileno(), 0, size)


def is_public_host(host: str) -> bool:
    """Whether others can reach it: a public IP address, or a name that is not of this machine."""
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return "." in host and not host.endswith((".localhost", ".local", ".internal"))


async def _chunks(file: IO[bytes]) -> AsyncIterator[bytes]:
    file.seek(0)
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def storage_status(response: httpx.Response) -> int:
    """The real status: Supabase answers 400 to nearly everything and tells it in the body."""
    with contextlib.suppress(ValueError, KeyError, TypeError, httpx.ResponseNotRead):
        return int(response.json()["statusCode"])
    return response.status_code


def is_final(response: httpx.Response) -> bool:
    """Whether repeating a refused upload is pointless.

    423: another upload of this path is under way. 403: Supabase Lite answers so to most of the
    uploads that come at once after its start.
    """
    status = storage_status(response)
    return 400 <= status < 500 and status not in (403, 408, 423, 429)


def storage_code(response: httpx.Response) -> str:
    """What a job fails with that Storage refused: an outage passes, and is not the job's fault."""
    status = storage_status(response)
    return "storage_unavailable" if status >= 500 or status in (408, 429) else "internal"


# --- pictures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """What the bytes of an output show. SVGs have neither blurhash nor preview, some no size."""

    format: str
    width: int | None
    height: int | None
    blurhash: str | None = None
    preview: bytes | None = None  # WebP; None too if the picture itself is not larger
    lacks: str | None = None  # what was not enough for blurhash and preview: memory or time


class Pictures:
    """Has pictures decoded and drawn by processes that die of what costs too much, not the worker.

    They are forked from one small process, which starts with the first picture and ends when there
    was none for a while, or with the worker. It knows no secret.
    """

    def __init__(self) -> None:
        self.lanes = [
            (SMALL_BYTES, asyncio.Semaphore(SMALL_AT_ONCE)),
            (LARGE_BYTES, asyncio.Semaphore(1)),
        ]
        self.server: subprocess.Popen[bytes] | None = None
        self.door: socket.socket

    async def inspect(self, file: IO[bytes], preview_pixels: int) -> Picture:
        """Do what inspect_image does. Raises JobError."""
        said = await self._ask("inspect", file, preview_pixels=preview_pixels)
        if "format" in said:
            return Picture(
                **said | {"preview": base64.b64decode(said.get("preview") or "") or None}
            )
        file.seek(0)
        head = file.read(32)
        for kind, first in FIRST_BYTES.items():
            if re.match(first, head, re.DOTALL):
                return Picture(kind, None, None, lacks=said["lacks"])
        raise JobError("provider_error", f"output: no image that takes little {said['lacks']}")

    async def shrink(self, file: IO[bytes]) -> bytes:
        """Do what shrink_source does. Raises JobError."""
        file.seek(0)
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(file, copy)
            said = await self._ask("shrink", copy)
        if said["lacks"]:
            raise JobError("invalid_input", f"source: takes too much {said['lacks']}")
        return base64.b64decode(said["data"])

    async def draw(self, prompt: str, seed: int, size: tuple[int, int], source: bytes) -> bytes:
        """Do what draw_preview does. Raises JobError."""
        with tempfile.TemporaryFile() as file:
            file.write(source)
            said = await self._ask("draw", file, prompt=prompt, seed=seed, size=size)
        if said["lacks"]:
            raise JobError("internal", f"preview: takes too much {said['lacks']}")
        return base64.b64decode(said["data"])

    async def _ask(self, task: str, file: IO[bytes], **more: Any) -> dict[str, Any]:
        """Have it done as a small picture; if that takes more memory, among the large ones."""
        said: dict[str, Any] = {}
        for means, lane in self.lanes:
            async with lane:
                said = await self._run(file, {"task": task, "means": means, **more})
            if said.get("lacks") != "memory":
                break
        if "failed" in said:
            code, detail = said["failed"]
            raise JobError(code, detail, reason=said["reason"])
        return said

    async def _run(self, file: IO[bytes], request: dict[str, Any]) -> dict[str, Any]:
        """Answer all that a new process told until its end. Raises OSError if there is none."""
        file.flush()
        for attempt in range(3):  # perhaps the server ends just now, as nobody has asked
            await asyncio.sleep(backoff(attempt) if attempt else 0)
            ours, theirs = socket.socketpair()
            with theirs, contextlib.suppress(ConnectionError):
                socket.send_fds(self.start(), [b"1"], [theirs.fileno(), file.fileno()])
            reader, writer = await asyncio.open_connection(sock=ours)
            said: dict[str, Any] = {}
            try:
                writer.write(json.dumps(request).encode())
                writer.write_eof()
                with contextlib.suppress(ConnectionError):
                    said = json.loads(await reader.readline() or b"{}")
                    for line in (await reader.read()).split(b"\n")[:-1]:
                        said |= json.loads(line)
            except asyncio.CancelledError:
                with contextlib.suppress(KeyError, ProcessLookupError):
                    os.kill(said["pid"], signal.SIGKILL)
                raise
            finally:
                writer.close()
            if said.pop("pid", None):
                return said
        raise OSError(errno.EAGAIN, "no process for pictures")

    def start(self) -> socket.socket:
        """Have the server run; answer how to reach it."""
        if self.server is None or self.server.poll() is not None:
            self.close()
            self.door, theirs = socket.socketpair()
            with theirs:
                self.server = subprocess.Popen(
                    [sys.executable, __file__, PICTURES],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={key: os.environ[key] for key in PUBLIC_VARIABLES & os.environ.keys()},
                    start_new_session=True,  # not stopped by what stops the worker, as Ctrl-C
                )
        return self.door

    def close(self) -> None:
        """End all processes for pictures."""
        if self.server:
            self.door.close()
            self.server.wait()


def serve_pictures() -> None:
    """Be the server of a worker's Pictures: fork a process for each request, without threads.

    So each has its own limits, and whatever a picture does to it is over with it.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # the stacks of many would count as memory
    Image.init()
    gc.freeze()  # what is there already is not copied by looking at it
    control = socket.socket(fileno=0)
    control.settimeout(IDLE_SECONDS)
    with contextlib.suppress(TimeoutError):
        while descriptors := socket.recv_fds(control, 1, 2)[1]:
            with contextlib.suppress(OSError):  # the worker sees that there is none
                if os.fork() == 0:
                    try:
                        serve_picture(*descriptors)
                    finally:
                        os._exit(0)
            for each in descriptors:
                os.close(each)
    os.killpg(0, signal.SIGKILL)  # who is still at work would be so for nobody


def serve_picture(channel: int, descriptor: int) -> None:
    """Do one request and end. What is told line by line holds, even if it is ended before."""
    with socket.socket(fileno=channel) as worker, os.fdopen(descriptor, "r+b") as file:

        def tell(**said: Any) -> None:
            worker.sendall(
                json.dumps(said, default=lambda data: base64.b64encode(data).decode()).encode()
                + b"\n"
            )

        tell(pid=os.getpid(), lacks="time")  # so it is, unless it gets to say something else
        with worker.makefile("rb") as asked:
            request = json.load(asked)
        means = request["means"]
        restrict(means)
        try:
            if request["task"] == "inspect":
                tell(**asdict(inspect_image(file, request["preview_pixels"], means, tell)))
            elif request["task"] == "shrink":
                tell(data=shrink_source(file, means), lacks=None)
            else:
                wish = request["prompt"], request["seed"], tuple(request["size"])
                tell(data=draw_preview(*wish, file), lacks=None)
        except MemoryError:
            tell(lacks="memory")
        except Exception as error:
            failed = as_job_error(error)
            tell(failed=(failed.code, failed.detail), reason=failed.reason, lacks=None)


def restrict(means: int) -> None:
    """Have the kernel refuse this process more memory, and end it if it takes too long."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + means
    for what, most in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, PICTURE_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (most, most))
    signal.alarm(STALL_SECONDS)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")  # it goes before the worker


class Chunks(PngImagePlugin.PngStream):
    """A PNG's: what does not tell of the pixels is passed over, or left out where it is broken."""

    def call(self, cid: bytes, pos: int, length: int) -> bytes:
        if cid in PIXEL_CHUNKS:
            return super().call(cid, pos, length)
        if cid in (b"iCCP", b"eXIf"):
            with contextlib.suppress(Exception):
                return super().call(cid, pos, length)
        assert self.fp
        self.fp.seek(pos)
        return ImageFile._safe_read(self.fp, length)

    def crc(self, cid: bytes, data: bytes) -> None:
        if cid in PIXEL_CHUNKS:
            super().crc(cid, data)
        else:
            self.crc_skip(cid, data)


def read_app(image: JpegImagePlugin.JpegImageFile, marker: int) -> None:
    """Read a JPEG's segment for applications, or leave it out where it is broken."""
    with contextlib.suppress(Exception):
        JpegImagePlugin.APP(image, marker)
        image.icclist = [part for part in image.icclist if len(part) > 14]


PngImagePlugin.PngStream = Chunks  # type: ignore[misc]
JpegImagePlugin.MARKER.update(dict.fromkeys(range(0xFFE0, 0xFFF0), ("APP", "", read_app)))  # type: ignore[arg-type]
# A JPEG is read as one also where it says that it is several, rightly or not.
Image.register_open("JPEG", JpegImagePlugin.JpegImageFile, JpegImagePlugin._accept)


def weigh(image: Image.Image, side: int, size: int) -> int:
    """How much memory it takes at most to decode an opened image and shrink it to this side."""
    pixels = image.width * image.height
    if image.format == "JPEG":
        each = 2 * len(image.getbands()) + 2  # a progressive one is held whole
    else:
        each = {"AVIF": 10, "WEBP": 17}.get(str(image.format)) or PIXEL_BYTES.get(image.mode, 13)
    return BASE_BYTES + 2 * size + each * pixels + 24 * min(pixels, side * side)


def inspect_image(
    file: IO[bytes],
    preview_pixels: int,
    means: int = LARGE_BYTES,
    tell: Callable[..., None] = lambda **_: None,
) -> Picture:
    """Look at the bytes themselves, whatever the provider calls them. Raises JobError.

    An image is decoded once, of an animation the first frame. An SVG is replaced in the file by one
    that does nothing. What can be told without decoding is told before.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        with Image.open(file, formats=[name for name in FORMATS if name != "SVG"]) as image:
            return decode_image(image, preview_pixels, size, means, tell)
    except UnidentifiedImageError:
        if BASE_BYTES + SVG_BYTES * min(size, MAX_SVG_BYTES) > means:
            raise MemoryError from None
        return sanitize_svg(file)
    except UNREADABLE as error:
        raise JobError("provider_error", f"output: no image: {type(error).__name__}") from None


def decode_image(
    image: Image.Image, preview_pixels: int, size: int, means: int, tell: Callable[..., None]
) -> Picture:
    """Decode an opened image, a JPEG no larger than needed. Raises JobError, or what Pillow does.

    Width and height are as displayed: turned as EXIF says.
    """
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise JobError("provider_error", "output: too many pixels")
    kind, full, profile = str(image.format), image.size, image.info.get("icc_profile")
    turn = orientation(image)
    width, height = full[::-1] if turn in SIDEWAYS else full
    side = preview_pixels or BLUR_PIXELS
    if weigh(image, side, size) > means:
        return Picture(kind, width, height, lacks="memory")
    tell(format=kind, width=width, height=height)
    image.draft(None, (2 * side, 2 * side))
    image.load()
    turn = turn or orientation(image)  # of a PNG it may come last
    width, height = full[::-1] if turn in SIDEWAYS else full
    if image.mode.startswith("I;16"):
        image = image.point(lambda value: value / 256).convert("L")
    mode = "RGBA" if image.has_transparency_data else "RGB"
    small = image if image.mode == mode else image.convert(mode)
    small.thumbnail((side, side))
    if turn in EXIF_TURNS:
        small = small.transpose(EXIF_TURNS[turn])
    file = io.BytesIO()
    if 0 < preview_pixels < max(width, height):
        small.save(file, "WEBP", quality=75, icc_profile=profile if is_of_rgb(profile) else None)
    return Picture(kind, width, height, blur(small), file.getvalue() or None)


def orientation(image: Image.Image) -> int:
    """How EXIF says that an image is turned; 0 where it does not, or is not to be understood."""
    with contextlib.suppress(Exception):
        return int(image.getexif().get(0x0112, 0)) if "exif" in image.info else 0
    return 0


def is_of_rgb(profile: bytes | None) -> bool:
    """Whether it is a whole profile of RGB colours, which the preview has, and not a huge one."""
    return bool(
        profile
        and len(profile) == int.from_bytes(profile[:4]) <= MAX_PROFILE_BYTES
        and (profile[16:20], profile[36:40]) == (b"RGB ", b"acsp")
    )


def blur(image: Image.Image) -> str:
    """The blurhash of an RGB or RGBA image, on white."""
    image.thumbnail((BLUR_PIXELS, BLUR_PIXELS))
    flat = Image.new("RGB", image.size, "white")
    flat.paste(image, mask=image if image.mode == "RGBA" else None)
    pixels = flat.get_flattened_data()
    rows = [pixels[start : start + flat.width] for start in range(0, len(pixels), flat.width)]
    return str(blurhash.encode(rows, 4, 3))


def sanitize_svg(file: IO[bytes]) -> Picture:
    """Replace an SVG by what svg-hush lets through: no script, handler, link or foreign host.

    Raises JobError if it is no SVG, or one that is made to get past or to exhaust a reader.
    """
    file.seek(0)
    try:
        source = file.read(MAX_SVG_BYTES + 1)
        if len(source) > MAX_SVG_BYTES:
            raise ValueError("too large")
        read_svg(source)  # first: svg-hush indents, so deep nesting would fill the memory
        clean = filter_svg(source, {"image": ["png", "jpeg", "gif", "webp"]})
        root = read_svg(clean, is_clean=True)
    except (ValueError, expat.ExpatError) as error:
        detail, reason = f"output: no image: {error}", "output: no image"
        raise JobError("provider_error", detail, reason=reason) from None
    file.seek(0)
    file.truncate()
    file.write(clean)
    file.flush()
    return Picture("SVG", *svg_size(root))


def read_svg(source: bytes, *, is_clean: bool = False) -> dict[str, str]:
    """Answer the root's attributes. Raises ValueError or ExpatError for what is no decent SVG.

    If it is said to be clean, for what svg-hush is known to let through, too.
    """
    names: list[str] = []  # of the open elements
    root: dict[str, str] = {}
    weight = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal weight
        if not names:
            root.update(attributes)
        if (not names and name != f"{SVG}svg") or (is_clean and not name.startswith(SVG)):
            raise ValueError("not an SVG")
        if names[-1:] == [f"{SVG}style"]:
            raise ValueError("an element in a style sheet")  # svg-hush forgets to filter after it
        names.append(name)
        weight += len(names)
        if len(names) > MAX_SVG_DEPTH or weight > MAX_SVG_WEIGHT:
            raise ValueError("too many elements, or too deep")

    def entity(*_: object) -> None:
        raise ValueError("an entity")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler, parser.EndElementHandler = start, lambda _: names.pop()
    parser.EntityDeclHandler = entity
    parser.Parse(source, True)
    if is_clean and FOREIGN.search(source):
        raise ValueError("a reference to elsewhere")
    return root


def svg_size(root: Mapping[str, str]) -> tuple[int, int] | tuple[None, None]:
    """Width and height where they are plain numbers, else those of the viewBox, else none."""
    box = root.get("viewBox", "").replace(",", " ").split()[2:]
    for pair in ([root.get("width", ""), root.get("height", "")], box):
        found = [re.fullmatch(r"(\d{1,6}(?:\.\d{1,9})?)(?:px)?", length) for length in pair]
        sizes = [round(float(each[1])) for each in found if each]
        if len(sizes) == len(pair) == 2 and min(sizes) > 0:
            return sizes[0], sizes[1]
    return None, None


def shrink_source(file: IO[bytes], means: int = LARGE_BYTES) -> bytes:
    """A source image, small, as a PNG. Raises JobError."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    try:
        with Image.open(file, formats=["JPEG", "PNG", "WEBP"]) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise JobError("invalid_input", "source: too many pixels")
            if weigh(image, max(PREVIEW_SOURCE_SIZE), size) > means:
                raise MemoryError
            image.draft("RGB", PREVIEW_SOURCE_SIZE)
            image.thumbnail(PREVIEW_SOURCE_SIZE)
            return as_png(image.convert("RGB"))
    except UNREADABLE as error:
        raise JobError("invalid_input", f"source: no image: {type(error).__name__}") from None


def draw_preview(
    prompt: str, seed: int, size: tuple[int, int], source: IO[bytes] | None = None
) -> bytes:
    """A PNG that is the same for the same arguments, with the prompt written into it."""
    chance = random.Random(hashlib.sha256(f"{prompt}\0{seed}".encode()).digest())
    hue = chance.randrange(360)
    sky, ground = f"hsl({hue}, 55%, 24%)", f"hsl({(hue + 50) % 360}, 55%, 62%)"
    image = ImageOps.colorize(Image.linear_gradient("L").resize(size), sky, ground)
    if source and source.seek(0, io.SEEK_END):
        image.paste(Image.blend(image, ImageOps.fit(Image.open(source), size), 0.7))
    _write_caption(image, prompt, f"placeholder, seed {seed}, {size[0]} x {size[1]}")
    return as_png(image)


def _write_caption(image: Image.Image, text: str, note: str) -> None:
    draw, (width, height), shorter = ImageDraw.Draw(image, "RGBA"), image.size, min(image.size)
    margin = max(4, shorter // 20)
    font = ImageFont.load_default(max(9, shorter // 18))
    small = ImageFont.load_default(max(8, shorter // 36))
    per_line = max(4, int((width - 2 * margin) / font.getlength("n")))
    words = "".join(c if c.isprintable() else " " for c in text)
    lines = textwrap.wrap(words, per_line, max_lines=6, placeholder=" …")
    draw.multiline_text(
        (width / 2, height / 2), "\n".join(lines), font=font, anchor="mm", align="center",
        fill="white", stroke_width=max(1, shorter // 300), stroke_fill=(0, 0, 0, 160),
    )  # fmt: skip
    draw.text((margin, height - margin), note, font=small, anchor="ls", fill=(255, 255, 255, 200))


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# --- the outbox ---------------------------------------------------------------------------------


class NotPublic(Exception):
    """A webhook's name leads to an address inside somebody's network."""


class PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects to public addresses only.

    A name is looked up once, here, and what was checked is connected to: it cannot become another
    address in between. TLS verifies the name as ever.
    """

    def __init__(self, allowed_hosts: frozenset[str]) -> None:
        self.allowed_hosts = allowed_hosts
        self.backend = httpcore.AnyIOBackend()
        self.resolver = ThreadPoolExecutor(16, "resolver")  # a lookup that hangs holds up no other

    async def connect_tcp(self, host: str, port: int, *rest: Any, **more: Any) -> Any:
        addresses = await self.resolve(host, port)
        if f"{host}:{port}" not in self.allowed_hosts and not all(map(is_public, addresses)):
            raise NotPublic
        for address in addresses[:-1]:
            with contextlib.suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self.backend.connect_tcp(address, port, *rest, **more)
        return await self.backend.connect_tcp(addresses[-1], port, *rest, **more)

    async def resolve(self, host: str, port: int) -> list[str]:
        """Every address of a name. Raises OSError."""
        look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self.resolver, look_up)
        return [str(address[0]) for *_, address in found]


def is_public(address: str) -> bool:
    """Whether an IP address can be reached by anybody, and is not another one in disguise."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip in NAT64:
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if ip not in IPV6_UNICAST:
            return False
    known = any(ip in network for network in NOT_PUBLIC if network.version == ip.version)
    return ip.is_global and not ip.is_multicast and not known


def signatures(secrets: list[str], message_id: str, timestamp: str, body: bytes) -> str:
    """The header webhook-signature: one signature for each secret (Standard Webhooks 1.0.0)."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    keys = [base64.b64decode(secret.removeprefix("whsec_")) for secret in secrets]
    digests = [hmac.digest(key, signed, "sha256") for key in keys]
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def judge(status: int, retry_after: str | None) -> Verdict:
    """What an endpoint's status means. Redirects are failures: they are not followed."""
    if 200 <= status < 300:
        return Verdict("delivered", status)
    if status == 410:
        return Verdict("gone", status)
    return Verdict("failed", status, retry_after=asked_seconds(retry_after))


class Outbox:
    """Sends what the database says is due, each lane for itself."""

    def __init__(self, settings: Settings, db: Database, http: httpx.AsyncClient) -> None:
        self.settings, self.db, self.http = settings, db, http
        # Not httpx: this follows no redirect, heeds no proxy, and unpacks nothing.
        self.webhooks = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(),
            max_connections=None,
            max_keepalive_connections=0,
            network_backend=PublicNetwork(settings.webhook_allowed_hosts),
        )
        self.expo = asyncio.Semaphore(EXPO_CONNECTIONS)
        self.due = asyncio.Event()
        self.lanes: dict[str, asyncio.Task[None]] = {}

    async def run(self, stopping: asyncio.Event) -> None:
        """Look when something may be due: a job or a lane has ended, or the time is up."""
        attempt = 0
        while not stopping.is_set():
            self.due.clear()
            try:
                for lane in set(await self.db.due_lanes()) - self.lanes.keys():
                    self.lanes[lane] = asyncio.create_task(self._serve(lane, stopping))
                pause, attempt = self.settings.poll_seconds * random.uniform(0.8, 1.0), 0
            except psycopg.Error:
                pause, attempt = backoff(attempt), attempt + 1
            await asyncio.sleep(OUTBOX_SECONDS)
            waits = [asyncio.create_task(event.wait()) for event in (self.due, stopping)]
            await asyncio.wait(
                [*waits, *self.lanes.values()], timeout=pause, return_when=asyncio.FIRST_COMPLETED
            )
            for wait in waits:
                wait.cancel()

    async def _serve(self, lane: str, stopping: asyncio.Event) -> None:
        """Send what is due in a lane until nothing is left: in several requests at once, of which
        one that hangs holds up no other. A request to Expo takes many pushes.
        """
        under_way: set[asyncio.Task[None]] = set()
        is_idle = True
        try:
            async with asyncio.TaskGroup() as requests:
                while not stopping.is_set():
                    for together in await self._claim(lane, LANE_SLOTS - len(under_way)):
                        under_way.add(requests.create_task(self._deliver(lane, together)))
                        is_idle = False
                    if not under_way:
                        break
                    _, under_way = await asyncio.wait(
                        under_way, timeout=BUSY_LANE_SECONDS, return_when=asyncio.FIRST_COMPLETED
                    )
            if is_idle:
                await asyncio.sleep(BUSY_LANE_SECONDS)
        finally:
            del self.lanes[lane]

    async def _claim(self, lane: str, requests: int) -> list[list[Delivery]]:
        """Claim for so many requests; answer what goes into each, if the database can."""
        if not requests:
            return []
        try:
            if lane == EXPO_LANE:
                pushes = await self.db.claim_deliveries(lane, MAX_PUSHES)
                return [pushes] if pushes else []
            return [[each] for each in await self.db.claim_deliveries(lane, requests)]
        except psycopg.Error:
            return []

    async def _deliver(self, lane: str, claimed: list[Delivery]) -> None:
        """Send what goes in one request, and say what became of each."""
        if deliveries := [each for each in claimed if each.body is not None]:
            verdicts = await self._send(deliveries)
            finished = (self._finish(lane, *each) for each in verdicts.items())
            await finish_first(asyncio.gather(*finished))

    async def _finish(self, lane: str, delivery: Delivery, verdict: Verdict) -> None:
        try:
            state = await self.db.finish_delivery(delivery, verdict)
        except psycopg.Error as error:  # once its lease has run out, it is sent again
            state, verdict = "unknown", Verdict("failed", error=type(error).__name__)
        log.log(
            logging.INFO if state == "delivered" else logging.WARNING,
            "delivery.%s delivery=%s lane=%s status=%s error=%r",
            *(state, delivery.delivery_id, lane, verdict.status, verdict.error),
        )

    async def _send(self, deliveries: list[Delivery]) -> dict[Delivery, Verdict]:
        """Try once. A library's message may hold the address: only its type is kept."""
        verdicts: dict[Delivery, Verdict] = {}
        first = deliveries[0]
        try:
            async with asyncio.timeout(DELIVERY_SECONDS):
                if first.url is None:
                    await self._push(deliveries, verdicts)
                else:
                    verdicts[first] = await self._post(
                        first, first.url, (first.body or "").encode()
                    )
            error = "NoTicket"
        except NotPublic:
            error = "the address is not public"
        except Exception as failure:
            error = type(failure).__name__
        return {each: verdicts.get(each) or Verdict("failed", error=error) for each in deliveries}

    async def _post(self, delivery: Delivery, url: str, body: bytes) -> Verdict:
        message_id, timestamp = f"evt_{delivery.delivery_id.hex}", str(int(time.time()))
        headers: dict[bytes | str, bytes | str] = {
            "content-type": "application/json",
            "user-agent": f"Darkroom/{version()}",
            "webhook-id": message_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": signatures(delivery.secrets or [], message_id, timestamp, body),
        }
        async with self.webhooks.stream("POST", url, headers=headers, content=body) as response:
            fields = {name.lower(): value for name, value in response.headers}
            return judge(response.status, fields.get(b"retry-after", b"").decode("latin-1"))

    async def _push(self, pushes: list[Delivery], verdicts: dict[Delivery, Verdict]) -> None:
        """Hand messages to Expo. Its tickets say that Expo took them, not that they arrived.

        What it refuses as a whole goes again in two halves, so that one message blocks no other;
        messages for several projects, which is refused, by project.
        """
        messages = [message for each in pushes for message in json.loads(each.body or "[]")]
        response = await self._ask_expo(self.settings.expo_push_url, messages)
        if response.status_code in (400, 413, 422) and len(pushes) > 1:
            parts = by_project(response, pushes)
            await asyncio.gather(*(self._push(part, verdicts) for part in parts))
        elif response.status_code != 200:
            verdict = judge(response.status_code, response.headers.get("retry-after"))
            verdicts |= dict.fromkeys(pushes, replace(verdict, outcome="failed"))
        elif len(tickets := response.json()["data"]) == len(pushes):
            for push, ticket in zip(pushes, tickets, strict=True):
                with contextlib.suppress(KeyError, TypeError, AttributeError):
                    verdicts[push] = judge_ticket(ticket)

    async def _ask_expo(self, url: str, body: Any) -> httpx.Response:
        headers = {"accept": "application/json"}
        if token := self.settings.expo_access_token:
            headers["authorization"] = f"Bearer {token}"
        async with self.expo:
            return await self.http.post(url, json=body, headers=headers)

    async def read_receipts(self) -> None:
        """Ask Expo what became of what it took; a token that is dead by then is forgotten."""
        while tickets := await self.db.claim_receipts():
            errors: dict[UUID, str | None] = {}
            url = urljoin(self.settings.expo_push_url, "getReceipts")
            try:
                response = await self._ask_expo(url, {"ids": list(tickets)})
                for ticket, receipt in response.raise_for_status().json()["data"].items():
                    if delivery_id := tickets.get(ticket):
                        errors[delivery_id] = judge_ticket(receipt).error
            except Exception as error:  # asked for again a quarter of an hour later
                log.warning("receipts.failed error=%s", type(error).__name__)
                return
            await self.db.finish_receipts(errors)
            for delivery_id, said in errors.items():
                if said:
                    log.warning("receipt.error delivery=%s error=%s", delivery_id, said)


def judge_ticket(ticket: Mapping[str, Any]) -> Verdict:
    """What a ticket of Expo's, or a receipt, says of one push."""
    if ticket["status"] == "ok":
        number = ticket.get("id")
        is_usable = isinstance(number, str) and 0 < len(number) <= 100
        return Verdict("delivered", 200, ticket=number if is_usable else None)
    reason = re.sub(r"[^A-Za-z]", "", str((ticket.get("details") or {}).get("error")))[:50]
    return Verdict("gone" if reason == "DeviceNotRegistered" else "failed", 200, reason)


def by_project(response: httpx.Response, pushes: list[Delivery]) -> list[list[Delivery]]:
    """Parts of what Expo refused together: by project, where it tells them apart, else halves."""
    parts: dict[Any, list[Delivery]] = {}
    with contextlib.suppress(ValueError, TypeError, KeyError, IndexError, AttributeError):
        projects = response.json()["errors"][0]["details"].items()
        owners = {token: name for name, tokens in projects for token in tokens}
        for each in pushes:
            parts.setdefault(owners.get(json.loads(each.body or "")[0]["to"]), []).append(each)
    if len(parts) < 2:
        middle = len(pushes) // 2
        return [pushes[:middle], pushes[middle:]]
    return list(parts.values())


# --- the worker ---------------------------------------------------------------------------------


class Systemd:
    """Tells systemd how the worker is, as sd_notify does; nobody where it was not started by it."""

    def __init__(self, address: str | None) -> None:
        self.address = address and re.sub("^@", "\0", address)

    def tell(self, *assignments: str) -> None:
        """Send READY=1, STATUS=… and the like. Never waits."""
        if not self.address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)
            try:
                channel.sendto("\n".join(assignments).encode(), self.address)
            except OSError as error:
                log.warning("systemd.unreachable error=%s", error)


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
        self.systemd = Systemd(None)
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
            tasks = [
                background.create_task(self.db.listen(registered["channel"], self.on_notify)),
                background.create_task(
                    self._every(registered["heartbeat_seconds"], self.beat, self.news)
                ),
                background.create_task(self._every(RECOVERY_SECONDS, self.recover)),
                background.create_task(self._every(ERASE_SECONDS, self.erase)),
                background.create_task(self._every(RECEIPTS_SECONDS, self.outbox.read_receipts)),
                background.create_task(self.outbox.run(self.stopping)),
                background.create_task(self._end_pauses()),
            ]
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
        """Have a heartbeat carry it before long, but not each step of each job by itself."""
        if self.news_due is None:
            self.news_due = asyncio.get_running_loop().call_later(PROGRESS_SECONDS, self.news.set)

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
        """Feed the watchdog at the end of a turn, once for each beat that was answered, or with
        each turn while the database says that it cannot: a worker that waits for it is well.

        So it goes hungry when this loop stands still, and when the database says nothing.
        """
        if self.db.has_listened.is_set() and self.last_beat > self.last_told:
            wakes = (
                "is woken by NOTIFY" if self.db.is_listening else "polls, as LISTEN does not work"
            )
            slots = f"{len(self.running)} of {self.settings.slots} slots busy"
            self.systemd.tell(
                "READY=1", "WATCHDOG=1", f"STATUS=worker {self.worker_id}: {slots}, {wakes}"
            )
            self.last_told = time.monotonic()
        elif self.db.trouble:
            self.systemd.tell("WATCHDOG=1", f"STATUS=waits for the database: {self.db.trouble}")

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
            running = Running(job, began, self.on_progress)
            self.running[job.token] = running
            running.task = asyncio.create_task(self.process(running))
        await asyncio.sleep(0)  # jobs first, then the next claim
        return bool(jobs)

    async def _sleep(self) -> None:
        """Go to sleep, and look twice more: an enqueue in flight may have seen us awake.

        Whoever wakes us marks us awake, whether or not the job is left for us: then from the top.
        """
        self.wake.clear()
        await self.db.sleep(self.worker_id)
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

    async def _end_pauses(self) -> None:
        """Have nothing wait longer once the worker is to stop."""
        await self.stopping.wait()
        self.wake.set()
        self.freed.set()

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
        if recovered := await self.db.recover_stale_jobs():
            log.warning("jobs.recovered count=%s", recovered)

    async def erase(self) -> None:
        """Erase what has been kept long enough, one request at a time, until nothing is left.

        What Storage does not delete now stays on the list for another time.
        """
        try:
            while await self.db.apply_retention() + await self._erase_files():
                pass
        except StorageRefused as error:
            log.warning("files.kept error=%s", error)
        except psycopg.Error as error:  # in a minute, not at once
            log.error("files.kept error=%s", type(error).__name__)

    async def _erase_files(self) -> int:
        erased = 0
        while files := await self.db.list_expired_files():
            for bucket, paths in files.items():
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
            await asyncio.sleep(ALONE_SECONDS)
            return sum([await self._erase_some(bucket, [path]) for path in paths])
        if kept := await self.db.forget_files(bucket, paths):
            log.warning("files.kept error=%s of %s are still there", kept, len(paths))
        log.info("files.erased bucket=%s count=%s", bucket, len(paths) - kept)
        return len(paths) - kept

    async def _drain(self) -> None:
        """Let jobs and deliveries finish within the grace time; the rest are cancelled: jobs are
        released, deliveries sent again by others.
        """
        log.info("worker.stopping running=%s", len(self.running))
        self.systemd.tell("STOPPING=1", "WATCHDOG=1", f"STATUS=ends {len(self.running)} jobs")
        with contextlib.suppress(psycopg.Error):
            await self.db.unregister_worker(self.worker_id)  # or a wake-up would be lost on it
        tasks = [*(each.task for each in self.running.values()), *self.outbox.lanes.values()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=self.settings.grace_seconds)
            for task in late:
                task.cancel()
            if late and (await asyncio.wait(late, timeout=RELEASE_SECONDS))[1]:
                force_exit()

    async def process(self, running: Running) -> None:
        """One job from claim to end: every way out completes, fails, releases or drops it."""
        job, started = running.job, time.monotonic()
        log.info("job.claimed job=%s attempt=%s provider=%s", job.job_id, job.attempt, job.provider)
        try:
            async with asyncio.timeout(job.deadline_seconds):
                images = await self._make(running)
            running.is_ending = True
            await self.db.complete_job(job, images, running.metrics)
            log.info(
                "job.completed job=%s images=%s seconds=%.2f",
                job.job_id,
                len(images),
                time.monotonic() - started,
            )
        except LeaseLost:
            await finish_first(self._drop(running))
        except asyncio.CancelledError:
            await finish_first(self._give_up(running))
        except Canceled:
            running.is_canceled = True
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
        await self.db.report_progress(job, "storing", None)
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
            await self.db.begin_create(running.job)
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
        since, sent = await self.db.recall_create(running.job)
        give_up_at, attempt = time.monotonic() + provider.settle_seconds, 0
        while True:
            is_last = time.monotonic() >= give_up_at
            candidates = await provider.find(running.job, since, sent)
            if bought := await finish_first(self._adopt(running, candidates)):
                return bought
            if is_last:
                return None
            await asyncio.sleep(min(backoff(attempt), max(0.0, give_up_at - time.monotonic())))
            attempt += 1

    async def _adopt(self, running: Running, candidates: list[str]) -> str | None:
        """Take over a purchase and know it at once, also when the job is stopped meanwhile."""
        job = running.job
        running.provider_job_id = await self.db.adopt_provider_job(job, candidates)
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
                provider_input[name] = await self._source(provider, given)
            elif isinstance(given, list):
                provider_input[name] = [await self._source(provider, path) for path in given]
        return provider_input

    async def _source(self, provider: Provider, path: str) -> str:
        try:
            if provider.fetches_sources and self.storage.is_reachable_from_outside:
                return await self.storage.sign(path)
            with tempfile.SpooledTemporaryFile(max_size=1 << 20) as file:
                await self.storage.fetch(path, file)
                return await provider.upload(path.rpartition("/")[2], file)
        except httpx.TransportError as error:
            raise JobError("storage_unavailable", f"source: {type(error).__name__}") from None
        except httpx.HTTPError as error:
            raise JobError("internal", f"source: {type(error).__name__}") from None

    async def _fail(self, running: Running, error: JobError) -> None:
        running.is_ending = True
        job = running.job
        self.is_full = self.is_full or error.code == "worker_full"
        try:
            outcome = await self.db.fail_job(job, error, running.metrics | error.metrics)
            what = (outcome, job.job_id, error.code, error.reason)
            log.warning("job.%s job=%s code=%s reason=%r", *what)
        except LeaseLost:
            log.warning("job.lost job=%s", job.job_id)

    async def _pause_provider(self, running: Running, error: ProviderDown) -> None:
        """The provider refused the account: put the job back and let its like wait."""
        running.is_ending = True
        job = running.job
        log.error(
            "provider.refused provider=%s job=%s is_sure=%s",
            job.provider,
            job.job_id,
            error.is_sure,
        )
        with contextlib.suppress(LeaseLost):
            user_id = None if error.is_sure else job.user_id
            if await self.db.pause_provider(
                job.provider, PROVIDER_PAUSE_SECONDS, error.detail, user_id
            ):
                await self.db.release_job(job, resumes=error.may_have_bought)
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
                await self.db.cancel_job(job, running.metrics)
            else:
                await self.db.release_job(job, resumes="is_asked" not in running.metrics)
        log.info("job.%s job=%s", "canceled" if running.is_canceled else "released", job.job_id)


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
    try:
        return metadata.version("darkroom")
    except metadata.PackageNotFoundError:
        return "0"


def force_exit() -> None:
    """End now. Jobs in flight are left to their leases."""
    log.error("worker.forced")
    logging.shutdown()
    os._exit(EXIT_FORCED)


def on_signal(stopping: asyncio.Event) -> None:
    """The first signal asks to stop, the second does not ask."""
    if stopping.is_set():
        force_exit()
    stopping.set()


def make_replicate(settings: Settings, http: httpx.AsyncClient) -> Replicate | None:
    """Answer Replicate, if there is a key for it."""
    if not settings.replicate_api_token:
        return None
    return Replicate(
        http,
        settings.replicate_api_url,
        settings.replicate_api_token,
        settings.replicate_settle_seconds,
    )


def make_storage(settings: Settings, http: httpx.AsyncClient) -> Storage:
    return Storage(
        http,
        settings.supabase_url,
        settings.supabase_service_key,
        settings.max_image_bytes,
        settings.image_preview_pixels,
    )


async def serve(settings: Settings) -> int:
    """Wire everything together and run one worker."""
    db = Database(settings.database_url, settings.secrets)
    async with httpx.AsyncClient(timeout=HTTP_TIMEOUT) as http:
        preview = Preview(settings.preview_seconds, settings.preview_failure_rate)
        providers: dict[str, Provider] = {"preview": preview}
        if replicate := make_replicate(settings, http):
            providers["replicate"] = replicate
        storage, outbox = make_storage(settings, http), Outbox(settings, db, http)
        storage.pictures = preview.pictures
        storage.pictures.start()  # meanwhile, for the first job
        worker = Worker(settings, db, providers, storage, outbox)
        worker.systemd = Systemd(os.environ.get("NOTIFY_SOCKET"))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, on_signal, worker.stopping)
        try:
            await db.pool.open()
            await worker.run()
        except ConfigError as error:
            log.error("worker.refused %s", error)
            return EXIT_CONFIG
        finally:
            await db.pool.close()
            preview.pictures.close()
    return EXIT_OK


async def check_database(db: Database) -> list[Finding]:
    """Rights, pg_cron and Storage's policies, as the database itself sees them."""
    async with await db.connect():  # says why it cannot, which the pool keeps for itself
        pass
    await db.pool.open(wait=True, timeout=15)
    try:
        return await db.check_setup()
    except (psycopg.errors.UndefinedFunction, psycopg.errors.InvalidSchemaName):
        detail = "no Darkroom of this version here: apply supabase/migrations"
    except psycopg.errors.InsufficientPrivilege:
        detail = "DATABASE_URL: its role is not darkroom_worker"
    return [Finding("database", "wrong", detail)]


async def check_listen(db: Database) -> list[Finding]:
    """Whether a NOTIFY arrives."""
    channel, began = f"darkroom_check_{uuid4().hex}", time.monotonic()
    async with await db.connect() as connection:
        await connection.execute(sql.SQL("listen {}").format(sql.Identifier(channel)))
        await db.hear(connection, channel, lambda _: None)
    milliseconds = 1000 * (time.monotonic() - began)
    return [Finding("listen", "ok", f"a NOTIFY arrived within {milliseconds:.0f} ms")]


async def check_storage(storage: Storage) -> list[Finding]:
    return [await storage.check()]


async def check_replicate(replicate: Replicate | None) -> list[Finding]:
    if replicate:
        return [await replicate.check()]
    detail = "REPLICATE_API_TOKEN is not set: jobs for its models fail here"
    return [Finding("replicate", "note", detail)]


async def look(part: str, finding: Awaitable[list[Finding]]) -> bool:
    """Print what a part of the check finds, a line each; answer whether all is well."""
    try:
        findings = await finding
    except httpx.HTTPError as error:
        name = "REPLICATE_API_URL" if part == "replicate" else "SUPABASE_URL"
        findings = [Finding(part, "wrong", f"{name}: {type(error).__name__}")]
    except (psycopg.Error, JobError, StorageRefused) as error:
        detail = error if isinstance(error, Deaf | JobError) else f"{type(error).__name__}: {error}"
        findings = [Finding(part, "wrong", str(detail))]
    for each in findings:
        print(f"{each.verdict:5}  {each.part:9}  {' '.join(each.detail.split())}", flush=True)
    return all(each.verdict != "wrong" for each in findings)


async def check(settings: Settings) -> int:
    """Try all that a worker needs, and change nothing."""
    db = Database(settings.database_url, settings.secrets)
    async with httpx.AsyncClient(timeout=HTTP_TIMEOUT) as http:
        try:
            is_well = [
                await look("database", check_database(db)),
                not db.pool.closed and await look("listen", check_listen(db)),
                await look("storage", check_storage(make_storage(settings, http))),
                await look("replicate", check_replicate(make_replicate(settings, http))),
            ]
        finally:
            await db.pool.close()
    return EXIT_OK if all(is_well) else EXIT_ERROR


def main(arguments: Sequence[str] = ()) -> int:
    """Run until told to stop, or `check`; answer the exit code."""
    if list(arguments) == [PICTURES]:
        serve_pictures()
    output = logging.StreamHandler(sys.stderr)
    output.setFormatter(SafeFormatter())
    logging.basicConfig(handlers=[output])
    if list(arguments) not in ([], ["check"]):
        log.error("worker.misconfigured arguments: only `check` is one")
        return EXIT_CONFIG
    try:
        settings = Settings.from_env(with_credentials(os.environ))
    except ConfigError as error:
        log.error("worker.misconfigured %s", error)
        return EXIT_CONFIG
    output.setFormatter(SafeFormatter(settings.secrets))
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)  # it tells of each try to connect
    log.setLevel(settings.log_level)
    try:
        return asyncio.run(check(settings) if arguments else serve(settings))
    except Exception:
        log.critical("worker.crashed", exc_info=True)
        return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
