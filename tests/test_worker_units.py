"""The parts of worker.py that need no database: what it is told, fetches, decodes and draws."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

import httpx
import psycopg
import pytest
from database import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import worker
from worker import ConfigError, Job, JobError, Replicate, Settings, Storage, inspect_image

ENVIRONMENT = {
    "DATABASE_URL": "postgresql://darkroom_worker:secret@127.0.0.1/postgres",
    "SUPABASE_URL": "http://127.0.0.1:54321/",
    "SUPABASE_SERVICE_KEY": "key",
}


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(file, kind, **options)
    return file.getvalue()


# --- settings ---


def test_settings_have_defaults_for_all_that_is_not_required():
    settings = Settings.from_env(ENVIRONMENT)

    assert (settings.slots, settings.grace_seconds, settings.poll_seconds) == (4, 30, 5)
    assert settings.supabase_url == "http://127.0.0.1:54321"
    assert settings.replicate_api_url == "https://api.replicate.com/v1"
    assert settings.replicate_api_token is None


def test_an_empty_optional_variable_counts_as_unset():
    documented = set(re.findall(r"\b[A-Z]+_[A-Z_]+\b", worker.__doc__ or ""))
    empty = dict.fromkeys(documented, "")

    assert Settings.from_env(empty | ENVIRONMENT) == Settings.from_env(ENVIRONMENT)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "") for name in ENVIRONMENT),
        ("DATABASE_URL", "127.0.0.1/postgres"),
        ("DATABASE_URL", "postgresql://darkroom_worker:not/escaped@127.0.0.1/postgres"),
        ("DATABASE_URL", "postgresql://darkroom_worker:not@escaped@127.0.0.1/postgres"),
        ("DATABASE_URL", "postgresql://[broken/postgres"),
        ("SUPABASE_URL", "127.0.0.1:54321"),
        ("REPLICATE_API_URL", "file:///etc/passwd"),
        ("WORKER_SLOTS", "0"),
        ("WORKER_SLOTS", "many"),
        ("WORKER_GRACE_SECONDS", "-1"),
        ("WORKER_POLL_SECONDS", "nan"),
        ("WORKER_POLL_SECONDS", "inf"),
        ("MAX_IMAGE_BYTES", "32MB"),
        ("PREVIEW_FAILURE_RATE", "1.1"),
        ("LOG_LEVEL", "verbose"),
    ],
)
def test_a_bad_variable_is_named_but_not_shown(name, value):
    with pytest.raises(ConfigError, match=rf"^{name}: ") as refusal:
        Settings.from_env(ENVIRONMENT | {name: value})

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

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 4:
            raise asyncio.CancelledError

    with mock.patch("asyncio.sleep", sleep), contextlib.suppress(asyncio.CancelledError):
        asyncio.run(worker.Worker._every(15, action))

    assert sum(pauses[:3]) < 3
    assert 13.5 <= pauses[3] <= 15


# --- images ---


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_format_and_size_are_read_from_the_bytes(kind):
    assert inspect_image(io.BytesIO(picture(kind))) == (kind, 40, 30)


def test_a_jpeg_of_several_pictures_is_stored_as_a_jpeg():
    several = picture("MPO", save_all=True, append_images=[Image.new("RGB", (40, 30))])

    assert inspect_image(io.BytesIO(several)) == ("JPEG", 40, 30)


PIXELS = 50_000_001
HOSTILE = {
    "empty": b"",
    "a page": b"<!doctype html><script>alert(1)</script>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "another format": picture("GIF"),
    "a program": b"\x7fELF" + bytes(200),
    "truncated png": picture("PNG")[:-40],
    "truncated jpeg": picture("JPEG")[:-40],
    "truncated webp": picture("WEBP")[:-40],
    "only a header": picture("PNG")[:33],
    "a broken chunk": picture("PNG")[:33] + b"\0\0\0\x64" + picture("PNG")[37:],
    "a bomb": picture("PNG").replace(b"\0\0\0\x28\0\0\0\x1e", b"\x7f\xff\xff\xff" * 2),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_bytes_that_are_no_image_are_the_providers_error(data):
    with pytest.raises(JobError) as refusal:
        inspect_image(io.BytesIO(data))

    assert refusal.value.code == "provider_error"


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    header = io.BytesIO()
    Image.new("1", (1, PIXELS)).save(header, "PNG")

    with (
        mock.patch("PIL.PngImagePlugin.PngImageFile.load", side_effect=AssertionError("decoded")),
        pytest.raises(JobError, match="provider_error: output: too many pixels"),
    ):
        inspect_image(header)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP"]),
    changes=st.dictionaries(st.integers(0, 300), st.integers(0, 255), max_size=4),
    end=st.integers(0, 3000),
)
def test_damaged_images_are_read_or_refused_but_never_crash(kind, changes, end):
    data = bytearray(picture(kind))
    for at, value in changes.items():
        data[at] = value
    try:
        assert inspect_image(io.BytesIO(bytes(data[:end])))[1:] != (0, 0)
    except JobError as error:
        assert error.code == "provider_error"


# --- downloads ---

TOKEN = "r8_a_secret"
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

    def read(self, url: str, api: str = "https://api.replicate.com/v1") -> bytes:
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


# --- storage ---


def stored(
    body: Iterable[bytes], answer: Callable[[httpx.Request], httpx.Response], max_bytes: int = 10**7
) -> dict[str, Any]:
    """Store one output where every upload is answered like this."""

    async def chunks() -> Any:
        for chunk in body:
            yield chunk

    async def handle(request: httpx.Request) -> httpx.Response:
        await request.aread()
        return answer(request)

    async def store() -> dict[str, Any]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as http:
            storage = Storage(http, "http://storage", "key", max_bytes)
            return await storage.store(a_job(), 0, chunks())

    with mock.patch("worker.backoff", return_value=0.0):
        return asyncio.run(store())


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
        "image_count": 1,
        "deadline_seconds": 300.0,
    }
    return Job(**values | changes)


def test_an_upload_is_repeated_with_all_its_bytes():
    uploads: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        uploads.append(request)
        return httpx.Response(503 if len(uploads) < 3 else 200)

    data = picture(size=(900, 700))
    image = stored([data], answer)

    assert [upload.content for upload in uploads] == [data] * 3
    assert {upload.headers["x-upsert"] for upload in uploads} == {"true"}
    assert (image["bytes"], image["width"], image["height"]) == (len(data), 900, 700)
    assert image["storage_path"] == f"{uuid.UUID(int=1)}/{uuid.UUID(int=2)}/0.png"


def test_an_upload_that_never_succeeds_is_our_error():
    with pytest.raises(JobError, match="internal: upload: HTTP 500"):
        stored([picture()], lambda _: httpx.Response(500))


def test_an_output_over_the_cap_is_given_up_at_the_cap():
    sent = 0

    def endless() -> Iterable[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield bytes(1000)

    with pytest.raises(JobError, match="provider_error: output: more than 5000 bytes"):
        stored(endless(), lambda _: httpx.Response(200), max_bytes=5000)

    assert sent == 6000


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


def create(answer: httpx.Response | Exception) -> str:
    """Create one prediction that is answered like this."""

    async def handle(_: httpx.Request) -> httpx.Response:
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def call() -> str:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as http:
            return await Replicate(http, "https://api.replicate.com/v1", TOKEN).create(a_job())

    return asyncio.run(call())


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (httpx.Response(400), "invalid_input"),
        (httpx.Response(422), "invalid_input"),
        (httpx.Response(402), "provider_busy"),
        (httpx.Response(429), "provider_busy"),
        (httpx.Response(401), "internal"),
        (httpx.Response(302), "internal"),
        (httpx.ConnectError("refused"), "provider_timeout"),
    ],
)
def test_a_refused_create_may_be_repeated_unless_the_input_is_wrong(answer, code):
    with pytest.raises(JobError) as refusal:
        create(answer)

    assert refusal.value.code == code


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(500),
        httpx.Response(504),
        httpx.ReadTimeout("late"),
        httpx.WriteError("reset"),
        httpx.RemoteProtocolError("hung up"),
        httpx.Response(201, text="<html>proxy</html>"),
        httpx.Response(201, json={"status": "starting"}),
        httpx.Response(200, json=["odd"]),
    ],
)
def test_a_create_of_unknown_outcome_is_never_repeated(answer):
    with pytest.raises(JobError) as refusal:
        create(answer)

    assert refusal.value.code == "timeout"  # the one code of an outage that is not retried


def end_of(**prediction: Any) -> worker.Result:
    """Poll a prediction that reads like this."""

    async def handle(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=prediction)

    async def call() -> worker.Result:
        async with httpx.AsyncClient(transport=httpx.MockTransport(handle)) as http:
            replicate = Replicate(http, "https://api.replicate.com/v1", TOKEN)
            return await replicate.result(a_job(), "p1", lambda _: None)

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


@pytest.mark.parametrize(
    ("output", "code"),
    [
        (None, "result_lost"),
        ({"image": DELIVERED}, "provider_error"),
        ([[DELIVERED]], "provider_error"),
        (7, "provider_error"),
    ],
)
def test_an_output_of_another_shape_is_an_error(output, code):
    with pytest.raises(JobError) as refusal:
        end_of(status="succeeded", output=output)

    assert refusal.value.code == code


@pytest.mark.parametrize("output", [DELIVERED, [DELIVERED]])
def test_one_url_and_a_list_of_urls_mean_the_same(output):
    result = end_of(status="succeeded", output=output, metrics={"predict_time": 1.5})

    assert result == worker.Result([DELIVERED], 1.5)


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


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_preview_has_the_size_asked_for_whatever_the_prompt(prompt, size):
    data = worker.draw_preview(prompt, 7, size)

    assert inspect_image(io.BytesIO(data)) == ("PNG", *size)


def test_a_preview_depends_on_prompt_seed_and_size_only():
    same = [worker.draw_preview("a lighthouse", 7, (64, 64)) for _ in range(2)]
    others = [
        worker.draw_preview("a lighthouse", 8, (64, 64)),
        worker.draw_preview("a house", 7, (64, 64)),
        worker.draw_preview("a lighthouse", 7, (64, 65)),
    ]

    assert same[0] == same[1]
    assert len({*same, *others}) == 4
