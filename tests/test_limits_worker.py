"""Real workers at their limits: ten times more asked for than they can do, a disk that is full.

What they cannot take is refused in words that stay the same, and nothing has to be done for them to
go on. `LIMITS=10 pytest tests/test_limits_worker.py` has ten times as many jobs.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from actors import Refusal, User, outcome, together
from database import Database
from worker_process import CONNECTIONS, WorkerProcess, Workers, eventually

from stack import Stack
from worker import POOL_SIZE

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


# --- ten times more than it can do ---

SLOTS = 4
SECONDS = 3  # of overload
THREADS = 8


class Crowd:
    """Users on the free plan, all of whom ask for one picture after another."""

    def __init__(self, db: Database, count: int) -> None:
        self.users = [User(db) for _ in range(count)]
        self.accepted: list[str] = []
        self.refusals: list[Refusal] = []

    def push(self, seconds: float) -> None:
        """Ask, each thread for a part of them, as fast as it goes."""
        parts = [self.users[start::THREADS] for start in range(THREADS)]
        deadline = time.monotonic() + seconds
        together([functools.partial(self._push, part, deadline) for part in parts])

    def _push(self, users: list[User], deadline: float) -> None:
        for user in itertools.cycle(users):
            if time.monotonic() > deadline:
                return
            answer = outcome(lambda user=user: user.enqueue(params=SMALL))
            if isinstance(answer, Refusal):
                self.refusals.append(answer)
            else:
                self.accepted.append(answer["job_id"])


@pytest.fixture
def crowd(db: Database) -> Crowd:
    """Twenty users who may have six jobs at once, and could pay for more."""
    db.execute("update private.settings set welcome_credits = 1000000")
    db.execute("update private.plans set max_active = %s, max_per_minute = 1000000", 6 * TIMES)
    return Crowd(db, 20)


def peak_memory(process: WorkerProcess) -> int:
    """Return the most memory a worker has held, in megabytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) // 1024


def overload(db: Database, workers: Workers, crowd: Crowd) -> WorkerProcess:
    """Return a worker that was asked for at least ten times as much as it did meanwhile."""
    db.execute("update private.alert_rules set threshold = 20 where alert = 'depth'")
    process = workers.start(PREVIEW_SECONDS=0.1, WORKER_SLOTS=SLOTS)
    crowd.push(SECONDS)
    done = db.value("select count(*) from public.generations where status = 'completed'")
    assert len(crowd.accepted) + len(crowd.refusals) > 10 * done
    return process


def until_drained(db: Database) -> None:
    """Wait until nobody has a job waiting or running."""
    active = "select count(*) from private.live_jobs"
    eventually(lambda: db.value(active) == 0, 60 * TIMES)


def test_under_overload_users_are_told_when_to_come_back_and_what_was_taken_is_done(
    db, service, workers, crowd
):
    db.execute("update private.plans set busy_after = '1 second' where name = 'free'")
    overload(db, workers, crowd)

    assert {refusal.token for refusal in crowd.refusals} <= {"busy", "too_many_active"}
    assert "busy" in {refusal.token for refusal in crowd.refusals}
    assert all(refusal.retry_after > 0 for refusal in crowd.refusals)
    assert set(service.alerts()) == {"depth"}

    until_drained(db)

    assert {workers.status(job) for job in crowd.accepted} == {"completed"}
    assert service.alerts() == {}
    workers.until(crowd.users[0].enqueued(params=SMALL), "completed")


def test_under_overload_a_user_waits_for_two_jobs_of_each_other_and_the_worker_stays_small(
    db, workers, crowd
):
    process = overload(db, workers, crowd)
    waiting = db.value("select count(*) from private.ready_jobs")
    assert waiting > 3 * len(crowd.users)
    assert {refusal.token for refusal in crowd.refusals} == {"too_many_active"}
    assert db.value(f"select count(*) {CONNECTIONS}") <= POOL_SIZE + 1

    job = User(db).enqueued(params=SMALL)
    workers.until(job, "completed", within=60 * TIMES)
    until_drained(db)

    started_before = (
        "select count(*) from private.attempts as a, public.generations as g"
        " where g.id = %s and a.started_at between g.created_at and g.started_at"
    )
    assert db.value(started_before, job) <= 2 * len(crowd.users) + SLOTS
    assert workers.most_at_once() <= SLOTS
    assert peak_memory(process) < 150
    assert not re.search("ERROR|Traceback", process.log)
