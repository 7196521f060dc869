"""One worker of several databases: slots shared, and nothing of one cell holds up another."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import pytest
from actors import User
from chaos.proxy import Proxy
from database import Database, Server, assert_books_balance
from fake_replicate import FakeReplicate
from test_worker_systemd import Manager
from test_worker_units import ENVIRONMENT
from worker_process import WorkerProcess, Workers, eventually

import worker
from stack import Stack

CELLS = ("home", "two")
FLUX = "black-forest-labs/flux-schnell"
SMALL = {"width": 64, "height": 64}


class Cells(Workers):
    """Workers of two databases, each behind a proxy that may treat its connections badly."""

    def __init__(self, dbs: dict[str, Database], proxies: dict[str, Proxy], *rest: Any) -> None:
        super().__init__(dbs["home"], *rest)
        self.dbs, self.proxies = dbs, proxies
        self.users = {cell: User(db).has(100) for cell, db in dbs.items()}
        self.login = urlsplit(self.environment["DATABASE_URL"]).netloc.rpartition("@")[0]
        self.environment |= {"DATABASE_URL": self.url(), "WORKER_POLL_SECONDS": "0.5"}

    def url(self, **logins: str) -> str:
        """Return the addresses of all cells, where not said otherwise as darkroom_worker."""
        return "\n".join(
            f"postgresql://{logins.get(cell, self.login)}@{self.name(cell)}" for cell in self.dbs
        )

    def name(self, cell: str) -> str:
        """Return what the log calls a cell."""
        return f"127.0.0.1:{self.proxies[cell].port}/{self.dbs[cell].name}"

    def logged_of(
        self, process: WorkerProcess, cell: str, pattern: str, within: float = 15
    ) -> re.Match[str]:
        return process.logged(rf"[A-Z] cell={re.escape(self.name(cell))} {pattern}", within)

    def start(self, **environment: Any) -> WorkerProcess:
        process = self.launch(**environment)
        for cell in self.dbs:
            self.logged_of(process, cell, r"worker\.started")
            self.logged_of(process, cell, r"listen\.started")
        return process

    def ready(self) -> tuple[int, ...]:
        query = "select count(*) from private.ready_jobs"
        return tuple(db.value(query) for db in self.dbs.values())

    def running(self) -> tuple[int, ...]:
        query = "select count(*) from private.running_jobs"
        return tuple(db.value(query) for db in self.dbs.values())

    def done(self, cell: str, within: float) -> None:
        """Have a job of the cell's made, within this many seconds."""
        job = self.users[cell].enqueued(params=SMALL)
        self.made(cell, job, within)

    def made(self, cell: str, job: str, within: float = 30) -> None:
        query = "select status from public.generations where id = %s"
        eventually(lambda: self.dbs[cell].value(query, job) == "completed", within)


@pytest.fixture
def workers(server: Server, template: str, stack: Stack, tmp_path: Path) -> Iterator[Cells]:
    dbs = {cell: server.create(template) for cell in CELLS}
    place = urlsplit(stack.worker_database_url)
    at = (str(place.hostname), int(place.port or 5432))
    with FakeReplicate() as fake, Proxy(lambda: at) as home, Proxy(lambda: at) as two:
        fake.default = replace(fake.default, seconds=60)
        for db in dbs.values():
            db.lift_limits()
            db.runs_at("replicate", fake.url)
            db.execute("update public.models set is_active = true")
            db.execute("update private.settings set retry_base = '0', heartbeat = '3 seconds'")
        with Cells(dbs, {"home": home, "two": two}, stack, tmp_path) as workers:
            workers.environment["REPLICATE_API_TOKEN"] = fake.token
            workers.extra_secrets = {fake.token}
            yield workers
        assert_books_balance(dbs["two"])
    for db in dbs.values():
        server.drop(db)


# --- slots ---


def test_slots_are_shared_an_idle_cell_keeps_none_and_a_freed_one_goes_to_who_has_fewest(workers):
    home, two = workers.users.values()
    held = [home.enqueued(model=FLUX) for _ in range(7)]
    process = workers.start(WORKER_SLOTS=4)
    eventually(lambda: workers.running() == (4, 0))
    others = [two.enqueued(model=FLUX) for _ in range(5)]

    for there in ((3, 1), (2, 2), (2, 2)):
        oldest = "select job_id::text from private.running_jobs order by token limit 1"
        home.cancel_generation(workers.dbs["home"].value(oldest))
        eventually(lambda there=there: workers.running() == there)
        eventually(lambda: sum(workers.ready()) + sum(workers.running()) < len(held + others))
    eventually(lambda: workers.ready() == (2, 3))  # the third was for home again
    for job in held:
        home.cancel_generation(job)
    eventually(lambda: workers.running() == (0, 4))

    assert process.is_running()
    for job in others:
        two.cancel_generation(job)
    eventually(lambda: workers.running() == (0, 0))


def a_cell(jobs: int, waits: bool, is_away: bool) -> worker.Worker:
    """Return a worker of a cell that runs so many jobs."""
    one = worker.Worker(*[mock.Mock()] * 5)
    one.db, one.running, one.waits = mock.Mock(is_away=is_away), dict.fromkeys(range(jobs)), waits
    return one


@pytest.mark.parametrize(
    ("count", "cells", "share"),  # of each cell: jobs, waits, is away; the share of the first
    [
        (4, [(1, 0, 0)], 3),  # the only one
        (4, [(1, 0, 0), (2, 0, 0)], 1),  # who does not wait wants none
        (4, [(0, 0, 0), (0, 1, 0)], 2),
        (4, [(0, 0, 0), (3, 1, 0)], 1),
        (4, [(3, 0, 0), (0, 1, 0)], 0),
        (8, [(1, 0, 0), (3, 1, 0)], 3),  # 4 and 4
        (1, [(0, 0, 0), (0, 1, 0)], 1),  # it took one longer ago
        (1, [(1, 0, 0), (0, 1, 0)], 0),
        (7, [(0, 0, 0), (0, 1, 0), (0, 1, 0)], 3),
        (4, [(0, 0, 0), (4, 0, 1)], 4),  # who is away keeps none
        (4, [(0, 0, 0), (4, 0, 1), (1, 1, 0)], 2),
        (3, [(1, 0, 0), (0, 1, 1)], 2),  # nor does it get one
        (4, [(4, 0, 1), (0, 0, 0)], 0),  # but nobody takes more than there are
        (4, [(0, 0, 0), (9, 0, 0)], 0),
    ],
)
def test_free_slots_are_dealt_out_among_the_cells_that_wait(count, cells, share):
    all_of_them = [a_cell(*each) for each in cells]
    slots = worker.Slots(count, all_of_them[0])
    slots.workers = all_of_them

    assert slots.share(all_of_them[0]) == share


def test_cells_that_wait_for_one_slot_have_it_in_turn(workers):
    jobs = {
        cell: [user.enqueued(params=SMALL) for _ in range(6)]
        for cell, user in workers.users.items()
    }
    workers.start(WORKER_SLOTS=1, PREVIEW_SECONDS=0.2)
    for cell in CELLS:
        for job in jobs[cell]:
            workers.made(cell, job)

    query = "select started_at as at, %s as cell from public.generations"
    starts = [row for cell, db in workers.dbs.items() for row in db.execute(query, cell)]
    order = [row["cell"] for row in sorted(starts, key=lambda row: row["at"])]
    turns = sum(a != b for a, b in itertools.pairwise(order))
    assert turns >= 8, order  # of 11


def test_workers_of_the_same_cells_do_each_job_once(workers):
    both = [workers.start(WORKER_SLOTS=2) for _ in range(2)]
    jobs = [(cell, workers.users[cell].enqueued(params=SMALL)) for cell in CELLS * 10]
    for cell, job in jobs:
        workers.made(cell, job)

    for cell, job in jobs:
        claims = sum(process.log.count(f"job.claimed job={job}") for process in both)
        assert claims == 1, cell
    assert [process.stop() for process in both] == [0, 0]


def test_a_worker_that_is_woken_while_its_slots_are_full_has_another_woken(workers):
    full = workers.start(WORKER_SLOTS=1, WORKER_POLL_SECONDS=60)
    two = workers.dbs["two"]
    its_id = int(workers.logged_of(full, "two", r"worker\.started worker=(\d+)")[1])
    seen = "select seen_at from private.workers where id = %s"
    workers.users["home"].enqueued(model=FLUX)
    eventually(lambda: workers.running() == (1, 0))
    before = two.value(seen, its_id)
    eventually(lambda: two.value(seen, its_id) > before)  # a beat has it look for work, in vain
    other = workers.start(WORKER_POLL_SECONDS=60)
    eventually(lambda: two.value("select every(asleep) from private.workers"))
    workers.until_silent(two)
    first = "update private.workers set seen_at = now() + interval '10 seconds' where id = %s"
    two.execute(first, its_id)

    workers.done("two", within=2)

    workers.logged_of(other, "two", r"job\.completed")


# --- one cell that is away, slow, or of another release ---


def test_a_cell_that_hangs_holds_up_no_other_though_there_is_one_slot_and_is_taken_up_again(
    workers,
):
    workers.start(WORKER_SLOTS=1, PREVIEW_SECONDS=0.05)

    with workers.proxies["two"].stalled():
        waiting = workers.users["two"].enqueued(params=SMALL)
        began = time.monotonic()
        while time.monotonic() - began < 3:
            workers.done("home", within=4)
    workers.made("two", waiting)
    workers.done("two", within=10)


def test_jobs_of_a_cell_that_is_away_keep_no_slot_and_end_when_it_is_back(workers):
    process = workers.start(WORKER_SLOTS=1, PREVIEW_SECONDS=1)
    job = workers.users["two"].enqueued(params=SMALL)
    workers.logged_of(process, "two", rf"job\.claimed job={job}")

    with workers.proxies["two"].stalled():
        workers.done("home", within=worker.AWAY_SECONDS + 5)
        workers.done("home", within=4)
    workers.made("two", job)

    assert process.log.count(f"job.completed job={job}") == 1


@pytest.mark.parametrize("fault", ["refusing", "stalled"])
def test_who_starts_while_a_cell_is_away_works_for_the_others_and_takes_it_up_when_it_is_back(
    workers, fault
):
    with getattr(workers.proxies["two"], fault)():
        process = workers.launch()
        workers.done("home", within=8)
        assert process.log.count("worker.started") == 1
    workers.done("two", within=30)

    assert process.stop() == 0


def test_a_cell_that_is_cut_off_meanwhile_is_taken_up_again_by_the_same_worker(workers):
    process = workers.start()

    with workers.proxies["two"].refusing():  # and cut off
        waiting = workers.users["two"].enqueued(params=SMALL)
        workers.logged_of(process, "two", r"listen\.lost")
        workers.done("home", within=4)
    workers.made("two", waiting)

    assert process.log.count("worker.started") == len(CELLS)
    assert process.stop() == 0


def test_a_cell_of_another_release_whose_answers_nobody_expects_is_tried_again(workers):
    two, process = workers.dbs["two"], workers.start()
    two.execute("alter function private.claim_jobs(bigint, integer, text[]) rename to old")
    two.execute(
        "create function private.claim_jobs(bigint, integer, text[]) returns table (news text)"
        " language sql as $$ select 'news' $$"
    )
    waiting = workers.users["two"].enqueued(params=SMALL)

    workers.logged_of(process, "two", r"worker\.crashed")
    workers.done("home", within=4)
    two.execute("drop function private.claim_jobs(bigint, integer, text[])")
    two.execute("alter function private.old(bigint, integer, text[]) rename to claim_jobs")

    workers.made("two", waiting)
    assert process.stop() == 0


def test_a_cell_with_another_role_is_refused_loudly_and_only_if_all_are_the_worker_ends(workers):
    workers.db.execute("create role stranger login password 'unknown'")
    strange = "stranger:unknown"
    try:
        one = workers.launch(DATABASE_URL=workers.url(two=strange))
        one.logged(r"ERROR cell=stranger@127.\S+ worker\.refused DATABASE_URL: its role")
        workers.done("home", within=8)
        assert one.stop() == 0
        none = workers.launch(DATABASE_URL=workers.url(home=strange, two=strange))

        assert none.wait() == 2
        assert none.log.count("worker.refused") == 2
    finally:
        workers.db.execute("drop role stranger")


# --- the end, and what is told ---


def test_a_stop_hands_back_the_jobs_of_all_cells(workers):
    jobs = [(cell, user.enqueued(model=FLUX)) for cell, user in workers.users.items()]
    process = workers.start(WORKER_GRACE_SECONDS=0)
    eventually(lambda: workers.running() == (1, 1))

    assert process.stop() == 0

    query = "select status from public.generations where id = %s"
    assert [workers.dbs[cell].value(query, job) for cell, job in jobs] == ["queued", "queued"]
    for db in workers.dbs.values():
        assert db.value("select count(*) from private.workers") == 0
        assert db.value("select attempt from private.ready_jobs") == 0


def test_a_stop_hands_back_jobs_at_once_though_another_cell_hangs(workers):
    job = workers.users["home"].enqueued(model=FLUX)
    process = workers.start(WORKER_GRACE_SECONDS=0)
    eventually(lambda: workers.running() == (1, 0))

    with workers.proxies["two"].stalled():
        process.signal(signal.SIGTERM)
        workers.until(job, "queued", within=4)


def test_a_second_signal_ends_it_at_once(workers):
    workers.users["two"].enqueued(model=FLUX)
    process = workers.start()
    eventually(lambda: workers.running() == (0, 1))

    process.signal(signal.SIGTERM)
    process.logged(r"worker\.stopping running=1")
    process.signal(signal.SIGTERM)

    assert process.wait(within=2) == 3


def test_the_watchdog_is_fed_while_any_cell_is_well_and_starves_when_all_hang(workers):
    address = f"@darkroom-cells-{os.getpid()}"
    manager = Manager(address)
    try:
        process = workers.start(NOTIFY_SOCKET=address, WORKER_WATCHDOG_SECONDS=8)
        works = r"worker \d+: 0 of 4 slots busy, is woken by NOTIFY"
        names = {cell: re.escape(workers.name(cell)) for cell in CELLS}
        both = (f"STATUS={names[a]}: {works}; {names[b]}: {works}" for a, b in (CELLS, CELLS[::-1]))
        manager.until(f"({'|'.join(both)})")

        with workers.proxies["two"].stalled():
            manager.until(rf"STATUS=.*{names['two']}: no answer.*", within=20)
            manager.until(rf"STATUS=.*{names['home']}: {works}.*")
            manager.until_fed(3)
            assert process.is_running()
            with workers.proxies["home"].stalled():
                assert process.wait(within=90) == 1  # by itself, as no systemd ends it
    finally:
        manager.socket.close()


def test_a_check_says_which_database_it_speaks_of(workers, capsys):
    def check(**changes: str) -> tuple[int, list[str]]:
        settings = worker.Settings(workers.environment | changes)
        code, said = asyncio.run(worker.check(settings)), capsys.readouterr().out
        assert [each for each in settings.secrets if each in said] == []
        return code, said.splitlines()

    code, lines = check()
    assert code == 0
    for name in map(workers.name, CELLS):
        parts = [line.split()[1] for line in lines if f"  {name}: " in line]
        assert parts[:1] + parts[-1:] == ["database", "listen"]
    assert [line.split()[:2] for line in lines[-2:]] == [["ok", "storage"], ["ok", "replicate"]]

    no_claims = "revoke all on function private.claim_jobs from darkroom_worker"
    workers.dbs["two"].execute(no_claims)
    code, lines = check()
    of_two = f"wrong  database   {workers.name('two')}: role darkroom_worker may not call"
    assert code == 1
    assert [line.startswith(of_two) for line in lines if line.startswith("wrong")] == [True]
    assert any(line.startswith(f"ok     database   {workers.name('home')}: ") for line in lines)

    with workers.proxies["home"].refusing():
        code, lines = check()
        wrong = [
            line for line in lines if line.startswith("wrong") and workers.name("home") in line
        ]
        assert (code, len(wrong)) == (1, 1)


# --- the setting ---


ONE, OTHER = "postgresql://darkroom_worker:4711-secret@one:6543/a", "postgres://u:0815-secret@b/c"


def test_addresses_stand_on_a_line_each_or_on_one():
    for between in (" ", "\n", " \r\n  "):
        settings = worker.Settings(ENVIRONMENT | {"DATABASE_URL": ONE + between + OTHER + "\n"})

        assert settings.databases == {"one:6543/a": ONE, "u@b:5432/c": OTHER}
        assert {ONE, OTHER, "4711-secret", "0815-secret"} < set(settings.secrets)
    assert worker.Settings(ENVIRONMENT | {"DATABASE_URL": ONE}).databases == {"": ONE}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (" \n ", "not a postgres"),
        (f"{ONE} second", r"not a postgres\S+ address, or several with spaces between$"),
        (f"{ONE} {OTHER.replace('u:', 'u@')}", "percent-encoded"),
        (f"{ONE} {ONE.replace('4711', '4712')}?sslmode=require", "the same database twice"),
        (f"{ONE},{OTHER}", "percent-encoded"),
    ],
)
def test_addresses_that_cannot_be_used_are_refused_without_being_shown(value, said):
    with pytest.raises(worker.ConfigError, match=f"^DATABASE_URL: .*{said}") as refusal:
        worker.Settings(ENVIRONMENT | {"DATABASE_URL": value})

    assert "secret" not in str(refusal.value)
