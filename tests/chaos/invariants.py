"""What must hold once everything has healed and all jobs have ended, whatever happened before.

Each function returns what breaks its rule, one line each; `judge` asks all of them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from chaos.clients import Accepted
from database import BOOKS, Database
from fake_replicate import FakeReplicate

Stored = Callable[[str], bytes | None]  # a file of the bucket, by its path


@dataclass(frozen=True)
class Evidence:
    """What the rules are held against: one scenario's jobs, and all around them."""

    db: Database
    accepted: Accepted
    provider: FakeReplicate
    stored: Stored
    key_prefix: str  # of the scenario's idempotency keys

    def generations(self) -> list[dict[str, Any]]:
        query = "select * from public.generations where idempotency_key like %s || '%%'"
        return self.db.execute(query, self.key_prefix)

    def attempts(self) -> list[dict[str, Any]]:
        query = (
            "select a.* from private.attempts as a"
            " inner join public.generations as g on g.id = a.generation_id"
            " where g.idempotency_key like %s || '%%' order by a.token"
        )
        return self.db.execute(query, self.key_prefix)


def lost(seen: Evidence) -> list[str]:
    """Every accepted job is on record and has ended; none is left in the queue."""
    statuses = {str(row["id"]): row["status"] for row in seen.generations()}
    found = [
        f"{job_id}: {statuses.get(job_id, 'unknown')}"
        for job_id in seen.accepted.jobs.values()
        if statuses.get(job_id) not in ("completed", "failed", "canceled")
    ]
    for table in ("ready_jobs", "running_jobs"):
        rows = seen.db.execute(f"select job_id from private.{table}")
        found += [f"{row['job_id']}: still in {table}" for row in rows]
    found += [f"unwanted answer: {text}" for text in seen.accepted.refused]
    found += [
        f"{job_id}: canceled, and nobody asked for it"
        for job_id, status in statuses.items()
        if status == "canceled" and job_id not in seen.accepted.canceled
    ]
    return found


def doubled(seen: Evidence) -> list[str]:
    """A request made one job, however often it was sent; a job ended once."""
    keys = Counter(row["idempotency_key"] for row in seen.generations())
    found = [f"{key}: {count} generations" for key, count in keys.items() if count > 1]
    found += [f"{key}: nobody was told of it" for key in keys if key not in seen.accepted.jobs]
    found += [f"{key}: answered with two jobs" for key in seen.accepted.doubled]
    ends = Counter(
        row["generation_id"]
        for row in seen.attempts()
        if row["outcome"] in ("completed", "failed", "canceled")
    )
    return found + [f"{job_id}: ended {count} times" for job_id, count in ends.items() if count > 1]


def wrongly_charged(seen: Evidence) -> list[str]:
    """Balance, ledger, charges, refunds and places are right, by two sets of rules."""
    found = [f"{row['id']}: {row['rule']}" for row in seen.db.execute(BOOKS)]
    broken = seen.db.execute("select * from private.broken_books")
    return found + [f"{row['user_id']}: {row['rule']}: {row['detail']}" for row in broken]


def files_missing(seen: Evidence) -> list[str]:
    """Every image on record is in Storage, as large as the record says; so is its preview."""
    query = (
        "select i.* from public.images as i"
        " inner join public.generations as g on g.id = i.generation_id"
        " where g.idempotency_key like %s || '%%'"
    )
    found = []
    for image in seen.db.execute(query, seen.key_prefix):
        for path in filter(None, (image["storage_path"], image["preview_path"])):
            body = seen.stored(path)
            is_whole = body and (path != image["storage_path"] or len(body) == image["bytes"])
            if not is_whole:
                found.append(f"{path}: {len(body) if body else 'no'} bytes")
    return found


def files_left(seen: Evidence) -> list[str]:
    """After the sweep no file is in Storage that no image speaks of."""
    query = (
        "select name from storage.objects as o where bucket_id = 'generations' and not exists ("
        "select from public.images as i where o.name in (i.storage_path, i.preview_path))"
    )
    return [row["name"] for row in seen.db.execute(query)]


def wrongly_bought(seen: Evidence) -> list[str]:
    """One create for a claim at most; bought anew only where nothing can come of the last one."""
    claims = Counter(row["generation_id"] for row in seen.attempts())
    used: dict[Any, list[str]] = defaultdict(list)
    for row in seen.attempts():
        if row["provider_job_id"]:
            used[row["generation_id"]].append(row["provider_job_id"])
    owners: dict[str, set[Any]] = defaultdict(set)
    for job_id, bought in used.items():
        for key in bought:
            owners[key].add(job_id)
    found = [f"{key}: of {len(jobs)} jobs" for key, jobs in owners.items() if len(jobs) > 1]
    creates: dict[str, list[str | None]] = defaultdict(list)
    for create in seen.provider.creates:
        if create.body is None:  # its worker was killed in the middle of it
            continue
        creates[create.body["input"]["prompt"]].append(create.prediction_id)
    for job in seen.generations():
        made = creates[job["prompt"]]
        bought = [key for key in made if key]
        if len(made) > claims[job["id"]]:
            found.append(f"{job['id']}: {len(made)} creates, {claims[job['id']]} claims")
        found += [
            f"{job['id']}: bought again after {key}"
            for key in bought[:-1]
            if not seen.provider.is_spent(key)
        ]
        if not set(used[job["id"]]) <= set(bought):
            found.append(f"{job['id']}: uses what it did not buy")
        if job["status"] == "completed" and used[job["id"]][-1:] != bought[-1:]:
            found.append(f"{job['id']}: completed with something else than it bought last")
    return found


RULES = {
    "lost": lost,
    "doubled": doubled,
    "wrongly charged": wrongly_charged,
    "image without file": files_missing,
    "file without image": files_left,
    "wrongly bought": wrongly_bought,
}


def judge(seen: Evidence) -> dict[str, list[str]]:
    """Return what breaks each rule; empty lists if all is well."""
    return {name: rule(seen) for name, rule in RULES.items()}
