"""A small fake of Replicate's HTTP API: predictions start, run and end as a test says.

    with FakeReplicate() as fake:  # the worker gets fake.url and fake.token
        fake.next(answer=429, retry_after=5)  # the first create is refused,
        fake.next(ends="failed", error=MODERATED)  # the second fails while running,
        ...  # all others follow fake.default
        assert len(fake.predictions) == 1  # bought once, however many creates came in

Predictions move when they are polled (or with time, `seconds`), so tests need no sleeps. State is
public and may be edited: set `fake.predictions[id]["created_at"]` to backdate one. What the fake
answers is held to the provider's own specification by test_fake_replicate.py.
"""

import base64
import email
import hashlib
import io
import json
import re
import secrets
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit
from zlib import compress, crc32

import pytest
from hostile import dear_jpeg
from PIL import Image

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
    422: ("Input validation failed", "- input.aspect_ratio: must be one of 1:1, 16:9\n"),
    429: ("Too many requests", "Request was throttled."),
}


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What happens to one create and to the prediction it buys."""

    # The create.
    answer: int | None = 201  # None hangs up without one
    stored: bool | None = None  # is it bought? None: if the answer is 201 or none at all
    retry_after: int = 30  # seconds, told by a 429 ...
    retry_hints: str = "header body text"  # ... in these places
    is_mixed_up: bool = False  # the answer is that of an earlier create
    # The run.
    queued: int = 0  # polls during which it stays `starting`
    polls: float = 2  # polls from then until it ends; inf: never
    seconds: float | None = None  # it ends after this time instead, however often it is polled
    running: str = "processing"  # what its status is called meanwhile
    ends: str = "succeeded"  # failed, canceled, aborted
    error: str | None = None  # text of a failed prediction, or of a refused create
    metrics: Mapping[str, Any] = field(default_factory=dict)  # on top of the usual ones
    failing_gets: int = 0  # so many polls are answered with get_status first
    get_status: int = 500
    hidden: int = 0  # so many lists do not show it yet
    # The output.
    images: int | None = None  # None: as many as asked for
    output: Any = None  # given out as it is, instead of URLs of images
    removed: bool = False  # it ends with its data gone already
    # gone, junk, bomb, dear (takes a core a minute), large, unsized (large, no length told),
    # broken, redirect
    file: str = "image"
    format: str | None = None  # of the bytes, whatever name and type say
    size: tuple[int, int] = (64, 48)  # width, height
    # Seconds each answer takes, by kind: create, get, file. The effect comes first.
    slow: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Request:
    """One request as received; `headers` has lower-case keys, `status` stays None if hung up."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any
    status: int | None = None
    prediction_id: str | None = None  # of a create: what it bought
    raw: bytes = b""


class Answer(NamedTuple):
    status: int | None  # None: hang up
    body: bytes = b""
    headers: Mapping[str, str | None] = {}
    wait: float = 0


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
            return (time.monotonic() - self.begun) / (self.behaviour.seconds or 1e-9)
        polled = self.gets - self.behaviour.failing_gets - self.behaviour.queued
        return polled / (self.behaviour.polls or 1e-9)


class FakeReplicate:
    """The provider, on a free local port, as a context manager."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.token = "r8_" + secrets.token_hex(16)
        self.default = Behaviour()
        self.predictions: dict[str, dict[str, Any]] = {}  # as clients see them, oldest first
        self.creates: list[Request] = []  # authorized ones, refused and lost ones included
        self.requests: list[Request] = []
        self.versions: dict[str, str] = {}  # bare version hash -> model
        self.uploads: dict[str, tuple[str, bytes]] = {}  # id -> name and bytes of a file
        self.list_answers: deque[int | None] = deque()  # the next lists are refused with these
        self.file_answers: deque[int | None] = deque()  # and the next uploads
        self.refused: dict[str, int] = {}  # creates with this text in them are, with this status
        self.account_status = 200
        self.fetch: Callable[[str], bytes] = str.encode  # what is at an address elsewhere
        self.page_size = 100
        self.large_bytes = 100 * 2**20
        self._next: deque[Behaviour] = deque()
        self._runs: dict[str, Run] = {}
        self._changed = threading.Condition()  # guards everything above
        self._closing = threading.Event()  # cuts slow answers short
        self._server = Server((host, 0), Handler)
        self._server.fake = self

    def __enter__(self) -> "FakeReplicate":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def origin(self) -> str:
        return "http://{}:{}".format(*self._server.server_address)

    @property
    def url(self) -> str:
        """Base of the API."""
        return f"{self.origin}/v1"

    @property
    def elsewhere(self) -> str:
        """Where `file="redirect"` leads: another host name, though this server would hear."""
        return f"http://localhost:{self._server.server_port}/elsewhere"

    def next(self, **changes: Any) -> None:
        """Queue what the next create meets: the default behaviour with these changes."""
        self._next.append(replace(self.default, **changes))

    def bought(self, model: str, inputs: dict[str, Any], **changes: Any) -> str:
        """Have a prediction that nobody asked for over HTTP."""
        with self._changed:
            return self._store(model, "hidden", inputs, replace(self.default, **changes))

    def behaviour(self, prediction_id: str) -> Behaviour:
        """What a prediction was told to do."""
        return self._runs[prediction_id].behaviour

    def source(self, prediction_id: str) -> bytes:
        """What a prediction was made from: the files that were at its addresses."""
        return self._runs[prediction_id].source

    def is_spent(self, prediction_id: str) -> bool:
        """Whether nothing can come of a prediction any more."""
        prediction, behaviour = self.predictions[prediction_id], self.behaviour(prediction_id)
        return (
            prediction["status"] in ("failed", "canceled", "aborted")
            or prediction["data_removed"]
            or behaviour.images == 0
            or behaviour.output is not None
            or behaviour.file not in ("image", "broken")
        )

    def expire(self, prediction_id: str) -> None:
        """Remove input, output and logs, as the provider does after an hour."""
        with self._changed:
            self.predictions[prediction_id] |= {
                "input": {},
                "output": None,
                "logs": "",
                "data_removed": True,
            }

    def until(self, condition: Callable[[], Any], timeout: float = 10) -> None:
        """Wait until a request has made the condition true."""
        with self._changed:
            assert self._changed.wait_for(condition, timeout), "the fake waited in vain"

    def handle(self, request: Request) -> Answer:
        with self._changed:
            self.requests.append(request)
            answer = self._route(request)
            request.status = answer.status
            self._changed.notify_all()
        self._closing.wait(answer.wait)
        return answer

    def _route(self, request: Request) -> Answer:
        authorized = request.headers.get("authorization") == f"Bearer {self.token}"
        answer = problem(404, "Not found", "The requested resource could not be found.")
        match request.method, request.path.strip("/").split("/"):
            case "GET", ["files", key, name] if key in self.predictions:
                answer = self._file(key, name)
            case _, ["v1", *_] if not authorized:
                answer = problem(401, "Unauthenticated", "You did not pass a valid token")
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
                answer = self._cancel(key)
        return answer

    def _create(self, request: Request) -> Answer:
        if invalid := invalid_fields(request.body):
            detail = "".join(f"- {field['description']}\n" for field in invalid)
            return problem(422, "Input validation failed", detail, invalid_fields=invalid)
        if not (named := self._resolve(request.body["version"])):
            detail = "The specified version does not exist or you may not use it."
            return problem(422, "Invalid version or not permitted", detail)
        behaviour = self._next.popleft() if self._next else self.default
        for text, status in self.refused.items():
            if text in json.dumps(request.body):
                behaviour = replace(behaviour, answer=status)
        stored = behaviour.stored
        if behaviour.answer in (201, None) if stored is None else stored:
            request.prediction_id = self._store(*named, request.body["input"], behaviour)
        if behaviour.answer == 201 and request.prediction_id:
            told = next(iter(self.predictions)) if behaviour.is_mixed_up else request.prediction_id
            answer = as_json(201, self.predictions[told])
        else:
            answer = refusal(behaviour)
        return answer._replace(wait=behaviour.slow.get("create", 0))

    def _resolve(self, version: str) -> tuple[str, str] | None:
        """Model and version a create asks for, in any of the three allowed forms."""
        if version in self.versions:
            return self.versions[version], version
        model, colon, digest = version.partition(":")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
            return None
        if colon:
            return (model, digest) if re.fullmatch("[0-9a-f]{64}", digest) else None
        return None if model in COMMUNITY else (model, "hidden")

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
        given = [each for value in inputs.values() for each in (value, *listed(value))]
        found = [each for each in given if isinstance(each, str) and each.startswith("http")]
        ids = [address.removeprefix(f"{self.url}/files/") for address in found]
        return b"".join(
            self.uploads[key][1] if key in self.uploads else self.fetch(address)
            for key, address in zip(ids, found, strict=True)
        )

    def _get(self, key: str) -> Answer:
        run = self._runs[key]
        run.gets += 1
        wait = run.behaviour.slow.get("get", 0)
        if run.gets <= run.behaviour.failing_gets:
            refused = replace(run.behaviour, answer=run.behaviour.get_status)
            return refusal(refused)._replace(wait=wait)
        self._advance(key)
        return as_json(200, self.predictions[key])._replace(wait=wait)

    def _cancel(self, key: str) -> Answer:
        self._advance(key)
        if self.predictions[key]["status"] not in TERMINAL:
            self._end(key, "canceled")
        return as_json(200, self.predictions[key])

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
            prediction["output"] = self._output(prediction, behaviour)
            if prediction["model"] not in COMMUNITY:
                count = len(prediction["output"]) if isinstance(prediction["output"], list) else 1
                prediction["metrics"].setdefault("image_count", count)
        if behaviour.removed:
            self.expire(key)

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
        """A page of predictions, newest first; its cursor is the id of the last one before it."""
        if self.list_answers:
            return refusal(Behaviour(answer=self.list_answers.popleft()))
        for key in self.predictions:
            self._advance(key)
        runs = list(self._runs.values())
        for run in runs:
            run.lists += 1
        shown = [
            p
            for p, r in zip(self.predictions.values(), runs, strict=True)
            if r.lists > r.behaviour.hidden
        ]
        rows = sorted(shown, key=lambda row: row["created_at"])[::-1]
        try:
            after = moment(query.get("created_after", "0001-01-01T00:00:00Z"))
            before = moment(query.get("created_before", "9999-01-01T00:00:00Z"))
        except ValueError:
            return problem(422, "Invalid date", "Dates must be in ISO 8601 format.")
        rows = [row for row in rows if after <= moment(row["created_at"]) < before]
        ids = [row["id"] for row in rows]
        start = ids.index(query["cursor"]) + 1 if "cursor" in query else 0
        page = rows[start : start + self.page_size]
        more = urlencode({**query, "cursor": page[-1]["id"]}) if ids[start + len(page) :] else None
        body = {
            "next": f"{self.url}/predictions?{more}" if more else None,
            "previous": None,  # not faked
            "results": [{k: v for k, v in row.items() if k != "logs"} for row in page],
        }
        return as_json(200, body)

    def _upload(self, request: Request) -> Answer:
        if self.file_answers:
            return refusal(Behaviour(answer=self.file_answers.popleft()))
        head = f"Content-Type: {request.headers.get('content-type')}\r\n\r\n".encode()
        form = email.message_from_bytes(head + request.raw)
        parts = form.get_payload() if form.is_multipart() else []
        (part,) = [p for p in parts if p.get_param("name", header="content-disposition")] or [None]
        if part is None or not part.get_filename():
            return problem(400, "Bad request", "content: a file with a name is required")
        content = part.get_payload(decode=True)
        key = secrets.token_hex(13)
        self.uploads[key] = (part.get_filename(), content)
        now = datetime.now(UTC)
        return as_json(
            201,
            {
                "id": key,
                "content_type": part.get_content_type(),
                "size": len(content),
                "checksums": {"sha256": hashlib.sha256(content).hexdigest()},
                "metadata": {},
                "created_at": now.isoformat(),
                "expires_at": (now + timedelta(days=1)).isoformat(),
                "urls": {"get": f"{self.url}/files/{key}"},
            },
        )

    def _file(self, key: str, name: str) -> Answer:
        behaviour = self._runs[key].behaviour
        if behaviour.file == "gone" or self.predictions[key]["output"] is None:
            return Answer(404, b"Not found")
        extension = name.rpartition(".")[2]
        position = int("".join(filter(str.isdigit, name.partition(".")[0])) or 0)
        source = self._runs[key].source
        body = image(behaviour.format or extension, behaviour.size, position, source)
        kind = {"svg": "svg+xml", "jpg": "jpeg"}.get(extension, extension)
        headers: dict[str, str | None] = {"Content-Type": f"image/{kind}"}
        status = 200
        match behaviour.file:
            case "junk":
                body = b"<!doctype html><script>alert(1)</script>"
            case "bomb":
                body = picture_bomb()
            case "dear":
                body = dear_jpeg(size=min(1_000_000, self.large_bytes // 4))
            case "large":
                body += bytes(self.large_bytes)
            case "unsized":
                body += bytes(self.large_bytes)
                headers |= {"Content-Length": None, "Connection": "close"}
            case "broken":
                headers |= {"Content-Length": str(len(body)), "Connection": "close"}
                body = body[: len(body) // 2]
            case "redirect":
                status, body = 302, b""
                headers["Location"] = f"{self.elsewhere}/{name}"
        return Answer(status, body, headers, behaviour.slow.get("file", 0))


class Server(ThreadingHTTPServer):
    fake: FakeReplicate
    request_queue_size = 128

    def handle_error(self, *arguments: Any) -> None:
        """Tell of errors, but not of clients that have left."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*arguments)


class Handler(BaseHTTPRequestHandler):
    """HTTP around `FakeReplicate.handle`."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer takes 40 ms

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = None
        with suppress(ValueError):
            body = json.loads(raw)
        headers = {key.lower(): value for key, value in self.headers.items()}
        query = dict(parse_qsl(url.query))
        request = Request(self.command, url.path, query, headers, body, raw=raw)
        answer = self.server.fake.handle(request)
        if answer.status is None:
            self.close_connection = True
            return
        with suppress(ConnectionError):  # the client may have left
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


def as_json(status: int, body: Any, **headers: str) -> Answer:
    return Answer(status, json.dumps(body).encode(), {"Content-Type": "application/json"} | headers)


def problem(status: int, title: str, detail: str, **more: Any) -> Answer:
    return as_json(status, {"title": title, "detail": detail, "status": status} | more)


def refusal(behaviour: Behaviour) -> Answer:
    """The answer of a request that is refused on purpose."""
    status, after, hints = behaviour.answer, behaviour.retry_after, behaviour.retry_hints
    if status is None:
        return Answer(None)
    if status not in REFUSALS:
        page = f"<html><h1>{status}</h1></html>".encode()
        return Answer(status, page, {"Content-Type": "text/html"})
    title, detail = REFUSALS[status]
    detail = behaviour.error or detail
    if status != 429:
        return problem(status, title, detail)
    if "text" in hints:
        detail += f" Your rate limit resets in ~{after}s."
    body = {"detail": detail, "status": 429} | ({"retry_after": after} if "body" in hints else {})
    return as_json(429, body, **({"Retry-After": str(after)} if "header" in hints else {}))


def invalid_fields(body: Any) -> list[dict[str, str]]:
    """What is wrong with the body of a create."""
    if not isinstance(body, dict):
        return [{"type": "type", "field": "", "description": "Must be a JSON object"}]
    found = [("required", name, f"{name} is required") for name in REQUIRED.keys() - body]
    for name, value in body.items():
        if name not in BODY:
            found.append(("additional", name, f"Additional property {name} is not allowed"))
        elif not isinstance(value, BODY[name]):
            found.append(("type", name, f"{name}: must be a {BODY[name].__name__}"))
    return [dict(zip(("type", "field", "description"), row, strict=True)) for row in found]


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


def listed(value: Any) -> list[Any]:
    """A list; what is none is an empty one."""
    return value if isinstance(value, list) else []


def picture_bomb() -> bytes:
    """A PNG of a few bytes that says it has 1.6 billion pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    data = compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)


@pytest.fixture
def fake_replicate() -> Iterator[FakeReplicate]:
    with FakeReplicate() as fake:
        yield fake
