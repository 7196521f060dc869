"""What money, slots and places should be, told a second time: small, in memory, without SQL.

The rules are those that users and workers are told, not those of the functions' bodies. Of a call
that is refused, nothing is noted here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

LIVE = ("queued", "processing")
MAX_ATTEMPTS = 3
CANCEL_REFUND_PERCENT = 50
MAX_ACTIVE = {"free": 4, "paid": 6}
MAX_BURNED = 2  # in a day
# For each model the price of an image, on either plan.
PRICES = {"darkroom/preview": {"free": 1, "paid": 0}, "darkroom/dear": {"free": 3, "paid": 2}}
# What an image costs us, and all may cost together, in US dollars.
COSTS = {"darkroom/preview": 1, "darkroom/dear": 2}
BUDGET = 9


# Codes that may be tried again, and whether that uses up an attempt.
RETRIES = {
    "provider_busy": False,
    "provider_timeout": True,
    "provider_error": True,
    "result_lost": True,
    "worker_full": False,
    "storage_unavailable": False,
    "internal": True,
}
FINAL = ("moderated", "invalid_input", "timeout")
RESUME = ("provider_timeout", "worker_full", "storage_unavailable", "internal")
REFUND_PERCENT = {"moderated": 40}  # of other failures all goes back


@dataclass(eq=False)
class Bucket:
    """Credits granted together, with an end or a priority; or all those that have neither."""

    name: str | None = None
    priority: int = 0
    ends: str = "infinity"
    credits: int = 0
    is_over: bool = False
    is_extended: bool = False


@dataclass
class Account:
    """A plan, and credits in the order in which they came."""

    buckets: list[Bucket]
    plan: str = "free"
    burned: int = 0  # purchases that were canceled
    debt: int = 0

    @property
    def credits(self) -> int:
        """What can be spent."""
        return sum(bucket.credits for bucket in self.buckets)

    @property
    def in_none(self) -> Bucket:
        return self.buckets[0]

    def in_order(self) -> list[Bucket]:
        return sorted(self.buckets, key=lambda bucket: (bucket.priority, bucket.ends))

    def spend(self, amount: int) -> list[tuple[Bucket, int]]:
        """Take from one bucket after the other; return how much came from each."""
        parts = []
        for bucket in self.in_order():
            part = min(bucket.credits, amount)
            bucket.credits -= part
            amount -= part
            parts += [(bucket, part)] if part else []
        assert not amount
        return parts

    def take(self, amount: int) -> None:
        """Take back what is there, the last to be spent first. The rest is owed."""
        for bucket in reversed(self.in_order()):
            part = min(bucket.credits, amount)
            bucket.credits -= part
            amount -= part
        self.debt += amount

    def receive(self, amount: int, bucket: Bucket, now: int) -> None:
        """Pay what is owed, and keep the rest. What came too late is lost, but for one time."""
        paid = min(amount, self.debt)
        self.debt -= paid
        if bucket.is_over and not bucket.is_extended:
            bucket.is_over, bucket.is_extended = False, True
            bucket.ends = f"0 {now:06}"  # before all that nobody extended
        if not bucket.is_over:
            bucket.credits += amount - paid


@dataclass
class Generation:
    """One job, from the charge to its end."""

    user_id: str
    model: str
    price: int
    image_count: int
    retry_of: str | None = None
    paid_from: list[tuple[Bucket, int]] = field(default_factory=list)
    status: str = "queued"
    error_code: str | None = None
    attempt: int = 0  # used while queued, under way while processing
    token: int | None = None
    cancel_requested: bool = False
    waits: bool = False  # for the end of a backoff
    is_late: set[str] = field(default_factory=set)  # clocks that ran out
    outcomes: dict[int, str] = field(default_factory=dict)  # of each ended claim, by token
    refund: int | None = None
    images: int = 0
    is_deleted: bool = False
    reserved: int = 0  # what it may cost at most while it runs, or waits to be resumed

    @property
    def asks(self) -> int:
        """What has to be reserved to claim it."""
        return 0 if self.reserved else COSTS[self.model] * self.image_count


class Books:
    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.now = 0  # calls that were noted: what one call does has one time
        self.jobs: dict[str, Generation] = {}
        self.batches: dict[str, list[str]] = {}
        self.given: dict[str, tuple[str, int, str]] = {}  # by external id; not how it is kept
        self.spent = 0

    def active(self, user_id: str) -> int:
        return sum(j.user_id == user_id and j.status in LIVE for j in self.jobs.values())

    def price(self, user_id: str, model: str, images: int) -> int:
        return PRICES[model][self.accounts[user_id].plan] * images

    def refusal(self, user_id: str, model: str, images: int, count: int = 1) -> str | None:
        account = self.accounts[user_id]
        if account.debt:
            return "PT402"
        if self.active(user_id) >= MAX_ACTIVE[account.plan] or account.burned >= MAX_BURNED:
            return "PT429"
        if self.price(user_id, model, images) * count > account.credits:
            return "PT402"
        return None

    def charge(
        self, user_id: str, job_id: str, model: str, images: int, retry_of: str | None = None
    ) -> None:
        price = self.price(user_id, model, images)
        parts = self.accounts[user_id].spend(price)
        self.jobs[job_id] = Generation(user_id, model, price, images, retry_of, parts)

    def give(
        self, user_id: str, amount: int, kind: str, external_id: str, bucket: Bucket | None = None
    ) -> None:
        """Give or take, once for each external id."""
        if external_id in self.given:
            return
        self.given[external_id] = user_id, amount, kind
        account = self.accounts[user_id]
        if amount < 0:
            account.take(-amount)
        else:
            account.buckets += [bucket] if bucket else []
            account.receive(amount, bucket or account.in_none, self.now)

    def grant_refusal(self, user_id: str, amount: int, kind: str, external_id: str) -> str | None:
        known = self.given.get(external_id)
        if known:
            return None if known == (user_id, amount, kind) else "PT409"
        return None

    def seen(self, user_id: str, job_id: str) -> Generation | None:
        """The user's job, if it is not hidden."""
        job = self.jobs.get(job_id)
        return job if job and job.user_id == user_id and not job.is_deleted else None

    def repeat_refusal(self, user_id: str, is_same: bool, job_ids: list[str]) -> str | None:
        """The code that a repeated request for these jobs is refused with, if it is."""
        if not is_same:
            return "PT409"
        return None if any(self.seen(user_id, job_id) for job_id in job_ids) else "PT404"

    def repeat_of(self, job_id: str) -> str | None:
        """The job that repeats this one and is under way or done."""
        repeats = [
            (job.is_deleted, id)
            for id, job in self.jobs.items()
            if job.retry_of == job_id and job.status not in ("failed", "canceled")
        ]
        return min(repeats)[1] if repeats else None

    def claimable(self) -> set[str]:
        return {id for id, job in self.jobs.items() if job.status == "queued" and not job.waits}

    def reserved(self) -> int:
        return sum(job.reserved for job in self.jobs.values())

    def room(self) -> int:
        return max(BUDGET - self.spent - self.reserved(), 0)

    def book(self, job: Generation, metrics: dict[str, Any]) -> None:
        """Pay what the attempt has cost; all that it might have, where nobody knows."""
        if False not in metrics.values():
            self.spent += COSTS[job.model] * metrics["images"] if metrics else job.reserved
        job.reserved = 0

    def claim(self, job_id: str, token: int) -> None:
        job = self.jobs[job_id]
        assert job.asks <= self.room()
        job.reserved += job.asks
        job.status, job.token, job.attempt = "processing", token, job.attempt + 1
        job.is_late = set()

    def holder(self, job_id: str, token: int) -> Generation | None:
        job = self.jobs.get(job_id)
        return job if job and job.token == token else None

    def ended_as(self, job_id: str, token: int) -> str | None:
        job = self.jobs.get(job_id)
        return job.outcomes.get(token) if job else None

    def complete(self, job: Generation, images: int) -> None:
        self.book(job, {})
        self._end(job, "completed")
        job.status, job.images = "completed", images
        missing = job.image_count - images
        if missing:
            self._refund(job, job.price * missing // job.image_count)

    def fail(
        self,
        job: Generation,
        code: str,
        waits: bool = False,
        metrics: dict[str, Any] = MappingProxyType({}),
    ) -> str:
        percent = REFUND_PERCENT.get(code, 100)
        if job.cancel_requested:
            self.cancel(job, percent=percent, metrics=metrics)
            return "canceled"
        used = job.attempt - (not RETRIES.get(code, True))
        if used >= MAX_ATTEMPTS or code not in RESUME or metrics == {"is_asked": False}:
            self.book(job, metrics)
        if code in RETRIES and used < MAX_ATTEMPTS:
            self._requeue(job, "retried", used)
            job.waits = waits
            return "retried"
        self._end(job, "failed")
        job.status, job.error_code = "failed", code
        self._refund(job, math.ceil(job.price * percent / 100))
        return "failed"

    def release(self, job: Generation, resumes: bool) -> None:
        if job.cancel_requested:
            self.cancel(job, is_burned=resumes, metrics={} if resumes else {"is_asked": False})
        else:
            if not resumes:
                self.book(job, {"is_asked": False})
            self._requeue(job, "released", job.attempt - 1)

    def cancel(
        self,
        job: Generation,
        is_burned: bool = False,
        percent: int = 100,
        metrics: dict[str, Any] = MappingProxyType({}),
    ) -> None:
        """End a job that its user does not want any more, and that the provider may bill us."""
        self.book(job, metrics)
        if job.status == "processing":
            self._end(job, "canceled")
        job.status, job.waits = "canceled", False
        self.accounts[job.user_id].burned += is_burned
        share = CANCEL_REFUND_PERCENT if is_burned else percent
        self._refund(job, math.ceil(job.price * share / 100))

    def ask_to_cancel(self, job: Generation) -> None:
        if job.status == "queued":
            self.cancel(job)
        elif job.status == "processing":
            job.cancel_requested = True

    def recover(self, job_ids: Iterable[str]) -> None:
        """End the claims of workers that are silent or stuck."""
        for job_id in job_ids:
            job = self.jobs[job_id]
            self.fail(job, "internal" if "lease_until" in job.is_late else "timeout")

    def _end(self, job: Generation, outcome: str) -> None:
        assert job.token is not None
        job.outcomes[job.token] = outcome
        job.token = None

    def _requeue(self, job: Generation, outcome: str, used: int) -> None:
        self._end(job, outcome)
        job.status, job.attempt, job.waits = "queued", used, False

    def _refund(self, job: Generation, amount: int) -> None:
        assert job.refund is None
        job.refund = amount
        for bucket, part in reversed(job.paid_from):  # what was spent last comes back first
            if back := min(part, amount):
                self.accounts[job.user_id].receive(back, bucket, self.now)
            amount -= back
