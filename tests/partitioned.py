"""Darkroom with generations, images and attempts in partitions, made from `sql/` by five edits.

    python tests/partitioned.py 2026-10 2027-03 > partitioned.sql     # one partition for each month

Ids are in the order of time (uuid_v7), so a range of ids is a range of time. What is restored into
a database made by this is in partitions (docs/RUNBOOK.md). Each edit must apply, or it fails.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

SQL_FILES = sorted((Path(__file__).resolve().parents[1] / "sql").glob("*.sql"))
TABLES = {"public.generations": "id", "public.images": "generation_id"}
TABLES["private.attempts"] = "generation_id"


def first_id(month: datetime) -> str:
    """Return the least id that uuid_v7 makes in a month."""
    digits = f"{int(month.timestamp() * 1000):012x}" + "0" * 20
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def months(first: str, last: str) -> Iterator[datetime]:
    """Return the first moment of each month from the first to the one after the last, in UTC."""
    month = datetime.strptime(first, "%Y-%m").replace(tzinfo=UTC)
    end = datetime.strptime(last, "%Y-%m").replace(tzinfo=UTC)
    while month <= end:
        yield month
        month = following(month)
    yield month


def following(month: datetime) -> datetime:
    return month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1)


def around(now: datetime) -> tuple[str, str]:
    """Return months from two before a moment to one after it."""
    return f"{now - timedelta(days=62):%Y-%m}", f"{now + timedelta(days=31):%Y-%m}"


def partition(table: str, month: datetime) -> str:
    """Return the statement for one month's partition."""
    bounds = f"from ('{first_id(month)}') to ('{first_id(following(month))}')"
    name = f"{table}_{month:%Y_%m}"
    closed = f"alter table {name} enable row level security;\nrevoke all on {name} from public"
    options = " with (fillfactor = 80)" if table == "public.generations" else ""
    return (
        f"create table {name} partition of {table} for values {bounds}{options};\n"
        f"{closed}, anon, authenticated, service_role;\n"
    )


def edited(first: str, last: str) -> str:
    """Return the whole of `sql/`, edited."""
    script = "".join(file.read_text() for file in SQL_FILES)
    starts = list(months(first, last))[:-1]

    def edit(old: str, new: str) -> None:
        nonlocal script
        if script.count(old) != 1:
            raise ValueError(f"not found once: {old!r}")
        script = script.replace(old, new)

    # What is unique in all partitions must hold the key of the partitions. That a key is used once
    # does not rest on this index: enqueue looks for it while it holds the user's lock.
    edit(
        "create unique index generations_idempotency_key_idx",
        "create index generations_idempotency_key_idx",
    )
    for table, key in TABLES.items():
        options = " with (fillfactor = 80)" if table == "public.generations" else ""
        parts = "".join(partition(table, month) for month in starts)
        spare = f"create table {table}_rest partition of {table} default;\n"
        closed = f"alter table {table}_rest enable row level security;\n"
        closed += f"revoke all on {table}_rest from public, anon, authenticated, service_role;\n"
        edit(
            f"){options};\n\ncomment on table {table} is",
            f") partition by range ({key});\n{parts}{spare}{closed}\ncomment on table {table} is",
        )
    return script


if __name__ == "__main__":
    print(edited(*sys.argv[1:3]))
