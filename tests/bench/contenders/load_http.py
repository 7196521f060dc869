"""Sends the same HTTP requests again and again, one after the other over each kept connection.

    PROGRAM OPTIONS    print {seconds, cpu_seconds, milliseconds} once the time is over

OPTIONS is one JSON object: host, port, requests (one for each connection, head and body as sent),
warm_seconds (not counted) and seconds. Whatever is not answered by 200 ends it. The
milliseconds are those of every answer; cpu_seconds are the client's own.
"""

from __future__ import annotations

import asyncio
import functools
import json
import re
import sys
import time
from typing import Any

HEAD_ENDS, LAST_CHUNK = b"\r\n\r\n", b"0\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def body_of(answer: bytes) -> bytes | None:
    """Return the body of an answer, chunks as they came; None if it is not all here yet."""
    head, found, body = answer.partition(HEAD_ENDS)
    length = LENGTH.search(head)
    is_complete = len(body) >= int(length[1]) if length else body.endswith(LAST_CHUNK)
    return body if found and is_complete else None


class Connection(asyncio.Protocol):
    """Asks, waits for the answer, asks again."""

    def __init__(self, request: str) -> None:
        self.request, self.received = request.encode(), b""
        self.milliseconds: list[float] = []  # of every answer that counts
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        self.received += data
        body = body_of(self.received)
        if body is None:
            return
        self.milliseconds.append(1000 * (time.monotonic() - self.began))
        if self.received.split(b" ", 2)[1] != b"200":
            self._end(RuntimeError(f"{self.received[:16]!r} {body[:300]!r}"))
        else:
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or ConnectionError("closed by the server"))

    def _ask(self) -> None:
        self.received, self.began = b"", time.monotonic()
        self.transport.write(self.request)

    def _end(self, error: Exception) -> None:
        if not self.over.done():
            self.over.set_exception(error)


async def load(options: dict[str, Any]) -> dict[str, Any]:
    """Open a connection for each request, and report what came back in time."""
    loop, connections = asyncio.get_running_loop(), []
    for request in options["requests"]:
        _, connection = await loop.create_connection(
            functools.partial(Connection, request), options["host"], options["port"]
        )
        connections.append(connection)
    await wait(connections, options["warm_seconds"])
    for each in connections:
        each.milliseconds.clear()
    began, cpu_began = time.monotonic(), time.process_time()
    await wait(connections, options["seconds"])
    return {
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - cpu_began,
        "milliseconds": [value for each in connections for value in each.milliseconds],
    }


async def wait(connections: list[Connection], seconds: float) -> None:
    """Let time pass, unless a connection fails."""
    over = [each.over for each in connections]
    done, _ = await asyncio.wait(over, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    for each in done:
        each.result()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(json.loads(sys.argv[1])))))
