"""A small TCP proxy that stands between the workers and PostgreSQL and treats connections badly.

with Proxy(lambda: ("127.0.0.1", 5432)) as proxy:  # the workers get proxy.port
    proxy.cut()                 # ends every connection; new ones work
    with proxy.refusing(): ...  # and those that are opened meanwhile, too
    with proxy.stalled(): ...   # nothing gets through; goes on where it was
    proxy.half_open()           # the server's side is gone, the worker's stays open and silent
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

CHUNK = 64 * 1024
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset, no farewell


class Link:
    """One connection of a worker, and ours to the server on its behalf."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near, self.far = near, far
        self.is_half_open = False


class Proxy:
    """Listens on a free port of its own; two threads forward each connection."""

    def __init__(self, target: Callable[[], tuple[str, int]]) -> None:
        self.target = target
        self.links: set[Link] = set()
        self.is_refusing = False
        self._flowing = threading.Event()
        self._flowing.set()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = int(self._socket.getsockname()[1])

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        end(self._socket)
        self.cut()

    def cut(self) -> None:
        for link in list(self.links):
            end(link.near)
            end(link.far)

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
        self._flowing.clear()
        try:
            yield
        finally:
            self._flowing.set()

    def half_open(self) -> None:
        for link in list(self.links):
            link.is_half_open = True
            end(link.far)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the proxy closes
            while True:
                near, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        try:
            if self.is_refusing:
                raise ConnectionRefusedError
            far = socket.create_connection(self.target())
        except OSError:
            end(near)
            return
        link = Link(near, far)
        self.links.add(link)
        back = threading.Thread(target=self._forward, args=(link, far, near), daemon=True)
        back.start()
        self._forward(link, near, far)
        back.join()
        self.links.discard(link)

    def _forward(self, link: Link, source: socket.socket, sink: socket.socket) -> None:
        """Forward until one side ends, then end the other; into a half-open link nothing goes."""
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                self._flowing.wait()
                if not link.is_half_open:
                    sink.sendall(data)
        if not (link.is_half_open and sink is link.near):
            end(sink)


def end(one: socket.socket) -> None:
    """Close a socket with a reset, and wake who waits for it."""
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        one.shutdown(socket.SHUT_RDWR)
    one.close()
