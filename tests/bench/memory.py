"""How much memory a worker needs while it downloads, checks and stores many large images at once.

    python tests/bench/memory.py [JOBS] [KIND ...]   # 64 jobs; png jpeg webp avif mixed

The code under test runs in a process of its own. The files come from, and go to, a server in this
one, over HTTP as in production. Prints peak resident memory and seconds for each kind.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

PROJECT = Path(__file__).resolve().parents[2]
MEGABYTE = 2**20
# Pixels of noise that make some 20 MB, and how.
KINDS: dict[str, tuple[int, dict[str, object]]] = {
    "png": (2640, {"compress_level": 1}),
    "jpeg": (3900, {"quality": 97}),
    "webp": (2640, {"lossless": True, "method": 0, "quality": 0}),
    "avif": (4400, {"quality": 95, "speed": 10}),
}


def make_picture(folder: Path, kind: str) -> Path:
    """Write a picture that does not compress."""
    from PIL import Image, ImageFile  # noqa: PLC0415 - not in the measured process

    side, options = KINDS[kind]
    ImageFile.MAXBLOCK = 64 * MEGABYTE
    file = folder / kind
    Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)).save(file, kind, **options)
    return file


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


def measure(jobs: int = 64, kinds: tuple[str, ...] = ("png", "jpeg")) -> tuple[int, float]:
    """Store this many images at once; return peak memory in MB and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            file = make_picture(Path(folder), kind)
            assert 18 * MEGABYTE < file.stat().st_size < 32 * MEGABYTE, (kind, file.stat().st_size)
        handler = type("Files", (Handler,), {"folder": Path(folder)})
        with Server(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}"
            started = time.monotonic()
            command = [sys.executable, __file__, "--measured", url, str(jobs), *kinds]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            server.shutdown()
            return int(done.stdout), time.monotonic() - started


async def store_all(url: str, jobs: int, kinds: list[str]) -> None:
    """What a worker with this many slots does, once all its predictions end at the same moment."""
    import httpx  # noqa: PLC0415

    import worker  # noqa: PLC0415

    async with httpx.AsyncClient(timeout=worker.HTTP_TIMEOUT) as http:
        replicate = worker.Replicate(http, url, "token")
        storage = worker.Storage(http, url, "key", 32 * MEGABYTE, 512)
        stored = await asyncio.gather(
            *(
                storage.store(
                    SimpleNamespace(user_id=uuid.uuid4(), job_id=uuid.uuid4()),  # type: ignore[arg-type]
                    0,
                    replicate.read(f"{url}/{kind}"),
                )
                for kind in itertools.islice(itertools.cycle(kinds), jobs)
            )
        )
    assert all(image["bytes"] > 18 * MEGABYTE for image in stored)


def peak_megabytes() -> int:
    """Peak resident memory of this process; getrusage would count what ran before exec."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measured"]:
        sys.path.insert(0, str(PROJECT))
        asyncio.run(store_all(sys.argv[2], int(sys.argv[3]), sys.argv[4:]))
        print(peak_megabytes())
    else:
        jobs = int((sys.argv[1:2] or ["64"])[0])
        for kind in sys.argv[2:] or [*KINDS, "mixed"]:
            peak, seconds = measure(jobs, tuple(KINDS) if kind == "mixed" else (kind,))
            print(f"{kind:6} {jobs} jobs  peak {peak} MB  {seconds:.1f} s", flush=True)
