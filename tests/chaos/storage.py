"""Stands in front of the real Storage and is as bad as it is told.

with StorageProxy(stack.api_url) as storage:  # the workers get storage.url
    with storage.behaving("lost"): ...  # every answer of an upload is lost after it was stored
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx

BEHAVIOURS = ("refuses", "slow", "lost", "late error")
DROPPED = {"host", "content-length", "transfer-encoding", "connection", "content-encoding"}


class StorageProxy:
    """Forwards to Storage from a free port of its own."""

    def __init__(self, target: str) -> None:
        # Supabase Lite closes a connection after 5 idle seconds; ours goes first.
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2)
        self.http = httpx.Client(base_url=target, timeout=10, limits=limits)
        self.behaviour = ""
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.proxy = self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> StorageProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.http.close()

    @contextlib.contextmanager
    def behaving(self, behaviour: str) -> Iterator[None]:
        """Have one of BEHAVIOURS for a while."""
        self.behaviour = behaviour
        try:
            yield
        finally:
            self.behaviour = ""


class Server(ThreadingHTTPServer):
    proxy: StorageProxy
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """Clients that were killed are no news."""


class Handler(BaseHTTPRequestHandler):
    """HTTP around `StorageProxy`."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:  # the worker died in the middle
            self.close_connection = True
            return
        behaviour = self.server.proxy.behaviour
        if behaviour == "refuses":
            self._answer(random.choice([500, 502, 503, 429]), b"try later")
            return
        if behaviour == "slow":
            time.sleep(random.uniform(0.5, 3))
        status, answer = self._forward(body)
        if behaviour == "lost":
            self.close_connection = True
        elif behaviour == "late error":
            self._answer(504, b"late")
        else:
            self._answer(status, answer)

    do_GET = do_DELETE = do_POST

    def _forward(self, body: bytes) -> tuple[int, bytes]:
        headers = {key: value for key, value in self.headers.items() if key.lower() not in DROPPED}
        try:
            response = self.server.proxy.http.request(
                self.command, self.path, content=body, headers=headers
            )
        except httpx.TransportError:
            return 502, b"no Storage"
        return response.status_code, response.content

    def _answer(self, status: int, body: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # the worker may be dead
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
