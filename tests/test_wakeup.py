"""NOTIFY wakes one sleeper for each job, and no wake-up is lost.

What `Worker._sleep` of worker.py does is done here over plain connections, so that many races fit
into a second. WAKE_UP_RACES=5000, of each kind, for the long form.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from actors import Worker, refused

RACES = int(os.environ.get("WAKE_UP_RACES", "300"))
SECOND_LOOK_SECONDS = (0.05, 0.2)  # as in worker.py
BACKSTOP_SECONDS = 2.0
LATE_SECONDS = 0.002  # at most, that one is behind the other


@pytest.fixture
def sleepers(db):
    """Four workers that sleep."""
    workers = [Worker(db).listening() for _ in range(4)]
    for worker in workers:
        worker.sleep()
    return workers


def woken(workers: list[Worker]) -> list[int]:
    """How often each was woken, with nothing to read."""
    told = [worker.wake_ups() for worker in workers]
    assert {payload for each in told for payload in each} <= {""}
    return [len(each) for each in told]


def test_each_job_wakes_one_sleeper_once_and_nobody_who_is_awake(alice, worker, sleepers):
    worker.listening().db.lift_limits()
    assert worker.channel == f"darkroom_worker_{worker.id}"

    alice.enqueue()
    alice.enqueue()
    assert sorted(woken([worker, *sleepers])) == [0, 0, 0, 1, 1]

    alice.enqueue_batch(["one", "two", "three"])
    assert sorted(woken([worker, *sleepers])) == [0, 0, 0, 1, 1]  # the others are awake by now

    sleepers[0].sleep()
    sleepers[0].claimed()
    alice.enqueue()
    assert woken(sleepers) == [0] * 4  # who has claimed is awake, too


def test_what_comes_back_wakes_a_sleeper(db, alice, service, worker):
    sleeper = Worker(db).listening()
    alice.enqueue()
    job = worker.claimed()

    for comes_back in (
        lambda: worker.release_job(job),
        lambda: service.resume_model("darkroom/preview"),
    ):
        sleeper.sleep()
        comes_back()
        assert sleeper.wake_ups() == [""]


def test_what_is_rolled_back_or_refused_wakes_nobody(alice, sleepers):
    with alice.connection.transaction(force_rollback=True):
        alice.enqueue()
    with refused("PT400"):
        alice.enqueue("")

    assert woken(sleepers) == [0] * 4


def test_who_was_heard_of_last_is_woken_and_nobody_who_is_silent_or_gone(db, alice, sleepers):
    sleepers[1].heartbeat()
    alice.enqueue()
    assert woken(sleepers) == [0, 1, 0, 0]

    sleepers[0].unregister_worker()
    db.pass_time("61 seconds")
    alice.enqueue()
    assert woken(sleepers) == [0] * 4


def test_a_worker_that_finds_nothing_stays_asleep(db, worker):
    worker.sleep()

    worker.claim_jobs()

    assert db.value("select asleep from private.workers") is True


def test_a_worker_somebody_is_waking_does_not_hold_up_others(alice, bob, worker):
    worker.sleep()

    with alice.connection.transaction():
        alice.enqueue()
        bob.enqueue()

    assert len(worker.claim_jobs(2)) == 2


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


@pytest.mark.parametrize("beats", [False, True], ids=["", "while the heart beats"])
def test_a_job_never_waits_for_the_backstop(db, alice, worker, beats):
    db.lift_limits()
    user, chance = alice.has(credits=RACES), random.Random(f"wake-up {beats}")
    sleeper = Sleeper(worker, chance)

    def late(start: threading.Barrier, call: Callable[[], str]) -> str:
        start.wait()
        time.sleep(chance.choice([0, chance.uniform(0, LATE_SECONDS)]))
        return call()

    def race(pool: ThreadPoolExecutor) -> str:
        others = [user.enqueue, *([sleeper.beat] if beats else [])]
        start = threading.Barrier(1 + len(others))
        running = [pool.submit(late, start, call) for call in others]
        found = late(start, sleeper.sleep_until_there_is_a_job)
        for each in running:
            each.result()
        return found

    with ThreadPoolExecutor(2) as pool:
        found = Counter(race(pool) for _ in range(RACES))

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
