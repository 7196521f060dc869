"""No wake-up is lost: a job that comes while a worker goes to sleep never waits for the backstop.

What `Worker._sleep` of worker.py does is done here over plain connections, so that thousands of
races fit into seconds. WAKE_UP_RACES=5000, of each kind, for the long form.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
from actors import Worker

RACES = int(os.environ.get("WAKE_UP_RACES", "500"))
SECOND_LOOK_SECONDS = (0.05, 0.2)  # as in worker.py
BACKSTOP_SECONDS = 2.0
LATE_SECONDS = 0.002  # at most, that one is behind the other

T = TypeVar("T")


class Sleeper:
    """A worker that has nothing to do, and whose heart beats at times."""

    def __init__(self, worker: Worker, chance: random.Random) -> None:
        self.worker, self.chance = worker.listening(), chance
        self.heart = worker.db.connect()
        self.heart.execute("set role darkroom_worker")
        self.beaten, self.looked = threading.Event(), threading.Event()

    def beat(self) -> None:
        """Beat over another connection, then look for work: a job may have met the row locked."""
        query = "select private.heartbeat(%s, '{}', '{}', '{}')"
        self.heart.execute(query, [self.worker.id])
        self.beaten.set()

    def sleep_until_there_is_a_job(self) -> str:
        """Go to sleep, look twice more, wait; return what found the job."""
        while True:
            self.beaten.clear()
            self.worker.sleep()
            if self.worker.claim_jobs():
                return "first look"
            self.looked.set()
            cause = self._wait(self.chance.uniform(*SECOND_LOOK_SECONDS))
            if self.worker.claim_jobs():
                return cause or "second look"
            if not cause and not (cause := self._wait(BACKSTOP_SECONDS)):
                return "backstop"
            if self.worker.claim_jobs():
                return cause

    def _wait(self, seconds: float) -> str:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for _ in self.worker.connection.notifies(timeout=0.004, stop_after=1):
                return "NOTIFY"
            if self.beaten.is_set():
                return "beat"
        return ""


class Race:
    """What happens at nearly the same moment as a worker goes to sleep, each at its own."""

    def __init__(self, pool: ThreadPoolExecutor, chance: random.Random) -> None:
        self.pool, self.chance = pool, chance

    def run(self, sleeper: Sleeper, *others: Callable[[], object]) -> str:
        """Return what found the job."""
        start = threading.Barrier(1 + len(others))

        def late(call: Callable[[], T], pause: float) -> T:
            start.wait()
            time.sleep(pause)
            return call()

        def pause() -> float:
            return self.chance.choice([0, self.chance.uniform(0, LATE_SECONDS)])

        running = [self.pool.submit(late, call, pause()) for call in others]
        found = late(sleeper.sleep_until_there_is_a_job, pause())
        for each in running:
            each.result()
        return found


@pytest.mark.parametrize("beats", [False, True], ids=["", "while the heart beats"])
def test_a_job_never_waits_for_the_backstop(db, alice, worker, beats):
    db.lift_limits()
    user, chance = alice.has(credits=RACES), random.Random(f"wake-up {beats}")
    sleeper = Sleeper(worker, chance)

    with ThreadPoolExecutor(2) as pool:
        race = Race(pool, chance)
        others = [user.enqueue, *([sleeper.beat] if beats else [])]
        found = Counter(race.run(sleeper, *others) for _ in range(RACES))

    assert found["backstop"] == 0, found
    assert found["first look"] and found["NOTIFY"], found  # else nothing raced


def test_a_job_that_saw_the_worker_awake_is_found_by_the_second_look(alice, worker):
    sleeper = Sleeper(worker, random.Random(1))

    with ThreadPoolExecutor(1) as pool:
        with alice.acting() as connection:
            connection.execute("select public.enqueue_generation('darkroom/preview', 'a cat')")
            found = pool.submit(sleeper.sleep_until_there_is_a_job)
            assert sleeper.looked.wait(5)  # what is not committed yet was not there

        assert found.result() == "second look"
