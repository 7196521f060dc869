"""Real workers at their limits: ten times more asked for than they can do, a disk that is full.

What they cannot take is refused in words that stay the same, and nothing has to be done for them to
go on. `LIMITS=10 pytest tests/test_limits_worker.py` has ten times as many users.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from database import Database
from worker_process import WorkerProcess, Workers, eventually

from stack import Stack

SMALL = {"width": 64, "height": 64}
TIMES = int(os.environ.get("LIMITS", "1"))
DISK_BYTES = 4 << 20


@pytest.fixture
def workers(db: Database, stack: Stack, tmp_path: Path) -> Iterator[Workers]:
    """Starts workers on the test's database."""
    db.execute("update private.settings set retry_base = '0'")
    with Workers(db, stack, tmp_path) as workers:
        yield workers


# --- a full disk ---


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes, for temporary files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = f"size={DISK_BYTES},mode=1777"
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "darkroom-test", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mount.returncode != 0:
        pytest.skip(f"no file system may be mounted here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte free; return the file that takes them."""
    file = disk / "filling"
    with file.open("wb", buffering=0) as output:
        os.posix_fallocate(output.fileno(), 0, DISK_BYTES)
    return file


def start_on(disk: Path, workers: Workers) -> WorkerProcess:
    process = workers.start(TMPDIR=disk, MAX_IMAGE_BYTES=1_000_000, WORKER_POLL_SECONDS=0.1)
    process.logged(f"worker.has_room folder={disk}")
    return process


def test_a_job_that_finds_the_disk_full_waits_until_there_is_room_and_costs_no_attempt(
    alice, db, workers, disk
):
    process = start_on(disk, workers)
    filling = fill(disk)

    job = alice.enqueued(params=SMALL)
    eventually(lambda: workers.outcomes(job))

    attempt = db.row("select * from private.attempts")
    assert (attempt["outcome"], attempt["error_code"]) == ("retried", "worker_full")
    assert attempt["error_detail"] == "ENOSPC No space left on device"
    assert alice.get_job_status(job)["status"] == "queued"
    filling.unlink()
    workers.until(job, "completed")
    tries = db.execute("select outcome, attempt, provider_job_id from private.attempts")
    assert {row["attempt"] for row in tries} == {1}
    assert len({row["provider_job_id"] for row in tries}) == 1, "made once"
    assert alice.ledger() == [("grant", 10), ("charge", -1)]
    assert process.stop() == 0


def test_a_full_worker_claims_nothing_and_says_why(alice, db, workers, disk):
    process = start_on(disk, workers)
    filling = fill(disk)
    first = alice.enqueued(params=SMALL)
    process.logged("worker.full error=ENOSPC No space left on device")

    second = alice.enqueued(params=SMALL)
    lines = len(re.findall("worker.full", process.log))
    eventually(lambda: len(re.findall("worker.full", process.log)) > lines + 3)

    assert workers.outcomes(second) == []
    assert workers.status(second) == "queued"
    filling.unlink()
    workers.until(first, "completed")
    workers.until(second, "completed")
    assert workers.outcomes(second) == ["completed"]


def test_a_full_workers_jobs_are_done_by_another(alice, workers, disk):
    full = start_on(disk, workers)
    fill(disk)
    job = alice.enqueued(params=SMALL)
    full.logged("worker.full error=ENOSPC")

    workers.start()

    workers.until(job, "completed")
    assert workers.outcomes(job) == ["retried", "completed"]
    assert full.is_running()
