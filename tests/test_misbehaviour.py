"""Random runs of misbehaviour: whatever happens, each job ends, is paid for once and bought once.

    MISBEHAVIOUR_RUNS=1000 .venv/bin/python -m pytest tests/test_misbehaviour.py

The seed is in the test's name and makes the same run again.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from fake_replicate import FakeReplicate
from misbehaviour import Run

RUNS = int(os.environ.get("MISBEHAVIOUR_RUNS") or 120)


@pytest.fixture(scope="module")
def tally() -> Counter[str]:
    """How often each end was met."""
    return Counter()


@pytest.fixture
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate() as fake:
        yield fake


@pytest.mark.parametrize("seed", range(RUNS))
def test_whatever_happens_a_job_ends_and_is_bought_and_charged_once(seed, db, stack, fake, tally):
    url = urlsplit(stack.worker_database_url)._replace(path=urlsplit(db.url).path)
    run = Run(seed, db, url.geturl(), fake)
    run.prepare()
    try:
        run.play()
        ends = run.judge()
    except BaseException:
        print(run.story())
        raise
    tally.update(ends)
    tally["runs"] += 1
    tally["killed runs"] += "killed" in run.fate.ends
    tally["canceled by a worker"] += len(run.canceled)


def test_the_runs_meet_every_end(tally):
    if tally["runs"] < 100:
        pytest.skip("too few runs")
    print(*sorted(tally.items()), sep="\n")

    ends = {"completed", "canceled", "moderated", "invalid_input"}
    ends |= {"provider_error", "result_lost", "timeout"}
    assert ends <= set(tally)
    assert tally["killed runs"] >= tally["runs"] * 0.4
