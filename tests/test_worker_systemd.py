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
from unittest import mock

import pytest
import stack_choice
from shared_worker import shared_worker
from worker_process import CONNECTIONS, eventually

import worker

BEAT_SECONDS = 0.2
ADDRESS = f"@darkroom-{os.getpid()}"

world, db, workers = shared_worker(
    f"heartbeat = '{BEAT_SECONDS} s'", NOTIFY_SOCKET=ADDRESS, WORKER_POLL_SECONDS=0.2
)


class Manager:
    """Stands where systemd does: keeps every message, in order."""

    def __init__(self, address: str) -> None:
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

    def until(self, pattern: str, within: float = 15) -> None:
        """Wait until one of the last message's assignments matches."""
        eventually(
            lambda: self.lines() and re.search(f"(?m)^{pattern}$", self.messages[-1]), within
        )

    def fed(self) -> int:
        return self.lines().count("WATCHDOG=1")

    def until_fed(self, times: int, within: float = 15) -> None:
        """Wait until the watchdog was fed so many times more."""
        wanted = self.fed() + times
        eventually(lambda: self.fed() >= wanted, within)

    def is_fed_for(self, seconds: float) -> bool:
        before = self.fed()
        time.sleep(seconds)
        return self.fed() > before


@pytest.fixture(scope="module")
def manager() -> Iterator[Manager]:
    manager = Manager(ADDRESS)
    yield manager
    manager.socket.close()


def test_ready_fed_and_stopping(manager, workers):
    workers.process.stop()
    manager.lines()
    manager.messages.clear()

    process = workers.process = workers.start()
    manager.until_fed(3)
    assert process.stop() == 0

    status = f"STATUS=worker {process.worker_id}: 0 of 4 slots busy, is woken by NOTIFY"
    assert manager.lines()[:3] == ["READY=1", "WATCHDOG=1", status]
    assert manager.lines()[-3:] == ["STOPPING=1", "WATCHDOG=1", "STATUS=ends 0 jobs"]


def test_a_busy_worker_is_fed_while_it_beats_and_starves_while_the_database_stands_still(
    db, manager, workers, alice
):
    if stack_choice.is_wanted():
        pytest.skip("pids in a container are not those of this machine")
    job = workers.running(alice, seconds=60)
    manager.until(".*: 1 of 4 slots busy, is woken by NOTIFY")
    manager.until_fed(3)

    backends = [row["pid"] for row in db.execute(f"select pid {CONNECTIONS}")]
    for pid in backends:
        os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(2 * BEAT_SECONDS)  # what was under way
        assert not manager.is_fed_for(10 * BEAT_SECONDS)
    finally:
        for pid in backends:
            os.kill(pid, signal.SIGCONT)

    assert workers.process.is_running()
    manager.until_fed(2)
    alice.cancel_generation(job)


def test_it_starves_while_no_claim_is_answered(db, manager, workers):
    manager.until_fed(1)
    claimer, seen = db.connect(), "select max(seen_at) from private.workers"

    with claimer.transaction():
        claimer.execute("lock table private.ready_jobs in access exclusive mode")
        time.sleep(2 * BEAT_SECONDS)
        before = db.value(seen)
        assert not manager.is_fed_for(10 * BEAT_SECONDS)
        assert db.value(seen) > before  # beats alone are not progress

    manager.until_fed(2)


def test_where_no_systemd_does_it_ends_itself_and_only_then(db, workers):
    process = workers.start(NOTIFY_SOCKET="", WORKER_WATCHDOG_SECONDS=2)
    began, claimer = time.monotonic(), db.connect()
    eventually(lambda: time.monotonic() - began > 4)
    assert process.is_running()

    with claimer.transaction():
        claimer.execute("lock table private.ready_jobs in access exclusive mode")
        assert process.wait() == 1

    assert "Timeout (0:00:02)!" in process.log  # and where it was


WORKS = ("READY=1", "STATUS=worker 7: 0 of 4 slots busy, is woken by NOTIFY")
POLLS = ("READY=1", "STATUS=worker 7: 0 of 4 slots busy, polls, as LISTEN does not work")
WAITS = ("STATUS=waits for the database: DiskFull 53100",)


@pytest.mark.parametrize(
    ("is_listening", "kinds", "said"),
    [
        (True, [], [WORKS]),  # once for each beat that was answered
        (False, ["DiskFull 53100"], [POLLS, WAITS]),
        (None, ["DiskFull 53100"], [WAITS, WAITS]),
        (None, ["DiskFull 53100", "NoAnswer"], []),  # it says nothing
        (None, [], []),
    ],
)
def test_what_is_told_depends_on_what_the_database_says(monkeypatch, is_listening, kinds, said):
    db, told = worker.Database("postgresql://"), mock.Mock()
    db.is_listening, db.troubles = is_listening, {"sleep": dict.fromkeys(kinds)} if kinds else {}
    one = worker.Worker(mock.Mock(slots=4), db, {}, mock.Mock(), mock.Mock())
    one.worker_id, one.last_beat = 7, 1.0
    monkeypatch.setattr(worker, "tell_systemd", told)
    monkeypatch.setattr(one, "_feed_watchdog", fed := mock.Mock())

    one._tell_systemd()
    one._tell_systemd()

    assert [call.args for call in told.call_args_list] == said
    assert fed.call_count == len(said)


def test_a_path_is_an_address_too_and_a_manager_that_is_gone_no_reason_to_stop(
    caplog, monkeypatch, tmp_path: Path
):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    worker.tell_systemd("READY=1")
    assert "systemd.unreachable error=" in caplog.text

    with contextlib.closing((manager := Manager(str(tmp_path / "notify"))).socket):
        worker.tell_systemd("READY=1")
        assert manager.lines() == ["READY=1", "WATCHDOG=1"]
