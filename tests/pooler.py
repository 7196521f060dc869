"""A real PgBouncer in front of a database, where it is installed: `pgbouncer(url, mode)`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from processes import free_port, spawn

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")


CONFIG = """
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {own_port}
unix_socket_dir =
auth_type = plain
auth_file = {folder}/users
pool_mode = {mode}
default_pool_size = 5
"""


@contextlib.contextmanager
def pgbouncer(url: str, mode: str) -> Iterator[str]:
    """Start one in this pool mode; yield the address that goes through it."""
    if not PROGRAM:
        pytest.skip("pgbouncer is not installed")
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    parts, port = urlsplit(url), free_port()
    through = parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{port}").geturl()
    with tempfile.TemporaryDirectory(prefix="pgbouncer-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "users").write_text(f'"{parts.username}" "{parts.password}"\n')
        (folder / "ini").write_text(
            CONFIG.format(
                host=parts.hostname, port=parts.port, own_port=port, folder=folder, mode=mode
            )
        )
        log = folder / "log" / "pgbouncer.log"
        process = spawn([PROGRAM, folder / "ini"], log=log, cwd=Path("/"), user=user)
        try:
            process.wait_until(lambda: answers(through), 10, log)
            yield through
        finally:
            process.stop(signal.SIGTERM, 5)


def answers(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=5).close()
    except psycopg.OperationalError:
        return False
    return True
