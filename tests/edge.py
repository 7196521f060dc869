"""The edge functions under the real Deno, and the gateway before which they are.

Each function runs with no right but to read its own variables and to reach its gateway, and writes
nothing to its log: neither what callers send nor what goes wrong.
"""

from __future__ import annotations

import contextlib
import signal
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import urlsplit

import httpx
from http_client import Client

from processes import free_port, spawn
from stack import DENO, PROJECT, SUPABASE, deno

SOURCES = {source.parent.name: source for source in SUPABASE.glob("functions/*/index.ts")}
EXAMPLES = PROJECT / "examples/functions"
OFFLINE = ["--no-config", "--no-lock", "--no-remote", "--no-npm"]
BACK = ("content-type", "cache-control", "retry-after")  # of an answer


@contextlib.contextmanager
def served(folder: Path, name: str, gateway: str, **variables: str | None) -> Iterator[str]:
    """Serve a function in front of a gateway; give its address.

    It may read the variables named, of which those that are None are not set, and reach what they
    are addresses of.
    """
    variables = {"SUPABASE_URL": gateway} | variables
    log, listens = folder / "logs" / f"{name}-{uuid.uuid4()}.log", f"127.0.0.1:{free_port()}"
    hosts = [listens, *(urlsplit(each or "").netloc for each in variables.values())]
    rights = [f"--allow-net={','.join(filter(None, hosts))}", f"--allow-env={','.join(variables)}"]
    source = SOURCES.get(name) or EXAMPLES / name / "index.ts"
    known = {name: value for name, value in variables.items() if value is not None}
    known |= {"DENO_DIR": str(folder), "DENO_SERVE_ADDRESS": f"tcp:{listens}"}
    command = [deno(), "run", *OFFLINE, "--cached-only", "--no-prompt", *rights, source]
    process = spawn(command, log=log, cwd=Path("/"), env=DENO | known)

    def is_ready() -> bool:
        try:
            httpx.options(f"http://{listens}")
            return True
        except httpx.TransportError:
            return False

    try:
        process.wait_until(is_ready, 30, log)
        yield f"http://{listens}"
    finally:
        process.stop(signal.SIGTERM, 10)
    assert log.read_text() == f"Listening on http://{listens}/\n"


class Edge(ThreadingHTTPServer):
    """The functions by name, each at its own address, and the gateway before which they are.

    It passes each request on to the address behind it, or answers what it is told, when it is told;
    and keeps them all.
    """

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), Gateway)
        self.url, self.behind = f"http://127.0.0.1:{self.server_port}", behind
        self.addresses: dict[str, str] = {}
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.may_answer = Event()
        Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def says(self, status: int | None, content: bytes = b"true") -> None:
        """Answer so from now on; with 0 by closing the connection."""
        self.answer = (status, content, {"Location": self.url, "Set-Cookie": "session=1"})
        self.requests.clear()
        self.may_answer.set()

    def invoke(
        self, name: str, caller: Client | None = None, method: str = "POST", **request: Any
    ) -> httpx.Response:
        """Call a function, with the caller's token if there is one."""
        headers = {"Authorization": f"Bearer {caller.token}"} if caller and caller.token else {}
        headers |= request.pop("headers", {})
        url = f"{self.addresses[name]}/{name}"
        return httpx.request(method, url, headers=headers, timeout=30, **request)


class Gateway(BaseHTTPRequestHandler):
    server: Edge

    def do_POST(self) -> None:
        sent = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(sent.get("content-length", 0)))
        self.server.requests.append((self.command, self.path, sent, body))
        self.server.may_answer.wait()
        status, content, headers = self.server.answer
        if status is None:
            function = self.path.removeprefix("/functions/v1/")
            url = self.server.addresses.get(
                function, f"{self.server.behind}{self.path.removeprefix('/rest/v1')}"
            )
            del sent["host"]
            sent.pop("accept-encoding", None)
            reply = httpx.request(self.command, url, headers=sent, content=body, timeout=30)
            self.server.replied = seen(reply)
            status, content = reply.status_code, reply.content
            headers = {name: reply.headers[name] for name in BACK if name in reply.headers}
        if status:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def seen(response: httpx.Response) -> tuple[Any, ...]:
    """Return all of an answer that a caller may rely on."""
    return response.status_code, response.json(), *map(response.headers.get, BACK)
