"""A server that webhooks and push notifications are sent to, which behaves as a test wants.

    with Receiver() as receiver:
        receiver.answers.append(Answer(500))  # the next request only; then 200 again
        receiver.until(2)

Every request is kept as it came. `on_request` is called before one is answered.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from standardwebhooks import Webhook
from worker_process import eventually


@dataclass(frozen=True)
class Request:
    """What came."""

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

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    hangs: bool = False
    floods: bool = False


class Receiver:
    """Listens on a port of its own, with TLS if it is given a certificate."""

    def __init__(self, certificate: Path | None = None) -> None:
        self.requests: list[Request] = []
        self.answers: deque[Answer] = deque()  # for the next requests
        self.answer: Answer | Callable[[Request], Answer] = Answer()  # for all others
        self.on_request: Callable[[Request], object] = lambda _: None
        self.flooded = 0  # bytes that were taken of endless answers
        self.released = threading.Event()
        handler = type("Bound", (Handler,), {"receiver": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.scheme = "https" if certificate else "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)

    def __enter__(self) -> Receiver:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

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


class Handler(BaseHTTPRequestHandler):
    """Keeps a request, then answers as the receiver says."""

    receiver: Receiver

    def do_POST(self) -> None:
        receiver = self.receiver
        length = int(self.headers["content-length"])
        body = self.rfile.read(length)
        if len(body) < length:  # the sender died on the way
            self.close_connection = True
            return
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.path, headers, body)
        receiver.requests.append(request)
        answer = receiver.answers.popleft() if receiver.answers else receiver.answer
        receiver.on_request(request)
        if not isinstance(answer, Answer):
            answer = answer(request)
        if answer.hangs:
            receiver.released.wait()
            return
        self.send_response(answer.status)
        size = str(10**12 if answer.floods else len(answer.body))
        for name, value in (answer.headers | {"content-length": size}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)
        while answer.floods:
            receiver.flooded += self.wfile.write(bytes(1 << 16))

    do_GET = do_POST

    def handle_one_request(self) -> None:
        """Let go of clients that are gone."""
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""
