"""Darkroom with generations, images and attempts in partitions, made from `sql/` by four edits.

    python tests/partitioned.py 2026-10 2027-03 > partitioned.sql     # one partition for each month

Ids are in the order of time (uuid_v7), so a range of ids is a range of time. What is restored into
a database made by this is in partitions (docs/scale.md). Each edit must apply, or it fails.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

SQL_FILES = sorted((Path(__file__).resolve().parents[1] / "sql").glob("[0-9]*.sql"))
# The key of each, and its options.
TABLES = {
    "public.generations": ("id", " with (fillfactor = 80)"),
    "public.images": ("generation_id", ""),
    "private.attempts": ("generation_id", ""),
}


def first_id(month: datetime) -> str:
    """Return the least id that uuid_v7 makes in a month."""
    digits = f"{int(month.timestamp() * 1000):012x}" + "0" * 20
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def following(month: datetime) -> datetime:
    return month.replace(year=month.year + month.month // 12, month=month.month % 12 + 1)


def around(now: datetime) -> tuple[str, str]:
    """Return months from two before a moment to one after it."""
    return f"{now - timedelta(days=62):%Y-%m}", f"{now + timedelta(days=31):%Y-%m}"


def edited(first: str, last: str) -> str:
    """Return the whole of `sql/`, edited."""
    script = "".join(file.read_text() for file in SQL_FILES)
    month, end = (datetime.strptime(each, "%Y-%m").replace(tzinfo=UTC) for each in (first, last))
    bounds = {"rest": "default"}
    while month <= end:
        to = following(month)
        bounds[f"{month:%Y_%m}"] = f"for values from ('{first_id(month)}') to ('{first_id(to)}')"
        month = to

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
    for table, (key, options) in TABLES.items():
        parts = "".join(
            f"create table {table}_{name} partition of {table} {values}{options};\n"
            f"alter table {table}_{name} enable row level security;\n"
            f"revoke all on {table}_{name} from public, anon, authenticated, service_role;\n"
            for name, values in bounds.items()
        )
        edit(
            f"){options};\n\ncomment on table {table} is",
            f") partition by range ({key});\n{parts}\ncomment on table {table} is",
        )
    return script


if __name__ == "__main__":
    print(edited(*sys.argv[1:3]))
