"""Sends HTTP requests one after the other over each kept connection.

    PROGRAM FILE    print {seconds, cpu_seconds, milliseconds} once the time is over

FILE holds one JSON object: host, port, requests (a list for each connection, sent in turn; head and
body as sent), warm_seconds (not counted) and seconds. Whatever is not answered by 200 ends it. The
milliseconds are those of every answer; cpu_seconds are the client's own.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

HEAD_ENDS, LAST_CHUNK = b"\r\n\r\n", b"0\r\n\r\n"
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Connection(asyncio.Protocol):
    """Asks, waits for the answer, asks again."""

    def __init__(self, requests: list[str]) -> None:
        self.requests, self.received = itertools.cycle(map(str.encode, requests)), b""
        self.milliseconds: list[float] = []  # of every answer that counts
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, body = self.received.partition(HEAD_ENDS)
        length = LENGTH.search(head)
        is_complete = len(body) >= int(length[1]) if length else body.endswith(LAST_CHUNK)
        if not (found and is_complete):
            return
        self.milliseconds.append(1000 * (time.monotonic() - self.began))
        if head.split(b" ", 2)[1] != b"200":
            self.connection_lost(RuntimeError(f"{head[:16]!r} {body[:300]!r}"))
        else:
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(error or ConnectionError("closed by the server"))

    def _ask(self) -> None:
        self.received, self.began = b"", time.monotonic()
        self.transport.write(next(self.requests))


async def load(options: dict[str, Any]) -> dict[str, Any]:
    """Open the connections, and report what came back in time."""
    loop, connections = asyncio.get_running_loop(), []
    for requests in options["requests"]:
        _, connection = await loop.create_connection(
            lambda requests=requests: Connection(requests), options["host"], options["port"]
        )
        connections.append(connection)

    async def wait(seconds: float) -> None:
        over = [each.over for each in connections]
        done, _ = await asyncio.wait(over, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
        for each in done:
            each.result()

    await wait(options["warm_seconds"])
    for each in connections:
        each.milliseconds.clear()
    began, cpu_began = time.monotonic(), time.process_time()
    await wait(options["seconds"])
    return {
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - cpu_began,
        "milliseconds": [value for each in connections for value in each.milliseconds],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(load(json.loads(Path(sys.argv[1]).read_text())))))
