"""tests/chaos: a short run with its seed, and the proof that each of its rules can be broken.

The long runs, and what they gave: `make chaos`, tests/chaos/RESULTS.md.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from actors import User
from actors import Worker as Caller
from chaos.clients import Accepted
from chaos.director import EVERYTHING, SCENARIOS, Director, Scenario
from chaos.faults import KINDS, plan
from chaos.invariants import RULES, Evidence, judge
from chaos.world import World
from database import Database
from fake_replicate import FakeReplicate, Request

SEED = int(os.environ.get("CHAOS_SEED") or 7)
JOBS, FAULTS = 60, 10
HOSTILE = Scenario("A hostile week", [kind for each in SCENARIOS[-2:] for kind in each.kinds])
FLUX = "black-forest-labs/flux-schnell"


@pytest.mark.parametrize(
    ("scenario", "faults"),
    [(EVERYTHING, FAULTS), pytest.param(HOSTILE, 8, marks=pytest.mark.long)],
)
def test_whatever_breaks_nothing_is_lost_doubled_or_wrongly_charged(scenario, faults):
    """About a minute each: a stack of its own, real workers, every kind of fault."""
    with World(fsync=False) as world:
        world.shorten()

        outcome = Director(world, scenario, SEED).run(JOBS, faults, workers=3)

    assert outcome.violations == {name: [] for name in outcome.violations}, f"seed {SEED}"
    assert set(outcome.violations) == {*RULES, "drain", "faults", "logs"}
    assert (outcome.jobs, outcome.faults) == (JOBS, faults)
    assert outcome.statuses["completed"] > JOBS / 3
    assert scenario is EVERYTHING or outcome.restarts == 0  # no worker ended by itself


def test_a_seed_gives_the_same_faults_again():
    kinds = [fault.kind.name for fault in plan(3, EVERYTHING.kinds, 40)]

    assert plan(3, EVERYTHING.kinds, 40) == plan(3, EVERYTHING.kinds, 40)
    assert plan(4, EVERYTHING.kinds, 40) != plan(3, EVERYTHING.kinds, 40)
    assert set(kinds) == set(KINDS)
    assert {kind for scenario in SCENARIOS for kind in scenario.kinds} == set(KINDS)


# --- each rule can be broken ---


class Settled:
    """One job that was made, stored and paid for as it should."""

    def __init__(self, db: Database) -> None:
        self.db = db
        db.execute("update public.models set is_active = true")
        self.user, self.caller = User(db), Caller(db)
        self.fake = FakeReplicate()
        self.job_id = self.user.enqueued("a picture", FLUX, idempotency_key="chaos-0-0")
        self.accepted = Accepted(jobs={"chaos-0-0": self.job_id})
        job = self.caller.claimed()
        self.prediction = self.create()
        self.caller.checkpoint(job, self.prediction)
        self.caller.complete_job(job)
        self.path = db.value("select storage_path from public.images")
        self.files = {self.path: bytes(1000)}
        self.store(self.path)

    def create(self, ends: str = "succeeded") -> str:
        """Have the provider make it, once more."""
        key = self.fake.bought(FLUX, {"prompt": "a picture"}, ends=ends)
        body = {"input": {"prompt": "a picture"}}
        self.fake.creates.append(
            Request("POST", "/v1/predictions", {}, {}, body, prediction_id=key)
        )
        return key

    def store(self, path: str) -> None:
        query = "insert into storage.objects (bucket_id, name) values ('generations', %s)"
        self.db.execute(query, path)

    def broken(self) -> list[str]:
        """Return the names of the rules that do not hold."""
        seen = Evidence(self.db, self.accepted, self.fake, self.files.get, "chaos-0-")
        return [rule for rule, found in judge(seen).items() if found]


@pytest.fixture
def settled(db: Database) -> Settled:
    return Settled(db)


def test_all_rules_hold_where_all_is_well(settled):
    assert settled.broken() == []


def in_the_queue(settled: Settled) -> None:
    settled.user.enqueued("another", FLUX)


def job_gone(settled: Settled) -> None:
    settled.accepted.jobs["chaos-0-1"] = str(uuid.uuid4())


def answer_unwanted(settled: Settled) -> None:
    settled.accepted.refused.append("enqueue_generation: 400")


def canceled_by_nobody(settled: Settled) -> None:
    job_id = settled.user.enqueued("another", FLUX, idempotency_key="chaos-0-1")
    settled.accepted.jobs["chaos-0-1"] = job_id
    settled.user.cancel_generation(job_id)


def answered_with_two_jobs(settled: Settled) -> None:
    settled.accepted.doubled.append("chaos-0-0")


def made_for_nobody(settled: Settled) -> None:
    del settled.accepted.jobs["chaos-0-0"]


def ended_twice(settled: Settled) -> None:
    settled.db.execute(
        "insert into private.attempts (generation_id, token, model_id, attempt, worker_id,"
        " started_at, outcome, provider_job_id) select generation_id, token + 1000, model_id, 2,"
        " worker_id, now(), 'completed', provider_job_id from private.attempts"
    )


def balance_off(settled: Settled) -> None:
    settled.db.execute("update public.entitlements set credits = credits + 1")


def place_not_given_back(settled: Settled) -> None:
    settled.db.execute(
        "insert into private.ready_jobs (job_id, user_id, model_id, fair_key)"
        " select id, user_id, model_id, 0 from public.generations"
    )


def refunded_although_made(settled: Settled) -> None:
    settled.db.execute("select private.refund_generation(user_id, id, 1) from public.generations")


def file_gone(settled: Settled) -> None:
    settled.files.clear()


def file_cut_short(settled: Settled) -> None:
    settled.files[settled.path] = bytes(999)


def file_of_nothing(settled: Settled) -> None:
    settled.store(f"{settled.user.id}/{uuid.uuid4()}/0.png")


def bought_twice(settled: Settled) -> None:
    settled.create()


def bought_without_a_claim(settled: Settled) -> None:
    settled.fake.predictions[settled.prediction]["status"] = "failed"
    settled.create()


def bought_by_somebody_else(settled: Settled) -> None:
    settled.db.execute("update private.attempts set provider_job_id = 'stranger'")


PLANTED: list[tuple[Callable[[Settled], Any], str]] = [
    (in_the_queue, "lost"),
    (job_gone, "lost"),
    (answer_unwanted, "lost"),
    (canceled_by_nobody, "lost"),
    (answered_with_two_jobs, "doubled"),
    (made_for_nobody, "doubled"),
    (ended_twice, "doubled"),
    (balance_off, "wrongly charged"),
    (place_not_given_back, "wrongly charged"),
    (refunded_although_made, "wrongly charged"),
    (file_gone, "image without file"),
    (file_cut_short, "image without file"),
    (file_of_nothing, "file without image"),
    (bought_twice, "wrongly bought"),
    (bought_without_a_claim, "wrongly bought"),
    (bought_by_somebody_else, "wrongly bought"),
]


@pytest.mark.parametrize(
    ("plant", "rule"), [pytest.param(*each, id=each[0].__name__) for each in PLANTED]
)
def test_a_planted_violation_is_found(settled, plant, rule):
    plant(settled)

    assert rule in settled.broken()


def test_every_rule_has_a_planted_violation():
    assert {rule for _, rule in PLANTED} == set(RULES)
