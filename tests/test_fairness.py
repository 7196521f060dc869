"""Fairness, measured: whose job is next when everybody wants something.

A job's fair_key is what its user had asked for before, in virtual time: price / weight for each
job, counted from the queue's present. The smallest is claimed next.
"""

from collections import Counter
from collections.abc import Callable

import pytest
from actors import User, Worker
from database import Database

HEAVY_JOBS = 2_000


@pytest.fixture
def fair(db: Database) -> Database:
    """A database without limits in which everybody new has enough credits."""
    db.lift_limits()
    db.execute("update private.plans set max_batch = 100")
    db.execute("update private.settings set welcome_credits = 1000000")
    return db


def enqueue_many(user: User, count: int) -> None:
    """Enqueue in batches: each job is charged and gets its fair_key by itself."""
    for _ in range(count // 100):
        user.enqueue_batch(["a lighthouse"] * 100)


def claims_until(worker: Worker, job_id: str, at_most: int, after: Callable[[], object]) -> int:
    """Claim and complete one by one, doing something after each; return which claim it was."""
    for number in range(1, at_most + 1):
        job = worker.claimed()
        worker.complete_job(job)
        if job.id == job_id:
            return number
        after()
    raise AssertionError(f"not claimed within {at_most}")


def test_a_users_first_job_is_next_or_second_behind_a_pile_of_another_and_then_they_alternate(fair):
    heavy, worker = User(fair), Worker(fair)
    enqueue_many(heavy, HEAVY_JOBS)
    newcomer = User(fair)

    job_id = newcomer.enqueued()

    assert newcomer.get_job_status(job_id)["queue_position"] <= 1
    assert claims_until(worker, job_id, 2, after=lambda: None) <= 2

    worker.claim_jobs(300)  # so it is in the middle of the pile, and for each of several
    jobs = [User(fair).enqueued() for _ in range(5)]
    assert set(jobs) < {worker.claimed().id for _ in range(6)}

    for _ in range(10):
        newcomer.enqueue()
    claimed = Counter(str(worker.claimed().user_id) for _ in range(20))
    assert claimed[newcomer.id] in (9, 10, 11)
    assert claimed[heavy.id] == 20 - claimed[newcomer.id]


def test_everybody_gets_a_share_by_plan_and_price(fair):
    free, paid, dear = User(fair), User(fair).has_paid(), User(fair)
    enqueue_many(free, 300)
    enqueue_many(paid, 1000)
    for _ in range(60):
        dear.enqueue(params={"num_outputs": 4})

    claimed = Counter(str(job.user_id) for job in Worker(fair).claim_jobs(1000))

    shares = {paid.id: 4, free.id: 1, dear.id: 1 / 4}
    for user_id, share in shares.items():
        assert claimed[user_id] == pytest.approx(1000 * share / sum(shares.values()), rel=0.1)


def test_a_free_user_waits_a_bounded_time_while_new_paid_users_keep_coming(fair):
    User(fair).has_paid().enqueue()
    job_id = User(fair).enqueued()

    # Two come for each claim. Virtual time makes four steps before the free user's job; those who
    # come within a step share the next, so at most 1 + 2 + 4 + 8 + 16 go first.
    def two_come() -> None:
        for _ in range(2):
            User(fair).has_paid().enqueue()

    claims_until(Worker(fair), job_id, at_most=1 + 2 + 4 + 8 + 16 + 1, after=two_come)
