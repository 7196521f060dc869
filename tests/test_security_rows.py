"""Every table of the catalogue, every role and verb, with and without a gateway that grants all."""

from __future__ import annotations

import contextlib

import psycopg
import pytest
from actors import Anon, Caller, Monitor, User
from database import unchanged
from hostile import SECRET, Victim

ROLES = "anon, authenticated, darkroom_worker, darkroom_monitor"
GRANTS = {
    "ours": "select",
    "everything": f"grant all on all tables in schema public, private to {ROLES}",
}
CHANGES = {
    "insert": "insert into {0} select * from {0} union all select (null::{0}).*",
    "update": "update {0} set {1} = {1}",
    "delete": "delete from {0}",
    "upsert": "insert into {0} select (null::{0}).* on conflict do nothing",
    "lock": "select from {0} for update",
}


class WorkerRole(Caller):
    """Somebody who has the worker's password."""

    role = "darkroom_worker"


@pytest.fixture
def tables(db) -> dict[str, str]:
    """Every table of ours, with one of its columns."""
    rows = db.execute(
        "select format('%I.%I', table_schema, table_name) as name, min(column_name) as column"
        " from information_schema.columns inner join pg_tables as t"
        " on (t.schemaname, t.tablename) = (table_schema, table_name)"
        " where table_schema in ('public', 'private') and is_generated = 'NEVER'"
        " and is_identity = 'NO' group by 1 order by 1"
    )
    assert len(rows) > 20
    return {row["name"]: row["column"] for row in rows}


@pytest.fixture(params=["anon", "stranger", "worker", "monitor"])
def outsider(request, db) -> Caller:
    """Somebody whose rows these are not."""
    outsiders = {"anon": Anon, "stranger": User, "worker": WorkerRole, "monitor": Monitor}
    return outsiders[request.param](db)


@pytest.mark.parametrize("grants", GRANTS)
def test_no_outsider_reads_a_row_of_a_user(db, tables, outsider, grants):
    victim = Victim(db)
    db.execute(GRANTS[grants])

    for table in tables:
        with contextlib.suppress(psycopg.errors.InsufficientPrivilege):
            text = str(outsider.query(f"select t::text from {table} as t"))
            assert victim.id not in text and SECRET not in text, table


@pytest.mark.parametrize("grants", GRANTS)
def test_no_outsider_changes_a_row(db, tables, outsider, grants):
    Victim(db)
    db.execute(GRANTS[grants])

    with unchanged(db):
        for change in CHANGES.values():
            for table, column in tables.items():
                with contextlib.suppress(psycopg.Error):
                    assert outsider.query(change.format(table, column)) == []
