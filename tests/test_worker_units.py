"""The parts of worker.py that need no database: what it is told, fetches, decodes and draws."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import gzip
import io
import json
import math
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any
from unittest import mock

import httpx
import psycopg
import pytest
from database import PROJECT
from psycopg.types.json import Jsonb

import worker
from worker import ConfigError, Job, JobError, Provider, Settings

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
    assert (settings.slots, settings.keys) == (4, {})


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


# --- what a provider is sent, and where the key goes ---

KEY = "r8_a_secret"
API = "https://api.replicate.com/v1"
DELIVERED = "https://replicate.delivery/xezq/out-0.png"
PROMPT = "x" * 20_000
ROW = {
    "base_url": API,
    "key_hosts": ["api.example.ai", "*.example.ai"],
    "hosts": ["replicate.delivery", "*.replicate.delivery"],
    "provider_input": {"prompt": PROMPT},
}
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

    def ask(self, step: Callable[[Provider], Awaitable[Any]], **row: Any) -> Any:
        async def call() -> Any:
            async with httpx.AsyncClient(transport=httpx.MockTransport(self.handle)) as http:
                return await step(Provider(http, ROW | row, KEY))

        return asyncio.run(call())

    def read(self, output: str, *kept: str) -> bytes:
        async def download(api: Provider) -> bytes:
            name = [api.keep(text) for text in kept][-1] if kept else output
            return b"".join([chunk async for chunk in api.read(name)])

        return bytes(self.ask(download))

    def send(self, url: str = f"{API}/jobs", **request: Any) -> dict[str, Any]:
        """Send a request as build_request makes it."""
        plain = {"method": "POST", "url": url, "headers": {}, "body": None, "seconds": None}
        return dict(self.ask(lambda api: api.send(plain | request)))


def redirect(to: str) -> httpx.Response:
    return httpx.Response(302, headers={"location": to})


@pytest.mark.parametrize(
    "url",
    [
        f"{API}/jobs",
        "https://API.replicate.com/x",
        "https://api.example.ai/",
        "https://a.b.example.ai",
    ],
)
def test_the_key_goes_into_headers_and_to_the_providers_own_hosts(url):
    web = Web(httpx.Response(200, json={}))
    asked = {"headers": {"x-key": "Key {{secret}}"}, "body": {"prompt": "{{secret}}"}}

    web.send(url, **asked)

    (request,) = web.requests
    assert request.headers["x-key"] == f"Key {KEY}"
    assert json.loads(request.content) == asked["body"]


FOREIGN = r"""
http://api.replicate.com/v1/jobs https://api.replicate.com:8443/v1/jobs http://api.example.ai/jobs
https://api.replicate.com@evil.com/v1 https://api.replicate.com.evil.com/ https://evil.com#api.example.ai
https://evil.com\.example.ai/ https://example.ai/ https://evilexample.ai/ https://replicate.delivery/
//api.replicate.com/v1/jobs jobs
"""


@pytest.mark.parametrize("url", [*FOREIGN.split(), "https://evil.com\n.example.ai/", ""])
def test_nothing_is_sent_to_where_the_key_does_not_belong(url):
    web = Web(httpx.Response(200, json={}))

    with pytest.raises(JobError, match="output_refused") as refusal:
        web.send(url)

    assert web.requests == [] and "evil" not in refusal.value.reason


def test_an_answer_that_leads_elsewhere_takes_the_key_nowhere():
    web = Web(redirect("https://evil.com/"), httpx.Response(200))

    assert web.send(headers={"x-key": "{{secret}}"})["status"] == 302
    assert len(web.requests) == 1


# --- what it answers ---

DEEP = "[" * 100_000
WORDS = "a log of many words. " * 20_000


@pytest.mark.parametrize(
    ("answer", "handed_in"),
    [
        (httpx.Response(201, json={"id": "p1"}), (201, {"id": "p1"})),
        (httpx.Response(404, text="<h1>404</h1>"), (404, "<h1>404</h1>")),
        (httpx.Response(204), (204, "")),
        (httpx.Response(200, text=r'{"a\u0000": "\ud800"}'), (200, {"a\ufffd": "?"})),
        (httpx.Response(200, text="\0" + DEEP), (200, "\ufffd" + DEEP[: worker.QUOTED_CHARS - 1])),
        (httpx.Response(200, text=DEEP), (200, DEEP[: worker.QUOTED_CHARS])),
        (httpx.Response(200, text="[NaN, -Infinity, 1e999]"), (200, ["NaN", "-Infinity", "1e999"])),
        (httpx.Response(200, text="[" + "9" * 5000 + "]"), (200, "[" + "9" * 4999)),
        (httpx.Response(200, json=[WORDS]), (200, [WORDS[-worker.TEXT_CHARS :]])),
        (httpx.Response(200, content=b"!" * 70_000), (200, "!" * worker.QUOTED_CHARS)),
        *(
            (httpx.Response(200, json={"prompt": prompt}), (200, {"prompt": prompt}))
            for prompt in (PROMPT, "x" * 9000, "a house " * 4000)  # where a create is looked for
        ),
        (httpx.ConnectError("refused"), (0, "ConnectError")),
        (httpx.ConnectTimeout("late"), (0, "ConnectTimeout")),
        (httpx.ReadTimeout("late"), (None, "ReadTimeout")),
        (httpx.WriteError("reset"), (None, "WriteError")),
        (httpx.RemoteProtocolError("hung up"), (None, "RemoteProtocolError")),
    ],
    ids=lambda each: str(each)[:30],
)
def test_an_answer_is_handed_in_as_the_database_can_take_it(answer, handed_in):
    said = Web(answer).send()

    assert (said["status"], said.get("body", said.get("error"))) == handed_in
    Jsonb(said)


@pytest.mark.parametrize(("chunk", "said"), [(10_000, "too long"), (1, "TimeoutError")])
def test_an_answer_without_end_is_none_however_it_comes(monkeypatch, chunk, said):
    monkeypatch.setattr(worker, "MAX_ANSWER_BYTES", 100_000)
    monkeypatch.setattr(worker, "DOWNLOAD_SECONDS", 0.2)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield bytes(chunk)
            await asyncio.sleep(0.01)

    answer = Web(httpx.Response(201, content=endless())).send(seconds=0.1)

    assert answer == {"status": None, "error": said}


def test_a_large_answer_is_read_and_looked_through_in_no_time():
    """Whatever an answer holds: nobody else's jobs are beaten for meanwhile."""
    began = time.process_time()
    for text in ("A" * 32_000_000, "A" + "\n" * 1_000_000 + "!", ("A" * 20_000 + "!") * 100):
        Web(httpx.Response(200, json=[text])).send()

    assert time.process_time() - began < 5


PIXELS = b"\x89PNG" + bytes(range(256)) * 40
PACKED = base64.b64encode(PIXELS).decode()


@pytest.mark.parametrize(
    "text", [PACKED, f"data:image/png;base64,{PACKED}", f"{PACKED[:76]}\n{PACKED[76:]}\n"]
)
def test_a_picture_in_an_answer_stays_here_and_the_database_sees_its_name(text):
    async def take(api: Provider) -> tuple[Any, bytes]:
        request = {"method": "GET", "url": API, "headers": {}, "body": None, "seconds": None}
        said = (await api.send(request))["body"]
        await api.send(request | {"body": {"image": said["data"][0]["b64_json"]}})
        return said, b"".join([chunk async for chunk in api.read(said["data"][0]["b64_json"])])

    web = Web(httpx.Response(200, json={"data": [{"b64_json": text}]}))
    said, read = web.ask(take)

    (name,) = said["data"][0].values()
    assert re.fullmatch("blob:[0-9a-f]{64}", name)
    assert read == PIXELS
    assert json.loads(web.requests[1].content) == {"image": text}  # and is sent where it is named


# --- downloads ---


@pytest.mark.parametrize(
    "url",
    [
        DELIVERED,
        "https://REPLICATE.delivery/a.png",
        f"{API}/files/a",
        "https://eu.example.ai/a.png",
    ],
)
def test_outputs_come_from_the_providers_hosts_and_without_the_key(url):
    web = Web(redirect("https://a.replicate.delivery/x"), httpx.Response(200, content=b"x"))

    assert web.read(url) == b"x"

    for request in web.requests:
        assert KEY not in str(request.headers)
        assert request.headers["accept-encoding"] == "identity"


def test_outputs_in_base64_are_what_they_are_however_small():
    nothing = Web(httpx.Response(500))

    assert (
        nothing.read("data:image/png;base64,AAECAw==")
        == nothing.read("AAECAw==")
        == bytes(range(4))
    )
    assert nothing.read("", PACKED) == PIXELS
    with pytest.raises(JobError, match="provider_error: output: cut short"):
        nothing.read("", PACKED[:-3])


ELSEWHERE = r"""
http://replicate.delivery/out.png http://api.replicate.com/v1/files/a file:///etc/passwd out.png
https://api.replicate.com:8443/v1/files/a https://replicate.delivery.evil.com/out.png
https://evilreplicate.delivery/out.png https://replicate.delivery@evil.com/out.png
https://evil.com#replicate.delivery https://evil.com\.replicate.delivery/out.png
https://169.254.169.254/latest/meta-data https://[broken/out.png //replicate.delivery/out.png
data:image/png,AAAA blob:none
"""


@pytest.mark.parametrize("url", [*ELSEWHERE.split(), "https://evil.com\n.replicate.delivery/a", ""])
def test_outputs_from_elsewhere_are_refused_and_not_fetched(url):
    web = Web(httpx.Response(200))

    with pytest.raises(JobError) as refusal:
        web.read(url)

    assert refusal.value.code == "output_refused"
    assert web.requests == []


@pytest.mark.parametrize(
    "target", ["https://evil.com/x", "//evil.com/x", "http://replicate.delivery/x"]
)
def test_a_redirect_is_held_to_the_same_hosts(target):
    web = Web(redirect(target))

    with pytest.raises(JobError, match=r"output_refused: host .* is not allowed"):
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
        (redirect(DELIVERED), "output_refused: output: too many redirects"),
        (packed("gzip, gzip"), "output_refused: output: packed"),
        (packed("GZIP"), "output_refused: output: packed"),
        (packed("br"), "output_refused: output: packed"),
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
        "base_url": None,
        "secret": None,
        "key_hosts": [],
        "hosts": [],
        "max_running": None,
    }
    return Job(**values | changes)


WAY = {  # as next_steps has it
    "method": "POST",
    "url": f"{API}/files",
    "headers": {"x-key": "{{secret}}"},
    "seconds": None,
    "field": "content",
    "address": ["urls", "get"],
}


@pytest.mark.parametrize(
    ("answer", "address"),
    [
        (httpx.Response(201, json={"urls": {"get": f"{API}/files/f"}}), f"{API}/files/f"),
        (httpx.Response(201, json={"urls": None}), None),
        (httpx.Response(201, json=["odd"]), None),
        (httpx.Response(402, text="go to billing"), None),
        (httpx.ReadTimeout("late"), None),
    ],
    ids=str,
)
def test_a_source_is_handed_over_as_the_provider_takes_it(answer, address):
    """And what it answers else is for the database to read."""
    web = Web(answer)

    async def upload(api: Provider) -> str:
        api.way = WAY
        return await api.upload("cat.png", "image/png", io.BytesIO(b"a cat"))

    if address:
        assert web.ask(upload) == address
    else:
        with pytest.raises(worker.UploadRefused) as refusal:
            web.ask(upload)
        assert refusal.value.args[0].keys() & {"status"}
    (request,) = web.requests
    assert request.headers["x-key"] == KEY
    assert b'name="content"; filename="cat.png"' in request.content and b"a cat" in request.content


def test_a_source_goes_within_the_input_where_there_is_no_other_way():
    async def upload(api: Provider) -> tuple[str, str]:
        name = await api.upload("cat.png", "image/png", io.BytesIO(b"a cat"))
        return name, api.blobs[name]

    name, text = Web(httpx.Response(500)).ask(upload)

    assert text == "data:image/png;base64,YSBjYXQ="
    assert name.startswith("blob:") and "YSBjYXQ" not in name


# --- how a job ends ---


def test_the_reason_in_the_log_holds_no_words_of_a_provider(caplog):
    words = "CUDA out of memory in 'a nude of A. Smith'"
    told = {"do": "fail", "code": "provider_error", "reason": "poll: failed", "detail": words}
    db = mock.Mock(
        next_step=mock.AsyncMock(return_value=told | {"metrics": {"is_billed": False}}),
        fail_job=mock.AsyncMock(return_value="retried"),
        quoted=str,
    )
    one, job = a_worker(db, keys={}), a_job(base_url=API)
    running = worker.Running(job, 0.0, one.on_progress)
    one.running[job.token] = running

    asyncio.run(one.process(running))

    (ended,) = [each for each in caplog.messages if each.startswith("job.retried")]
    assert ended.endswith("code=provider_error reason='poll: failed'")
    (said,) = db.fail_job.await_args_list
    assert said.args[:4] == (job, "provider_error", words, None)
    assert said.args[4].obj == {"is_billed": False}


def test_an_unexpected_error_tells_its_type_and_place_but_not_its_text():
    try:
        raise ValueError("https://replicate.delivery/a-signed-url")
    except ValueError as error:
        told = worker.as_job_error(error)

    assert told.code == "internal"
    assert told.detail.startswith("ValueError at test_an_unexpected_error")
    assert "replicate.delivery" not in told.detail


def a_worker(db: Any, **settings: Any) -> worker.Worker:
    one = worker.Worker(
        mock.Mock(watchdog_seconds=0, **settings), db, mock.Mock(), mock.Mock(), mock.Mock()
    )
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
