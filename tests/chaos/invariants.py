"""What must hold once everything has healed and all jobs have ended, whatever happened before.

Each function returns what breaks its rule, one line each; `judge` asks all of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chaos.clients import Accepted
from chaos.world import MARK, PERIOD_CREDITS, Databases
from database import BOOKS
from fake_replicate import FakeReplicate

OF_SCENARIO = "g.prompt like %s || '%%'"
ENDS = ("completed", "failed", "canceled")


@dataclass(frozen=True)
class Evidence:
    """What the rules are held against: one scenario's jobs, and all around them."""

    db: Databases
    accepted: Accepted
    provider: FakeReplicate
    stored: Callable[[str], bytes | None]  # a file of the bucket, by its path
    prefix: str  # of the scenario's prompts

    def generations(self) -> list[dict[str, Any]]:
        query = f"select g.* from public.generations as g where {OF_SCENARIO}"
        return self.db.execute(query, self.prefix)

    def of_generations(self, table: str) -> list[dict[str, Any]]:
        """The rows of a table that belong to them."""
        query = (
            f"select t.* from {table} as t inner join public.generations as g"
            f" on g.id = t.generation_id where {OF_SCENARIO} order by t.ctid"
        )
        return self.db.execute(query, self.prefix)


def lost(seen: Evidence) -> list[str]:
    """Every accepted job is on record and has ended; none is left in the queue."""
    statuses = {str(row["id"]): row["status"] for row in seen.generations()}
    accepted, wanted_no_more = seen.accepted.jobs.values(), seen.accepted.canceled
    found = [f"{job}: {statuses.get(job)}" for job in accepted if statuses.get(job) not in ENDS]
    queued = seen.db.execute("select job_id from private.live_jobs")
    found += [f"{row['job_id']}: still in the queue" for row in queued]
    found += [f"unwanted answer: {text}" for text in seen.accepted.refused]
    canceled = {job for job, status in statuses.items() if status == "canceled"}
    return found + [f"{job}: canceled by nobody" for job in canceled - wanted_no_more]


def doubled(seen: Evidence) -> list[str]:
    """A request made one job, however often it was sent; a job ended once."""
    keys = Counter(row["prompt"].removeprefix(f"{MARK} ") for row in seen.generations())
    found = [f"{key}: {count} generations" for key, count in keys.items() if count > 1]
    found += [f"{key}: nobody was told of it" for key in keys if key not in seen.accepted.jobs]
    found += [f"{key}: answered with two jobs" for key in seen.accepted.doubled]
    attempts = seen.of_generations("private.attempts")
    ends = Counter(row["generation_id"] for row in attempts if row["outcome"] in ENDS)
    return found + [f"{job_id}: ended {count} times" for job_id, count in ends.items() if count > 1]


def wrongly_charged(seen: Evidence) -> list[str]:
    """Balance, ledger, charges, refunds and places are right, by two sets of rules."""
    broken = seen.db.execute(BOOKS) + seen.db.execute("select * from private.broken_books")
    return [" ".join(map(str, row.values())) for row in broken]


def files_missing(seen: Evidence) -> list[str]:
    """Every image on record is in Storage, as large as the record says; so is its preview."""
    found = []
    for image in seen.of_generations("public.images"):
        for path in filter(None, (image["storage_path"], image["preview_path"])):
            body = seen.stored(path)
            is_whole = body and (path != image["storage_path"] or len(body) == image["bytes"])
            if not is_whole:
                found.append(f"{path}: {len(body) if body else 'no'} bytes")
    return found


def files_left(seen: Evidence) -> list[str]:
    """After the sweep no file is in Storage that no image speaks of."""
    files = seen.db.execute("select name from storage.objects where bucket_id = 'generations'")
    images = seen.db.execute("select storage_path, preview_path from public.images")
    return sorted({row["name"] for row in files} - {p for row in images for p in row.values()})


def wrongly_bought(seen: Evidence) -> list[str]:
    """One create for a claim at most; bought anew only where nothing can come of the last one."""
    attempts = seen.of_generations("private.attempts")
    claims = Counter(row["generation_id"] for row in attempts)
    used: dict[Any, list[str]] = defaultdict(list)
    owners: dict[str, set[Any]] = defaultdict(set)
    for row in sorted(attempts, key=lambda row: row["token"]):
        if key := row["provider_job_id"]:
            used[row["generation_id"]].append(key)
            owners[key].add(row["generation_id"])
    found = [f"{key}: of {len(jobs)} jobs" for key, jobs in owners.items() if len(jobs) > 1]
    creates: dict[str, list[str | None]] = defaultdict(list)
    for create in seen.provider.creates:
        creates[create.body["input"]["prompt"]].append(create.prediction_id)
    for job in seen.generations():
        job_id, made = job["id"], creates[job["prompt"]]
        bought = [key for key in made if key]
        if len(made) > claims[job_id]:
            found.append(f"{job_id}: {len(made)} creates, {claims[job_id]} claims")
        spare = [key for key in bought[:-1] if not seen.provider.is_spent(key)]
        found += [f"{job_id}: bought again after {key}" for key in spare]
        if not set(used[job_id]) <= set(bought):
            found.append(f"{job_id}: uses what it did not buy")
        if job["status"] == "completed" and used[job_id][-1:] != bought[-1:]:
            found.append(f"{job_id}: completed with something else than it bought last")
    return found


def wrongly_booked(seen: Evidence) -> list[str]:
    """Nothing is reserved any more, and what attempts cost is spent: at least what is known, and at
    most what each might have cost.
    """
    costs = """
    select a.cost_usd as known, coalesce(a.cost_usd, 0.01 * g.image_count) as most
    from private.attempts as a inner join public.generations as g on g.id = a.generation_id
    """
    attempts = seen.db.execute(costs)
    states = seen.db.execute("select spent_usd, reserved_usd from private.budget_states")
    known, most = (sum(row[name] or 0 for row in attempts) for name in ("known", "most"))
    spent, reserved = (sum(row[name] for row in states) for name in ("spent_usd", "reserved_usd"))
    is_right = reserved == 0 and known <= spent <= most
    return [] if is_right else [f"spent {spent} of {known} to {most}, reserved {reserved}"]


def wrongly_paid(seen: Evidence) -> list[str]:
    """What was paid for is granted once, however often and in whatever order stores tell of it."""
    grants = seen.db.execute(
        "select external_id, amount - debt as given from public.credit_ledger where kind = 'grant'"
    )
    given = {
        name: sum(row["given"] for row in grants if name in (row["external_id"] or ""))
        for name in seen.accepted.paid
    }
    return [f"{name}: {credits}" for name, credits in given.items() if credits != PERIOD_CREDITS]


RULES = {
    "lost": lost,
    "doubled": doubled,
    "wrongly charged": wrongly_charged,
    "image without file": files_missing,
    "file without image": files_left,
    "wrongly bought": wrongly_bought,
    "wrongly booked": wrongly_booked,
    "wrongly paid": wrongly_paid,
}


def judge(seen: Evidence) -> dict[str, list[str]]:
    """Return what breaks each rule; empty lists if all is well."""
    return {name: rule(seen) for name, rule in RULES.items()}
