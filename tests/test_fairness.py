"""Fairness, measured: whose job is next when everybody wants something.

A job's fair_key is what its user had asked for before, in virtual time: price / weight for each
job, counted from the queue's present. The smallest is claimed next.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from actors import PREVIEW, User, Worker
from database import Database, Server

HEAVY_JOBS = 10_000
SHARE_CLAIMS = 1_000


def enqueue_many(user: User, count: int) -> None:
    """Enqueue in batches: each job is charged and gets its fair_key by itself."""
    for _ in range(count // 100):
        user.call("public.enqueue_batch", model=PREVIEW, prompts=["a lighthouse"] * 100)


def ready_for_all(db: Database) -> Database:
    """Lift limits and give everybody new enough credits."""
    db.lift_limits()
    db.execute("update private.plans set max_batch = 100")
    db.execute("update private.settings set welcome_credits = 1000000")
    return db


@pytest.fixture(scope="module")
def piled(server: Server, template: str) -> Iterator[tuple[Database, str]]:
    """A database where one user has 10,000 jobs queued, and the user's id."""
    db = ready_for_all(server.create(template))
    heavy = User(db)
    enqueue_many(heavy, HEAVY_JOBS)
    db.execute("analyze")
    db.close()
    yield db, heavy.id
    server.drop(db)


@pytest.fixture
def pile(server: Server, piled: tuple[Database, str]) -> Iterator[tuple[Database, User]]:
    """A copy of that database for one test, and the user."""
    template, heavy_id = piled
    db = server.create(template.name)
    yield db, User(db, heavy_id)
    server.drop(db)


def claims_until(worker: Worker, job_id: str, at_most: int, after: Callable[[], object]) -> int:
    """Claim and complete one by one, doing something after each; return which claim it was."""
    for number in range(1, at_most + 1):
        job = worker.claimed()
        worker.complete_job(job)
        if job.id == job_id:
            return number
        after()
    raise AssertionError(f"not claimed within {at_most}")


def test_a_users_first_job_is_next_or_second_behind_ten_thousand_of_another(pile):
    db, heavy = pile
    worker = Worker(db, slots=1)
    worker.complete_job(worker.claimed())
    running = worker.claimed()
    assert str(running.user_id) == heavy.id

    newcomer = User(db)
    job_id = newcomer.enqueued()

    assert newcomer.get_job_status(job_id)["queue_position"] <= 1
    worker.complete_job(running)
    assert claims_until(worker, job_id, 2, after=lambda: None) <= 2


def test_so_it_is_in_the_middle_of_the_pile_and_for_each_of_several_users(pile):
    db, _ = pile
    worker = Worker(db, slots=1)
    for _ in range(300):
        worker.claimed()

    jobs = [User(db).enqueued() for _ in range(5)]
    claimed = [worker.claimed().id for _ in range(6)]

    assert set(jobs) < set(claimed)


def test_the_jobs_of_a_newcomer_alternate_with_the_pile(pile):
    db, heavy = pile
    worker = Worker(db)
    newcomer = User(db)
    for _ in range(10):
        newcomer.enqueue()

    claimed = Counter(str(worker.claimed().user_id) for _ in range(20))

    assert claimed[newcomer.id] in (9, 10, 11)
    assert claimed[heavy.id] == 20 - claimed[newcomer.id]


def test_a_paid_user_gets_the_configured_share_of_a_thousand_claims(db):
    ready_for_all(db)
    free, paid = User(db), User(db).has_paid()
    enqueue_many(free, 500)
    enqueue_many(paid, SHARE_CLAIMS)
    worker = Worker(db)

    claimed = Counter(
        str(job.user_id) for _ in range(SHARE_CLAIMS // 10) for job in worker.claim_jobs(10)
    )

    expected = SHARE_CLAIMS * 4 / (4 + 1)
    assert abs(claimed[paid.id] - expected) <= 0.1 * expected
    assert abs(claimed[free.id] - (SHARE_CLAIMS - expected)) <= 0.1 * (SHARE_CLAIMS - expected)


def test_a_job_of_four_images_counts_as_four(db):
    ready_for_all(db)
    few, many = User(db), User(db)
    for _ in range(50):
        few.enqueue(params={"num_outputs": 4})
    enqueue_many(many, 200)
    worker = Worker(db)

    claimed = Counter(str(worker.claimed().user_id) for _ in range(100))

    assert claimed[few.id] == pytest.approx(20, abs=2)


def test_a_free_user_waits_a_bounded_time_while_paid_ones_never_stop(db):
    """Bound: each paid user goes first with weight ratio + 1 jobs at most."""
    ready_for_all(db)
    paid = [User(db).has_paid() for _ in range(10)]
    for user in paid:
        for _ in range(3):
            user.enqueue()
    worker = Worker(db)
    job_id = User(db).enqueued()
    stream = iter(paid * 100)

    number = claims_until(
        worker, job_id, at_most=10 * (4 + 1) + 1, after=lambda: next(stream).enqueue()
    )

    assert number > 10  # the paid users did have their advantage


def test_a_free_user_waits_a_bounded_time_while_new_paid_users_keep_coming(db):
    """Two come for each claim. Bound: virtual time makes four steps before the free user's job;
    those who come within a step share the next, so at most 1 + 2 + 4 + 8 + 16 go first.
    """
    ready_for_all(db)
    worker = Worker(db)
    User(db).has_paid().enqueue()
    job_id = User(db).enqueued()

    def two_come() -> None:
        for _ in range(2):
            User(db).has_paid().enqueue()

    claims_until(worker, job_id, at_most=1 + 2 + 4 + 8 + 16 + 1, after=two_come)


def test_retries_of_one_user_go_first_but_not_for_ever(db):
    """Bound: the attempts left of the job that was claimed when the other came, and one more."""
    ready_for_all(db)
    failing, worker = User(db), Worker(db)
    for _ in range(10):
        failing.enqueue()
    worker.fail_job(worker.claimed(), "internal", retry_after=0)
    job_id = User(db).enqueued()

    claimed = []
    while job_id not in claimed:
        job = worker.claimed()
        claimed.append(job.id)
        worker.fail_job(job, "internal", retry_after=0)

    assert len(claimed) <= 2 + 1 + 1
