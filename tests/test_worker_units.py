"""The parts of worker.py that need no database: what it is told, fetches, decodes and draws."""

from __future__ import annotations

import asyncio
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
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from typing import IO, Any
from unittest import mock

import httpx
import psycopg
import pytest
from database import PROJECT
from PIL import Image

import pictures
import worker
from worker import ConfigError, Job, JobError, Replicate, Settings, Storage

ENVIRONMENT = {
    "DATABASE_URL": "postgresql://darkroom_worker:secret@127.0.0.1/postgres",
    "SUPABASE_URL": "http://127.0.0.1:54321/",
    "SUPABASE_SERVICE_KEY": "key",
}


# --- settings ---


def test_settings_have_defaults_for_all_that_is_not_required():
    settings = Settings(ENVIRONMENT)

    assert (settings.slots, settings.grace_seconds, settings.poll_seconds) == (4, 30, 5)
    assert settings.supabase_url == "http://127.0.0.1:54321"
    assert settings.replicate_api_url == "https://api.replicate.com/v1"
    assert settings.replicate_api_token is None


def test_an_empty_optional_variable_counts_as_unset():
    documented = set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", worker.__doc__ or ""))
    empty = dict.fromkeys(documented, "")

    assert vars(Settings(empty | ENVIRONMENT)) == vars(Settings(ENVIRONMENT))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "") for name in ENVIRONMENT),
        ("DATABASE_URL", "127.0.0.1/postgres"),
        ("DATABASE_URL", "postgresql://darkroom_worker:not/escaped@127.0.0.1/postgres"),
        ("DATABASE_URL", "postgresql://darkroom_worker:not@escaped@127.0.0.1/postgres"),
        ("DATABASE_URL", "postgresql://[broken/postgres"),
        ("DATABASE_URL", "postgresql://darkroom_worker:not%escaped@127.0.0.1/postgres"),
        ("DATABASE_URL", "postgresql://darkroom_worker:not escaped@127.0.0.1/postgres"),
        ("DATABASE_URL", "postgresql://darkroom_worker:not%00escaped@127.0.0.1/postgres"),
        ("DATABASE_URL", "postgresql://darkroom_worker:secret@127.0.0.1/postgres?sslmod=require"),
        ("SUPABASE_URL", "127.0.0.1:54321"),
        ("REPLICATE_API_URL", "file:///etc/passwd"),
        ("EXPO_PUSH_URL", "file:///etc/passwd"),
        ("WEBHOOK_ALLOWED_HOSTS", "127.0.0.1"),
        ("WEBHOOK_ALLOWED_HOSTS", "localhost:8000 localhost:8001"),
        ("WEBHOOK_ALLOWED_HOSTS", "http://localhost:8000"),
        ("WORKER_SLOTS", "0"),
        ("WORKER_SLOTS", "many"),
        ("WORKER_GRACE_SECONDS", "-1"),
        ("WORKER_POLL_SECONDS", "nan"),
        ("WORKER_POLL_SECONDS", "inf"),
        ("MAX_IMAGE_BYTES", "32MB"),
        ("IMAGE_PREVIEW_PIXELS", "4097"),
        ("REPLICATE_SETTLE_SECONDS", "-1"),
        ("PREVIEW_FAILURE_RATE", "1.1"),
        ("LOG_LEVEL", "verbose"),
    ],
)
def test_a_bad_variable_is_named_but_not_shown(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}: ") as refusal:
        Settings(ENVIRONMENT | {name: value})

    assert len(value) < 8 or value not in str(refusal.value)


def test_a_bad_configuration_ends_the_worker_with_code_2_and_one_line():
    environment = {"PATH": os.environ["PATH"], **ENVIRONMENT, "WORKER_SLOTS": "x"}
    done = subprocess.run(
        [sys.executable, PROJECT / "worker.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 2
    assert done.stderr.endswith("ERROR worker.misconfigured WORKER_SLOTS: not a number\n")
    assert done.stderr.count("\n") == 1


HOST = "postgresql://darkroom_worker:secret@127.0.0.1:6543/postgres"


@pytest.mark.parametrize(
    ("query", "kept", "prepares"),
    [
        ("", "", True),
        ("?pgbouncer=true", "", False),
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


def test_a_parameter_that_nobody_knows_is_named():
    with pytest.raises(ConfigError, match=r"DATABASE_URL: libpq knows no parameter sslmod$"):
        Settings(ENVIRONMENT | {"DATABASE_URL": f"{HOST}?sslmod=require"})


# --- backoff ---


@pytest.mark.parametrize("attempt", [0, 1, 5, 60, 5000])
def test_backoff_is_exponential_jittered_and_capped(attempt):
    longest = min(worker.RETRY_CAP_SECONDS, worker.RETRY_BASE_SECONDS * 2 ** min(attempt, 60))
    pauses = [worker.backoff(attempt) for _ in range(200)]

    assert longest / 2 <= min(pauses) < max(pauses) <= longest


def test_after_a_failed_beat_the_next_comes_soon():
    """The pool may hold several dead connections, and the lease outlives but three intervals."""
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


# --- downloads ---

TOKEN = "r8_a_secret"
API = "https://api.replicate.com/v1"
DELIVERED = "https://replicate.delivery/xezq/out-0.png"


class Web:
    """Answers every request by its URL and remembers what was asked."""

    def __init__(self, **answers: httpx.Response) -> None:
        self.answers = answers
        self.requests: list[httpx.Request] = []

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self.answers.get(request.url.host.replace(".", "_")) or httpx.Response(404)

    def hosts(self) -> list[str]:
        return [request.url.host for request in self.requests]

    def read(self, url: str, api: str = API) -> bytes:
        async def download() -> bytes:
            async with httpx.AsyncClient(transport=httpx.MockTransport(self.handle)) as http:
                return b"".join([chunk async for chunk in Replicate(http, api, TOKEN).read(url)])

        return asyncio.run(download())


@pytest.mark.parametrize(
    "url",
    [
        DELIVERED,
        "https://pbxt.replicate.delivery/a/out.png",
        "https://REPLICATE.delivery/out.png",
        "https://api.replicate.com/v1/files/a/download",
    ],
)
def test_outputs_come_from_the_providers_hosts_and_without_the_token(url):
    web = Web()
    web.handle = lambda request: web.requests.append(request) or httpx.Response(200, content=b"x")

    assert web.read(url) == b"x"
    assert "authorization" not in web.requests[0].headers


@pytest.mark.parametrize(
    "url",
    [
        "http://replicate.delivery/out.png",
        "http://api.replicate.com/v1/files/a",
        "https://api.replicate.com:8443/v1/files/a",
        "https://replicate.delivery.evil.com/out.png",
        "https://evilreplicate.delivery/out.png",
        "https://replicate.delivery@evil.com/out.png",
        "https://evil.com/replicate.delivery/out.png",
        "https://evil.com#replicate.delivery",
        "https://evil.com?.replicate.delivery",
        "https://evil.com\\.replicate.delivery/out.png",
        "https://evil.com\n.replicate.delivery/out.png",
        "https://169.254.169.254/latest/meta-data",
        "https://127.0.0.1/out.png",
        "https://[::1]/out.png",
        "https://[broken/out.png",
        "https://replicate.delivery:port/out.png",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "//replicate.delivery/out.png",
        "out.png",
        "",
    ],
)
def test_outputs_from_elsewhere_are_the_providers_error_and_not_fetched(url):
    web = Web()

    with pytest.raises(JobError) as refusal:
        web.read(url)

    assert refusal.value.code == "provider_error"
    assert web.requests == []


def redirect(to: str) -> httpx.Response:
    return httpx.Response(302, headers={"location": to})


@pytest.mark.parametrize(
    "target", ["https://evil.com/x", "//evil.com/x", "http://replicate.delivery/x"]
)
def test_a_redirect_is_held_to_the_same_hosts(target):
    web = Web(replicate_delivery=redirect(target))

    with pytest.raises(JobError, match=r"provider_error: output: host .* is not allowed"):
        web.read(DELIVERED)

    assert web.hosts() == ["replicate.delivery"]


def test_a_redirect_among_the_providers_hosts_is_followed():
    web = Web(
        replicate_delivery=redirect("https://a.replicate.delivery/x"),
        a_replicate_delivery=httpx.Response(200, content=b"x"),
    )

    assert web.read(DELIVERED) == b"x"


@pytest.mark.parametrize("coding", ["gzip", "gzip, gzip", "deflate", "br", "GZIP"])
def test_an_output_that_is_packed_is_refused_before_it_is_unpacked(coding):
    bomb = gzip.compress(gzip.compress(bytes(10**6)))
    answer = httpx.Response(
        200, headers={"content-encoding": coding}, stream=httpx.ByteStream(bomb)
    )
    web = Web(replicate_delivery=answer)

    with pytest.raises(JobError, match="provider_error: output: packed"):
        web.read(DELIVERED)

    assert web.requests[0].headers["accept-encoding"] == "identity"


def test_redirects_in_a_circle_end():
    web = Web(replicate_delivery=redirect(DELIVERED))

    with pytest.raises(JobError, match="too many redirects"):
        web.read(DELIVERED)

    assert len(web.requests) == worker.MAX_REDIRECTS + 1


@pytest.mark.parametrize(
    ("status", "code"), [(404, "result_lost"), (410, "result_lost"), (500, "internal")]
)
def test_a_download_that_fails_says_whether_the_result_is_gone(status, code):
    with pytest.raises(JobError) as refusal:
        Web(replicate_delivery=httpx.Response(status)).read(DELIVERED)

    assert refusal.value.code == code


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


class Sources(Web):
    """A storage server with source images, and the provider's files API."""

    def __init__(self, url: str, signed: dict[str, str]) -> None:
        super().__init__()
        self.url, self.signed, self.file = url, signed, b"a cat"

    def handle(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        request.read()
        if request.url.path.startswith("/storage/v1/object/sign/"):
            return httpx.Response(200, json=self.signed)
        if request.url.path == "/v1/files":
            return httpx.Response(201, json={"urls": {"get": "https://api/v1/files/f1"}})
        return httpx.Response(200, content=self.file)

    def sent(self, provider: Any = None, **provider_input: Any) -> dict[str, Any]:
        """What a worker that has these sources would send to the provider."""
        job = a_job(provider_input=provider_input, image_inputs=["image", "more"])

        async def call() -> dict[str, Any]:
            async with httpx.AsyncClient(transport=httpx.MockTransport(self.handle)) as http:
                settings = Settings(ENVIRONMENT | {"SUPABASE_URL": self.url})
                given = provider or Replicate(http, "https://api/v1", TOKEN)
                storage = Storage(settings, http, mock.Mock())
                one = worker.Worker(settings, mock.Mock(), {}, storage, mock.Mock())
                return await one._with_sources(given, job)

        return asyncio.run(call())


SIGNED = "/object/sign/inputs/u/cat.png?token=t"


@pytest.mark.parametrize(
    "signed",
    [{"signedURL": SIGNED}, {"signedUrl": SIGNED}, {"signedUrl": f"/storage/v1{SIGNED}"}],
    ids=str,
)
def test_a_source_image_is_given_as_a_signed_address_where_storage_is_public(signed):
    web = Sources("https://project.supabase.co", signed)

    sent = web.sent(prompt="p", image="u/a cat.png")

    address = f"https://project.supabase.co/storage/v1{SIGNED}"
    assert sent == {"prompt": "p", "image": address}
    (request,) = web.requests
    assert request.url.raw_path == b"/storage/v1/object/sign/inputs/u/a%20cat.png"
    assert json.loads(request.content)["expiresIn"] >= 300


@pytest.mark.parametrize("url", ["http://127.0.0.1:54321", "http://kong.internal", "http://[::1]"])
def test_a_source_image_is_uploaded_where_storage_is_not_public(url):
    web = Sources(url, {})

    sent = web.sent(more=["u/cat.png", "u/dog.png"])

    assert sent == {"more": ["https://api/v1/files/f1"] * 2}
    uploads = [request for request in web.requests if request.url.path == "/v1/files"]
    assert [b'filename="cat.png"' in upload.content for upload in uploads] == [True, False]
    assert all(b"\r\n\r\na cat\r\n" in upload.content for upload in uploads)


def test_a_provider_that_fetches_nothing_is_given_the_file_also_where_storage_is_public():
    web = Sources("https://project.supabase.co", {"signedURL": SIGNED})
    seen = pictures.Picture("PNG", 40, 30, blurhash="LEHV6n")
    provider = worker.Preview(mock.Mock(inspect=mock.AsyncMock(return_value=seen)), 0, 0)

    assert web.sent(provider=provider, image="u/cat.png")["image"] == f"-{b'LEHV6n'.hex()}"


def test_a_source_image_that_was_not_given_is_left_out():
    assert Sources("http://127.0.0.1", {}).sent(prompt="p", image=None) == {
        "prompt": "p",
        "image": None,
    }


@pytest.mark.parametrize("status", [401, 402, 403])
def test_an_account_that_may_not_upload_is_paused_and_what_was_bought_is_kept(status):
    async def call() -> str:
        transport = httpx.MockTransport(lambda _: httpx.Response(status))
        async with httpx.AsyncClient(transport=transport) as http:
            return await Replicate(http, "https://api/v1", TOKEN).upload("a", io.BytesIO(b"a"))

    with pytest.raises(worker.ProviderDown) as refusal:
        asyncio.run(call())

    assert refusal.value.may_have_bought


# --- Replicate's answers ---


@pytest.mark.parametrize(
    ("response", "seconds"),
    [
        (httpx.Response(429, headers={"retry-after": "7"}, json={"retry_after": 9}), 7),
        (httpx.Response(429, json={"retry_after": 9, "detail": "in ~30s."}), 9),
        (httpx.Response(429, json={"detail": "Your rate limit resets in ~30s."}), 30),
        (httpx.Response(429, headers={"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}), 60),
        (httpx.Response(429, text="<html>busy</html>"), 60),
        (httpx.Response(402, json=["odd"]), 60),
    ],
)
def test_how_long_to_wait_is_found_wherever_the_provider_says_it(response, seconds):
    assert worker.retry_after_seconds(response) == seconds


def create(answer: httpx.Response | Exception, **changes: Any) -> str:
    """Create one prediction that is answered like this."""

    async def handle(_: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def call() -> str:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as http:
            return await Replicate(http, API, TOKEN).create(a_job(**changes), {"prompt": "p"})

    return asyncio.run(call())


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (httpx.Response(400), "invalid_input"),
        (httpx.Response(422), "invalid_input"),
        (httpx.Response(429), "provider_busy"),
        (httpx.Response(302), "internal"),
        (httpx.Response(404), "internal"),
        (httpx.ConnectError("refused"), "provider_busy"),
        (httpx.ConnectTimeout("late"), "provider_busy"),
        (httpx.PoolTimeout("none free"), "provider_busy"),
    ],
)
def test_a_refused_create_may_be_repeated_unless_the_input_is_wrong(answer, code):
    with pytest.raises(JobError) as refusal:
        create(answer)

    assert refusal.value.code == code


def test_a_throttled_create_tells_how_long_to_wait():
    with pytest.raises(JobError) as refusal:
        create(httpx.Response(429, headers={"retry-after": "7"}))

    assert refusal.value.retry_after == 7


@pytest.mark.parametrize("status", [401, 402, 403])
def test_a_refused_account_is_no_jobs_fault_and_has_bought_nothing(status):
    with pytest.raises(worker.ProviderDown) as refusal:
        create(httpx.Response(status, text="go to billing"))

    assert refusal.value.is_sure and not refusal.value.may_have_bought
    assert f"HTTP {status}: go to billing" in str(refusal.value)


REFUSED_STEPS: dict[str, Callable[[Replicate], Awaitable[Any]]] = {
    "create": lambda api: api.create(a_job(), {}),
    "files": lambda api: api.upload("a", io.BytesIO(b"a")),
    "poll": lambda api: api.result(a_job(), "p1", lambda _: None),
    "list": lambda api: api.find(a_job(), datetime.now(UTC)),
}


@pytest.mark.parametrize("account", [200, 500, None])
@pytest.mark.parametrize("status", [401, 402, 403])
@pytest.mark.parametrize("step", REFUSED_STEPS)
def test_a_refusal_is_not_surely_the_accounts_unless_that_is_refused_too(step, status, account):
    async def handle(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/v1/account":
            return httpx.Response(status)
        if account is None:
            raise httpx.ReadTimeout("late")
        return httpx.Response(account)

    async def call() -> None:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as http:
            await REFUSED_STEPS[step](Replicate(http, "https://api/v1", TOKEN))

    with pytest.raises(worker.Refused) as refusal:
        asyncio.run(call())

    error = refusal.value
    assert f"HTTP {status}" in str(error)
    assert error.may_have_bought == (step != "create")
    # 403: of the model or a file, for all we know. Else of the key or the credit, to be proven.
    assert getattr(error, "is_sure", "the job's") == ("the job's" if status == 403 else False)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(408),
        httpx.Response(500),
        httpx.Response(504),
        httpx.ReadTimeout("late"),
        httpx.WriteTimeout("late"),
        httpx.WriteError("reset"),
        httpx.ReadError("reset"),
        httpx.RemoteProtocolError("hung up"),
        httpx.Response(201, text="<html>proxy</html>"),
        httpx.Response(201, json={"status": "starting"}),
        httpx.Response(201, json={"id": None}),
        httpx.Response(201, json={"id": ""}),
        httpx.Response(200, json=["odd"]),
        httpx.Response(201, json={"id": "p1", "input": {"image": "https://a/anothers.png"}}),
    ],
)
def test_a_create_of_unknown_outcome_says_so(answer):
    with pytest.raises(worker.UnknownOutcome):
        create(answer)


# --- looking for a lost create ---

SINCE = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)


def found(
    *pages: Any, sent: bytes | None = None, **changes: Any
) -> tuple[list[str], list[httpx.Request]]:
    """Look for a job where the list has these pages, or answers of another kind."""
    requests: list[httpx.Request] = []
    answers = [page if isinstance(page, httpx.Response) else as_page(*page) for page in pages]

    async def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return answers[len(requests) - 1]

    async def call() -> list[str]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as http:
            return await Replicate(http, API, TOKEN).find(a_job(**changes), SINCE, sent)

    with mock.patch("worker.backoff", return_value=0.0):
        return asyncio.run(call()), requests


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


@pytest.mark.parametrize(
    "changes",
    [
        {"model": "black-forest-labs/flux-dev"},
        {"input": {"prompt": "a house"}},
        {"input": {}},
        {"input": None},
        {"input": "a lighthouse"},
        {"input": [["prompt", "a lighthouse"]]},
        {"input": {}, "data_removed": True},
        {"version": "b" * 64},
    ],
    ids=str,
)
def test_a_prediction_of_another_model_or_input_is_not_ours(changes):
    assert found(([listed(**changes)],))[0] == []


def test_an_input_of_which_nothing_is_left_proves_nothing():
    assert found(([listed(input={})],), provider_input={})[0] == []


SOURCE = "https://project.supabase.co/storage/v1/object/sign/inputs/u/cat.png?token="
ASKED = {"prompt": "p", "seed": 1, "scale": 1.0, "fast": True, "lora": None}
ASKED |= {"image": f"{SOURCE}a", "more": [f"{SOURCE}b", f"{SOURCE}c"]}


@pytest.mark.parametrize(
    ("changes", "is_ours"),
    [
        ({}, True),
        ({"seed": 1.0, "scale": 1}, True),  # one number in JSON, however a server writes it
        ({"seed": True}, False),
        ({"fast": 1}, False),
        ({"seed": "1"}, False),
        ({"seed": 2**53}, False),
        ({"lora": ""}, False),
        ({"lora": ...}, False),
        ({"mask": "https://example.com/mask.png"}, False),
        ({"mask": None}, False),
        ({"image": f"{SOURCE}b"}, False),
        ({"image": ...}, False),
        ({"image": "u/cat.png"}, False),
        ({"image": [f"{SOURCE}a"]}, False),
        ({"more": [f"{SOURCE}c", f"{SOURCE}b"]}, False),
        ({"more": [f"{SOURCE}b"]}, False),
        ({"prompt": "P"}, False),
    ],
    ids=str,
)
def test_only_the_whole_input_with_its_sources_is_a_proof(changes, is_ours):
    given = {name: value for name, value in (ASKED | changes).items() if value is not ...}
    job = {"provider_input": ASKED | {"image": "u/cat.png"}, "image_inputs": ["image", "more"]}

    ids, _ = found(([listed(input=given)],), sent=worker.fingerprint(ASKED), **job)

    assert bool(ids) == is_ours


def test_large_numbers_are_not_taken_for_their_neighbours():
    seeds = {worker.fingerprint({"seed": 2**60 + number}) for number in range(3)}

    assert len(seeds) == 3


def test_without_what_was_sent_no_source_is_recognized():
    sent = {"prompt": "p", "image": "u/cat.png"}
    given = {"prompt": "p", "image": f"{SOURCE}a"}

    assert found(([listed(input=given)],), provider_input=sent, image_inputs=["image"])[0] == []


@pytest.mark.parametrize(
    ("changes", "is_ours"),
    [
        ({"model": "o/sdxl", "version": "a" * 64}, True),
        ({"model": "o/renamed", "version": "a" * 64}, True),
        ({"model": "o/sdxl", "version": "b" * 64}, False),
        ({"model": "o/sdxl", "version": "hidden"}, False),
        ({"model": "o/sdxl", "version": None}, False),
    ],
)
def test_a_model_that_runs_by_version_is_known_by_that_alone(changes, is_ours):
    ids, _ = found(([listed(**changes)],), provider_ref=f"o/sdxl:{'a' * 64}")

    assert bool(ids) == is_ours


@pytest.mark.parametrize("status", [404, 429, 500])
def test_a_list_that_fails_proves_nothing_and_is_read_again(status):
    ids, requests = found(*[httpx.Response(status)] * 6, ([listed()],))

    assert (ids, len(requests)) == (["p1"], 7)


def test_a_list_without_end_is_given_up_for_good():
    with (
        mock.patch("worker.MAX_PAGES", 2),
        pytest.raises(JobError, match=r"^timeout: create: outcome unknown"),
    ):
        found(([], "https://x?cursor=a"), ([], "https://x?cursor=b"))


@pytest.mark.parametrize("status", [401, 402, 403])
def test_an_account_refused_while_looking_may_have_bought(status):
    with pytest.raises(worker.ProviderDown) as refusal:
        found(httpx.Response(status), httpx.Response(status))

    assert refusal.value.may_have_bought


# --- how a prediction ends ---


def end_of(*before: httpx.Response, **prediction: Any) -> worker.Result:
    """Poll a prediction that reads like this, in the end."""
    answers = [*before, httpx.Response(200, json=prediction)]

    async def handle(_: httpx.Request) -> httpx.Response:
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def call() -> worker.Result:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as http:
            return await Replicate(http, API, TOKEN).result(a_job(), "p1", lambda _: None)

    with mock.patch("worker.backoff", return_value=0.0):
        return asyncio.run(call())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("The input or output was flagged as sensitive. (E005)", "moderated"),
        ("NSFW content detected. Try running it again.", "moderated"),
        ("Content moderated", "moderated"),
        ("Your request was blocked by the safety system", "moderated"),
        ("CUDA out of memory (E1001)", "provider_error"),
        ("E0051", "provider_error"),
        ("", "provider_error"),
        (None, "provider_error"),
        ({"odd": 1}, "provider_error"),
    ],
)
def test_a_failed_prediction_is_moderated_or_the_providers_error(error, code):
    with pytest.raises(JobError) as refusal:
        end_of(status="failed", error=error)

    assert refusal.value.code == code


def test_an_answer_about_another_prediction_is_none():
    anothers = {"id": "p2", "status": "succeeded", "output": "https://replicate.delivery/2.png"}

    with mock.patch("worker.PROVIDER_POLL_SECONDS", 0.0):
        result = end_of(
            httpx.Response(200, json=anothers), id="p1", status="succeeded", output=DELIVERED
        )

    assert result.outputs == [DELIVERED]


def test_an_output_that_was_removed_is_lost():
    with pytest.raises(JobError, match="result_lost: the output was removed"):
        end_of(status="succeeded", output=None, data_removed=True)


@pytest.mark.parametrize(
    "output",
    [
        DELIVERED,
        [DELIVERED],
        [[DELIVERED]],
        {"image": DELIVERED},
        {"seed": 7, "revised_prompt": "a lighthouse", "images": [{"url": DELIVERED}]},
    ],
    ids=str,
)
def test_addresses_are_found_in_texts_lists_and_objects(output):
    result = end_of(status="succeeded", output=output, metrics={"predict_time": 1.5})

    assert result == worker.Result([DELIVERED], {"provider_seconds": 1.5, "images": 1})


@pytest.mark.parametrize("output", [7, [], {"a": 1}, "done"], ids=str)
def test_an_output_without_an_address_has_no_outputs(output):
    assert end_of(status="succeeded", output=output).outputs == []


@pytest.mark.parametrize("name", ["image_count", "image_output_count"])
def test_images_are_counted_as_the_provider_bills_them(name):
    result = end_of(status="succeeded", output=[DELIVERED], metrics={name: 3})

    assert result.metrics == {"images": 3}


@pytest.mark.parametrize("said", [None, "1.5", -1, 1e9, [1]], ids=str)
def test_metrics_that_are_no_decent_numbers_are_not_passed_on(said):
    result = end_of(
        status="succeeded",
        output=[DELIVERED],
        metrics={"predict_time": said, "image_count": said},
    )

    assert result.metrics == {"images": 1}


@pytest.mark.parametrize(
    ("status", "is_billed"),
    [("failed", {"is_billed": False}), ("aborted", {"is_billed": False}), ("canceled", {})],
)
def test_what_failed_is_free_and_what_was_canceled_costs_the_seconds_it_ran(status, is_billed):
    with pytest.raises(JobError) as failure:
        end_of(status=status, error="out of memory", metrics={"predict_time": 1.5})

    assert failure.value.metrics == {"provider_seconds": 1.5} | is_billed


def bar(done: int, total: int = 4) -> str:
    """Return a line of a progress bar as tqdm draws it."""
    percent = 100 * done // total
    return f"{percent:3}%|{'█' * (percent // 10):10}| {done}/{total} [00:01<00:01,  9.84it/s]\n"


def told(*logs: str, image_count: int = 1, before: str = "") -> list[int]:
    """Return what a job's logs, as they grow, are reported as; `before` is an earlier job's log."""
    percents: list[int] = []
    replicate = worker.Replicate(httpx.AsyncClient(), "https://api.invalid/v1", "key")
    job = a_job(image_count=image_count)
    replicate._follow(job, before, is_over=True, report=lambda _: None)
    for log in logs:
        replicate._follow(job, log, is_over=False, report=percents.append)
    return percents


@pytest.mark.parametrize(
    ("logs", "percents"),
    [
        (["Using seed: 7\n" + bar(0), bar(0) + bar(2), bar(2) + bar(4) + bar(4)], [0, 50, 100]),
        ([bar(1).replace("\n", "\r") + bar(3)], [75]),
        (["Prompt: 90% cocoa, 50%|x| 1/2 [of it\n"], []),
        (["Weights:  80%|████████  | 8/10 [00:01<00:01]\nGPU at 93%\n"], []),
        (["downloading 12%\n", " 12%|█         | 1.2G/10G [00:01<00:01]\n"], []),
        (["0%|   | 0/0 [00:00<?, ?it/s]\n", ""], []),
    ],
    ids=["a bar", "carriage returns", "a prompt", "other bars", "bytes", "nothing"],
)
def test_only_progress_bars_tell_progress(logs, percents):
    assert told(*logs) == percents


def test_a_bar_for_each_image_is_a_part_of_the_whole():
    one, two = bar(0) + bar(4) + bar(4), bar(0) + bar(2)

    assert told(bar(2), one, one + two, one + one, image_count=2) == [25, 50, 75, 100]


def test_as_many_bars_are_expected_as_the_models_last_job_had():
    one = bar(0) + bar(4)

    assert told(bar(2), one, image_count=4, before=one) == [50, 100]  # one bar for all images
    assert told(bar(2), one, one + bar(2, 8), before=one + bar(8, 8)) == [25, 50, 62]  # a refiner


def test_progress_never_goes_back():
    news: list[int] = []
    running = worker.Running(a_job(), 0.0, lambda: news.append(1))

    for percent in (0, 50, 20, 50, 100, 3):
        running.report(percent)

    assert (running.progress, len(news)) == (100, 3)


def test_a_missing_prediction_is_lost_only_if_it_stays_missing():
    gone = httpx.Response(404)

    assert end_of(*[gone] * worker.HTTP_TRIES, status="succeeded", output=DELIVERED).outputs
    with pytest.raises(JobError, match="result_lost: no such prediction"):
        end_of(*[gone] * (worker.HTTP_TRIES + 1), status="succeeded", output=DELIVERED)


@pytest.mark.parametrize("status", ["starting", "processing", "pondering", None])
def test_a_status_we_do_not_know_is_one_more_to_wait_for(status):
    with mock.patch("worker.PROVIDER_POLL_SECONDS", 0.0):
        running = httpx.Response(200, json={"status": status})
        result = end_of(running, running, status="succeeded", output=DELIVERED)

    assert result.outputs == [DELIVERED]


@pytest.mark.parametrize("status", ["canceled", "aborted"])
def test_a_prediction_ended_from_outside_is_not_resumed_but_begun_anew(status):
    with pytest.raises(JobError) as refusal:
        end_of(status=status)

    assert refusal.value.code == "provider_error"  # retried without the checkpoint


def test_an_unexpected_error_tells_its_type_and_place_but_not_its_text():
    try:
        raise ValueError("https://replicate.delivery/a-signed-url")
    except ValueError as error:
        told = worker.as_job_error(error)

    assert told.code == "internal"
    assert told.detail.startswith("ValueError at test_an_unexpected_error")
    assert "replicate.delivery" not in told.detail


@pytest.mark.parametrize(
    ("answers", "end", "reason"),
    [
        ([], {"status": "failed", "error": "in 'a nude of A. Smith'"}, "prediction failed"),
        ([httpx.Response(404)] * 9, {}, "no such prediction"),
    ],
)
def test_the_reason_in_the_log_holds_no_words_of_a_provider(answers, end, reason):
    with pytest.raises(JobError) as failure:
        end_of(*answers, **end)

    assert failure.value.reason == reason


def test_a_stop_does_not_cut_short_the_call_that_ends_a_job():
    ended: list[str] = []

    async def fail_job(job: Job, code: str, *_: object) -> str:
        await asyncio.sleep(0.01)
        ended.append(code)
        return "failed"

    async def stop_meanwhile() -> None:
        one = worker.Worker(
            mock.Mock(), mock.Mock(fail_job=fail_job, quoted=str), {}, mock.Mock(), mock.Mock()
        )
        running = worker.Running(a_job(), 0.0, one.on_progress)
        one.running[running.job.token] = running
        task = asyncio.create_task(one.process(running))
        await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(stop_meanwhile())

    assert ended == ["internal"]


# --- the preview provider ---

SIZES = [(64, 64), (2048, 64), (64, 2048), (1, 1), (1024, 768)]
PROMPTS = {
    "plain": "a lighthouse at dusk, oil painting",
    "blank": " \n\t ",
    "one long word": "a" * 4000,
    "wide": "日本の灯台" * 50,
    "right to left": "منارة عند الغسق" * 20,
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈" * 50,
    "control": "\x01\x07\x1b[31m\u202e\ufeff",
    "format": "%s {0} \\n [fail:] <b>",
}


def drawn(prompt: str, seed: int, size: tuple[int, int]) -> bytes:
    return pictures.draw_preview(prompt, size, "", seed)


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_preview_has_the_size_asked_for_whatever_the_prompt(prompt, size):
    assert Image.open(io.BytesIO(drawn(prompt, 7, size))).size == size


def test_a_preview_depends_on_prompt_seed_and_size_only():
    same = [drawn("a lighthouse", 7, (64, 64)) for _ in range(2)]
    others = [
        drawn("a lighthouse", 8, (64, 64)),
        drawn("a house", 7, (64, 64)),
        drawn("a lighthouse", 7, (64, 65)),
    ]

    assert same[0] == same[1]
    assert len({*same, *others}) == 4


def as_file(content: bytes) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(content)
    return file


def png(size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (0, 255, 0)).save(file, "PNG")
    return file.getvalue()


async def previewing(work: Callable[[worker.Preview], Awaitable[Any]]) -> Any:
    """Have a preview provider of its own for a piece of work."""
    decoder = pictures.Pictures()
    try:
        return await work(worker.Preview(decoder, 0, 0))
    finally:
        decoder.close()


def preview(source: bytes | None = None) -> bytes:
    """What the preview provider draws, in another worker than the one that created it."""
    given = {"prompt": "p", "seed": 1, "width": 64, "height": 64}
    job = a_job(provider_input=given | ({"image": "u/cat.png"} if source else {}))

    async def create(provider: worker.Preview) -> str:
        address = source and await provider.upload("cat.png", as_file(source))
        return await provider.create(job, given | {"image": address})

    async def draw(provider: worker.Preview) -> bytes:
        (output,) = (await provider.result(job, job_id, lambda percent: None)).outputs
        return bytes(output)

    job_id = asyncio.run(previewing(create))
    return asyncio.run(previewing(draw))


def test_a_preview_starts_from_its_source_also_in_another_workers_hands():
    red, green, blue = Image.open(io.BytesIO(preview(png()))).getpixel((0, 0))

    assert green > 150 > max(red, blue)
    assert preview() != preview(png()) == preview(png())


@pytest.mark.parametrize("content", [b"", b"a cat", png((8000, 8000))], ids=len)
def test_a_source_that_is_no_sane_picture_is_the_users_fault(content):
    with pytest.raises(JobError) as refusal:
        asyncio.run(previewing(lambda provider: provider.upload("a", as_file(content))))

    assert refusal.value.code == "invalid_input"


# --- pauses that others ask for ---


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        *((words, None) for words in (None, "", "-", "soon", "nan", "\u0663\u0660", "9" * 10_000)),
        *((words, 0.0) for words in ("0", "-5", "-1e308", "-inf", -1e308)),
        ("Wed, 21 Oct 2015 07:28:00 GMT", None),
        *((words, 86_400.0) for words in ("1000000", "1e308", "inf", "1e999", 10**90)),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400.0),
        ("Fri, 99 Dec 9999 23:59:59 GMT", None),
        *((words, 30.0) for words in ("30", " 30 ", "3e1", 30)),
    ],
)
def test_a_pause_that_somebody_asks_for_is_a_number_from_none_to_a_day(words, seconds):
    assert worker.asked_seconds(words) == seconds


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({"retry-after": "nan"}, '{"retry_after": 7}', 7),
        ({"retry-after": "-1e308"}, "", 0),
        ({}, '{"retry_after": 1e999}', 86_400),
        ({}, '{"retry_after": ' + "9" * 400 + "}", 60),
        ({}, '{"detail": "resets in ~30s"}', 30),
        ({}, "~" + "9" * 400 + "s", 60),
        ({}, "[1]", 60),
    ],
)
def test_a_provider_that_asks_for_nonsense_is_asked_again_within_the_day(headers, body, seconds):
    response = httpx.Response(429, headers=headers, text=body)

    assert worker.retry_after_seconds(response) == seconds


# --- calls for many jobs ---


class Trips:
    """Stands for a function that takes many jobs: notes who came together, and takes a while."""

    def __init__(self, *lost: int) -> None:
        self.lost = set(lost)
        self.made: list[list[int]] = []
        self.gate = asyncio.Event()

    async def __call__(self, function: str, ids: list[Any], tokens: list[int], *said: Any) -> Any:
        assert function == "complete_jobs" and len(ids) == len(tokens)
        self.made.append(tokens)
        await self.gate.wait()
        if "bad" in said[0]:
            raise psycopg.errors.InvalidParameterValue("bad")
        if said[0] == ["odd"]:
            await asyncio.Event().wait()  # asks again and again
        if "odd" in said[0]:
            raise psycopg.errors.InternalError_("odd")
        if "gone" in said[0]:
            raise psycopg.OperationalError("gone")
        if "stop" in said[0]:
            raise asyncio.CancelledError
        return [
            {"token": token, "verdict": token * 10} for token in tokens if token not in self.lost
        ]


def batch(trips: Trips, *said: str) -> tuple[worker.Batch, list[asyncio.Task[Any]]]:
    """Call for jobs 0, 1, 2 …, each saying this."""
    call = worker.Batch(trips, "complete_jobs")
    return call, [asyncio.create_task(call(a_job(token=n), each)) for n, each in enumerate(said)]


async def outcomes(trips: Trips, calls: list[asyncio.Task[Any]]) -> list[Any]:
    trips.gate.set()
    return await asyncio.gather(*calls, return_exceptions=True)


def test_calls_made_while_one_is_under_way_go_together_in_the_next():
    async def act() -> None:
        trips = Trips(2)
        call, calls = batch(trips, "a")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        calls += [asyncio.create_task(call(a_job(token=n), "a")) for n in (1, 2, 3)]
        await asyncio.sleep(0)

        said = await outcomes(trips, calls)

        assert trips.made == [[0], [1, 2, 3]]
        assert [said[0], said[1], said[3]] == [0, 10, 30]
        assert isinstance(said[2], worker.LeaseLost)
        assert await call(a_job(token=4), "a") == 40

    asyncio.run(act())


def test_no_call_takes_more_jobs_than_fit():
    async def act() -> None:
        trips = Trips()
        _, calls = batch(trips, *["a"] * 250)

        await outcomes(trips, calls)

        assert [len(trip) for trip in trips.made] == [100, 100, 50]

    asyncio.run(act())


def test_what_is_wrong_with_one_call_is_told_to_it_alone():
    async def act() -> None:
        trips = Trips()
        _, calls = batch(trips, "a", "bad", "a")

        said = await outcomes(trips, calls)

        assert isinstance(said.pop(1), psycopg.errors.InvalidParameterValue)
        assert said == [0, 20]

    asyncio.run(act())


@pytest.mark.parametrize(
    ("end", "error"), [("gone", psycopg.OperationalError), ("stop", asyncio.CancelledError)]
)
def test_when_a_call_for_many_cannot_be_made_everybody_is_told(end, error):
    async def act() -> None:
        trips = Trips()
        _, calls = batch(trips, end, "a", "a")

        said = await asyncio.wait_for(outcomes(trips, calls), 5)

        assert [type(each) for each in said] == [error] * 3

    asyncio.run(act())


def test_what_may_be_the_fault_of_one_job_holds_up_no_other():
    async def act() -> None:
        trips = Trips()
        call, calls = batch(trips, "a", "odd", "a")
        trips.gate.set()

        assert [await calls[0], await calls[2]] == [0, 20]
        assert await call(a_job(token=3), "a") == 30
        assert not calls[1].done()

    asyncio.run(act())


@pytest.mark.parametrize(
    ("error", "whose"),
    [
        (psycopg.errors.ReadOnlySqlTransaction(), "database"),
        (psycopg.errors.CannotConnectNow(), "database"),
        (psycopg.errors.DiskFull(), "database"),
        (psycopg.errors.DeadlockDetected(), "database"),
        (psycopg.OperationalError(), "database"),
        (psycopg.InterfaceError(), "database"),
        (worker.Outdated(), "database"),
        (psycopg.errors.InsufficientPrivilege(), "either"),
        (psycopg.errors.FeatureNotSupported(), "either"),
        (psycopg.errors.InternalError_(), "either"),
        (psycopg.errors.CheckViolation(), "job"),
        (psycopg.errors.NumericValueOutOfRange(), "job"),
        (psycopg.errors.ProgramLimitExceeded(), "job"),
        (psycopg.errors.RaiseException(), "job"),
        (psycopg.DataError("NUL"), "job"),
        (UnicodeEncodeError("utf-8", "", 0, 1, ""), "job"),
    ],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
def test_whose_fault_an_error_is_its_sqlstate_says(error, whose):
    assert worker.fault(error) == whose


def test_who_is_cancelled_does_not_go_and_stops_no_other():
    async def act() -> None:
        trips = Trips()
        call, calls = batch(trips, "a", "a")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        calls += [asyncio.create_task(call(a_job(token=n), "a")) for n in (2, 3)]
        await asyncio.sleep(0)
        calls[0].cancel()
        calls[2].cancel()

        said = await outcomes(trips, calls)

        assert trips.made == [[0, 1], [3]]
        assert [said[1], said[3]] == [10, 30]
        assert all(isinstance(said[n], asyncio.CancelledError) for n in (0, 2))

    asyncio.run(act())


@pytest.mark.parametrize("ends_well", [True, False])
def test_what_must_be_finished_is_however_often_its_caller_is_cancelled(ends_well):
    """A purchase under way, when two heartbeats in turn say that the lease is lost."""

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


def test_after_a_beat_the_worker_looks_for_work():
    """An enqueue that met its row locked by the beat has woken nobody."""
    db = mock.Mock(heartbeat=mock.AsyncMock(return_value=[]))
    one = worker.Worker(mock.Mock(), db, {}, mock.Mock(), mock.Mock())

    asyncio.run(one.beat())

    assert one.wake.is_set()


def test_who_could_not_beat_claims_again_with_the_first_beat():
    db = mock.Mock(
        heartbeat=mock.AsyncMock(return_value=[]),
        claim_jobs=mock.AsyncMock(return_value=[mock.Mock(token=1)]),
    )
    one = worker.Worker(mock.Mock(slots=1, poll_seconds=60), db, {}, mock.Mock(), mock.Mock())
    one.is_full, one.lease_seconds, one.last_beat = False, 60, -math.inf
    one.process = mock.AsyncMock()

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
    one = worker.Worker(mock.Mock(slots=1, poll_seconds=60), db, {}, mock.Mock(), mock.Mock())
    one.process, one.is_full = mock.AsyncMock(), False

    asyncio.run(asyncio.wait_for(one._sleep(), 3))

    assert list(one.running) == [1]
    assert db.method_calls[0] == mock.call.call(
        "sleep", 0
    )  # what it looked for before proves nothing


def test_who_runs_full_on_the_way_to_sleep_does_not_claim_again_what_it_gave_back():
    db = mock.Mock(claim_jobs=mock.AsyncMock(return_value=[mock.Mock(token=1)]))
    one = worker.Worker(mock.Mock(slots=1, poll_seconds=0), db, {}, mock.Mock(), mock.Mock())
    one.process, one.is_full = mock.AsyncMock(), False

    async def give_back_what_has_no_room(*_: object) -> None:
        one.is_full = True

    db.call = give_back_what_has_no_room
    asyncio.run(asyncio.wait_for(one._sleep(), 3))

    assert not one.running
