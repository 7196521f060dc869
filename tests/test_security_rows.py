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


@pytest.mark.parametrize("grants", GRANTS)
@pytest.mark.parametrize("who", [Anon, User, WorkerRole, Monitor], ids=lambda who: who.__name__)
def test_no_outsider_reads_or_changes_a_row(db, who, grants):
    victim, outsider = Victim(db), who(db)
    db.execute(GRANTS[grants])
    tables = db.execute(
        "select format('%I.%I', table_schema, table_name) as name, min(column_name) as column"
        " from information_schema.columns inner join pg_tables as t"
        " on (t.schemaname, t.tablename) = (table_schema, table_name)"
        " where table_schema in ('public', 'private') and is_generated = 'NEVER'"
        " and is_identity = 'NO' group by 1 order by 1"
    )
    assert len(tables) > 20

    with unchanged(db):
        for name, column in (table.values() for table in tables):
            with contextlib.suppress(psycopg.errors.InsufficientPrivilege):
                text = str(outsider.query(f"select t::text from {name} as t"))
                assert victim.id not in text and SECRET not in text, name
            for change in CHANGES.values():
                with contextlib.suppress(psycopg.Error):
                    assert outsider.query(change.format(name, column)) == []
