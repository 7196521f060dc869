"""What a worker tells systemd, received as systemd does: on a datagram socket, from a process."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import stack_choice
from database import Database
from pooler import pgbouncer
from worker_process import CONNECTIONS, WorkerProcess, Workers, eventually

import worker
from stack import Stack

BEAT_SECONDS = 0.2


class Manager:
    """Stands where systemd does: keeps every message, in order."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(re.sub("^@", "\0", address))
        self.socket.setblocking(False)
        self.messages: list[str] = []

    def lines(self) -> list[str]:
        """Return every assignment so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.messages.append(self.socket.recv(65536).decode())
        return [line for message in self.messages for line in message.splitlines()]

    def count(self, line: str) -> int:
        return self.lines().count(line)

    def until(self, pattern: str, within: float = 15) -> None:
        """Wait for an assignment that matches."""
        eventually(lambda: any(re.fullmatch(pattern, line) for line in self.lines()), within)

    def until_fed(self, times: int, within: float = 15) -> None:
        """Wait until the watchdog was fed so many times more."""
        wanted = self.count("WATCHDOG=1") + times
        eventually(lambda: self.count("WATCHDOG=1") >= wanted, within)

    def is_fed_for(self, seconds: float) -> bool:
        """Say whether the watchdog is fed in this time."""
        before = self.count("WATCHDOG=1")
        time.sleep(seconds)
        return self.count("WATCHDOG=1") > before


@pytest.fixture(params=["{}/notify", "@darkroom-{}"], ids=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    """The two kinds of address that systemd gives."""
    manager = Manager(request.param.format(tmp_path))
    yield manager
    manager.socket.close()


@pytest.fixture
def workers(db: Database, stack: Stack, tmp_path: Path) -> Iterator[Workers]:
    """Starts workers on the test's database; they beat often."""
    db.lift_limits()
    db.execute(f"update private.settings set heartbeat = '{BEAT_SECONDS} s'")
    with Workers(db, stack, tmp_path) as workers:
        yield workers


def backends(db: Database) -> list[int]:
    """Return the pids of the server's processes that serve workers."""
    if stack_choice.is_wanted():
        pytest.skip("pids in a container are not those of this machine")
    return [row["pid"] for row in db.execute(f"select pid {CONNECTIONS}")]


@contextlib.contextmanager
def stopped(pids: list[int]) -> Iterator[None]:
    """Have processes stand still."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def started(workers: Workers, manager: Manager, **environment: object) -> WorkerProcess:
    process = workers.start(NOTIFY_SOCKET=manager.address, WORKER_POLL_SECONDS=0.2, **environment)
    manager.until("READY=1")
    return process


def test_ready_fed_and_stopping(workers, manager):
    process = started(workers, manager)
    first = manager.messages[0].splitlines()

    manager.until_fed(3)
    assert process.stop() == 0

    status = f"STATUS=worker {process.worker_id}: 0 of 4 slots busy, is woken by NOTIFY"
    assert first == ["READY=1", "WATCHDOG=1", status]
    assert manager.lines()[-3:] == ["STOPPING=1", "WATCHDOG=1", "STATUS=ends 0 jobs"]


@pytest.mark.parametrize("manager", ["{}/notify"], indirect=True)
class TestWatchdog:
    """The rest is the same for both kinds of address."""

    def test_a_busy_worker_is_fed_while_it_beats(self, workers, manager, alice):
        process = started(workers, manager, WORKER_SLOTS=1, PREVIEW_SECONDS=60)
        alice.enqueue("a lighthouse at dusk")

        manager.until(".*: 1 of 1 slots busy, is woken by NOTIFY")
        manager.until_fed(3)
        with stopped(backends(alice.db)):
            time.sleep(2 * BEAT_SECONDS)
            assert not manager.is_fed_for(10 * BEAT_SECONDS)
        process.kill()
        alice.db.execute("update private.running_jobs set lease_until = now() - interval '1 s'")

    def test_it_starves_while_the_database_stands_still(self, db, workers, manager):
        process = started(workers, manager)
        manager.until_fed(1)

        with stopped(backends(db)):
            time.sleep(2 * BEAT_SECONDS)  # what was under way
            assert not manager.is_fed_for(10 * BEAT_SECONDS)
            assert process.is_running()

        manager.until_fed(2)
        assert process.stop() == 0

    def test_it_starves_while_no_claim_is_answered(self, db, workers, manager):
        """Beats alone are not progress."""
        started(workers, manager)
        manager.until_fed(1)
        claimer = db.connect()
        seen = "select seen_at from private.workers"

        with claimer.transaction():
            claimer.execute("lock table private.ready_jobs in access exclusive mode")
            time.sleep(2 * BEAT_SECONDS)
            before = db.value(seen)
            assert not manager.is_fed_for(10 * BEAT_SECONDS)
            assert db.value(seen) > before

        manager.until_fed(2)

    def test_it_starves_while_its_own_loop_stands_still(self, workers, manager):
        process = started(workers, manager)

        process.signal(signal.SIGSTOP)
        assert not manager.is_fed_for(10 * BEAT_SECONDS)
        process.signal(signal.SIGCONT)

        manager.until_fed(2)

    def test_while_the_database_says_that_it_cannot_the_worker_says_so_and_is_fed(
        self, db, workers, manager
    ):
        process = started(workers, manager)

        limit = f"alter database {db.name} connection limit"
        db.execute(f"{limit} 0")
        workers.terminate_backends("true")
        manager.until("STATUS=waits for the database: .*", within=30)
        late = workers.launch(NOTIFY_SOCKET=manager.address)
        late.logged("database.lost call=register_worker error=.*too many connections", within=30)
        manager.until_fed(2, within=60)
        assert manager.count("READY=1") == process.log.count("worker.started")

        db.execute(f"{limit} -1")
        late.logged("worker.started", within=30)
        eventually(lambda: manager.lines()[-1].endswith("is woken by NOTIFY"), within=30)

    def test_behind_a_transaction_pooler_it_is_ready_and_says_that_it_polls(self, workers, manager):
        with pgbouncer(workers.environment["DATABASE_URL"], "transaction") as url:
            process = started(workers, manager, DATABASE_URL=url)

            assert manager.lines()[2].endswith("slots busy, polls, as LISTEN does not work")
            process.logged("listen.lost error=DATABASE_URL: a NOTIFY did not arrive, as through a")
            query = "select is_listening from private.workers"
            eventually(lambda: workers.db.value(query) is False)
            assert process.stop() == 0

    def test_a_worker_that_cannot_start_is_never_ready(self, workers, manager):
        process = workers.launch(NOTIFY_SOCKET=manager.address, SUPABASE_URL="")

        assert process.wait() == 2
        assert manager.lines() == []


def test_a_manager_that_is_gone_is_no_reason_to_stop(caplog, monkeypatch, tmp_path):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))

    worker.tell_systemd("READY=1")

    assert "systemd.unreachable error=" in caplog.text
