"""Everything at once: whatever order things happen in, the books balance."""

import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
from actors import Refusal, User, Worker, outcome, together
from database import Database, assert_books_balance

CODES = ["moderated", "provider_busy", "provider_error", "internal", "E1234"]
EXPECTED = {"DR001", "PT402", "PT409", "PT429", "PT503"}
STEPS = 60


class Monkey:
    """One thread that does random things as one actor, and counts how each was answered."""

    def __init__(self, db: Database, seed: str) -> None:
        self.db = db
        self.random = random.Random(seed)
        self.answers: Counter[str] = Counter()

    def do(self, call: Callable[[], object]) -> object:
        """Make a call and count its outcome."""
        answer = outcome(call)
        self.answers[answer.code if isinstance(answer, Refusal) else "done"] += 1
        return answer


class UserMonkey(Monkey):
    """Enqueues, at times with a key used before."""

    def __init__(self, db: Database, seed: str, user: User) -> None:
        super().__init__(db, seed)
        self.user = user.on_another_device()

    def run(self) -> None:
        for _ in range(STEPS):
            images = self.random.randint(1, 4)
            key = self.random.choice([None, str(self.random.randint(1, 20))])
            self.do(
                lambda n=images, k=key: self.user.enqueue(
                    params={"num_outputs": n}, idempotency_key=k
                )
            )


class WorkerMonkey(Monkey):
    """Claims and ends jobs in every way, or forgets them; sometimes ends one that is long lost."""

    def __init__(self, db: Database, seed: str) -> None:
        super().__init__(db, seed)
        self.worker = Worker(db)

    def run(self) -> None:
        held = []
        for _ in range(STEPS):
            held += self.worker.claim_jobs(self.random.randint(1, 3))
            self.random.shuffle(held)
            for job in held[: self.random.randint(0, len(held))]:
                self.do(self.ending_of(job))
            held = held[-8:]
            self.do(lambda jobs=held: self.worker.heartbeat(*jobs) if jobs else None)

    def ending_of(self, job) -> Callable[[], object]:
        """Choose how this attempt ends, or that nothing happens yet."""
        images = self.random.randint(1, job.image_count)
        code = self.random.choice(CODES)
        return self.random.choice(
            [
                lambda: self.worker.complete_job(job, images=images),
                lambda: self.worker.complete_job(job, images=job.image_count),
                lambda: self.worker.fail_job(job, code),
                lambda: self.worker.release_job(job),
                lambda: self.worker.checkpoint(job, "prediction"),
            ]
        )


class Reaper(Monkey):
    """Lets leases and deadlines run out, and recovers."""

    def __init__(self, db: Database, seed: str) -> None:
        super().__init__(db, seed)
        self.worker = Worker(db)
        self.connection = db.connect()

    def run(self) -> None:
        for _ in range(STEPS):
            clock = self.random.choice(["lease_until", "lease_until", "deadline_at"])
            self.connection.execute(
                f"update private.running_jobs set {clock} = now() - interval '1 second'"
                " where job_id in (select job_id from private.running_jobs"
                "   order by random() limit 2 for update skip locked)"
            )
            self.do(lambda: self.worker.recover_stale_jobs(self.random.randint(1, 20)))


def drain(db: Database) -> None:
    """Let everything that is left come to its end."""
    worker = Worker(db)
    deadline = time.monotonic() + 30
    while db.value("select sum(active_jobs) from public.entitlements"):
        assert time.monotonic() < deadline, "some job never ends"
        db.pass_time("61 seconds")
        worker.recover_stale_jobs()
        for job in worker.claim_jobs(50):
            worker.complete_job(job)


@pytest.mark.parametrize("seed", ["a", "b", "c"])
def test_the_books_balance_whatever_happens_in_whatever_order(db, seed):
    db.lift_limits()
    db.execute("update private.settings set retry_base = '0', welcome_credits = 150")
    users = [User(db) for _ in range(3)]
    monkeys: list[Monkey] = [
        *(UserMonkey(db, f"{seed} user {n}", users[n % 3]) for n in range(5)),
        *(WorkerMonkey(db, f"{seed} worker {n}") for n in range(4)),
        *(Reaper(db, f"{seed} reaper {n}") for n in range(2)),
    ]

    together([monkey.run for monkey in monkeys])
    assert_books_balance(db)
    drain(db)

    assert_books_balance(db)
    answers = sum((monkey.answers for monkey in monkeys), Counter())
    assert set(answers) - {"done"} <= EXPECTED
    assert answers["DR001"] > 0  # leases really were lost
