"""NOTIFY wakes one sleeper for each job, and no wake-up is lost."""

from collections.abc import Callable

import pytest
from actors import Worker, refused


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


def test_who_is_woken_without_a_free_slot_has_another_woken_while_a_job_is_ready(alice, sleepers):
    alice.enqueue()
    (first,) = [each for each in sleepers if each.wake_ups()]

    assert first.claim_jobs(0) == []
    assert sum(woken(sleepers)) == 1 and first.wake_ups() == []
    alice.cancel_generation(alice.list_active_jobs()[0]["job_id"])
    first.claim_jobs(0)

    assert sum(woken(sleepers)) == 0


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


KEYS = [[], ["FAL_KEY"], ["REPLICATE_API_TOKEN", "FAL_KEY"]]


@pytest.mark.parametrize(
    ("change", "woken_at_most"),
    [
        ("secret = null", {0, 1, 2}),
        ("secret = 'FAL_KEY'", {1, 2}),
        ("secret = 'REPLICATE_API_TOKEN'", {2}),
        ("is_active = false", set()),
    ],
)
def test_only_who_can_make_a_job_is_woken_for_it(db, alice, service, change, woken_at_most):
    """By a new job, by one that comes back, and by a pause that ends."""
    workers = [Worker(db, keys=keys).listening() for keys in KEYS]
    db.execute(f"update private.providers set {change} where name = 'preview'")

    def wakes(event: Callable[[], object]) -> set[int]:
        for each in workers:
            each.sleep()
        event()
        return {place for place, times in enumerate(woken(workers)) if times}

    db.lift_limits()
    by_new_ones = wakes(lambda: alice.enqueue_batch(["one", "two", "three"]))
    by_resume = wakes(lambda: service.resume_model("preview"))

    assert by_new_ones == woken_at_most
    assert by_resume <= woken_at_most and bool(by_resume) == bool(woken_at_most)
    if job := next((job for each in workers for job in each.claim_jobs(1)), None):
        assert wakes(lambda: workers[0].release_job(job)) <= woken_at_most


# However an enqueue and a worker that goes to sleep meet, a look finds the job where NOTIFY does
# not: the worker looks when it has gone to sleep, soon again, and after each beat of its heart.


def test_a_job_that_came_before_is_found_by_the_first_look(alice, worker):
    alice.enqueue()

    worker.sleep()

    assert worker.claimed()


def test_a_job_whose_enqueue_saw_the_worker_awake_is_found_by_the_second_look(alice, worker):
    worker.listening()
    with alice.acting() as connection:
        connection.execute("select public.enqueue_generation('darkroom/preview', 'a cat')")
        worker.sleep()
        assert worker.claim_jobs() == []  # what is not committed yet was not there

    assert worker.wake_ups() == []
    assert worker.claimed()


def test_a_job_that_met_the_worker_while_it_beat_is_found_by_the_look_after_the_beat(
    alice, bob, worker
):
    worker.listening().sleep()
    heart = worker.db.connect()
    with heart.transaction():
        heart.execute("select private.heartbeat(%s, '{}', '{}', '{}')", [worker.id])
        alice.enqueue()  # does not wait for the row

    assert worker.wake_ups() == []
    bob.enqueue()
    assert worker.wake_ups() == [""]  # a worker that finds nothing would still be asleep
    assert len(worker.claim_jobs(2)) == 2
