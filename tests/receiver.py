"""HTTP servers for tests, each on a port of its own. Receiver takes webhooks and push messages:

    with Receiver() as receiver:
        receiver.answers.append(Answer(500))  # the next request only; then 200 again
        receiver.until(2)

Every request is kept as it came. `on_request` is called before one is answered.
"""

from __future__ import annotations

import json
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from standardwebhooks import Webhook
from worker_process import eventually


@dataclass(frozen=True)
class Request:
    """What came; names of headers in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float = field(default_factory=time.time)

    @property
    def id(self) -> str:
        """The webhook-id."""
        return self.headers["webhook-id"]

    @property
    def message(self) -> Any:
        """The body, read."""
        return json.loads(self.body)

    @property
    def job_id(self) -> str:
        return str(self.message["data"]["job_id"])

    def verified(self, secret: str) -> Any:
        """Check the signature as receivers do, with the library of those who wrote the spec."""
        return Webhook(secret).verify(self.body, self.headers)


@dataclass(frozen=True)
class Answer:
    """How a request is answered: with this; never, if it hangs; endlessly, if it floods."""

    status: int | None = 200  # None: hang up
    headers: Mapping[str, str | None] = field(default_factory=dict)
    body: bytes = b""
    hangs: bool = False
    floods: bool = False
    wait: float = 0  # seconds before it


class HttpServer:
    """Answers as `respond` says, with TLS if it is given a certificate."""

    def __init__(self, certificate: Path | None = None, address: str = "127.0.0.1") -> None:
        self.closing = threading.Event()  # cuts short what waits
        self.flooded = 0  # bytes that were taken of endless answers
        self._server = Listening((address, 0), type("Bound", (Handler,), {"owner": self}))
        self.port = self._server.server_port
        self.scheme = "https" if certificate else "http"
        self.origin = f"{self.scheme}://{address}:{self.port}"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def respond(self, request: Request) -> Answer:
        raise NotImplementedError


class Listening(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *arguments: Any) -> None:
        """Tell of errors, but not of clients that are gone."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(*arguments)


class Handler(BaseHTTPRequestHandler):
    owner: HttpServer
    disable_nagle_algorithm = True  # else every answer takes 40 ms

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:  # the sender died on the way
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        answer = self.owner.respond(Request(self.command, self.path, headers, body))
        self.owner.closing.wait(None if answer.hangs else answer.wait)
        if answer.hangs or answer.status is None:
            return
        self.send_response(answer.status)
        size = str(10**12 if answer.floods else len(answer.body))
        for name, value in {"Content-Length": size, **answer.headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)
        while answer.floods:
            self.owner.flooded += self.wfile.write(bytes(1 << 16))

    do_GET = do_PUT = do_DELETE = do_POST

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Receiver(HttpServer):
    def __init__(self, certificate: Path | None = None) -> None:
        super().__init__(certificate)
        self.requests: list[Request] = []
        self.answers: deque[Answer] = deque()  # for the next requests
        self.answer: Answer | Callable[[Request], Answer] = Answer()  # for all others
        self.on_request: Callable[[Request], object] = lambda _: None

    def respond(self, request: Request) -> Answer:
        self.requests.append(request)
        answer = self.answers.popleft() if self.answers else self.answer
        self.on_request(request)
        return answer if isinstance(answer, Answer) else answer(request)

    def url(self, path: str = "/hooks", host: str = "127.0.0.1") -> str:
        return f"{self.scheme}://{host}:{self.port}{path}"

    @property
    def host(self) -> str:
        """As WEBHOOK_ALLOWED_HOSTS wants it."""
        return f"127.0.0.1:{self.port}"

    def until(self, count: int, within: float = 15) -> list[Request]:
        """Wait for this many requests."""
        return eventually(lambda: len(self.requests) >= count and list(self.requests), within)

    def ids(self, job_id: str) -> set[str]:
        """Return every id that a job was told under."""
        return {request.id for request in self.requests if request.job_id == job_id}
