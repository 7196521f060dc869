"""Real worker processes for tests: `worker.py` as in production, each with its log in a file.

    with Workers(db, stack, folder) as workers:
        process = workers.start(PREVIEW_SECONDS=0.1)  # returns once it has registered
        workers.until(job_id, "completed")
        assert process.stop() == 0

At the end whatever still runs is killed, the books must balance, and no log may hold a prompt, a
key or a password. `eventually` is the only way tests of workers wait.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx
from database import PROJECT, Database, assert_books_balance

from stack import Stack

T = TypeVar("T")

CONNECTIONS = (  # of all workers
    "from pg_stat_activity where usename = 'darkroom_worker' and datname = current_database()"
)


def eventually(condition: Callable[[], T], within: float = 15) -> T:
    """Return the first true answer of a condition; fail when it has none in this many seconds."""
    deadline = time.monotonic() + within
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not within {within} s"
        time.sleep(0.01)
    return answer


class WorkerProcess:
    """One `worker.py`."""

    program = PROJECT / "worker.py"

    def __init__(
        self, log_file: Path, environment: dict[str, str], within: Sequence[str] = ()
    ) -> None:
        """Start it, with another program that runs it in front, if wanted."""
        self.log_file = log_file
        with log_file.open("ab") as output:
            self._process = subprocess.Popen(
                [*within, sys.executable, self.program],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=PROJECT,
                env=environment,
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def logged(self, pattern: str, within: float = 15) -> re.Match[str]:
        """Wait for a line that matches."""
        return eventually(lambda: re.search(pattern, self.log), within)

    @property
    def worker_id(self) -> int:
        """Its row in private.workers, once it is registered."""
        return int(self.logged(r"worker\.started worker=(\d+)")[1])

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, within: float = 20) -> int:
        """Wait for its end and return the exit code."""
        return self._process.wait(within)

    def stop(self, within: float = 20) -> int:
        """Ask it to stop and return the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait(within)

    def kill(self) -> None:
        """End it as a crash does."""
        self._process.kill()
        self._process.wait()


class Workers:
    """Starts workers on one database, looks at what they do, and cleans up after them."""

    def __init__(self, db: Database, stack: Stack, folder: Path) -> None:
        self.db, self.stack, self.folder = db, stack, folder
        path = urlsplit(db.url).path
        self.environment = {
            "PATH": os.environ["PATH"],
            "DATABASE_URL": urlsplit(stack.worker_database_url)._replace(path=path).geturl(),
            "SUPABASE_URL": stack.api_url,
            "SUPABASE_SERVICE_KEY": stack.service_role_key,
            "PREVIEW_SECONDS": "0.1",
            "LOG_LEVEL": "DEBUG",
        }
        self.processes: list[WorkerProcess] = []
        self.extra_secrets: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        for process in self.processes:
            process.kill()
            print(f"--- {process.log_file.name}\n{process.log}")  # pytest shows it for failures
        if failure is None:
            assert_books_balance(self.db)
            assert self.leaks() == []

    def start(self, **environment: Any) -> WorkerProcess:
        """Start one and wait until it is registered."""
        process = self.launch(**environment)
        process.logged(r"worker\.started")
        return process

    def launch(self, **environment: Any) -> WorkerProcess:
        """Start one, whatever becomes of it."""
        values = {name: str(value) for name, value in environment.items()}
        # Others may have written into this folder before.
        log_file = self.folder / f"worker-{len([*self.folder.glob('worker-*.log')]) + 1}.log"
        process = WorkerProcess(log_file, self.environment | values)
        self.processes.append(process)
        return process

    # What is in the database.

    def status(self, job_id: str) -> str:
        return str(self.db.value("select status from public.generations where id = %s", job_id))

    def until(self, job_id: str, *statuses: str, within: float = 15) -> str:
        """Wait until the job has one of these states."""
        return eventually(lambda: self.status(job_id) in statuses and job_id, within)

    def until_asleep(self, process: WorkerProcess, within: float = 15) -> None:
        """Wait until a worker has found nothing to do and sleeps in the database."""
        query = "select asleep from private.workers where id = %s"
        eventually(lambda: self.db.value(query, process.worker_id), within)

    def until_silent(self, db: Database | None = None) -> None:
        """Wait until no worker has asked the database anything for longer than its second look."""
        query = (
            "select count(*) > 0 and bool_and(now() - state_change > interval '0.25 seconds')"
            f" {CONNECTIONS}"
        )
        eventually(lambda: (db or self.db).value(query))

    def until_disconnected(self) -> None:
        """Wait until no worker has a connection: whatever killed ones had begun is over."""
        eventually(lambda: self.db.value(f"select not exists (select {CONNECTIONS})"))

    def checkpointed(self, job_id: str) -> dict[str, Any] | None:
        """Return the running job once the provider's id of it is saved."""
        query = "select * from private.running_jobs where job_id = %s and provider_job_id > ''"
        return next(iter(self.db.execute(query, job_id)), None)

    def outcomes(self, job_id: str) -> list[str]:
        """Return how each claim of the job ended."""
        query = "select outcome from private.attempts where generation_id = %s order by token"
        return [row["outcome"] for row in self.db.execute(query, job_id)]

    # What happens to workers.

    def backdate_leases(self) -> None:
        """Let the leases of all running jobs have run out, and the next look for them be due."""
        self.db.execute("update private.running_jobs set lease_until = now() - interval '1 second'")
        self.db.execute("select setval('private.recovery_due', 0)")

    def give_lease_away(self, job_id: str) -> None:
        """Let somebody else hold the lease, as after a recovery and another claim."""
        query = "update private.running_jobs set token = nextval('private.lease_tokens')"
        self.db.execute(f"{query} where job_id = %s", job_id)

    def terminate_backends(self, condition: str) -> int:
        """End workers' connections on the server; return how many."""
        query = f"select pg_terminate_backend(pid) {CONNECTIONS} and {condition}"
        return len(self.db.execute(query))

    # What comes out.

    def stored_file(self, path: str) -> bytes:
        url = f"{self.stack.api_url}/storage/v1/object/generations/{path}"
        headers = {"Authorization": f"Bearer {self.stack.service_role_key}"}
        return httpx.get(url, headers=headers).raise_for_status().content

    def secrets(self) -> set[str]:
        """Return what must never be in a log: prompts, keys, passwords, and what a test adds."""
        prompts = self.db.execute("select prompt from public.generations where length(prompt) > 5")
        password = urlsplit(self.environment["DATABASE_URL"]).password or ""
        keys = {self.stack.service_role_key, self.stack.jwt_secret, password}
        return {row["prompt"] for row in prompts} | keys | self.extra_secrets

    def leaks(self) -> list[str]:
        """Return the lines of all logs that tell a secret."""
        secrets = self.secrets()
        lines = [line for process in self.processes for line in process.log.splitlines()]
        return [line for line in lines if any(secret in line for secret in secrets)]
