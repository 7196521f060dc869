"""Large images, a server that gives them out and takes in what is stored, and what they cost.

PROGRAM URL JOBS KIND ...    store what the server gives out as a worker does; print peak MB
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

from PIL import Image, ImageFile

PROJECT = Path(__file__).resolve().parents[2]
MEGABYTE = 2**20
# Pixels of noise that make some 20 MB, and how.
KINDS: dict[str, tuple[int, dict[str, object]]] = {
    "png": (2640, {"compress_level": 1}),
    "jpeg": (3900, {"quality": 97}),
    "webp": (2640, {"lossless": True, "method": 0, "quality": 0}),
    "avif": (4400, {"quality": 95, "speed": 10}),
}


class Handler(BaseHTTPRequestHandler):
    """Gives out the files of a folder, and throws away what is uploaded."""

    protocol_version = "HTTP/1.1"
    folder: Path

    def do_GET(self) -> None:
        file = self.folder / self.path.rpartition("/")[2]
        self.send_response(200)
        self.send_header("Content-Length", str(file.stat().st_size))
        self.end_headers()
        with file.open("rb") as source:
            shutil.copyfileobj(source, self.wfile, MEGABYTE)

    def do_POST(self) -> None:
        left = int(self.headers["Content-Length"])
        while left:
            left -= len(self.rfile.read(min(left, MEGABYTE)))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve the files of a folder; give the address."""
    handler = type("Files", (Handler,), {"folder": folder})
    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def measure(jobs: int = 64, kinds: tuple[str, ...] = ("png", "jpeg")) -> tuple[float, float]:
    """Store this many images that do not compress at once; return peak MB and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        ImageFile.MAXBLOCK = 64 * MEGABYTE
        for kind in kinds:
            side, options = KINDS[kind]
            file, noise = Path(folder, kind), os.urandom(3 * side * side)
            Image.frombytes("RGB", (side, side), noise).save(file, kind, **options)
            assert 18 * MEGABYTE < file.stat().st_size < 32 * MEGABYTE, (kind, file.stat().st_size)
        with serving(Path(folder)) as url:
            started = time.monotonic()
            done = subprocess.run(
                [sys.executable, __file__, url, str(jobs), *kinds],
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | {"PYTHONPATH": str(PROJECT)},
            )
            return float(done.stdout) / 1024, time.monotonic() - started


async def store_all(url: str, jobs: int, kinds: list[str]) -> None:
    """What a worker with this many slots does, once all its predictions end at the same moment."""
    import httpx  # noqa: PLC0415

    import worker  # noqa: PLC0415

    async with httpx.AsyncClient(timeout=worker.HTTP_TIMEOUT) as http:
        row = {"base_url": url, "key_hosts": [], "hosts": []}
        read = worker.Provider(http, row, None).read
        environment = {"DATABASE_URL": "postgresql://", "SUPABASE_SERVICE_KEY": "key"}
        settings = worker.Settings(environment | {"SUPABASE_URL": url})
        storage = worker.Storage(settings, http, worker.Pictures())
        job = SimpleNamespace(user_id=uuid.uuid4(), job_id=uuid.uuid4())
        files = [f"{url}/{kind}" for kind in itertools.islice(itertools.cycle(kinds), jobs)]
        stored = await asyncio.gather(
            *(storage.store(job, n, partial(read, file)) for n, file in enumerate(files))  # type: ignore[arg-type]
        )
    assert all(image["bytes"] > 18 * MEGABYTE for image in stored)


if __name__ == "__main__":
    asyncio.run(store_all(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
    # Not getrusage: that counts who started this, too.
    print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
