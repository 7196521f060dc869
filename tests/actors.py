"""Who calls the functions: a user, nobody, the operator's backend, a worker.

Each acts with its own role and claims over a connection of its own, never as the superuser. Methods
are named like the functions. Those in the past tense (`enqueued`) bring about what a test is given.
"""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import psycopg
from database import Database
from psycopg import sql
from psycopg.rows import class_row, dict_row
from psycopg.types.json import Jsonb

PREVIEW = "darkroom/preview"

# What the functions for many jobs take beside their ids and tokens.
COLUMNS = {
    "next_steps": ["jsonb[]"],
    "report_progress": ["text[]", "smallint[]"],
    "complete_jobs": ["jsonb[]", "jsonb[]"],
    "fail_jobs": ["text[]", "text[]", "real[]", "jsonb[]"],
}

T = TypeVar("T")


@dataclass(frozen=True)
class Refusal:
    """An error of ours as a client sees it."""

    code: str
    token: str
    detail: str | None
    hint: str | None
    retry_after: int | None = None

    @classmethod
    def of(cls, error: psycopg.Error) -> Refusal:
        """Read an error, also one in PostgREST's form: SQLSTATE PGRST with JSON in the message."""
        diagnosis = error.diag
        if diagnosis.sqlstate != "PGRST":
            return cls(
                error.sqlstate or type(error).__name__,
                diagnosis.message_primary or str(error),
                diagnosis.message_detail,
                diagnosis.message_hint,
            )
        body = json.loads(diagnosis.message_primary or "")
        answer = json.loads(diagnosis.message_detail or "")
        assert body["code"] == f"PT{answer['status']}"
        retry_after = int(answer["headers"]["Retry-After"])
        return cls(body["code"], body["message"], body["details"], body["hint"], retry_after)


class LeaseLost(psycopg.Error):
    """What a worker makes of it when a call for many jobs answers nothing about one."""

    sqlstate = "DR001"


class Canceled(psycopg.Error):
    """What it makes of being told so."""

    sqlstate = "DR002"


class Expected:
    """Holds the refusal once the block has ended."""

    refusal: Refusal

    @property
    def detail(self) -> str:
        return self.refusal.detail or ""


@contextlib.contextmanager
def refused(code: str, token: str | None = None) -> Iterator[Expected]:
    expected = Expected()
    try:
        yield expected
    except psycopg.Error as error:
        expected.refusal = Refusal.of(error)
    else:
        raise AssertionError(f"not refused with {code} {token or ''}")
    assert expected.refusal.code == code, expected.refusal
    assert token in (None, expected.refusal.token), expected.refusal


def outcome(call: Callable[[], T]) -> T | Refusal:
    try:
        return call()
    except psycopg.Error as error:
        return Refusal.of(error)


def together(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Make all calls at the same moment, each in a thread of its own; return their results."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], T]) -> T:
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(run, call) for call in calls]]


class Caller:
    """Calls functions as PostgREST does: in a transaction that has the role and the claims."""

    role: str
    id: str | None = None

    def __init__(self, db: Database) -> None:
        self.db = db
        self.connection = db.connect()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Call the function of this name, with arguments by place or by name."""
        if name.startswith("_"):
            raise AttributeError(name)
        return functools.partial(self.call, f"public.{name}")

    def claims(self) -> dict[str, str]:
        return {"role": self.role}

    @contextlib.contextmanager
    def acting(self) -> Iterator[psycopg.Connection[Any]]:
        """Give the connection for one transaction as this caller."""
        claims = self.claims()
        settings = {"role": self.role, "request.jwt.claims": json.dumps(claims)}
        settings |= {f"request.jwt.claim.{name}": claim for name, claim in claims.items()}
        with self.connection.transaction():
            self.connection.execute(
                "select set_config(key, value, true) from jsonb_each_text(%s)", [Jsonb(settings)]
            )
            yield self.connection

    def call(self, function: str, *places: Any, **names: Any) -> Any:
        """Call a function with arguments by place and by name, a dict as JSON."""
        marks = [sql.SQL("%s")] * len(places)
        marks += [sql.SQL("{} => %s").format(sql.Identifier(name)) for name in names]
        query = sql.SQL("select {}({})").format(
            sql.Identifier(*function.split(".")), sql.SQL(", ").join(marks)
        )
        given = [Jsonb(v) if isinstance(v, dict) else v for v in (*places, *names.values())]
        with self.acting() as connection:
            row = connection.execute(query, given).fetchone()
            return row and row[0]

    def query(self, query: str, *arguments: Any) -> list[dict[str, Any]]:
        with self.acting() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            cursor.execute(query, arguments or None)
            return cursor.fetchall() if cursor.description else []


class Anon(Caller):
    """Somebody who has not signed in."""

    role = "anon"

    def claims(self) -> dict[str, str]:
        """Return no claims: some gateways set none for anon."""
        return {}


class Service(Caller):
    """The operator's backend."""

    role = "service_role"

    def grant_credits(
        self,
        user: User | str,
        amount: int,
        external_id: str | None,
        kind: str = "grant",
        **rest: Any,
    ) -> dict[str, Any]:
        user_id = getattr(user, "id", user)
        return self.call("public.grant_credits", user_id, amount, kind, external_id, **rest)

    def alerts(self) -> dict[str, str]:
        return {alert["alert"]: alert["detail"] for alert in self.queue_health()["alerts"]}

    def set_paid(self, user: User | str, paid_until: str | None) -> dict[str, Any]:
        return self.call("public.set_paid", getattr(user, "id", user), paid_until)

    def redrive(self, code: str, since: str = "-infinity", **rest: Any) -> dict[str, Any]:
        return self.call("public.redrive_failed", code, since, **rest)

    def redrive_failed(self, code: str, since: str, **rest: Any) -> int:
        return int(self.redrive(code, since, **rest)["redriven"])

    def register_webhook(
        self, url: str = "https://api.example.com/hooks", **rest: Any
    ) -> dict[str, str]:
        return self.call("public.register_webhook", url, **rest)

    def redeliver_dead(self, webhook_id: str) -> int:
        return int(self.call("public.redeliver_dead", webhook_id)["redelivered"])


class Monitor(Caller):
    """Who only looks on: the operator's page, `make top`, an exporter of metrics."""

    role = "darkroom_monitor"


class User(Caller):
    """Somebody who has signed up."""

    role = "authenticated"

    def __init__(self, db: Database, user_id: str | None = None) -> None:
        super().__init__(db)
        self.id = user_id or str(uuid.uuid4())
        if not user_id:
            db.execute("insert into auth.users (id) values (%s)", self.id)

    def claims(self) -> dict[str, str]:
        return {"role": self.role, "sub": self.id}

    def on_another_device(self) -> User:
        return User(self.db, self.id)

    def has(self, credits: int) -> User:
        """Bring the balance to this, through the ledger."""
        if amount := credits - self.credits():
            Service(self.db).grant_credits(self, amount, str(uuid.uuid4()), "adjust")
        return self

    def has_history(self, count: int) -> list[str]:
        """Have this many free generations, each with image, preview and attempt; return paths."""
        rows = self.db.execute(
            "with made as (insert into public.generations (user_id, model_id, prompt, input,"
            "   provider_input, status, price_credits, image_count, finished_at)"
            "  select %s, 'darkroom/preview', 'a lighthouse at dusk', '{}', '{}', 'completed', 0,"
            "   1, now() from generate_series(1, %s) returning id, user_id),"
            " booked as (insert into public.credit_ledger (user_id, generation_id, kind, amount,"
            "   balance_after) select user_id, id, 'charge', 0, e.credits"
            "   from made inner join public.entitlements as e using (user_id)),"
            " tried as (insert into private.attempts (generation_id, token, model_id, attempt,"
            "   worker_id, started_at, outcome)"
            "  select id, 1, 'darkroom/preview', 1, 1, now(), 'completed' from made),"
            " shown as (insert into public.images (generation_id, position, user_id, storage_path,"
            "   preview_path, content_type, bytes) select id, 0, user_id,"
            "   concat(user_id, '/', id, '/0.png'), concat(user_id, '/', id, '/0.preview.webp'),"
            "   'image/png', 70 from made returning storage_path, preview_path)"
            " select unnest(array[storage_path, preview_path]) as path from shown",
            self.id,
            count,
        )
        self.db.execute("analyze public.generations, public.images, private.attempts")
        return [row["path"] for row in rows]

    def has_paid(self, until: str = "infinity") -> User:
        Service(self.db).set_paid(self, until)
        return self

    def enqueue(
        self, prompt: str | None = "a lighthouse at dusk", model: str | None = PREVIEW, **rest: Any
    ) -> dict[str, Any]:
        if "params" in rest:
            rest["params"] = Jsonb(rest["params"])
        return self.call("public.enqueue_generation", model=model, prompt=prompt, **rest)

    def enqueued(self, *arguments: Any, **rest: Any) -> str:
        return str(self.enqueue(*arguments, **rest)["job_id"])

    def enqueue_batch(
        self, prompts: list[str | None] | None, model: str | None = PREVIEW, **rest: Any
    ) -> dict[str, Any]:
        return self.call("public.enqueue_batch", model=model, prompts=prompts, **rest)

    def list_active_jobs(self, *job_ids: str) -> list[dict[str, Any]]:
        return self.call("public.list_active_jobs", [uuid.UUID(id) for id in job_ids])

    def set_tags(self, job_id: str, *tags: str | None) -> list[str]:
        return list(self.call("public.set_tags", job_id, list(tags))["tags"])

    def credits(self) -> int:
        query = "select credits from public.entitlements where user_id = %s"
        return int(self.db.value(query, self.id))

    def ledger(self) -> list[tuple[str, int]]:
        query = "select kind, amount from public.credit_ledger where user_id = %s order by id"
        return [(entry["kind"], entry["amount"]) for entry in self.db.execute(query, self.id)]


@dataclass(frozen=True)
class Job:
    """A job as claim_jobs hands it out."""

    job_id: uuid.UUID
    user_id: uuid.UUID
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
    key_hosts: list[str] | None
    hosts: list[str] | None
    max_running: int | None

    @property
    def id(self) -> str:
        return str(self.job_id)

    def image(self, position: int = 0, **changes: Any) -> dict[str, Any]:
        """Return one stored image as complete_job takes it."""
        return {
            "position": position,
            "storage_path": f"{self.user_id}/{self.job_id}/{position}.png",
            "content_type": "image/png",
            "width": 64,
            "height": 64,
            "bytes": 1000,
        } | changes


@dataclass(frozen=True)
class Delivery:
    """What claim_deliveries hands out."""

    delivery_id: uuid.UUID
    token: int
    url: str | None
    secrets: list[str] | None
    body: str | None

    @property
    def message(self) -> Any:
        return json.loads(self.body or "null")


def _json(value: dict[str, Any] | None) -> Jsonb | None:
    return None if value is None else Jsonb(value)


def created(provider_job_id: str, **changes: Any) -> dict[str, Any]:
    """What a worker hands in once Replicate has created a job."""
    answer = {"step": "create", "memo": {}, "status": 201, "body": {"id": provider_job_id}}
    return answer | changes


def polled(provider_job_id: str, status: str, **rest: Any) -> dict[str, Any]:
    """What it hands in once Replicate was asked for a job."""
    body = {"id": provider_job_id, "status": status, **rest}
    return {"step": "poll", "memo": {}, "status": 200, "body": body}


class Worker:
    """A worker process: registered, and calling the worker functions as darkroom_worker."""

    def __init__(
        self, db: Database, slots: int = 4, keys: Sequence[str] = ("REPLICATE_API_TOKEN",)
    ) -> None:
        self.db, self.keys = db, list(keys)
        self.connection = db.connect()
        self.connection.execute("set role darkroom_worker")
        registered = self.register_worker(slots)
        self.id = int(registered["worker_id"])
        self.channel = str(registered["channel"])
        self.heartbeat_seconds = float(registered["heartbeat_seconds"])
        self.lease_seconds = float(registered["lease_seconds"])

    def register_worker(self, slots: int) -> dict[str, Any]:
        register = "select * from private.register_worker('test', %s, '1', %s)"
        return self._rows(register, slots, self.keys)[0]

    def claim_jobs(self, slots: int = 1) -> list[Job]:
        cursor = self.connection.cursor(row_factory=class_row(Job))
        query = "select * from private.claim_jobs(%s, %s, %s)"
        return cursor.execute(query, [self.id, slots, self.keys]).fetchall()

    def claimed(self) -> Job:
        (job,) = self.claim_jobs(1)
        return job

    def heartbeat(
        self, *jobs: Job, progress: Sequence[int | None] = (), is_listening: bool = True
    ) -> list[str]:
        rows = self._rows(
            "select * from private.heartbeat(%s, %s::uuid[], %s::bigint[], %s::smallint[], %s)",
            self.id,
            [job.job_id for job in jobs],
            [job.token for job in jobs],
            list(progress) or [None] * len(jobs),
            is_listening,
        )
        assert [row["job_id"] for row in rows] == sorted(job.job_id for job in jobs)
        verdicts = {row["job_id"]: row["verdict"] for row in rows}
        return [verdicts[job.job_id] for job in jobs]

    def sleep(self) -> None:
        self._value("sleep", self.id)

    def unregister_worker(self) -> None:
        self._value("unregister_worker", self.id)

    def next_step(self, job: Job, answer: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask what to do, after the claim or after an answer: {step, status, body, memo …}."""
        return dict(self._of_one("next_steps", job, Jsonb(answer)))

    def answered(
        self,
        job: Job,
        told: dict[str, Any],
        body: Any = None,
        status: int | None = 200,
        **rest: Any,
    ) -> dict[str, Any]:
        """Send what next_step told, have it be answered so, and ask what to do then."""
        assert told["do"] == "send", told
        answer = {"step": told["step"], "memo": told["memo"], "provider": job.provider}
        return self.next_step(job, answer | {"status": status, "body": body, **rest})

    def checkpoint(self, job: Job, provider_job_id: str) -> None:
        """Have the provider make the job under this id: see Database.buys_previews."""
        self.buy((job, provider_job_id))

    def buy(self, *bought: tuple[Job, str]) -> None:
        """Have the provider make these jobs under these ids."""
        told = self.of_many("next_steps", [(job, Jsonb(None)) for job, _ in bought])
        assert [step["step"] for _, step in told] == ["create"] * len(bought), told
        told = self.of_many("next_steps", [(job, Jsonb(created(id))) for job, id in bought])
        assert [step["step"] for _, step in told] == ["poll"] * len(bought), told

    def pause_provider(
        self, provider: str, seconds: int, reason: str = "402", user_id: object = None
    ) -> bool:
        return self._value("pause_provider", provider, seconds, reason, user_id)

    def report_progress(self, job: Job, stage: str, progress: int | None = None) -> None:
        if self._of_one("report_progress", job, stage, progress) == "canceled":
            raise Canceled("canceled")

    def complete_job(
        self,
        job: Job,
        images: int | list[dict[str, Any]] = 1,
        metrics: dict[str, Any] | None = None,
    ) -> None:
        """Complete with this many images, or with these."""
        self._of_one("complete_jobs", job, *self.done(job, images, metrics))

    def complete_jobs(self, *done: tuple[Job, int]) -> dict[str, str]:
        """Complete many at once, each with this many images; return the verdict on each."""
        calls = [(job, *self.done(job, images, None)) for job, images in done]
        return {str(job.job_id): verdict for job, verdict in self.of_many("complete_jobs", calls)}

    @staticmethod
    def done(
        job: Job, images: int | list[dict[str, Any]], metrics: dict[str, Any] | None = None
    ) -> tuple[Jsonb, Jsonb | None]:
        """What complete_jobs takes of one job."""
        if isinstance(images, int):
            images = [job.image(position) for position in range(images)]
        return Jsonb(images), _json(metrics)

    def fail_job(
        self,
        job: Job,
        code: str | None,
        detail: str | None = None,
        retry_after: float | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> str:
        said = (code, detail, retry_after, _json(metrics))
        return str(self._of_one("fail_jobs", job, *said))

    def cancel_job(self, job: Job, metrics: dict[str, Any] | None = None) -> None:
        self._value("cancel_job", job.job_id, job.token, _json(metrics))

    def release_job(self, job: Job, resumes: bool = True) -> None:
        self._value("release_job", job.job_id, job.token, resumes)

    def recover_stale_jobs(self, at_most: int = 100) -> int:
        # As if no look before had taken long, as it may by chance.
        self.db.execute("select setval('private.recovery_due', 0)")
        return self._value("recover_stale_jobs", at_most)

    def apply_retention(self, at_most: int = 500) -> int:
        return self._value("apply_retention", at_most)

    def list_expired_files(self, at_most: int = 100) -> list[tuple[str, str]]:
        query = "select * from private.list_expired_files(%s)"
        return [(row["bucket"], row["path"]) for row in self._rows(query, at_most)]

    def forget_files(self, *files: tuple[str, str]) -> int:
        """Return how many are still there."""
        return self._value("forget_files", [file[0] for file in files], [file[1] for file in files])

    def due_lanes(self) -> list[str]:
        return [row["lane"] for row in self._rows("select private.due_lanes() as lane")]

    def claim_deliveries(self, lane: str, at_most: int = 100) -> list[Delivery]:
        cursor = self.connection.cursor(row_factory=class_row(Delivery))
        query = "select * from private.claim_deliveries(%s, %s)"
        return cursor.execute(query, [lane, at_most]).fetchall()

    def finish_delivery(
        self,
        delivery: Delivery,
        outcome: str = "delivered",
        status: int | None = 200,
        error: str | None = None,
        **more: Any,
    ) -> str:
        """Say what became of a try; more: retry_after, ticket."""
        said = [outcome, status, error, more.get("retry_after"), more.get("ticket")]
        return self._value("finish_delivery", delivery.delivery_id, delivery.token, *said)

    def of_many(self, function: str, calls: Sequence[tuple[Any, ...]]) -> list[tuple[Job, Any]]:
        """Call a function for many jobs; return each whose lease holds and what is said of it."""
        jobs, *columns = (list(column) for column in zip(*calls, strict=True))
        types = ["uuid[]", "bigint[]", *COLUMNS[function]]
        marks = ", ".join(f"%s::{each}" for each in types)
        query = f"select * from private.{function}({marks})"
        arrays = [[job.job_id for job in jobs], [job.token for job in jobs], *columns]
        said = {row[0]: row[1] for row in self.connection.execute(query, arrays).fetchall()}
        return [(job, said[job.token]) for job in jobs if job.token in said]

    def _of_one(self, function: str, job: Job, *arguments: Any) -> Any:
        """Call it for one job; raise LeaseLost if it says nothing of it."""
        for _, answer in self.of_many(function, [(job, *arguments)]):
            return answer
        raise LeaseLost("lease_lost")

    def listening(self) -> Worker:
        self.connection.execute(sql.SQL("listen {}").format(sql.Identifier(self.channel)))
        return self

    def wake_ups(self) -> list[str]:
        """Return the payloads that arrived on the channel until now."""
        self.db.execute("select pg_notify(%s, 'until now')", self.channel)
        payloads: list[str] = []
        for notice in self.connection.notifies(timeout=10):
            if notice.payload == "until now":
                return payloads
            payloads.append(notice.payload)
        raise AssertionError("not listening")

    def let_the_next_claim_scan_all(self) -> None:
        """Make the last scan from the queue's start a while old."""
        self.db.execute("select setval('private.scan_due', 1)")

    def _rows(self, query: str, *arguments: Any) -> list[dict[str, Any]]:
        cursor = self.connection.cursor(row_factory=dict_row)
        return cursor.execute(query, arguments).fetchall()

    def _value(self, function: str, *arguments: Any) -> Any:
        marks = ", ".join(["%s"] * len(arguments))
        return self._rows(f"select private.{function}({marks}) as value", *arguments)[0]["value"]
