"""Everything at once: whatever order things happen in, the books balance."""

import functools
import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
from actors import Refusal, Service, User, Worker, outcome, together
from database import Database, assert_books_balance

CODES = ["moderated", "provider_busy", "provider_error", "internal", "E1234"]
EXPECTED = {"done", "DR001", "PT402", "PT409", "PT429", "PT503"}
EXPECTED |= {"22023"}  # cancel_job, and nobody asked for it
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
    """Enqueues, at times with a key used before; cancels and retries, alone or in batches."""

    def __init__(self, db: Database, seed: str, user: User) -> None:
        super().__init__(db, seed)
        self.user = user.on_another_device()
        self.jobs: list[str] = []
        self.batches: list[str] = []

    def run(self) -> None:
        ways = [self.enqueue, self.enqueue, self.enqueue_batch, self.cancel, self.cancel]
        ways += [self.cancel_batch, self.retry, self.retry]
        for _ in range(STEPS):
            self.random.choice(ways)()

    def asked(self) -> dict[str, object]:
        """Choose how many images, and whether the request has a key."""
        images = {"num_outputs": self.random.randint(1, 4)}
        key = self.random.choice([None, str(self.random.randint(1, 20))])
        return {"params": images, "idempotency_key": key}

    def enqueue(self) -> None:
        answer = self.do(functools.partial(self.user.enqueue, **self.asked()))
        self.jobs += [answer["job_id"]] if isinstance(answer, dict) else []

    def enqueue_batch(self) -> None:
        prompts = ["one", "two", "three"][: self.random.randint(1, 3)]
        answer = self.do(functools.partial(self.user.enqueue_batch, prompts, **self.asked()))
        if isinstance(answer, dict):
            self.batches.append(answer["batch_id"])
            self.jobs += answer["job_ids"]

    def cancel(self) -> None:
        if self.jobs:
            job_id = self.random.choice(self.jobs[-10:])
            self.do(lambda: self.user.cancel_generation(job_id))

    def cancel_batch(self) -> None:
        if self.batches:
            batch_id = self.random.choice(self.batches[-3:])
            self.do(lambda: self.user.cancel_batch(batch_id))

    def retry(self) -> None:
        if self.jobs:
            job_id = self.random.choice(self.jobs)
            answer = self.do(lambda: self.user.retry_generation(job_id))
            self.jobs += [answer["job_id"]] if isinstance(answer, dict) else []


class OperatorMonkey(Monkey):
    """Has failed jobs made again, and gives credits, at times twice."""

    def __init__(self, db: Database, seed: str, users: list[User]) -> None:
        super().__init__(db, seed)
        self.service, self.users = Service(db), users

    def run(self) -> None:
        for _ in range(STEPS // 4):
            code = self.random.choice(CODES[:-1])
            at_most = self.random.randint(1, 20)
            self.do(lambda c=code, n=at_most: self.service.redrive_failed(c, "today", at_most=n))
            user, gift = self.random.randrange(3), self.random.randint(1, 5)
            self.do(lambda u=user, g=gift: self.service.grant_credits(self.users[u], 5, f"{u} {g}"))


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
            latest = {job.job_id: job for job in sorted(held, key=lambda job: job.token)}
            self.do(functools.partial(self.worker.heartbeat, *latest.values()))

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
                lambda: self.worker.checkpoint(job, f"prediction-{job.id}"),
                lambda: self.worker.begin_create(job),
                lambda: self.worker.cancel_job(job),
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
    while db.value("select count(*) from private.live_jobs"):
        assert time.monotonic() < deadline, "some job never ends"
        db.pass_time("61 seconds")
        worker.recover_stale_jobs()
        for job in worker.claim_jobs(50):
            worker.complete_job(job)


@pytest.mark.parametrize("refund_percent", [100, 50])
@pytest.mark.parametrize(
    "seed", ["a", *(pytest.param(each, marks=pytest.mark.long) for each in "bc")]
)
def test_the_books_balance_whatever_happens_in_whatever_order(db, seed, refund_percent):
    db.lift_limits()
    db.execute(
        "update private.settings set retry_base = '0', welcome_credits = 150,"
        " running_cancel_refund_percent = %s, breaker_pause = '10 milliseconds',"
        " breaker_pause_cap = '10 milliseconds'",
        refund_percent,
    )
    users = [User(db) for _ in range(3)]
    monkeys: list[Monkey] = [
        *(UserMonkey(db, f"{seed} user {n}", users[n % 3]) for n in range(5)),
        *(WorkerMonkey(db, f"{seed} worker {n}") for n in range(4)),
        *(Reaper(db, f"{seed} reaper {n}") for n in range(2)),
        *(OperatorMonkey(db, f"{seed} operator {n}", users) for n in range(2)),
    ]

    together([monkey.run for monkey in monkeys])
    assert_books_balance(db)
    drain(db)

    assert_books_balance(db)
    answers = sum((monkey.answers for monkey in monkeys), Counter())
    assert set(answers) <= EXPECTED
    assert answers["DR001"] > 0  # leases really were lost
    ends = "select count(distinct outcome) from private.attempts"
    assert db.value(ends) >= 4  # as a rule all five; threads go as they like
    repeated = "select count(*) from public.generations where retry_of is not null"
    assert db.value(repeated) > 0
