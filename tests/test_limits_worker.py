"""Real workers at their limits: ten times more asked for than they can do, a disk that is full.

What they cannot take is refused in words that stay the same, and nothing has to be done for them to
go on. `LIMITS=10 pytest tests/test_limits_worker.py` has ten times as many jobs.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from actors import Refusal, User, outcome, together
from database import Database, memory
from worker_process import CONNECTIONS, Workers, eventually

from stack import Stack
from worker import POOL_SIZE

SMALL = {"width": 64, "height": 64}
TIMES = int(os.environ.get("LIMITS", "1"))
DISK_BYTES = 4 << 20
SLOTS = 4


@pytest.fixture
def workers(db: Database, stack: Stack, tmp_path: Path) -> Iterator[Workers]:
    """Starts workers on the test's database."""
    db.execute("update private.settings set retry_base = '0'")
    with Workers(db, stack, tmp_path) as workers:
        yield workers


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few megabytes, for temporary files."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = f"size={DISK_BYTES},mode=1777"
    command = ["mount", "-t", "tmpfs", "-o", options, "darkroom-test", folder]
    mount = subprocess.run(command, capture_output=True, text=True, check=False)
    if mount.returncode != 0:
        pytest.skip(f"no file system may be mounted here: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_costs_no_attempt_nothing_is_claimed_and_others_do_the_jobs(
    alice, db, workers, disk
):
    full = workers.start(TMPDIR=disk, MAX_IMAGE_BYTES=1_000_000, WORKER_POLL_SECONDS=0.1)
    full.logged(f"worker.has_room folder={disk}")
    filling = disk / "filling"
    with filling.open("wb", buffering=0) as output:
        os.posix_fallocate(output.fileno(), 0, DISK_BYTES)

    met = alice.enqueued(params=SMALL)
    full.logged("worker.full error=ENOSPC No space left on device")
    attempt = db.row("select * from private.attempts")
    waiting = alice.enqueued(params=SMALL)
    lines = len(re.findall("worker.full", full.log))
    eventually(lambda: len(re.findall("worker.full", full.log)) > lines + 3)
    assert (attempt["outcome"], attempt["error_code"]) == ("retried", "worker_full")
    assert attempt["error_detail"] == "ENOSPC No space left on device"
    assert (workers.status(met), workers.outcomes(waiting)) == ("queued", [])

    other = workers.start(WORKER_POLL_SECONDS=0.1)
    workers.until(met, "completed")
    workers.until(waiting, "completed")
    assert other.stop() == 0
    filling.unlink()
    workers.until(alice.enqueued(params=SMALL), "completed")

    tries = db.execute("select * from private.attempts where generation_id = %s", met)
    assert [each["outcome"] for each in tries] == ["retried", "completed"]
    assert {each["attempt"] for each in tries} == {1}
    assert len({each["provider_job_id"] for each in tries}) == 1, "made once"
    assert alice.credits() == 7
    assert full.stop() == 0


def push(users: list[User], seconds: float) -> list[Any]:
    """Have all of them ask for one picture after another; return what they are answered."""

    def ask(part: list[User]) -> list[Any]:
        answers, deadline = [], time.monotonic() + seconds
        for user in itertools.cycle(part):
            if time.monotonic() > deadline:
                break
            answers.append(outcome(lambda user=user: user.enqueue(params=SMALL)))
        return answers

    return [*itertools.chain(*together([partial(ask, users[n::8]) for n in range(8)]))]


def tokens(answers: list[Any]) -> set[str]:
    return {each.token for each in answers if isinstance(each, Refusal)}


def test_under_overload_users_are_told_when_to_come_back_and_what_was_taken_is_done_in_turn(
    db, service, workers
):
    db.execute("update private.settings set welcome_credits = 1000000")
    db.execute("update private.plans set max_active = %s, max_per_minute = 1000000", 6 * TIMES)
    db.execute("update private.alert_rules set threshold = 20 where alert = 'depth'")
    users = [User(db) for _ in range(20)]
    process = workers.start(PREVIEW_SECONDS=0.1, WORKER_SLOTS=SLOTS)

    answers = push(users, 3)
    done = db.value("select count(*) from public.generations where status = 'completed'")
    assert len(answers) > 10 * done
    assert db.value("select count(*) from private.ready_jobs") > 3 * len(users)
    assert (tokens(answers), set(service.alerts())) == ({"too_many_active"}, {"depth"})
    assert db.value(f"select count(*) {CONNECTIONS}") <= POOL_SIZE + 1
    late = User(db).enqueued(params=SMALL)
    db.execute("update private.plans set busy_after = '1 second' where name = 'free'")
    answers += push(users, 0.5)
    assert tokens(answers) == {"too_many_active", "busy"}
    assert all(each.retry_after > 0 for each in answers if isinstance(each, Refusal))

    live = "select count(*) from private.live_jobs"
    eventually(lambda: db.value(live) == 0, within=60 * TIMES)

    taken = [late, *(each["job_id"] for each in answers if not isinstance(each, Refusal))]
    assert {workers.status(job) for job in taken} == {"completed"}
    started_before = (
        "select count(*) from private.attempts as a, public.generations as g"
        " where g.id = %s and a.started_at between g.created_at and g.started_at"
    )
    assert db.value(started_before, late) <= 2 * len(users) + SLOTS
    at_once = (
        "select max((select count(*) from private.attempts as b"
        " where b.started_at <= a.started_at and b.ended_at > a.started_at))"
        " from private.attempts as a"
    )
    assert db.value(at_once) <= SLOTS
    assert memory(process.pid, "VmHWM") < 150e6
    assert not re.search("ERROR|Traceback", process.log)
    assert service.alerts() == {}
