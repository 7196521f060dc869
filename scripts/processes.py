"""Background processes that outlive the command which started them.

A pid alone proves nothing: once its process has ended, the kernel may hand the number to somebody
else's. So every process is remembered together with the moment it started, and a signal is only
sent while both still match. That is what lets `make down` stop what `make up` started, hours later,
without ever touching anything else.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05


class StackError(Exception):
    """Something the person at the terminal can act on; shown without a traceback."""


@dataclass(frozen=True)
class Process:
    """One process, identified by its pid and the kernel's record of when it started."""

    pid: int
    started: int

    def is_running(self) -> bool:
        """Say whether this very process, not a later one with its number, is still alive."""
        is_alive = self.started > 0 and start_ticks(self.pid) == self.started
        if not is_alive:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self.pid, os.WNOHANG)  # an ended child of ours is a zombie until then
        return is_alive

    def stop(self, gently: signal.Signals, grace_seconds: float) -> None:
        """Ask the process group to end, and kill what has not ended when the grace is over."""
        for this_signal in (gently, signal.SIGKILL):
            if not self.is_running():
                return
            os.killpg(self.pid, this_signal)
            deadline = time.monotonic() + grace_seconds
            while self.is_running() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)

    def wait_until(self, ready: Callable[[], bool], seconds: float, log: Path) -> None:
        """Wait until the process answers; give up as soon as it has died, and show its log."""
        deadline = time.monotonic() + seconds
        while not ready():
            if not self.is_running():
                raise StackError(f"It ended while starting. {log} says:\n{last_lines(log)}")
            if time.monotonic() > deadline:
                raise StackError(f"No answer for {seconds:.0f} s. {log} says:\n{last_lines(log)}")
            time.sleep(POLL_SECONDS)


class ProcessTable:
    """The processes of one stack by name, kept in a file between commands."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def get(self, name: str) -> Process | None:
        """Return the process of that name if it still runs."""
        found = self._read().get(name)
        return found if found and found.is_running() else None

    def put(self, name: str, process: Process) -> None:
        """Remember a process."""
        processes = self._read() | {name: process}
        draft = self.file.with_suffix(".new")
        draft.write_text(json.dumps({key: [p.pid, p.started] for key, p in processes.items()}))
        draft.replace(self.file)

    def _read(self) -> dict[str, Process]:
        try:
            return {
                key: Process(*value) for key, value in json.loads(self.file.read_text()).items()
            }
        except FileNotFoundError:
            return {}


def spawn(
    command: Sequence[str | Path],
    *,
    log: Path,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    user: str | None = None,
) -> Process:
    """Start a command in a session of its own, so that Ctrl-C here does not reach it."""
    log.parent.mkdir(mode=0o700, exist_ok=True)
    with log.open("ab") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd,
            env=env,
            start_new_session=True,
            **as_user(user),
        )
    child.returncode = 0  # Python would complain that it still runs; that is the point of it
    return Process(child.pid, start_ticks(child.pid) or 0)


def as_user(name: str | None) -> dict[str, Any]:
    """Return the subprocess arguments that run a command as another OS user, if one is named."""
    return {"user": name, "group": name, "extra_groups": []} if name else {}


def start_ticks(pid: int) -> int | None:
    """Read when a process started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else int(fields[18])


def free_port(preferred: int = 0) -> int:
    """Return the preferred port if nobody listens on it, else one the kernel picks."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def last_lines(log: Path, count: int = 15) -> str:
    """Return the end of a log file, for an error message."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
