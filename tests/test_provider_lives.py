"""Whatever is lost, and wherever a worker dies, a job is made once and from its own.

Two strangers, who may ask for the same, and a worker that decides nothing: it sends what
private.next_steps says to a provider's fake and hands the answer in, until chance strikes. Chance
is seeded; LIVES=250 tries that many seeds for each provider.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from actors import Job, User, Worker
from database import Database, assert_books_balance
from fake_providers import FAKES, FakeProvider
from psycopg.types.json import Jsonb
from test_worker_providers import add_models

LIVES = int(os.environ.get("LIVES", "8"))
CREATES = [  # what one may meet
    *({}, {}, {"ends": "failed"}, {"ends": "gone"}, {"failing_gets": 2}, {"answer": 429}),
    *({"answer": None, "stored": True, "hidden": 2}, {"answer": 500, "stored": True}),
    *({"answer": None, "stored": False}, {"answer": 500, "stored": False}),
]
MIXED_UP = {"is_mixed_up": True}  # noticed where we name the job


class Dead(Exception):
    """The worker's process ended here."""


class Run:
    """All claims of the two jobs, from the first to the end of both."""

    def __init__(self, db: Database, fake: FakeProvider, seed: int) -> None:
        self.db, self.fake, self.chance = db, fake, random.Random(seed)
        query = "select coalesce(secret, 'NO_KEY') from private.providers where name = %s"
        self.worker = Worker(db, 4, [db.value(query, fake.name)])
        self.http = httpx.Client(trust_env=False)
        self.rate = self.chance.choice([0, 0.03, 0.1, 0.2])  # of deaths
        self.history: list[str] = []
        self.creates: list[int] = []  # tokens of the claims that sent one
        self.stored: dict[str, str] = {}  # of each job, the output
        self.jobs: dict[str, tuple[User, str]] = {}
        for prompt in self.chance.choice([("the same", "the same"), ("one", "another")]):
            user = User(db).has(credits=9)
            self.jobs[user.enqueued(prompt, f"{fake.name}/draw")] = (user, prompt)
        for _ in range(8):
            of_fake = [MIXED_UP] if fake.name == "comfyui" else []
            fake.next(**self.chance.choice([*CREATES, *of_fake]))

    def to_the_end(self) -> None:
        for _ in range(30):
            self.db.execute("update private.ready_jobs set run_at = now()")
            self.db.execute("delete from private.breakers")
            for job in self.worker.claim_jobs(2):
                with suppress(Dead):
                    self.live(job)
            past = "update private.running_jobs set lease_until = now() - interval '1 second'"
            self.db.execute(past)
            self.worker.recover_stale_jobs()
            if {self.of(job, "status") for job in self.jobs} <= {"completed", "failed"}:
                return
        raise AssertionError("it has no end")

    def of(self, job: str, column: str) -> Any:
        return self.db.value(f"select {column} from public.generations where id = %s", job)

    def live(self, job: Job) -> None:
        """Do what a worker does with one claim."""
        step = self.next(job, None)
        while step["do"] == "send":
            answer = self.sent(job, step)
            said = {"step": step["step"], "memo": step["memo"], "provider": job.provider}
            step = self.next(job, said | answer)
        self.meet(f"{step['do']} {job.id}")
        metrics = step.get("metrics")
        if step["do"] == "store":
            (self.stored[job.id],) = step["outputs"]
            self.worker.complete_job(job, 1, metrics)
        else:
            assert step["do"] == "fail"
            self.worker.fail_job(job, step["code"], step["reason"], None, metrics)

    def next(self, job: Job, said: dict[str, Any] | None) -> Any:
        self.meet(f"next {job.id} {said}")
        query = "select step from private.next_steps(array[%s], array[%s], array[%s])"
        return self.db.value(query, job.job_id, job.token, Jsonb(said))

    def sent(self, job: Job, step: dict[str, Any]) -> dict[str, Any]:
        self.meet(f"{step['step']} {job.id}")
        request = step["request"]
        headers = {k: v.replace("{{secret}}", self.fake.key) for k, v in request["headers"].items()}
        if step["step"] == "create":
            self.creates.append(job.token)
        try:
            response = self.http.request(
                request["method"], request["url"], headers=headers, json=request["body"]
            )
        except httpx.HTTPError:
            return {"status": None}
        if step["step"] != "create" and self.chance.random() < self.rate:
            return {"status": None}  # too late
        return {"status": response.status_code, "headers": {}, "body": response.json()}

    def meet(self, call: str) -> None:
        self.history.append(call)
        if self.chance.random() < self.rate:
            self.history.append("death")
            raise Dead

    def check(self) -> None:
        assert len(self.creates) == len(set(self.creates))  # one create a claim, at most
        query = "select provider_job_id, generation_id::text as job from private.purchases"
        owners = {row["provider_job_id"]: row["job"] for row in self.db.execute(query)}
        failed = 0
        for job, (user, prompt) in self.jobs.items():
            is_made = self.of(job, "status") == "completed"
            assert user.credits() == (8 if is_made else 9)
            failed += not is_made
            for key, task in self.fake.tasks.items():
                if is_made and self.fake.shows(self.stored[job], task):
                    assert owners[key] == job
                    assert f"'{prompt}'" in str(task.body)
        if self.fake.name != "openai":  # has no ids
            unclaimed = [key for key in self.fake.bought if key not in owners]
            assert len(unclaimed) <= failed  # what nobody got is of a job that was given up
        assert len(self.fake.bought) == len(set(self.fake.bought))
        assert_books_balance(self.db)


@pytest.fixture(scope="module")
def db(server, template) -> Iterator[Database]:
    database = server.create(template)
    database.lift_limits()
    database.execute("update private.settings set retry_base = '0'")
    for name in FAKES:
        add_models(database, name)
    yield database
    server.drop(database)


@pytest.mark.parametrize("seed", range(LIVES))
@pytest.mark.parametrize("name", FAKES)
def test_a_job_is_made_once_and_from_its_own_whatever_happens(db, name, seed):
    opened = len(db._connections)
    with FAKES[name]() as fake:
        fake.points(db, settle="0.2 seconds")
        run = Run(db, fake, seed)
        try:
            run.to_the_end()
            run.check()
        except BaseException:
            print("\n".join(run.history))
            raise
        finally:
            for connection in db._connections[opened:]:
                connection.close()
