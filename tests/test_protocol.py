"""Claim, lease, end, recover: every state that one job can get into, and every step from it.

An explorer makes each call that anybody could make in each state, on the real functions: every
worker call with every token ever handed out, so each worker is also the one that was thought dead;
the user's cancel; the clocks; recovery. What is new is explored further, what was seen is not,
until nothing new turns up. So any schedule of any number of workers is a way through the states
that were seen, up to the number of claims allowed. One connection does it all: a step is a
savepoint, and rolling back to it is how the state before comes back. (What happens while two of
these calls overlap is in test_money_model.)

Proven in each state and for each step: a call with a token that does not hold the lease changes
nothing, and says so; nothing changes a job that has ended; what `broken_rules` names holds; and no
job is lost: whatever became of its workers, recovery and one worker that lives end it.

`PROTOCOL_CLAIMS` allows more claims.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from actors import Job, Refusal, Service, User, Worker, created, outcome, polled
from database import Database
from psycopg.pq import TransactionStatus
from psycopg.rows import scalar_row

CLAIMS = int(os.environ.get("PROTOCOL_CLAIMS", "2"))
MAX_ATTEMPTS = 2
IMAGES = 3
REFUND_PERCENT = 50
WELCOME = 10
ENDED = ("completed", "failed", "canceled")

# All that decides what may happen next, and all that money is about. Tokens and times are told by
# what they mean.
STATE = """
create function private.protocol_state() returns jsonb language plpgsql set jit = off as $$
begin
  return (
    select jsonb_build_object(
      'status', g.status, 'debt', e.debt, 'credits', private.spendable_credits(e),
      'buckets', (
        select jsonb_agg(jsonb_build_array(
          case when b.expires_at > now() then b.credits end, b.is_extended
        )) from private.credit_buckets as b
      ),
      'reserved', (select b.reserved_usd from private.budget_states as b),
      'booked', (
        select b.spent_usd between sum(coalesce(a.cost_usd, 0)) and 3 * count(a.token)
        from private.budget_states as b left join private.attempts as a on true
        group by b.spent_usd
      ),
      'balances', (
        select (e.credits, e.debt) = (sum(l.amount), sum(l.debt))
        from public.credit_ledger as l where l.user_id = e.user_id
      ),
      'ready', (
        select jsonb_agg(jsonb_build_array(
          r.attempt, r.run_at is not null, r.create_started_at is not null, r.provider_job_id,
          exists (select from private.paused_now)
        )) from private.ready_jobs as r
      ),
      'running', (
        select jsonb_agg(jsonb_build_array(
          r.attempt, r.lease_until < now(), r.deadline_at < now(), r.cancel_requested,
          r.create_started_at is not null, r.provider_job_id
        )) from private.running_jobs as r
      ),
      'ledger', (
        select jsonb_object_agg(l.kind, l.given) from (
          select l.kind, sum(l.amount - l.debt) as given from public.credit_ledger as l
          where l.user_id = g.user_id group by l.kind
        ) as l
      ),
      'outcomes', (
        select coalesce(jsonb_agg(a.outcome order by a.token), '[]') from private.attempts as a
      ),
      'bought', (select count(*) from private.purchases),
      'images', (select count(*) from public.images),
      'events', (select count(*) from private.deliveries)
    )
    from public.generations as g inner join public.entitlements as e using (user_id)
  );
end $$;
"""
SETTINGS = f"""
update private.settings set retry_base = '0', max_attempts = {MAX_ATTEMPTS},
  welcome_credits = {WELCOME}, running_cancel_refund_percent = {REFUND_PERCENT},
  breaker_failures = 32767, breaker_provider_failures = 32767;
update public.models set cost_usd = 1, cost_unit = 'image';
insert into private.budgets (period, limit_usd) values ('month', 1000)
"""

State = dict[str, Any]


class Stage:
    """Everybody, on one connection in one transaction, and one job."""

    def __init__(self, db: Database) -> None:
        db.execute(STATE)
        db.execute(SETTINGS)
        db.buys_previews()
        Service(db).register_webhook()
        self.user, self.worker = User(db), Worker(db)
        # The job is paid from a bucket and from what is in none.
        Service(db).grant_credits(self.user, IMAGES - 1, "ends", expires_at="2999-01-01")
        self.job_id = self.user.enqueued(params={"num_outputs": IMAGES})
        self.connection = db.connect()
        self.user.connection = self.worker.connection = self.connection
        self.connection.execute("begin")

    def state(self) -> State:
        cursor = self.connection.cursor(row_factory=scalar_row)
        return cursor.execute("select private.protocol_state()").fetchone()

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Have everything that is done in the block never have happened."""
        self.connection.execute("savepoint before")
        yield
        self.connection.execute("rollback to savepoint before; release savepoint before")

    def moves(self, table: str, column: str) -> None:
        query = f"update private.{table} set {column} = now() - interval '1 second'"
        self.connection.execute(query)

    def step(self, name: str, job: Job | None) -> Any:
        answer = outcome(lambda: OF_LEASE[name](self.worker, job) if job else OTHERS[name](self))
        if not self.is_undone():
            self.connection.execute("reset role")  # the user's
        return answer

    def is_undone(self) -> bool:
        """Whether PostgreSQL refused the last call, and with that undid it."""
        return self.connection.info.transaction_status == TransactionStatus.INERROR

    def credits_end(self) -> None:
        """Let the bucket end: nothing is left in it but what was given back."""
        self.connection.execute("update private.credit_buckets set expires_at = now()")
        self.connection.execute(
            "update public.entitlements set credits_end_at = now() where credits_end_at is not null"
        )

    def takes_back(self) -> None:
        """Have all that the user was given taken back, once."""
        self.connection.execute(
            "select public.grant_credits(%s, %s, 'adjust', 'dispute')",
            [self.user.id, -WELCOME - IMAGES + 1],
        )

    def claims(self) -> list[Job]:
        self.worker.let_the_next_claim_scan_all()
        return self.worker.claim_jobs(2)


DONE = polled("prediction", "succeeded", output="https://replicate.delivery/a")


def found(job: Job) -> dict[str, Any]:
    """What is answered where a lost create is looked for: one that is this job's."""
    ref = job.provider_ref
    item = {"id": "prediction", "model": ref, "version": "hidden", "input": job.provider_input}
    return {"step": "find", "memo": {}, "status": 200, "body": {"results": [item]}}


# What a worker may say of a lease that it holds or held.
OF_LEASE: dict[str, Callable[[Worker, Job], Any]] = {
    "next_step": lambda w, job: w.next_step(job),
    "next_step: created": lambda w, job: w.next_step(job, created("prediction")),
    "next_step: lost": lambda w, job: w.next_step(job, created("prediction", status=None)),
    "next_step: found": lambda w, job: w.next_step(job, found(job)),
    "next_step: done": lambda w, job: w.next_step(job, DONE),
    "report_progress": lambda w, job: w.report_progress(job, "storing"),
    "heartbeat": lambda w, job: w.heartbeat(job),
    "complete_job": lambda w, job: w.complete_job(job, IMAGES),
    "complete_job with one image": lambda w, job: w.complete_job(job, 1),
    "fail_job: moderated": lambda w, job: w.fail_job(job, "moderated"),
    "fail_job: provider_error": lambda w, job: w.fail_job(job, "provider_error"),
    "fail_job: provider_timeout": lambda w, job: w.fail_job(job, "provider_timeout"),
    "fail_job: model_withdrawn": lambda w, job: w.fail_job(job, "model_withdrawn"),
    "fail_job: provider_busy": lambda w, job: w.fail_job(job, "provider_busy", retry_after=60),
    "release_job": lambda w, job: w.release_job(job),
    "release_job anew": lambda w, job: w.release_job(job, resumes=False),
    "cancel_job": lambda w, job: w.cancel_job(job),
    "cancel_job not asked for": lambda w, job: w.cancel_job(job, metrics={"is_asked": False}),
}
OTHERS: dict[str, Callable[[Stage], Any]] = {
    "claim_jobs": Stage.claims,
    "recover_stale_jobs": lambda s: s.worker.recover_stale_jobs(),
    "cancel_generation": lambda s: s.user.cancel_generation(s.job_id),
    "the lease runs out": lambda s: s.moves("running_jobs", "lease_until"),
    "the deadline passes": lambda s: s.moves("running_jobs", "deadline_at"),
    "resume_model": lambda s: s.connection.execute(
        "select public.resume_model('darkroom/preview')"
    ),
    "the backoff ends": lambda s: s.connection.execute(
        "update private.ready_jobs set run_at = null"
    ),
    "the credits end": Stage.credits_end,
    "a chargeback": Stage.takes_back,
}
OF_MONEY = ("the credits end", "a chargeback")
# After these and a claim, whatever has happened, the job ends.
LAST = ("the lease runs out", "recover_stale_jobs", "the backoff ends", "resume_model")
REFUSALS = {
    "cancel_generation": {"PT409"},
    "cancel_job": {"22023"},
    "cancel_job not asked for": {"22023"},
    "report_progress": {"DR002"},
}


@dataclass
class Explorer:
    """Goes everywhere once."""

    stage: Stage
    seen: set[str] = field(default_factory=set)
    steps: int = 0
    wrong: list[str] = field(default_factory=list)
    path: list[str] = field(default_factory=list)

    def visit(self, state: State, held: list[Job]) -> None:
        """Look at a state that was not seen before, and at all that follows from it."""
        self.seen.add(str(state))
        self.complain(broken_rules(state))
        self.complain(self.lost(state))
        for name in OF_LEASE:
            for job in held:
                self.take(name, state, held, job)
        for name in OTHERS:
            if name in OF_MONEY:  # within the first claim, which is then the last
                is_open = len(held) < 2 and state["status"] not in ENDED
            else:
                is_moved = state["debt"] or state["buckets"][0][0] is None
                is_open = name != "claim_jobs" or (len(held) < CLAIMS and not (held and is_moved))
            if is_open:
                self.take(name, state, held, None)

    def take(self, name: str, before: State, held: list[Job], job: Job | None) -> None:
        """Take one step, go on from there, and come back."""
        is_stale = job is not None and (job is not held[-1] or before["running"] is None)
        self.path.append(f"{name} {held.index(job) + 1}" if job else name)
        with self.stage.undone():
            self.steps += 1
            answer = self.stage.step(name, job)
            if isinstance(answer, Refusal):
                self.complain(wrong_refusal(name, is_stale, answer))
            if not self.stage.is_undone():
                after = self.stage.state()
                self.complain(wrong_step(before, is_stale, answer, after))
                if str(after) not in self.seen:
                    self.visit(after, held + answer if name == "claim_jobs" else held)
        self.path.pop()

    def lost(self, state: State) -> list[str]:
        """Whether the job does not end though somebody works and its own workers are dead."""
        if state["status"] in ENDED:
            return []
        with self.stage.undone():
            for name in LAST:
                self.stage.step(name, None)
            for job in self.stage.step("claim_jobs", None):
                self.stage.step("complete_job", job)
            end = self.stage.state()
        return broken_rules(end) + ([] if end["status"] in ENDED else ["the job is lost"])

    def complain(self, rules: list[str]) -> None:
        """Note what is wrong and how it came to be."""
        self.wrong += [f"{rule}: {' > '.join(self.path)}" for rule in rules]


def wrong_refusal(name: str, is_stale: bool, refusal: Refusal) -> list[str]:
    """Whether this call should not be refused, or not so."""
    if is_stale:
        return [] if refusal.code == "DR001" else ["a stale token is refused otherwise"]
    return [] if refusal.code in REFUSALS.get(name, ()) else [f"refused with {refusal.code}"]


def wrong_step(before: State, is_stale: bool, answer: Any, after: State) -> list[str]:
    """What a step did that it must not do."""
    is_refused = isinstance(answer, Refusal)
    if is_stale and not is_refused and answer not in (None, "repeated", ["lost"]):
        return [f"a stale token is answered {answer}"]
    if after == before:
        return []
    if is_stale or is_refused:
        return ["a stale token or a refused call changes something"]
    return ["what has ended changes"] if before["status"] in ENDED else []


def broken_rules(state: State) -> list[str]:
    """What is not as it must be in every state."""
    ends = [end for end in state["outcomes"] if end in ENDED]
    places = (state["ready"] or []) + (state["running"] or [])
    live = {"queued": state["ready"], "processing": state["running"]}
    holds = {
        "charged once": state["ledger"]["charge"] == -IMAGES,
        "refunded as the end calls for": state["ledger"].get("refund") in refunds(state),
        "the balance is the ledger": state["balances"],
        "who has a debt has no credits": not (state["debt"] and state["credits"]),
        "a chargeback takes all, and what is given back comes after": "adjust"
        not in state["ledger"]
        or state["credits"] - state["debt"] == state["ledger"].get("refund", 0) - IMAGES,
        "in one place while it lives": len(places) == (state["status"] in live),
        "in the place its status says": state["status"] in ENDED or live[state["status"]],
        "one end": len(ends) <= 1 and ends == state["outcomes"][-1:][: len(ends)],
        "the end is that of the last attempt": ends in ([], [state["status"]]),
        "reserved while something may be bought": state["reserved"]
        == IMAGES * any(state["running"] or [ready[2] for ready in state["ready"] or []]),
        "booked what it cost, and no more than it might": state["booked"],
        "images where completed": (state["images"] > 0) == (state["status"] == "completed"),
        "told once": state["events"] == (state["status"] in ENDED),
        "attempts are limited": all(place[0] <= MAX_ATTEMPTS for place in places),
    }
    return [rule for rule, is_so in holds.items() if not is_so]


def refunds(state: State) -> list[int | None]:
    if state["status"] == "completed":
        return [IMAGES - state["images"] or None]
    part = math.ceil(IMAGES * REFUND_PERCENT / 100)
    return {"failed": [IMAGES], "canceled": [IMAGES, part]}.get(state["status"], [None])


@pytest.fixture
def explorer(db: Database) -> Explorer:
    return Explorer(Stage(db))


def test_no_schedule_of_claims_ends_clocks_and_recovery_breaks_a_rule(explorer):
    explorer.visit(explorer.stage.state(), [])

    assert explorer.wrong == []
    statuses = {name for name in (*ENDED, "queued") if f"'status': '{name}'" in str(explorer.seen)}
    assert statuses == {*ENDED, "queued"}
    assert explorer.steps > len(explorer.seen) > 100
