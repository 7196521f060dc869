"""Money by model: whatever users, workers and operators do, the books say what money_model says.

Hypothesis makes up what happens: calls, repeats of calls, calls with leases that are long lost,
clocks that run out. Every second call is made in a transaction that stays open while others act:
what has to wait for it goes on once it is committed or rolled back. After each step every balance,
ledger entry, status, lease and attempt is compared. (What is told of a lease is in test_protocol.)

`MONEY_MODEL_MINUTES` makes it a long search with new examples each time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from actors import Job, Refusal, Service, User, Worker, outcome
from billing import START, RevenueCat, millis
from database import Database, assert_books_balance
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyStrategyDefinition
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from money_model import (
    BUDGET,
    COSTS,
    FINAL,
    LIVE,
    MAX_ACTIVE,
    MAX_BURNED,
    PRICES,
    REFUND_PERCENT,
    RETRIES,
    Account,
    Books,
    Bucket,
)

MINUTES = float(os.environ.get("MONEY_MODEL_MINUTES", "0"))
WELCOME = 15
SOLD_CREDITS = 4
SOLD_UNTIL = datetime(2998, 6, 1, tzinfo=UTC)
OPEN_FOR = 4  # calls that others make meanwhile
SETUP = f"""
update public.models set cost_usd = {COSTS["darkroom/preview"]}, cost_unit = 'image'
where id = 'darkroom/preview';
insert into public.models
select (jsonb_populate_record(m, '{{
  "id": "darkroom/dear", "price_credits": 3, "paid_price_credits": 2,
  "cost_usd": {COSTS["darkroom/dear"]}
}}')).* from public.models as m where m.id = 'darkroom/preview';
insert into public.credit_products (provider, product_id, credits, grace)
values ('revenuecat', 'monthly', {SOLD_CREDITS}, '0');
update private.plans set max_per_minute = 1000000, max_batch = 3, max_burned_per_day = {MAX_BURNED};
update private.plans set max_active = {MAX_ACTIVE["free"]} where name = 'free';
update private.plans set max_active = {MAX_ACTIVE["paid"]} where name = 'paid';
update private.settings set welcome_credits = {WELCOME}, running_cancel_refund_percent = 50,
  retry_base = '0', breaker_failures = 32767, breaker_provider_failures = 32767,
  keep_ledger_of_deleted_users = '0';
update private.error_codes set refund_percent = {REFUND_PERCENT["moderated"]}
where code = 'moderated';
"""
NEW_BUDGET = f"""
delete from private.budgets;
insert into private.budgets (period, limit_usd, on_breach) values ('month', {BUDGET}, 'pause')
"""
FACTS = """
select jsonb_build_object(
  'budget', (select jsonb_build_array(b.spent_usd, b.reserved_usd) from private.budget_states as b),
  'accounts', (
    select jsonb_object_agg(e.user_id, jsonb_build_array(
      private.spendable_credits(e), e.debt, (
        select coalesce(jsonb_object_agg(b.external_id, b.credits), '{}')
        from private.credit_buckets as b
        where b.user_id = e.user_id and b.credits > 0 and b.expires_at > now()
      ), (select count(*) from private.live_jobs as j where j.user_id = e.user_id),
      e.day_burned
    ))
    from public.entitlements as e
  ),
  'ledger', (
    select jsonb_agg(jsonb_build_array(l.user_id, l.kind, l.generation_id, l.external_id, l.given))
    from (
      select l.user_id, l.kind, l.generation_id, l.external_id, sum(l.amount - l.debt) as given
      from public.credit_ledger as l
      where l.kind <> 'expire' and coalesce(l.generation_id::text, l.external_id) is not null
      group by 1, 2, 3, 4
    ) as l inner join public.entitlements as e using (user_id)
    where l.external_id is null or l.external_id not like 'welcome%'
  ),
  'jobs', (
    select jsonb_object_agg(g.id, jsonb_build_array(
      g.status, g.error_code, g.retry_of, coalesce(ready.attempt, running.attempt), running.token,
      coalesce(running.cancel_requested, false), ready.run_at is not null,
      (select count(*) from public.images as i where i.generation_id = g.id),
      (select coalesce(jsonb_object_agg(a.token, a.outcome), '{}')
       from private.attempts as a where a.generation_id = g.id),
      g.deleted_at is not null
    ))
    from public.generations as g
    left join private.ready_jobs as ready on ready.job_id = g.id
    left join private.running_jobs as running on running.job_id = g.id
  )
)
"""

users = st.sampled_from(["alice", "bob"])
models = st.sampled_from(list(PRICES))
keys = st.sampled_from([None, None, "first", "second"])
# When granted credits end, and their priority.
ENDS = [(None, 0), ("2998-01-01", 0), ("2999-01-01", 0), ("2998-01-01", 1), (None, -1), (None, 1)]
ENDED = """
with moved as (
  update public.entitlements as e set credits_end_at = case
    when b.credits > 0 then least(e.credits_end_at, now()) else e.credits_end_at
  end
  from private.credit_buckets as b
  where b.external_id = %s and e.user_id = b.user_id
  returning b.id
)
update private.credit_buckets set expires_at = now()
where id = (select id from moved) returning id
"""
PERIOD_ENDS = """
with ended as (update private.budgets set spent_until = least(spent_until, now()))
update private.budget_spendings set booked_at = '-infinity' returning budget_id
"""
MOST = 3 * max(COSTS.values())  # what one job may cost
METRICS = st.sampled_from([{}, {"images": 1}, {"is_asked": False}, {"is_billed": False}])
OWNERS = st.sampled_from([True, True, True, False])
OF_JOBS = ["cancel", "cancel", "cancel_batch", "retry", "hide_or_show"]
OF_LEASES = ["complete", "fail", "fail", "release", "cancel_job", "cancel_job", "a_clock_runs_out"]


def same(one: object, other: object) -> None:
    assert one == other


class Actors:
    """Everybody once, each with a connection."""

    def __init__(self, db: Database) -> None:
        self.users = {"alice": User(db), "bob": User(db)}
        self.worker, self.service = Worker(db, slots=10), Service(db)


@dataclass
class Open:
    """A call whose transaction has not ended."""

    connection: psycopg.Connection[Any]
    since: int
    note: Callable[[], Any]
    touched: set[str]


class Stage:
    """A database for many examples, one after the other, each with users of its own."""

    def __init__(self, db: Database) -> None:
        self.db = db
        db.execute(SETUP)
        db.execute("set lock_timeout = '15ms'")  # for clocks: what is locked runs on
        self.actors, self.slow, self.pool = Actors(db), Actors(db), ThreadPoolExecutor(1)
        db.execute("delete from auth.users")

    def new_users(self) -> dict[str, str]:
        """Sign two up; return their ids by name."""
        ids = {name: str(uuid.uuid4()) for name in self.actors.users}
        for name, user_id in ids.items():
            self.db.execute("insert into auth.users (id) values (%s)", user_id)
            self.actors.users[name].id = self.slow.users[name].id = user_id
        return ids


class Money(RuleBasedStateMachine):
    """The database and the reference model beside it."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage, self.db = stage, stage.db
        self.books = Books()
        self.ids = stage.new_users()
        for user_id in self.ids.values():
            self.books.accounts[user_id] = Account([Bucket(credits=WELCOME)])
        self.db.execute(NEW_BUDGET)
        self.jobs: list[str] = []  # all that anybody has heard of
        self.leases: list[Job] = []
        self.requests: dict[tuple[str, ...], Any] = {}  # by idempotency key: request and answer
        self.open: Open | None = None
        self.calls = 0

    def teardown(self) -> None:
        if self.open:
            self.open.connection.execute("rollback")
        for user_id in self.ids.values():
            self.db.execute("delete from auth.users where id = %s", user_id)

    def do(
        self,
        call: Callable[[Actors], Any],
        expected: Callable[[], tuple[str | None, Callable[[Any], Any]]],
        touched: set[str] = frozenset(),
        connection: Callable[[Actors], psycopg.Connection[Any]] = lambda a: a.worker.connection,
        may_stay_open: bool = True,
    ) -> None:
        """Make a call, see that it is refused as it should be, and note what it did.

        In a transaction that stays open it is noted when that commits. What a call should do is
        asked for when what it had to wait for has ended; it may have been refused before.
        """
        self.calls += 1
        opens = may_stay_open and self.open is None and self.calls % 2 == 0
        actors = self.stage.slow if opens else self.stage.actors
        own = connection(actors)
        if opens:
            own.execute("begin")
        early, _ = expected()
        future = self.stage.pool.submit(lambda: outcome(lambda: call(actors)))
        waits = "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s"
        while self.open and not future.done():
            if self.db.value(waits, own.info.backend_pid):
                self.end_open()
        answer = future.result()
        refusal, note = expected()
        if isinstance(answer, Refusal):
            assert answer.code in (early, refusal), answer
            if opens:
                own.execute("rollback")
        else:
            assert refusal is None, f"not refused with {refusal}"
            if opens:
                self.open = Open(own, self.calls, lambda: note(answer), touched)
            else:
                self.note(lambda: note(answer))
        if self.open and self.calls == self.open.since + OPEN_FOR:
            self.end_open()

    def note(self, note: Callable[[], Any]) -> None:
        self.books.now += 1
        note()

    def end_open(self) -> None:
        """End the transaction that is open: it commits, or at times is rolled back."""
        was, self.open = self.open, None
        if self.calls % 4 == 0:
            was.connection.execute("rollback")
        else:
            was.connection.execute("commit")
            self.note(was.note)

    def as_user(self, name: str, call: Callable[[User], Any], *rest: Any) -> None:
        self.do(lambda a: call(a.users[name]), *rest, connection=lambda a: a.users[name].connection)

    def as_service(self, call: Callable[[Service], Any], expected: Any, **rest: bool) -> None:
        own = {"connection": lambda a: a.service.connection}
        self.do(lambda a: call(a.service), expected, **own, **rest)

    def held(self) -> list[Job]:
        return [job for job in self.leases if self.books.holder(job.id, job.token)]

    def lasting(self) -> list[Bucket]:
        """Buckets that will end."""
        accounts = self.books.accounts.values()
        buckets = [bucket for account in accounts for bucket in account.buckets]
        return [b for b in buckets if not b.is_over and b.ends != "infinity"]

    def name_for(self, job_id: str, is_owner: bool) -> str:
        """Who acts: the owner of the job or not."""
        job = self.books.jobs.get(job_id)
        is_bobs = job is not None and job.user_id == self.ids["bob"]
        return "bob" if is_bobs == is_owner else "alice"

    @rule(data=st.data())
    def something_happens(self, data):
        ways = ["enqueue", "enqueue", "grant", "grant", "renewal", "set_paid"] + (
            OF_JOBS if self.jobs else []
        )
        ways += ["claim"] * 3 if self.books.claimable() else []
        ways += OF_LEASES if self.leases else []
        ways += ["a_period_ends"] * 2 if self.books.spent > BUDGET / 2 else []
        ways += ["credits_end"] * 2 if self.lasting() else []
        if any(job.is_late for job in self.books.jobs.values()):
            ways.append("recover_stale_jobs")
        way = data.draw(st.sampled_from(ways))
        if way in OF_JOBS:  # the newest first
            job_id = data.draw(st.sampled_from(self.jobs[::-1]))
            getattr(self, way)(job_id, self.name_for(job_id, data.draw(OWNERS)))
        elif way in OF_LEASES:
            lease = data.draw(st.sampled_from(self.held() * 3 + self.leases[::-1]))
            getattr(self, way)(lease, data.draw)
        else:
            getattr(self, way)(data.draw)

    # What users do.

    def enqueue(self, draw):
        name, model, key = draw(users), draw(models), draw(keys)
        images, n = draw(st.integers(1, 3)), draw(st.integers(0, 3))  # one, or a batch of n
        user_id, request, what = self.ids[name], (model, images, n), "batch_id" if n else "job_id"

        def call(user):
            asked = {"params": {"num_outputs": images}, "idempotency_key": key}
            if n:
                return user.enqueue_batch(["a"] * n, model, **asked)
            return user.enqueue("a", model, **asked)

        def expected():
            known, answer = self.requests.get((name, what, key), (None, None))
            if key and known:
                job_ids = self.books.batches.get(answer, [answer])
                refusal = self.books.repeat_refusal(user_id, known == request, job_ids)
                return refusal, lambda said: same(said[what], answer)
            return self.books.refusal(user_id, model, images, n or 1), note

        def note(said):
            job_ids = said["job_ids"] if n else [said["job_id"]]
            for job_id in job_ids:
                self.books.charge(user_id, job_id, model, images)
            same(said["credits_left"], self.books.accounts[user_id].credits)
            if n:
                self.books.batches[said["batch_id"]] = job_ids
            self.requests[name, what, key] = request, said[what]
            self.jobs += job_ids

        self.as_user(name, call, expected)

    def cancel(self, job_id, name):
        def expected():
            job = self.books.seen(self.ids[name], job_id)
            has_ended = job and job.status in ("completed", "failed")
            refusal = "PT409" if has_ended else None if job else "PT404"
            return refusal, lambda _: self.books.ask_to_cancel(job)

        self.as_user(name, lambda u: u.cancel_generation(job_id), expected, {job_id})

    def cancel_batch(self, job_id, name):
        found = [each for each in self.books.batches.items() if job_id in each[1]]
        if not found:
            return
        batch_id, job_ids = found[0]

        def note(_):
            for each in job_ids:
                self.books.ask_to_cancel(self.books.jobs[each])

        def expected():
            return self.books.repeat_refusal(self.ids[name], True, job_ids), note

        self.as_user(name, lambda u: u.cancel_batch(batch_id), expected, set(job_ids))

    def retry(self, job_id, name):
        user_id = self.ids[name]

        def expected():
            job, known = self.books.seen(user_id, job_id), self.books.repeat_of(job_id)
            if job is None or job.status not in ("failed", "canceled"):
                return "PT409" if job else "PT404", None
            if known is not None and not self.books.jobs[known].is_deleted:
                return None, lambda said: same(said["job_id"], known)

            def note(said):
                new = said["job_id"]
                self.books.charge(user_id, new, job.model, job.image_count, job_id)
                self.jobs.append(new)

            return self.books.refusal(user_id, job.model, job.image_count), note

        self.as_user(name, lambda u: u.retry_generation(job_id), expected)

    def hide_or_show(self, job_id, name):
        job = self.books.jobs[job_id]
        hides = not job.is_deleted

        def expected():
            is_own = job.user_id == self.ids[name]
            refusal = None if is_own else "PT404"
            if is_own and hides and job.status in LIVE:
                refusal = "PT409"
            return refusal, lambda _: setattr(job, "is_deleted", hides)

        call = "delete_generation" if hides else "restore_generation"
        self.as_user(name, lambda u: getattr(u, call)(job_id), expected)

    # What operators do.

    def grant(self, draw):
        name = draw(users)
        amount, external_id = draw(st.sampled_from([5, 5, -3, -20])), str(draw(st.integers(1, 20)))
        kind = "grant" if amount > 0 else "adjust"
        given = self.ids[name], amount, kind, external_id
        ends, priority = draw(st.sampled_from(ENDS)) if amount > 0 else (None, 0)
        bucket = Bucket(external_id, priority, ends or "infinity") if ends or priority else None

        def expected():
            is_new = external_id not in self.books.given

            def note(said):
                self.books.give(*given, bucket)
                has = self.books.accounts[self.ids[name]]
                same(said, {"credits": has.credits, "debt": has.debt, "applied": is_new})

            return self.books.grant_refusal(*given), note

        how = {"expires_at": ends, "priority": priority}
        self.as_service(lambda s: s.grant_credits(*given[:2], external_id, kind, **how), expected)

    def renewal(self, draw):
        """A store tells of a period, each time under another id."""
        name, number = draw(users), draw(st.integers(1, 4))
        user_id = self.ids[name]
        store = RevenueCat(user_id, original=f"{user_id}-{number}")
        event = store.renewed(START, START, expiration_at_ms=millis(SOLD_UNTIL))
        key = f"revenuecat:{store.original}:monthly:{millis(START)}"
        bucket = Bucket(key, 0, str(SOLD_UNTIL.date()))

        def expected():
            return None, lambda _: self.books.give(user_id, SOLD_CREDITS, "grant", key, bucket)

        self.as_service(lambda s: s.apply_billing_event("revenuecat", event), expected)

    def set_paid(self, draw):
        name, plan = draw(users), draw(st.sampled_from(list(MAX_ACTIVE)))
        account, until = self.books.accounts[self.ids[name]], "infinity" if plan == "paid" else None
        expected = None, lambda _: setattr(account, "plan", plan)
        # What waits for it is charged by the plan there was when it was asked for.
        self.as_service(
            lambda s: s.set_paid(self.ids[name], until), lambda: expected, may_stay_open=False
        )

    # What workers do, with a lease they hold or one of long ago.

    def claim(self, draw):
        slots = draw(st.integers(1, 3))
        is_alone = self.open is None  # else what another transaction has locked is passed over

        def call(actors):
            actors.worker.let_the_next_claim_scan_all()
            return actors.worker.claim_jobs(slots)

        def expected():
            claimable, room = self.books.claimable(), self.books.room()
            fits = any(self.books.jobs[id].asks <= room for id in claimable)

            def note(claimed):
                assert {job.id for job in claimed} <= claimable
                # Of a budget that is nearly spent the next claim may take more.
                is_tight = room < MOST * slots
                least = fits if is_tight else min(slots, len(claimable))
                assert not is_alone or least <= len(claimed) <= slots
                for job in claimed:
                    self.books.claim(job.id, job.token)
                self.leases += claimed

            return None, note

        self.do(call, expected)

    def end(self, lease: Job, call: Callable[[Worker], Any], ways: str, of_holder: Any) -> None:
        """Have a worker end an attempt. A repeat of a call that ended it so changes nothing."""

        def expected():
            job = self.books.holder(lease.id, lease.token)
            if job:
                return of_holder(job)
            is_repeat = self.books.ended_as(lease.id, lease.token) in ways.split()
            return None if is_repeat else "DR001", lambda _: None

        self.do(lambda a: call(a.worker), expected, {lease.id})

    def complete(self, lease, draw):
        images = lease.image_count - draw(st.sampled_from([0, 0, 1, 1, 2, -1]))
        refusal = None if 1 <= images <= lease.image_count else "22023"
        self.end(
            lease,
            lambda worker: worker.complete_job(lease, images),
            "completed",
            lambda job: (refusal, lambda _: self.books.complete(job, images)),
        )

    def fail(self, lease, draw):
        code, metrics = draw(st.sampled_from([*RETRIES, *FINAL])), draw(METRICS)
        retry_after = draw(st.sampled_from([None, None, 60]))
        waits = retry_after is not None
        self.end(
            lease,
            lambda worker: worker.fail_job(lease, code, retry_after=retry_after, metrics=metrics),
            "retried failed canceled",
            lambda job: (
                None,
                lambda answer: same(answer, self.books.fail(job, code, waits, metrics)),
            ),
        )

    def release(self, lease, draw):
        resumes = draw(st.booleans())
        self.end(
            lease,
            lambda worker: worker.release_job(lease, resumes),
            "released canceled failed",
            lambda job: (None, lambda _: self.books.release(job, resumes)),
        )

    def cancel_job(self, lease, draw):
        metrics = draw(METRICS)
        is_burned = False not in metrics.values()
        self.end(
            lease,
            lambda worker: worker.cancel_job(lease, metrics),
            "canceled",
            lambda job: (
                None if job.cancel_requested else "22023",
                lambda _: self.books.cancel(job, is_burned, metrics=metrics),
            ),
        )

    def moved(self, query: str, *arguments: Any) -> bool:
        """Change a time, unless its row is locked; return whether there was one."""
        rows = outcome(lambda: self.db.execute(query, *arguments))
        return isinstance(rows, list) and len(rows) > 0

    def a_clock_runs_out(self, lease, draw):
        clock = draw(st.sampled_from(["lease_until", "lease_until", "deadline_at"]))
        query = f"update private.running_jobs set {clock} = now() - interval '1 second'"
        query += " where job_id = %s and token = %s returning token"
        if self.moved(query, lease.job_id, lease.token):
            self.books.jobs[lease.id].is_late.add(clock)

    @precondition(lambda self: any(job.waits for job in self.books.jobs.values()))
    @rule()
    def the_backoffs_end(self):
        for id in [id for id, job in self.books.jobs.items() if job.waits]:
            query = "update private.ready_jobs set run_at = null"
            if self.moved(f"{query} where job_id = %s and run_at is not null returning job_id", id):
                self.books.jobs[id].waits = False

    def credits_end(self, draw):
        bucket = draw(st.sampled_from(self.lasting()))
        if self.moved(ENDED, bucket.name):
            bucket.is_over, bucket.credits = True, 0
        if draw(st.booleans()):  # else it is found when something is done with them
            self.db.execute("select private.expire_credits()")

    def a_period_ends(self, _):
        if self.moved(PERIOD_ENDS):
            self.books.spent = 0

    def recover_stale_jobs(self, _):
        late = {id for id, job in self.books.jobs.items() if job.token and job.is_late}
        if self.open and late & self.open.touched:
            return  # whether it has their rows, which are passed over then, is not known here

        def note(count):
            same(count, len(late))
            self.books.recover(late)

        self.do(lambda a: a.worker.recover_stale_jobs(), lambda: (None, note), late)

    # What must then be the same here and there.

    @invariant()
    def the_books_say_what_the_model_says(self):
        facts = self.db.value(FACTS)
        assert Counter(map(str, facts["ledger"] or [])) == Counter(map(str, self.ledger()))
        assert facts["accounts"] == self.accounts()
        assert facts["budget"] == [self.books.spent, self.books.reserved()]
        assert self.books.spent + self.books.reserved() <= BUDGET
        assert (facts["jobs"] or {}) == self.states()
        assert_books_balance(self.db)

    def accounts(self) -> dict[str, list[int]]:
        """Credits, debt, what is in buckets, slots and burned purchases of each user."""
        accounts = self.books.accounts.items()
        return {
            id: [
                *(each.credits, each.debt),
                {b.name: b.credits for b in each.buckets if b.name and b.credits},
                *(self.books.active(id), each.burned),
            ]
            for id, each in accounts
        }

    def states(self) -> dict[str, list[Any]]:
        return {
            id: [
                *(job.status, job.error_code, job.retry_of),
                *(job.attempt if job.status in LIVE else None, job.token),
                *(job.token is not None and job.cancel_requested, job.waits),
                *(job.images, {str(t): o for t, o in job.outcomes.items()}, job.is_deleted),
            ]
            for id, job in self.books.jobs.items()
        }

    def ledger(self) -> Iterator[list[Any]]:
        """All entries but the welcome credits."""
        for external_id, (user_id, amount, kind) in self.books.given.items():
            yield [user_id, kind, None, external_id, amount]
        for id, job in self.books.jobs.items():
            yield [job.user_id, "charge", id, None, -job.price]
            if job.refund is not None:
                yield [job.user_id, "refund", id, None, job.refund]


def profile() -> settings:
    """The same examples each time, or in a long search new ones, made short if they fail."""
    return settings(
        max_examples=40,
        stateful_step_count=80,
        derandomize=not MINUTES,
        database=None,
        phases=[Phase.generate, Phase.shrink] if MINUTES else [Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture
def stage(db: Database) -> Stage:
    return Stage(db)


def test_money_is_what_the_model_says_whatever_happens(stage):
    until = time.monotonic() + MINUTES * 60

    for _ in itertools.takewhile(lambda n: n == 0 or time.monotonic() < until, itertools.count()):
        # How long a lock is waited for is not up to Hypothesis, which then sees another example.
        with contextlib.suppress(*[FlakyStrategyDefinition] if MINUTES else []):
            run_state_machine_as_test(lambda: Money(stage), settings=profile())
