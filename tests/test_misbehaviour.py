"""Random runs of misbehaviour: whatever happens, each job ends, is paid for once and bought once.

    MISBEHAVIOUR_RUNS=1200 .venv/bin/python -m pytest tests/test_misbehaviour.py

A quarter as many are runs of strangers; of the 120 and 30 of `LONG=1 make test` a quarter is played
without it. The seed is in the test's name and makes the same run again.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from database import Database
from fake_replicate import FakeReplicate
from misbehaviour import Run, Strangers

from stack import Stack

RUNS = int(os.environ.get("MISBEHAVIOUR_RUNS") or 120)
SHORT = 30


@pytest.fixture(scope="module")
def tally() -> Counter[str]:
    """How often each end was met."""
    return Counter()


@pytest.fixture
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate() as fake:
        yield fake


def worker_url(db: Database, stack: Stack) -> str:
    """The address of the test's database for a worker."""
    path = urlsplit(db.url).path
    return urlsplit(stack.worker_database_url)._replace(path=path).geturl()


def played(run: Run) -> Counter[str]:
    """Play a run to its end, and judge it."""
    run.prepare()
    try:
        run.play()
        return run.judge()
    except BaseException:
        print(run.story())
        raise


def seeds(runs: int, short: int) -> list[Any]:
    """The runs' seeds, of which `make test` takes the first ones."""
    return [pytest.param(n, marks=[pytest.mark.long] * (n >= short)) for n in range(runs)]


@pytest.mark.parametrize("seed", seeds(RUNS, SHORT))
def test_whatever_happens_a_job_ends_and_is_bought_and_charged_once(seed, db, stack, fake, tally):
    run = Run(seed, db, worker_url(db, stack), fake)
    tally.update(played(run))
    tally["runs"] += 1
    tally["killed runs"] += "killed" in run.fate.ends
    tally["canceled by a worker"] += len(run.canceled)


@pytest.mark.parametrize("seed", seeds(RUNS // 4, SHORT // 4))
def test_nobody_gets_a_picture_made_from_anothers_source(seed, db, stack, fake):
    ends = played(Strangers(seed, db, worker_url(db, stack), fake))

    assert ends["completed"] + ends["canceled"] + ends["failed"] >= 2


@pytest.mark.long
def test_the_runs_meet_every_end(tally):
    if tally["runs"] < 100:
        pytest.skip("too few runs")
    print(*sorted(tally.items()), sep="\n")

    ends = {"completed", "canceled", "moderated", "invalid_input"}
    ends |= {"provider_error", "result_lost", "timeout"}
    assert ends <= set(tally)
    assert tally["killed runs"] >= tally["runs"] * 0.4
