"""A small fake of Replicate's HTTP API: predictions start, run and end as a test says.

    with FakeReplicate() as fake:  # the worker gets fake.url and fake.token
        fake.next(answer=429, retry_after=5)  # the first create is refused,
        fake.next(ends="failed", error=MODERATED)  # the second fails while running,
        ...  # all others follow fake.default
        assert len(fake.predictions) == 1  # bought once, however many creates came in

Predictions move when they are polled (or with time, `seconds`), so tests need no sleeps. State is
public and may be edited. What the fake answers is held to the provider's own specification by
test_fake_replicate.py.
"""

import base64
import email
import hashlib
import io
import json
import re
import secrets
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl, urlsplit
from zlib import compress, crc32

import pytest
import receiver
from hostile import chunk, dear_jpeg
from PIL import Image
from receiver import Answer, HttpServer

TERMINAL = {"succeeded", "failed", "canceled", "aborted"}
MODERATED = "The input or output was flagged as sensitive. Please try again. (E005)"

ONE_OUTPUT = {  # their output is a URL instead of a list of URLs
    "black-forest-labs/flux-1.1-pro",
    "recraft-ai/recraft-v3",
    "recraft-ai/recraft-v3-svg",
}
# They run by version only, write png and do not count images in their metrics.
COMMUNITY = {"stability-ai/sdxl", "bytedance/sdxl-lightning-4step"}

# The whole body of a create; nothing else is allowed.
REQUIRED = {"version": str, "input": dict}
BODY = REQUIRED | {"webhook": str, "webhook_events_filter": list, "stream": bool}
REFUSALS = {  # status -> title, detail
    401: ("Unauthenticated", "You did not pass a valid authentication token"),
    402: ("Insufficient credit", "You have insufficient credit. Go to billing to purchase credit."),
    404: ("Not found", "The requested resource could not be found."),
    422: ("Input validation failed", "- input.aspect_ratio: must be one of 1:1, 16:9\n"),
    429: ("Too many requests", "Request was throttled."),
}


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What happens to one create and to the prediction it buys."""

    # The create.
    answer: int | None = 201  # None hangs up without one
    stored: bool | None = None  # is it bought? None: if the answer is 201 or none at all
    retry_after: int | str = 30  # seconds, told by a 429, or other words
    is_mixed_up: bool = False  # the answer is that of an earlier create
    # The run.
    polls: float = 2  # polls until it ends; inf: never
    seconds: float | None = None  # it ends after this time instead, however often it is polled
    running: str = "processing"  # what its status is called meanwhile
    ends: str = "succeeded"  # failed, canceled, aborted
    error: str | None = None  # text of a failed prediction, or of a refused create
    metrics: Mapping[str, Any] = field(default_factory=dict)  # on top of the usual ones
    failing_gets: int = 0  # so many polls are answered with get_status first
    get_status: int | None = 500
    hidden: int = 0  # so many lists do not show it yet
    # The output.
    images: int | None = None  # None: as many as asked for
    output: Any = None  # given out as it is, instead of URLs of images
    removed: bool = False  # it ends with its data gone already
    # gone, junk, bomb, dear (takes a core a minute), large, unsized (large, no length told),
    # broken, redirect, hangs
    file: str = "image"
    files: Mapping[int, str] = field(default_factory=dict)  # of single outputs, by position
    format: str | None = None  # of the bytes, whatever name and type say
    size: tuple[int, int] = (64, 48)  # width, height
    # Seconds each answer takes, by kind: create, get, file. The effect comes first.
    slow: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Request:
    """One request as received; `status` stays None if it was hung up on."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]  # by keys in lower case
    body: Any  # None, if it is no JSON
    status: int | None = None
    prediction_id: str | None = None  # of a create: what it bought
    raw: bytes = b""


@dataclass
class Run:
    """The part of a prediction that clients do not see."""

    behaviour: Behaviour
    source: bytes = b""  # what was at the addresses in its input
    begun: float = field(default_factory=time.monotonic)
    gets: int = 0
    lists: int = 0

    def progress(self) -> float:
        if self.behaviour.seconds is not None:
            return (time.monotonic() - self.begun) / self.behaviour.seconds
        return (self.gets - self.behaviour.failing_gets) / self.behaviour.polls


class Fake(HttpServer):
    """What fakes of providers have in common: requests are kept, and told what they meet."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        super().__init__(address=address)
        self.default: Any = None  # what a create meets
        self.creates: list[Request] = []  # authorized ones, refused and lost ones included
        self.requests: list[Request] = []
        self.refused: dict[str, int] = {}  # creates with this text in them are, with this status
        self.account_status = 200
        self.fetch: Callable[[str], bytes] = str.encode  # what is at an address elsewhere
        self._next: deque[Any] = deque()
        self._changed = threading.Condition()  # guards everything above

    def next(self, **changes: Any) -> None:
        """Queue what the next create meets: the default behaviour with these changes."""
        self._next.append(replace(self.default, **changes))

    def until(self, condition: Callable[[], Any], timeout: float = 10) -> None:
        """Wait until a request has made the condition true."""
        with self._changed:
            assert self._changed.wait_for(condition, timeout), "the fake waited in vain"

    def respond(self, came: receiver.Request) -> Answer:
        url, body = urlsplit(came.path), None
        with suppress(ValueError):
            body = json.loads(came.body)
        query = dict(parse_qsl(url.query))
        request = Request(came.method, url.path, query, came.headers, body, raw=came.body)
        with self._changed:
            self.requests.append(request)
            answer = self.route(request)
            request.status = answer.status
            self._changed.notify_all()
        return answer

    def route(self, request: Request) -> Answer:
        raise NotImplementedError


class FakeReplicate(Fake):
    """The provider, on a free local port, as a context manager."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__(host)
        self.url = f"{self.origin}/v1"  # base of the API
        # Where `file="redirect"` leads: another host name, though this server would hear.
        self.elsewhere = f"http://localhost:{self.port}/elsewhere"
        self.token = "r8_" + secrets.token_hex(16)
        self.default = Behaviour()
        self.predictions: dict[str, dict[str, Any]] = {}  # as clients see them, oldest first
        self.uploads: dict[str, tuple[str, bytes]] = {}  # id -> name and bytes of a file
        self.list_answers: deque[int | None] = deque()  # the next lists are refused with these
        self.file_answers: deque[int | None] = deque()  # and the next uploads
        self.large_bytes = 100 * 2**20
        self._runs: dict[str, Run] = {}

    def bought(self, model: str, inputs: dict[str, Any], **changes: Any) -> str:
        """Have a prediction that nobody asked for over HTTP."""
        with self._changed:
            return self._store(model, "hidden", inputs, replace(self.default, **changes))

    def source(self, prediction_id: str) -> bytes:
        """What a prediction was made from: the files that were at its addresses."""
        return self._runs[prediction_id].source

    def is_spent(self, prediction_id: str) -> bool:
        """Whether nothing can come of a prediction any more."""
        prediction = self.predictions[prediction_id]
        behaviour = self._runs[prediction_id].behaviour
        return (
            prediction["status"] in ("failed", "canceled", "aborted")
            or prediction["data_removed"]
            or behaviour.images == 0
            or behaviour.output is not None
            or behaviour.file not in ("image", "broken")
        )

    def route(self, request: Request) -> Answer:
        is_authorized = request.headers.get("authorization") == f"Bearer {self.token}"
        answer = refusal(Behaviour(answer=404))
        match request.method, request.path.strip("/").split("/"):
            case "GET", ["files", key, name] if key in self.predictions:
                answer = self._file(key, name)
            case _, ["v1", *_] if not is_authorized:
                answer = refusal(Behaviour(answer=401))
            case "GET", ["v1", "account"]:
                answer = as_json(self.account_status, {"type": "user", "username": "darkroom"})
            case "POST", ["v1", "predictions"]:
                self.creates.append(request)
                answer = self._create(request)
            case "GET", ["v1", "predictions"]:
                answer = self._list(request.query)
            case "POST", ["v1", "files"]:
                answer = self._upload(request)
            case "GET", ["v1", "predictions", key] if key in self.predictions:
                answer = self._get(key)
            case "POST", ["v1", "predictions", key, "cancel"] if key in self.predictions:
                self._advance(key)
                if self.predictions[key]["status"] not in TERMINAL:
                    self._end(key, "canceled")
                answer = as_json(200, self.predictions[key])
        return answer

    def _create(self, request: Request) -> Answer:
        body = request.body
        if wrong := faults(body):
            return refusal(Behaviour(answer=422, error=wrong))
        # By name, or by name and version. Models that run by name show no version.
        model, _, version = body["version"].partition(":")
        is_hash = re.fullmatch("[0-9a-f]{64}", version)
        if "/" not in model or not (is_hash or (not version and model not in COMMUNITY)):
            return refusal(Behaviour(answer=422, error="Invalid version or not permitted"))
        behaviour = self._next.popleft() if self._next else self.default
        for text, status in self.refused.items():
            if text in json.dumps(body):
                behaviour = replace(behaviour, answer=status)
        is_stored = behaviour.stored
        if behaviour.answer in (201, None) if is_stored is None else is_stored:
            version = version or "hidden"
            request.prediction_id = self._store(model, version, body["input"], behaviour)
        if behaviour.answer == 201 and request.prediction_id:
            told = next(iter(self.predictions)) if behaviour.is_mixed_up else request.prediction_id
            answer = as_json(201, self.predictions[told])
        else:
            answer = refusal(behaviour)
        return replace(answer, wait=behaviour.slow.get("create", 0))

    def _store(self, model: str, version: str, inputs: dict[str, Any], behaviour: Behaviour) -> str:
        key = base64.b32encode(secrets.token_bytes(16)).decode().lower().rstrip("=")
        self._runs[key] = Run(behaviour, self._source(inputs))
        self.predictions[key] = {
            "id": key,
            "model": model,
            "version": version,
            "input": inputs,
            "logs": "",
            "output": None,
            "data_removed": False,
            "error": None,
            "source": "api",
            "status": "starting",
            "created_at": stamp()[:-4] + "000Z",  # of milliseconds, unlike the other times
            "urls": {
                "web": f"{self.origin}/p/{key}",
                "get": f"{self.url}/predictions/{key}",
                "cancel": f"{self.url}/predictions/{key}/cancel",
            },
        }
        return key

    def _source(self, inputs: dict[str, Any]) -> bytes:
        """The files at all addresses of an input, fetched at once."""
        found = b""
        for value in inputs.values():
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, str) and each.startswith("http"):
                    own = self.uploads.get(each.removeprefix(f"{self.url}/files/"))
                    found += own[1] if own else self.fetch(each)
        return found

    def _get(self, key: str) -> Answer:
        run = self._runs[key]
        run.gets += 1
        if run.gets <= run.behaviour.failing_gets:
            answer = refusal(replace(run.behaviour, answer=run.behaviour.get_status))
        else:
            self._advance(key)
            answer = as_json(200, self.predictions[key])
        return replace(answer, wait=run.behaviour.slow.get("get", 0))

    def _advance(self, key: str) -> None:
        prediction, run = self.predictions[key], self._runs[key]
        done = run.progress()
        if prediction["status"] in TERMINAL or done <= 0:
            return
        if run.behaviour.ends != "aborted":  # which means: before it started
            prediction.setdefault("started_at", stamp())
            prediction["status"] = run.behaviour.running
            prediction["logs"] = logs(prediction["input"].get("num_inference_steps", 4), done)
        if done >= 1:
            self._end(key, run.behaviour.ends)

    def _end(self, key: str, status: str) -> None:
        prediction, behaviour = self.predictions[key], self._runs[key].behaviour
        prediction |= {"status": status, "completed_at": stamp()}
        if status != "aborted":
            started = prediction.get("started_at", prediction["completed_at"])
            prediction["metrics"] = {
                "predict_time": between(started, prediction["completed_at"]),
                "total_time": between(prediction["created_at"], prediction["completed_at"]),
            } | dict(behaviour.metrics)
        if status == "failed":
            prediction["error"] = behaviour.error or "CUDA out of memory (E1001)"
        if status == "succeeded":
            output = prediction["output"] = self._output(prediction, behaviour)
            if prediction["model"] not in COMMUNITY:
                count = len(output) if isinstance(output, list) else 1
                prediction["metrics"].setdefault("image_count", count)
        if behaviour.removed:
            prediction |= {"input": {}, "output": None, "logs": "", "data_removed": True}

    def _output(self, prediction: dict[str, Any], behaviour: Behaviour) -> Any:
        if behaviour.output is not None:
            return behaviour.output
        model, inputs = prediction["model"], prediction["input"]
        extension = inputs.get("output_format", "png" if model in COMMUNITY else "webp")
        extension = "svg" if model.endswith("-svg") else extension
        count = inputs.get("num_outputs", 1) if behaviour.images is None else behaviour.images
        folder = f"{self.origin}/files/{prediction['id']}"
        urls = [f"{folder}/out-{position}.{extension}" for position in range(count)]
        return urls[0] if model in ONE_OUTPUT and urls else urls

    def _list(self, query: dict[str, str]) -> Answer:
        """All predictions since a time, newest first, on one page."""
        if self.list_answers:
            return refusal(Behaviour(answer=self.list_answers.popleft()))
        shown = []
        after = moment(query.get("created_after", "0001-01-01T00:00:00Z"))
        for key, prediction in self.predictions.items():
            run = self._runs[key]
            self._advance(key)
            run.lists += 1
            if run.lists > run.behaviour.hidden and moment(prediction["created_at"]) >= after:
                shown.append({name: each for name, each in prediction.items() if name != "logs"})
        return as_json(200, {"next": None, "previous": None, "results": shown[::-1]})

    def _upload(self, request: Request) -> Answer:
        if self.file_answers:
            return refusal(Behaviour(answer=self.file_answers.popleft()))
        head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
        (part,) = email.message_from_bytes(head + request.raw).get_payload()
        content, key, now = part.get_payload(decode=True), secrets.token_hex(13), datetime.now(UTC)
        self.uploads[key] = (part.get_filename(), content)
        file = {
            "id": key,
            "content_type": part.get_content_type(),
            "size": len(content),
            "checksums": {"sha256": hashlib.sha256(content).hexdigest()},
            "metadata": {},
            "created_at": now.isoformat(),
            "expires_at": (now + timedelta(days=1)).isoformat(),
            "urls": {"get": f"{self.url}/files/{key}"},
        }
        return as_json(201, file)

    def _file(self, key: str, name: str) -> Answer:
        run, extension = self._runs[key], name.rpartition(".")[2]
        behaviour = run.behaviour
        position = int("".join(filter(str.isdigit, name.partition(".")[0])) or 0)
        file = behaviour.files.get(position, behaviour.file)
        if file == "hangs":
            return Answer(hangs=True)
        if file == "gone" or self.predictions[key]["output"] is None:
            return Answer(404, body=b"Not found")
        body = image(behaviour.format or extension, behaviour.size, position, run.source)
        kind = {"svg": "svg+xml", "jpg": "jpeg"}.get(extension, extension)
        status, headers = 200, dict[str, str | None]({"Content-Type": f"image/{kind}"})
        match file:
            case "junk":
                body = b"<!doctype html><script>alert(1)</script>"
            case "bomb":  # a PNG of a few bytes that says it has 1.6 billion pixels
                header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
                body = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", compress(bytes(100_000)))
            case "dear":
                body = dear_jpeg(size=min(1_000_000, self.large_bytes // 4))
            case "large":
                body += bytes(self.large_bytes)
            case "unsized":
                body += bytes(self.large_bytes)
                headers |= {"Content-Length": None}
            case "broken":
                headers |= {"Content-Length": str(len(body))}
                body = body[: len(body) // 2]
            case "redirect":
                status, body = 302, b""
                headers |= {"Location": f"{self.elsewhere}/{name}"}
        return Answer(status, headers, body, wait=behaviour.slow.get("file", 0))


def as_json(status: int, body: Any, **headers: str) -> Answer:
    kind = {"Content-Type": "application/json"}
    return Answer(status, kind | headers, json.dumps(body).encode())


def refusal(behaviour: Behaviour) -> Answer:
    """The answer of a request that is refused on purpose."""
    status, after = behaviour.answer, behaviour.retry_after
    if status not in REFUSALS:
        return Answer(status, {"Content-Type": "text/html"}, f"<h1>{status}</h1>".encode())
    title, detail = REFUSALS[status]
    body = {"title": title, "detail": behaviour.error or detail, "status": status}
    return as_json(status, body, **({"Retry-After": str(after)} if status == 429 else {}))


def faults(body: Any) -> str:
    """What is wrong with the body of a create."""
    if not isinstance(body, dict):
        return "Must be a JSON object"
    found = [f"{name} is required" for name in REQUIRED.keys() - body]
    found += [
        f"{name}: must not be"
        for name, value in body.items()
        if not isinstance(value, BODY.get(name, ()))
    ]
    return "".join(f"- {each}\n" for each in found)


def stamp() -> str:
    """The time now, as the provider writes it."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def moment(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def between(start: str, end: str) -> float:
    return (moment(end) - moment(start)).total_seconds()


def logs(steps: int, done: float) -> str:
    """The model's log so far: one progress bar line, as tqdm writes them, per step."""
    bars = (
        f"{100 * step // steps:3}%|{'█' * (10 * step // steps):10}| {step}/{steps} [00:01<00:01]\n"
        for step in range(int(min(done, 1) * steps) + 1)
    )
    return "Using seed: 1234\n" + "".join(bars)


@lru_cache
def image(extension: str, size: tuple[int, int], position: int, source: bytes = b"") -> bytes:
    """A picture whose colour depends on its position and what it was made from."""
    width, height = size
    hue = (60 * position + crc32(source)) % 360
    if extension == "svg":
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">'
            f'<rect width="100%" height="100%" fill="hsl({hue},80%,50%)"/></svg>'
        ).encode()
    out = io.BytesIO()
    picture = Image.new("RGB", size, f"hsl({hue},80%,50%)")
    picture.save(out, {"jpg": "jpeg"}.get(extension, extension))
    return out.getvalue()


@pytest.fixture
def fake_replicate() -> Iterator[FakeReplicate]:
    with FakeReplicate() as fake:
        yield fake
