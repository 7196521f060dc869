"""A small TCP proxy that stands between the workers and PostgreSQL and treats connections badly.

with Proxy(lambda: ("127.0.0.1", 5432)) as proxy:  # the workers get proxy.port
    proxy.cut()                 # resets every connection; new ones work
    with proxy.refusing(): ...  # and resets those that are opened meanwhile, too
    with proxy.stalled(): ...   # nothing gets through; goes on where it was
    proxy.half_open()           # the server's side is gone, the worker's stays open and silent
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

CHUNK = 64 * 1024
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset, no farewell


class Link:
    """One connection of a worker, and ours to the server on its behalf."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.near, self.far = near, far
        self.is_half_open = False

    def cut(self) -> None:
        """Reset both sides."""
        reset(self.near)
        reset(self.far)


class Proxy:
    """Listens on a free port of its own; forwards from a thread of its own."""

    def __init__(self, target: Callable[[], tuple[str, int]]) -> None:
        self.target = target
        self.links: set[Link] = set()
        self.is_refusing = False
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._socket.close()

    # What it does to connections, from other threads.

    def cut(self) -> None:
        self._do(lambda: [link.cut() for link in self.links])

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        self.is_refusing = True
        self.cut()
        try:
            yield
        finally:
            self.is_refusing = False

    @contextlib.contextmanager
    def stalled(self) -> Iterator[None]:
        self._do(self._flowing.clear)
        try:
            yield
        finally:
            self._do(self._flowing.set)

    def half_open(self) -> None:
        def part() -> None:
            for link in self.links:
                link.is_half_open = True
                reset(link.far)

        self._do(part)

    def _do(self, action: Callable[[], object]) -> None:
        done = threading.Event()

        def act() -> None:
            action()
            done.set()

        self._loop.call_soon_threadsafe(act)
        done.wait(10)

    # Forwarding.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(asyncio.start_server(self._serve, sock=self._socket))
        self._ready.set()
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        try:
            if self.is_refusing:
                raise ConnectionRefusedError
            far_reader, far = await asyncio.open_connection(*self.target())
        except OSError:
            reset(near)
            return
        link = Link(near, far)
        self.links.add(link)
        try:
            with contextlib.suppress(asyncio.CancelledError):  # the proxy closes
                await asyncio.gather(
                    self._forward(link, reader, far), self._forward(link, far_reader, near)
                )
        finally:
            self.links.discard(link)
            link.cut()

    async def _forward(
        self, link: Link, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        """Forward until one side ends, then end the other; into a half-open link nothing goes."""
        with contextlib.suppress(OSError):
            while data := await source.read(CHUNK):
                await self._flowing.wait()
                if not link.is_half_open:
                    sink.write(data)
                    await sink.drain()
        if not (link.is_half_open and sink is link.near):
            reset(sink)


def reset(writer: asyncio.StreamWriter) -> None:
    """Close one side with a reset."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()
