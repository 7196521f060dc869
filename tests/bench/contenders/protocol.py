"""How the bench talks to a contender's program, in Python; protocol.mjs is the same in JavaScript.

    PROGRAM install URL OPTIONS     make the tables in an empty database
    PROGRAM statement URL OPTIONS   print {text, values}: how the library enqueues one payload
    PROGRAM work URL OPTIONS        print "ready", wait for a line, work, print a report, end

OPTIONS is one JSON object: what the contender is set to, and for `work` also jobs (how many to
handle, null: no limit), seconds (at most) and keys (whether to note when which job was handled).
Work ends at that many jobs, after that time, or at a second line on stdin. The report holds the
moments at which jobs were handled, in seconds of CLOCK_MONOTONIC, which all processes share, and
the memory in use, in MB. Programs in Python report too how much it was at most, and the processor
time that the process took, in seconds.
"""

from __future__ import annotations

import json
import os
import re
import select
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from psycopg.adapt import PyFormat, Transformer


class Work:
    """One run of `work`."""

    def __init__(self, options: dict[str, Any], end: Callable[[], None] | None = None) -> None:
        self.jobs: int | None = options["jobs"]
        self.seconds: float = options["seconds"]
        self.wants_keys: bool = options["keys"]
        self.moments: list[float] = []
        self.keys: list[str] = []
        self.claims: list[float] = []  # seconds each claim took
        self.end = end or (lambda: os._exit(0))
        self._over = threading.Lock()

    def begin(self) -> None:
        """Say that all is prepared, and wait for the start."""
        print("ready", flush=True)
        sys.stdin.readline()
        self.began = time.monotonic()

        def watch() -> None:
            select.select([sys.stdin], [], [], self.seconds)
            self.finish()

        threading.Thread(target=watch, daemon=True).start()

    def handled(self, key: str = "") -> None:
        """Note that a job was handled now."""
        self.moments.append(time.monotonic())
        if self.wants_keys:
            self.keys.append(key)
        if len(self.moments) == self.jobs:
            self.finish()

    def finish(self) -> None:
        """Report, then end."""
        if self._over.acquire(blocking=False):
            count = len(self.moments)
            report = {
                "began": self.began,
                "moments": self.moments[:count],
                "keys": self.keys[:count],
                "claims": self.claims[:],
                "megabytes": resident_megabytes(),
                "peak_megabytes": resident_megabytes("VmHWM"),
                "cpu_seconds": time.process_time(),
            }
            print(json.dumps(report), flush=True)
            self.end()


def resident_megabytes(which: str = "VmRSS") -> float:
    """Return how much memory this process has in use, or (VmHWM) had at most."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{which}:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def show_statement(text: str, values: Sequence[Any], context: Any = None) -> None:
    """Print a statement with $1, $2, … and its values as PostgreSQL reads them."""
    dumped = Transformer(context).dump_sequence(values, [PyFormat.TEXT] * len(values))
    texts = [None if value is None else bytes(value).decode() for value in dumped]
    print(json.dumps({"text": text, "values": texts}))


def main(**commands: Callable[[str, dict[str, Any]], None]) -> None:
    command, url, options = sys.argv[1:]
    commands[command](url, json.loads(options))
