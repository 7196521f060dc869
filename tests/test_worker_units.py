"""The parts of worker.py that need no database: what it is told, fetches, decodes and draws."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import io
import itertools
import math
import os
import re
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from typing import Any
from unittest import mock

import httpx
import psycopg
import pytest
from database import PROJECT

import worker
from worker import ConfigError, Job, JobError, Replicate, Settings

ENVIRONMENT = {
    "DATABASE_URL": "postgresql://darkroom_worker:secret@127.0.0.1/postgres",
    "SUPABASE_URL": "http://127.0.0.1:54321/",
    "SUPABASE_SERVICE_KEY": "key",
}
HOST = "postgresql://darkroom_worker:secret@127.0.0.1:6543/postgres"


# --- settings ---


def test_what_is_empty_counts_as_unset():
    documented = set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", worker.__doc__ or ""))
    settings = Settings(dict.fromkeys(documented, "") | ENVIRONMENT)

    assert vars(settings) == vars(Settings(ENVIRONMENT))
    assert (settings.slots, settings.replicate_api_token) == (4, None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "") for name in ENVIRONMENT),
        ("DATABASE_URL", "127.0.0.1/postgres"),
        ("DATABASE_URL", "postgresql://darkroom_worker:not/escaped@127.0.0.1/postgres"),
        ("DATABASE_URL", "postgresql://darkroom_worker:not@escaped@127.0.0.1/postgres"),
        ("DATABASE_URL", "postgresql://[broken/postgres"),
        ("DATABASE_URL", "postgresql://darkroom_worker:not%escaped@127.0.0.1/postgres"),
        ("DATABASE_URL", "postgresql://darkroom_worker:not%00escaped@127.0.0.1/postgres"),
        ("DATABASE_URL", f"{HOST}?sslmod=require"),
        ("REPLICATE_API_URL", "file:///etc/passwd"),
        ("WEBHOOK_ALLOWED_HOSTS", "http://localhost:8000"),
        ("WORKER_SLOTS", "0"),
        ("WORKER_POLL_SECONDS", "nan"),
        ("LOG_LEVEL", "verbose"),
    ],
)
def test_a_bad_variable_is_named_but_not_shown(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}: ") as refusal:
        Settings(ENVIRONMENT | {name: value})

    assert len(value) < 8 or value not in str(refusal.value)


def test_a_bad_configuration_ends_the_worker_with_code_2_and_one_line():
    environment = {"PATH": os.environ["PATH"], **ENVIRONMENT, "WORKER_SLOTS": "x"}
    command = [sys.executable, PROJECT / "worker.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert done.stderr.endswith("ERROR worker.misconfigured WORKER_SLOTS: not a number\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("query", "kept", "prepares"),
    [
        ("", "", True),
        ("?pgbouncer=true&connection_limit=1&pool_timeout=20&schema=public", "", False),
        ("?sslmode=require&supa=base-pooler.x", "?sslmode=require", True),
        ("?pgbouncer=false&sslmode=require", "?sslmode=require", True),
    ],
)
def test_addresses_as_platforms_show_them_are_taken(query, kept, prepares):
    settings = Settings(ENVIRONMENT | {"DATABASE_URL": HOST + query})

    db = worker.Database(settings.database_url)

    assert db.url == HOST + kept
    assert ("prepare_threshold" not in db.pool.kwargs) is prepares
    assert {"secret", HOST + query} < set(settings.secrets)


def test_credentials_go_before_variables_and_those_that_cannot_be_read_stop_the_worker(tmp_path):
    (tmp_path / "darkroom_REPLICATE_API_TOKEN").write_text("r8_from_systemd\n")
    (tmp_path / "darkroom_EXPO_ACCESS_TOKEN").write_text("\n")
    given = {"REPLICATE_API_TOKEN": "r8_other", "EXPO_ACCESS_TOKEN": "kept"}

    values = worker.with_credentials(given | {"CREDENTIALS_DIRECTORY": str(tmp_path)})

    assert values["REPLICATE_API_TOKEN"] == "r8_from_systemd"
    assert values["EXPO_ACCESS_TOKEN"] == "kept"
    with pytest.raises(ConfigError, match=r"^CREDENTIALS_DIRECTORY: FileNotFoundError"):
        worker.with_credentials({"CREDENTIALS_DIRECTORY": str(tmp_path / "none")})


# --- pauses ---


@pytest.mark.parametrize("attempt", [0, 5, 5000])
def test_backoff_is_exponential_jittered_and_capped(attempt):
    longest = min(worker.RETRY_CAP_SECONDS, worker.RETRY_BASE_SECONDS * 2 ** min(attempt, 60))
    pauses = [worker.backoff(attempt) for _ in range(200)]

    assert longest / 2 <= min(pauses) < max(pauses) <= longest


def test_after_a_failed_beat_the_next_comes_soon():
    pauses = []

    async def action() -> None:
        if len(pauses) < 3:
            raise psycopg.OperationalError

    async def wait_for(news: Coroutine[None, None, bool], seconds: float) -> None:
        news.close()
        pauses.append(seconds)
        if len(pauses) == 4:
            raise asyncio.CancelledError
        raise TimeoutError

    with mock.patch("asyncio.wait_for", wait_for), contextlib.suppress(asyncio.CancelledError):
        asyncio.run(worker.Worker._every(15, action))

    assert sum(pauses[:3]) < 3
    assert 13.5 <= pauses[3] <= 15


@pytest.mark.parametrize(
    ("header", "body", "seconds"),
    [
        ("7", '{"retry_after": 9}', 7),
        (" 3e1 ", "", 30),
        *((header, "", 60) for header in (None, "soon", "nan", "\u0663\u0660", "9" * 10_000)),
        *((header, "", 0) for header in ("0", "-5", "-1e308", "-inf")),
        *((header, "", 86_400) for header in ("1000000", "inf", "1e999")),
        ("Fri, 31 Dec 1999 23:59:59 GMT", "", 60),
        ("Fri, 31 Dec 9999 23:59:59 GMT", "", 86_400),
        ("Fri, 99 Dec 9999 23:59:59 GMT", "", 60),
        ("nan", '{"retry_after": 7}', 7),
        (None, '{"retry_after": 9, "detail": "in ~30s."}', 9),
        (None, '{"retry_after": 1e999}', 86_400),
        (None, '{"retry_after": ' + "9" * 400 + "}", 60),
        (None, '{"detail": "Your rate limit resets in ~30s."}', 30),
        (None, "~" + "9" * 400 + "s", 60),
        (None, "[1]", 60),
    ],
    ids=lambda each: str(each)[:30],
)
def test_a_pause_that_somebody_asks_for_is_found_and_from_none_to_a_day(header, body, seconds):
    fields = {"retry-after": header.encode()} if header else {}

    assert worker.retry_after_seconds(httpx.Response(429, headers=fields, text=body)) == seconds


# --- downloads ---

TOKEN = "r8_a_secret"
API = "https://api.replicate.com/v1"
DELIVERED = "https://replicate.delivery/xezq/out-0.png"
Answer = httpx.Response | Exception


class Web:
    """Gives these answers, the last one again and again, and remembers what was asked."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def handle(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def ask(self, step: Callable[[Replicate], Awaitable[Any]]) -> Any:
        async def call() -> Any:
            async with httpx.AsyncClient(transport=httpx.MockTransport(self.handle)) as http:
                return await step(Replicate(http, API, TOKEN))

        with (
            mock.patch("worker.backoff", return_value=0.0),
            mock.patch("worker.PROVIDER_POLL_SECONDS", 0.0),
        ):
            return asyncio.run(call())

    def read(self, url: str) -> bytes:
        async def download(api: Replicate) -> bytes:
            return b"".join([chunk async for chunk in api.read(url)])

        return bytes(self.ask(download))


def redirect(to: str) -> httpx.Response:
    return httpx.Response(302, headers={"location": to})


@pytest.mark.parametrize("url", [DELIVERED, "https://REPLICATE.delivery/a.png", f"{API}/files/a"])
def test_outputs_come_from_the_providers_hosts_and_without_the_token(url):
    web = Web(redirect("https://a.replicate.delivery/x"), httpx.Response(200, content=b"x"))

    assert web.read(url) == b"x"

    for request in web.requests:
        assert "authorization" not in request.headers
        assert request.headers["accept-encoding"] == "identity"


ELSEWHERE = r"""
http://replicate.delivery/out.png http://api.replicate.com/v1/files/a file:///etc/passwd out.png
https://api.replicate.com:8443/v1/files/a https://replicate.delivery.evil.com/out.png
https://evilreplicate.delivery/out.png https://replicate.delivery@evil.com/out.png
https://evil.com#replicate.delivery https://evil.com\.replicate.delivery/out.png
https://169.254.169.254/latest/meta-data https://[broken/out.png //replicate.delivery/out.png
data:image/png;base64,AAAA
"""


@pytest.mark.parametrize("url", [*ELSEWHERE.split(), "https://evil.com\n.replicate.delivery/a", ""])
def test_outputs_from_elsewhere_are_the_providers_error_and_not_fetched(url):
    web = Web(httpx.Response(200))

    with pytest.raises(JobError) as refusal:
        web.read(url)

    assert refusal.value.code == "provider_error"
    assert web.requests == []


@pytest.mark.parametrize(
    "target", ["https://evil.com/x", "//evil.com/x", "http://replicate.delivery/x"]
)
def test_a_redirect_is_held_to_the_same_hosts(target):
    web = Web(redirect(target))

    with pytest.raises(JobError, match=r"provider_error: output: host .* is not allowed"):
        web.read(DELIVERED)

    assert [request.url.host for request in web.requests] == ["replicate.delivery"]


def packed(coding: str) -> httpx.Response:
    bomb = gzip.compress(gzip.compress(bytes(10**6)))
    headers = {"content-encoding": coding}
    return httpx.Response(200, headers=headers, stream=httpx.ByteStream(bomb))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (httpx.Response(404), "result_lost"),
        (httpx.Response(410), "result_lost"),
        (httpx.Response(500), "internal"),
        (redirect(DELIVERED), "provider_error: output: too many redirects"),
        (packed("gzip, gzip"), "provider_error: output: packed"),
        (packed("GZIP"), "provider_error: output: packed"),
        (packed("br"), "provider_error: output: packed"),
    ],
)
def test_a_download_that_brings_nothing_says_why(answer, said):
    with pytest.raises(JobError, match=f"^{said}"):
        Web(answer).read(DELIVERED)


# --- source images ---


def a_job(**changes: Any) -> Job:
    values = {
        "job_id": uuid.UUID(int=2),
        "user_id": uuid.UUID(int=1),
        "token": 7,
        "attempt": 1,
        "provider": "replicate",
        "provider_ref": "black-forest-labs/flux-schnell",
        "provider_input": {"prompt": "a lighthouse"},
        "provider_job_id": None,
        "image_inputs": [],
        "image_count": 1,
        "deadline_seconds": 300.0,
        "begun_before": None,
    }
    return Job(**values | changes)


# --- Replicate's answers ---


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (httpx.Response(400), "invalid_input"),
        (httpx.Response(429), "provider_busy"),
        (httpx.Response(404), "internal"),
        (httpx.ConnectError("refused"), "provider_busy"),
        (httpx.Response(500), "unknown"),
        (httpx.ReadTimeout("late"), "unknown"),
        (httpx.WriteError("reset"), "unknown"),
        (httpx.RemoteProtocolError("hung up"), "unknown"),
        (httpx.Response(201, text="<html>proxy</html>"), "unknown"),
        (httpx.Response(201, json={"id": ""}), "unknown"),
        (httpx.Response(200, json=["odd"]), "unknown"),
        (httpx.Response(201, json={"id": "p1", "input": {"image": "https://a/b.png"}}), "unknown"),
    ],
)
def test_a_create_that_may_have_bought_is_of_unknown_outcome_and_no_other(answer, code):
    with pytest.raises((JobError, worker.UnknownOutcome)) as refusal:
        Web(answer).ask(lambda api: api.create(a_job(), {"prompt": "p"}))

    assert getattr(refusal.value, "code", "unknown") == code


@pytest.mark.parametrize(
    ("step", "may_have_bought"),
    [
        (lambda api: api.create(a_job(), {}), False),
        (lambda api: api.upload("a", io.BytesIO(b"a")), True),
        (lambda api: api.result(a_job(), "p1", lambda _: None), True),
        (lambda api: api.find(a_job(), datetime.now(UTC)), True),
    ],
    ids=["create", "files", "poll", "list"],
)
def test_a_refusal_is_not_surely_the_accounts_unless_that_is_refused_too(step, may_have_bought):
    accounts = (401, 200, 500, None)
    for status, account in itertools.product((401, 402, 403), accounts):
        look = httpx.Response(account) if account else httpx.ReadTimeout("late")

        with pytest.raises(worker.Refused, match=f"HTTP {status}: go to billing") as refusal:
            Web(httpx.Response(status, text="go to billing"), look).ask(step)

        assert refusal.value.may_have_bought == may_have_bought
        # 403: of the model or a file, for all we know. Else of the key or the credit, to be proven.
        is_ours = isinstance(refusal.value, worker.ProviderDown)
        assert (is_ours, getattr(refusal.value, "is_sure", False)) == (
            (status != 403 or account == 401),
            account == 401,
        )


# --- looking for a lost create ---

SINCE = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def found(
    *pages: Any, sent: bytes | None = None, **changes: Any
) -> tuple[list[str], list[httpx.Request]]:
    """Look for a job where the list has these pages, or answers of another kind."""
    web = Web(*[page if isinstance(page, httpx.Response) else as_page(*page) for page in pages])
    return web.ask(lambda api: api.find(a_job(**changes), SINCE, sent)), web.requests


def as_page(results: list[Any], following: str | None = None) -> httpx.Response:
    return httpx.Response(200, json={"results": results, "next": following, "previous": None})


def listed(key: str = "p1", **changes: Any) -> dict[str, Any]:
    prediction = {
        "id": key,
        "model": "black-forest-labs/flux-schnell",
        "version": "hidden",
        "input": {"prompt": "a lighthouse"},
    }
    return prediction | changes


def test_the_list_is_read_from_a_minute_before_and_to_its_end_oldest_first():
    ids, requests = found(
        ([listed("p3"), listed("p2")], "https://evil.example.com/v1/predictions?cursor=c"),
        ([listed("p1")],),
    )

    assert ids == ["p1", "p2", "p3"]
    first, second = [request.url for request in requests]
    assert first.params["created_after"] == "2026-11-22T11:59:00+00:00"
    assert str(second) == f"{API}/predictions?cursor=c"  # the token goes nowhere else


VERSION = {"provider_ref": f"o/sdxl:{'a' * 64}"}


@pytest.mark.parametrize(
    ("asked", "changes", "is_ours"),
    [
        ({}, {}, True),
        ({}, {"model": "black-forest-labs/flux-dev"}, False),
        ({}, {"version": "b" * 64}, False),
        ({}, {"input": None}, False),
        ({"provider_input": {}}, {"input": {}}, False),  # nothing is left of it to prove it
        # A version is known by that alone.
        (VERSION, {"model": "o/x", "version": "a" * 64}, True),
        (VERSION, {"model": "o/sdxl", "version": "b" * 64}, False),
        (VERSION, {"model": "o/sdxl", "version": None}, False),
    ],
    ids=str,
)
def test_a_prediction_of_another_model_or_input_is_not_ours(asked, changes, is_ours):
    assert bool(found(([listed(**changes)],), **asked)[0]) == is_ours


SOURCE = "https://project.supabase.co/storage/v1/object/sign/inputs/u/cat.png?token="
ASKED = {"prompt": "p", "seed": 2**60, "scale": 1.0, "fast": True, "lora": None}
ASKED |= {"image": f"{SOURCE}a", "more": [f"{SOURCE}b", f"{SOURCE}c"]}


@pytest.mark.parametrize(
    ("changes", "is_ours"),
    [
        ({}, True),
        ({"seed": 2.0**60, "scale": 1}, True),  # one number in JSON, however a server writes it
        ({"scale": True}, False),
        ({"scale": "1"}, False),
        ({"seed": 2**60 + 1}, False),
        ({"lora": ...}, False),
        ({"mask": None}, False),
        ({"image": f"{SOURCE}b"}, False),
        ({"image": ...}, False),
        ({"image": "u/cat.png"}, False),
        ({"more": [f"{SOURCE}c", f"{SOURCE}b"]}, False),
        ({"more": [f"{SOURCE}b"]}, False),
    ],
    ids=str,
)
def test_only_the_whole_input_with_its_sources_is_a_proof(changes, is_ours):
    given = {name: value for name, value in (ASKED | changes).items() if value is not ...}
    job = {"provider_input": ASKED | {"image": "u/cat.png"}, "image_inputs": ["image", "more"]}

    ids, _ = found(([listed(input=given)],), sent=worker.fingerprint(ASKED), **job)

    assert bool(ids) == is_ours
    assert found(([listed(input=given)],), **job)[0] == [] or changes.get("image") == "u/cat.png"


# --- how a prediction ends ---


def end_of(*before: Answer, **prediction: Any) -> worker.Result:
    """Poll a prediction that reads like this, in the end."""
    web = Web(*before, httpx.Response(200, json=prediction))
    return web.ask(lambda api: api.result(a_job(), "p1", lambda _: None))


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        ("failed", "The input or output was flagged as sensitive. (E005)", "moderated"),
        ("failed", "NSFW content detected. Try running it again.", "moderated"),
        ("failed", "Your request was blocked by the safety system", "moderated"),
        ("failed", "CUDA out of memory in 'a nude of A. Smith' (E1001)", "provider_error"),
        ("failed", "E0051", "provider_error"),
        ("failed", {"odd": 1}, "provider_error"),
        ("aborted", None, "provider_error"),
        ("canceled", "NSFW", "provider_error"),
    ],
)
def test_the_reason_in_the_log_holds_no_words_of_a_provider(status, error, code):
    with pytest.raises(JobError) as failure:
        end_of(status=status, error=error, metrics={"predict_time": 1.5, "image_count": -1})

    assert (failure.value.code, failure.value.reason) == (code, f"prediction {status}")
    is_free = {} if status == "canceled" else {"is_billed": False}  # it costs the time it ran
    assert failure.value.metrics == {"provider_seconds": 1.5} | is_free


@pytest.mark.parametrize(
    ("output", "outputs"),
    [
        (DELIVERED, [DELIVERED]),
        ([[DELIVERED]], [DELIVERED]),
        ({"seed": 7, "revised_prompt": "a house", "images": [{"url": DELIVERED}]}, [DELIVERED]),
        ([], []),
        (7, []),
        ({"a": 1}, []),
        ("done", []),
    ],
    ids=str,
)
def test_addresses_are_found_in_texts_lists_and_objects(output, outputs):
    assert end_of(status="succeeded", output=output).outputs == outputs


@pytest.mark.parametrize("said", [None, "1.5", -1, 1e9, [1]], ids=str)
def test_metrics_that_are_no_decent_numbers_are_not_passed_on(said):
    metrics = {"predict_time": said, "image_count": said}
    result = end_of(status="succeeded", output=[DELIVERED], metrics=metrics)

    assert result.metrics == {"images": 1}


def test_what_says_nothing_of_this_prediction_or_its_end_is_waited_for():
    anothers = {"id": "p2", "status": "succeeded", "output": "https://replicate.delivery/2.png"}
    running = [{"status": status} for status in ("starting", "processing", "pondering", None)]
    before = [httpx.Response(200, json=each) for each in (anothers, *running)]
    gone = [httpx.Response(404)] * worker.HTTP_TRIES
    end = {"id": "p1", "status": "succeeded", "output": DELIVERED}

    assert end_of(*before, *gone, **end).outputs == [DELIVERED]

    with pytest.raises(JobError, match="result_lost: no such prediction"):
        end_of(*gone, httpx.Response(404), **end)
    with pytest.raises(JobError, match="result_lost: the output was removed"):
        end_of(status="succeeded", output=None, data_removed=True)


def test_an_unexpected_error_tells_its_type_and_place_but_not_its_text():
    try:
        raise ValueError("https://replicate.delivery/a-signed-url")
    except ValueError as error:
        told = worker.as_job_error(error)

    assert told.code == "internal"
    assert told.detail.startswith("ValueError at test_an_unexpected_error")
    assert "replicate.delivery" not in told.detail


def a_worker(db: Any, **settings: Any) -> worker.Worker:
    one = worker.Worker(mock.Mock(**settings), db, {}, mock.Mock(), mock.Mock())
    one.is_full = False
    return one


def test_a_stop_does_not_cut_short_the_call_that_ends_a_job():
    ended: list[str] = []

    async def fail_job(job: Job, code: str, *_: object) -> str:
        await asyncio.sleep(0.01)
        ended.append(code)
        return "failed"

    async def stop_meanwhile() -> None:
        one = a_worker(mock.Mock(fail_job=fail_job, quoted=str))
        running = worker.Running(a_job(), 0.0, one.on_progress)
        one.running[running.job.token] = running
        task = asyncio.create_task(one.process(running))
        await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(stop_meanwhile())

    assert ended == ["internal"]


# --- calls for many jobs ---


WRONG = {
    "bad": psycopg.errors.InvalidParameterValue(),
    "odd": psycopg.errors.InternalError_(),
    "gone": psycopg.OperationalError(),
    "stop": asyncio.CancelledError(),
}


class Trips:
    """Stands for a function that takes many jobs: notes who came together, and takes a while."""

    def __init__(self) -> None:
        self.made: list[list[int]] = []
        self.gate = asyncio.Event()

    async def __call__(self, function: str, ids: list[Any], tokens: list[int], *said: Any) -> Any:
        assert function == "complete_jobs" and len(ids) == len(tokens)
        self.made.append(tokens)
        await self.gate.wait()
        if said[0] == ["odd"]:
            await asyncio.Event().wait()  # asks again and again
        for each in said[0]:
            if each in WRONG:
                raise WRONG[each]
        return [{"token": n, "verdict": n * 10} for n in tokens if n != 2]  # of 2 nothing is known


def called(trips: Trips, *said: str) -> tuple[worker.Batch, list[asyncio.Task[Any]]]:
    """Call for jobs 0, 1, 2 …, each saying this."""
    call = worker.Batch(trips, "complete_jobs")
    return call, [asyncio.create_task(call(a_job(token=n), each)) for n, each in enumerate(said)]


async def outcomes(trips: Trips, calls: list[asyncio.Task[Any]]) -> list[Any]:
    trips.gate.set()
    return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 5)


def test_calls_made_while_one_is_under_way_go_together_in_the_next_without_who_is_cancelled():
    async def act() -> None:
        trips = Trips()
        call, calls = called(trips, "a", "a")
        await asyncio.sleep(0.001)
        calls += [asyncio.create_task(call(a_job(token=n), "a")) for n in (2, 3, 4)]
        await asyncio.sleep(0.001)
        calls[0].cancel()
        calls[3].cancel()

        said = await outcomes(trips, calls)

        assert trips.made == [[0, 1], [2, 4]]
        lost, stopped = worker.LeaseLost, asyncio.CancelledError
        assert [type(each) for each in said] == [stopped, int, lost, stopped, int]
        assert (said[1], said[4], await call(a_job(token=5), "a")) == (10, 40, 50)

    asyncio.run(act())


def test_no_call_takes_more_jobs_than_fit():
    async def act() -> None:
        trips = Trips()

        await outcomes(trips, called(trips, *["a"] * 250)[1])

        assert [len(trip) for trip in trips.made] == [100, 100, 50]

    asyncio.run(act())


@pytest.mark.parametrize("wrong", ["bad", "gone", "stop"])
def test_of_calls_that_went_together_each_is_told_what_concerns_it(wrong):
    async def act() -> None:
        trips = Trips()

        said = await outcomes(trips, called(trips, "a", wrong)[1])

        its = type(WRONG[wrong])
        assert [type(each) for each in said] == [int if wrong == "bad" else its, its]

    asyncio.run(act())


def test_what_may_be_the_fault_of_one_job_holds_up_no_other():
    async def act() -> None:
        trips = Trips()
        call, calls = called(trips, "a", "odd")
        trips.gate.set()

        assert (await calls[0], await call(a_job(token=3), "a")) == (0, 30)
        assert not calls[1].done()

    asyncio.run(act())


@pytest.mark.parametrize(
    ("whose", "errors"),
    [
        (
            "database",
            ["ReadOnlySqlTransaction", "CannotConnectNow", "DiskFull", "DeadlockDetected"],
        ),
        ("either", ["InsufficientPrivilege", "FeatureNotSupported", "InternalError_"]),
        ("job", ["CheckViolation", "ProgramLimitExceeded", "RaiseException"]),
    ],
)
def test_whose_fault_an_error_is_its_sqlstate_says(whose, errors):
    assert {worker.fault(getattr(psycopg.errors, each)()) for each in errors} == {whose}
    assert worker.fault(worker.Outdated()) == worker.fault(psycopg.InterfaceError()) == "database"
    assert worker.fault(psycopg.DataError("NUL")) == "job"


@pytest.mark.parametrize("ends_well", [True, False])
def test_what_must_be_finished_is_however_often_its_caller_is_cancelled(ends_well):
    async def act() -> None:
        loop, said = asyncio.get_running_loop(), []
        loop.set_exception_handler(lambda _, context: said.append(context))
        end = loop.create_future()
        caller = asyncio.create_task(worker.finish_first(end))
        for _ in range(3):
            await asyncio.sleep(0)
            caller.cancel()
        await asyncio.sleep(0)
        assert not caller.done()

        end.set_result("bought") if ends_well else end.set_exception(worker.LeaseLost())
        await asyncio.wait([caller])

        assert caller.cancelled()
        del end, caller
        gc.collect()
        assert said == []

    asyncio.run(act())


@pytest.mark.parametrize(("told", "threshold"), [(7, 5), (8, None)])
def test_behind_a_pooler_no_statement_is_prepared(told, threshold):
    """A pooler answers a new connection with a process number of its own."""
    cursor = mock.AsyncMock(**{"fetchone.return_value": {"pid": 7}})
    connection = mock.AsyncMock(prepare_threshold=5, **{"execute.return_value": cursor})
    connection.info.backend_pid = told

    asyncio.run(worker.mind_pooler(connection))

    assert connection.prepare_threshold == threshold


# --- when it looks for work ---


def test_after_a_beat_the_worker_looks_for_work():
    """An enqueue that met its row locked by the beat has woken nobody."""
    one = a_worker(mock.Mock(heartbeat=mock.AsyncMock(return_value=[])))

    asyncio.run(one.beat())

    assert one.wake.is_set()


@pytest.mark.parametrize(("max_running", "looks"), [(None, False), (2, True)])
def test_who_frees_a_place_at_a_provider_looks_for_the_next_job(max_running, looks):
    """Also when it sleeps with slots to spare: nobody is woken for a place."""
    one = a_worker(mock.Mock(complete_job=mock.AsyncMock()))
    one._make = mock.AsyncMock(return_value=[])
    job = mock.Mock(token=1, deadline_seconds=9, max_running=max_running)
    running = one.running[1] = worker.Running(job, 0.0, one.on_progress)

    asyncio.run(one.process(running))

    assert one.wake.is_set() == looks


def test_who_could_not_beat_claims_again_with_the_first_beat():
    db = mock.Mock(
        heartbeat=mock.AsyncMock(return_value=[]),
        claim_jobs=mock.AsyncMock(return_value=[mock.Mock(token=1)]),
    )
    one = a_worker(db, slots=1, poll_seconds=60)
    one.lease_seconds, one.last_beat, one.process = 60, -math.inf, mock.AsyncMock()

    async def beat_at_last() -> None:
        claiming = asyncio.create_task(one._claim_until_stopped())
        await asyncio.sleep(0.01)
        assert not one.running
        await one.beat()
        async with asyncio.timeout(3):
            while not one.running:
                await asyncio.sleep(0.01)
        claiming.cancel()

    asyncio.run(beat_at_last())


@pytest.mark.parametrize(("looks", "seconds"), [(1, 60), (2, 0.01)], ids=["first", "second"])
def test_who_goes_to_sleep_looks_for_what_came_meanwhile(monkeypatch, looks, seconds):
    """Whoever enqueued it may have seen the worker awake, and then wakes nobody."""
    monkeypatch.setattr(worker, "SECOND_LOOK_SECONDS", seconds)
    found = [[]] * (looks - 1) + [[mock.Mock(token=1)]]
    db = mock.Mock(call=mock.AsyncMock(), claim_jobs=mock.AsyncMock(side_effect=found))
    one = a_worker(db, slots=1, poll_seconds=60)
    one.process = mock.AsyncMock()

    asyncio.run(asyncio.wait_for(one._sleep(), 3))

    assert list(one.running) == [1]
    assert db.method_calls[0] == mock.call.call("sleep", 0)  # a look before it proves nothing


def test_who_runs_full_on_the_way_to_sleep_does_not_claim_again_what_it_gave_back():
    db = mock.Mock(claim_jobs=mock.AsyncMock(return_value=[mock.Mock(token=1)]))
    one = a_worker(db, slots=1, poll_seconds=0)
    one.process = mock.AsyncMock()

    async def give_back_what_has_no_room(*_: object) -> None:
        one.is_full = True

    db.call = give_back_what_has_no_room
    asyncio.run(asyncio.wait_for(one._sleep(), 3))

    assert not one.running


def test_an_answer_that_comes_drop_by_drop_is_none_in_the_end(monkeypatch):
    monkeypatch.setattr(worker, "DOWNLOAD_SECONDS", 0.2)

    async def drops() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    async def act() -> dict[str, Any]:
        transport = httpx.MockTransport(lambda _: httpx.Response(201, content=drops()))
        async with httpx.AsyncClient(transport=transport) as http:
            provider = worker.Provider(http, {"base_url": API, "key_hosts": [], "hosts": []}, TOKEN)
            request = {"method": "POST", "url": f"{API}/predictions", "headers": {}, "body": {}}
            return await provider.send(request | {"seconds": 0.1})

    assert asyncio.run(act()) == {"status": None, "error": "TimeoutError"}
