"""The throw-away cluster in which the bench runs: template databases, copies of them, processes."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
from database import PROJECT, Database, memory, seconds_of_a_core
from psycopg import sql

from processes import last_lines
from stack import Cluster, Settings, node, postgres_program

CONTENDERS = Path(__file__).resolve().parent / "contenders"
SERVER_SETTINGS = {
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
    "max_connections": "200",
    "synchronous_commit": "on",
    "wal_level": "replica",
    "autovacuum": "on",
}
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
START_SECONDS, END_SECONDS = 60.0, 20.0  # at most, for a contender's program to be ready, to end
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join(map(str, [PROJECT, CONTENDERS])),
    "PGCONNECT_TIMEOUT": "10",
}


@dataclass(frozen=True)
class Statement:
    """One way to enqueue: SQL with $1, $2, … and its values in PostgreSQL's text form.

    Where a value holds KEY, each enqueue may have a key of its own.
    """

    text: str
    values: Sequence[str | None] = ()

    KEY = "@key-0000@"

    def with_key(self, key: str) -> list[str | None]:
        return [value and value.replace(self.KEY, key) for value in self.values]


@dataclass(frozen=True)
class Contender:
    """A queue with its settings, behind a program of contenders/ (its commands: protocol.py)."""

    name: str
    program: str
    options: Mapping[str, Any]
    holds: int = 0  # so many jobs, at most, at one time

    def command(self, command: str, url: str, **options: Any) -> list[str]:
        file = CONTENDERS / self.program
        runner = str(node()) if file.suffix == ".mjs" else sys.executable
        return [runner, str(file), command, url, json.dumps({**self.options, **options})]


class Lab:
    """A cluster of its own. Everything it starts is stopped when it closes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = Cluster(folder, Settings(folder / "env"), tuning=SERVER_SETTINGS)
        self.templates: set[str] = set()
        self.databases: dict[str, Database] = {}  # by name: those that parts share
        self.part_end = contextlib.ExitStack()  # stops what a part has started
        self.statements: dict[str, Statement] = {}  # of the peers, by name

    @classmethod
    @contextlib.contextmanager
    def open(cls) -> Iterator[Lab]:
        """Start it in a temporary folder; stop and delete it at the end, whatever happens."""
        with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as folder:
            Path(folder).chmod(0o711)  # PostgreSQL's user passes through
            lab = cls(Path(folder))
            try:
                lab.cluster.start()
                yield lab
            finally:
                for number in STOPS:  # a second Ctrl-C would leave it all
                    signal.signal(number, signal.SIG_IGN)
                with contextlib.ExitStack() as end:  # each, whatever the others do; the last first
                    end.callback(lab.cluster.delete)
                    end.callback(lab.cluster.stop)
                    for database in lab.databases.values():
                        end.callback(database.close)
                    end.push(lab.part_end)

    def admin(self, query: sql.SQL | sql.Composed) -> Any:
        """Run a statement beside all databases of the bench; return its first value, if any."""
        with psycopg.connect(self.cluster.url(), autocommit=True) as connection:
            cursor = connection.execute(query)
            return cursor.fetchone()[0] if cursor.description else None  # type: ignore[index]

    def template(self, name: str, fill: Callable[[Database], None], base: str = "template1") -> str:
        """Make a template database, once: a copy of another, filled, vacuumed and analyzed."""
        name = re.sub(r"\W+", "-", name)
        if name not in self.templates:
            database = self._create(name, base)
            self.templates.add(name)
            try:
                fill(database)
                database.execute("vacuum analyze")
            except BaseException:
                self._drop(database)
                raise
            database.close()
        return name

    def shared(self, name: str, fill: Callable[[Database], None], base: str) -> Database:
        """Have a database that all parts of the run share: one that takes long to fill."""
        if name not in self.databases:
            template = self.template(name, fill, base)
            self.templates.discard(template)  # it outlives the part
            self.admin(sql.SQL("checkpoint"))
            self.databases[name] = self._database(template)
        return self.databases[name]

    @contextlib.contextmanager
    def copy(self, template: str, name: str = "bench") -> Iterator[Database]:
        """Have a fresh copy of a template, after a checkpoint; drop it in the end."""
        database = self._create(name, template)
        self.admin(sql.SQL("checkpoint"))
        try:
            yield database
        finally:
            self._drop(database)

    def _database(self, name: str) -> Database:
        database = Database(urlsplit(self.cluster.url())._replace(path=f"/{name}").geturl(), name)
        database.execute("set statement_timeout = 0")
        return database

    def _create(self, name: str, template: str) -> Database:
        # Copying files keeps large templates out of the write-ahead log.
        query = sql.SQL("create database {} template {} strategy file_copy")
        self.admin(query.format(sql.Identifier(name), sql.Identifier(template)))
        return self._database(name)

    def _drop(self, database: Database) -> None:
        database.close()
        self.templates.discard(database.name)
        query = sql.SQL("drop database if exists {} with (force)")
        self.admin(query.format(sql.Identifier(database.name)))

    def end_part(self) -> None:
        """Stop what a part has started, and give back the disk that its templates take."""
        self.part_end.close()
        for name in list(self.templates):
            self._drop(Database("", name))

    def run(self, command: Sequence[str], **environment: str) -> str:
        environment = ENVIRONMENT | environment
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            raise RuntimeError(f"{Path(command[0]).name}: {gist(done.stderr)}")
        return done.stdout

    def pgbench(
        self, url: str, text: str, *options: str, values: Sequence[str | None] = (), **env: str
    ) -> float:
        """Run a script of one statement again and again; return transactions per second.

        A peer's $1, $2, … become variables that hold the values; null is one not set.
        """
        file = self.folder / "pgbench.sql"
        file.write_text(re.sub(r"\$(\d+)", r":v\1", text))
        defined = [f"-Dv{n}={value}" for n, value in enumerate(values, 1) if value is not None]
        command = [str(postgres_program("pgbench")), "-n", "-M", "prepared", "-f", str(file)]
        printed = self.run([*command, *options, *defined, url], **env)
        return float(re.search(r"^tps = ([\d.]+)", printed, re.MULTILINE)[1])  # type: ignore[index]

    @contextlib.contextmanager
    def work(self, contender: Contender, url: str, **options: Any) -> Iterator[Program]:
        """Start a contender's worker and wait until it is ready; end it, if it does not itself."""
        log = self.folder / "worker.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                contender.command("work", url, **options),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=ENVIRONMENT,
            )
        with process:
            try:
                program = Program(process, log)
                program.read(START_SECONDS)
                yield program
                process.wait(END_SECONDS)
            finally:
                process.kill()
                process.stdin = None  # which it may have closed


class Program:
    """A contender's worker process: ready, then going, then over."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log

    def say(self) -> None:
        """Let it begin, or the second time report now; it may be over already."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write("\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]

    def report(self, within: float) -> dict[str, Any]:
        return dict(json.loads(self.read(within)))

    def megabytes(self) -> float:
        return memory(self.process.pid, "VmRSS") / 2**20

    def cpu_seconds(self) -> float:
        return seconds_of_a_core(self.process.pid)

    def read(self, within: float) -> str:
        """Read a line; a process that writes none in time is ended."""
        watch = threading.Timer(within, self.process.kill)
        watch.start()
        try:
            line = self.process.stdout.readline()  # type: ignore[union-attr]
        finally:
            watch.cancel()
        if not line:
            raise RuntimeError(f"the worker said nothing: {gist(last_lines(self.log))}")
        return str(line)


def gist(text: str) -> str:
    """Return the line of a program's output that most likely names its error."""
    lines = text.strip().splitlines() or ["no output"]
    return next((line for line in lines if "ERROR" in line), lines[-1])


def machine() -> dict[str, Any]:
    """Describe the computer, without its name."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    kilobytes = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "processor": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory": f"{round(int(kilobytes[1]) / 2**20)} GB" if kilobytes else "unknown",
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "load at start": round(os.getloadavg()[0], 2),
    }
