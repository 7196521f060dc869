"""What callers plant (types, tables, functions, operators) is never picked up by our functions.

PostgreSQL looks for types and tables among the caller's temporary objects first, unless pg_temp is
said to come later: with an empty search_path, `::uuid` in a definer would be the caller's uuid.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from actors import Caller, Refusal
from database import SQL_FILES, Database
from hostile import API_ROLES, Function, Victim, functions

TRAP = "P0666"
EXPECTED = "ok|PT404|PT409|DR001|22023"  # 22023: cancel_job, and nobody asked for it
RAISE = f"begin raise sqlstate '{TRAP}'; end"
TYPES = (
    "bool,bytea,float8,int2,int4,int8,interval,json,jsonb,numeric,regclass,text,timestamptz,uuid"
)
LISTED = f"('{{{TYPES}}}'::regtype[])"
PLANTED_FUNCTIONS = """
select format('create function planted.%%I(%%s) returns %%s language plpgsql as %%L',
  proname, pg_get_function_identity_arguments(oid), prorettype::regtype, %s::text) as command
from pg_proc
where pronamespace = 'pg_catalog'::regnamespace and prokind = 'f' and not proretset
  and proname = any(%s)
  and not '{internal,cstring,"\\"any\\"",record,void,trigger}'::regtype[]::oid[]
    && (proargtypes::oid[] || prorettype)
"""
PLANTED_OPERATORS = f"""
select format('create function planted.op%%s(%%s, %%s) returns %%s language plpgsql as %%L',
    oid, oprleft::regtype, oprright::regtype, oprresult::regtype, %s::text) as command,
  format('create operator planted.%%s (function = planted.op%%s, leftarg = %%s, rightarg = %%s)',
    oprname, oid, oprleft::regtype, oprright::regtype) as operator
from pg_operator
where oprleft = any {LISTED} and oprright = any {LISTED}
"""


class Intruder(Caller):
    """Somebody with SQL access to a role, a schema of his own and temporary objects."""

    def __init__(self, db: Database, role: str, user_id: str) -> None:
        super().__init__(db)
        self.role, self.user_id = role, user_id
        db.execute(f"create schema planted authorization {role}")

    def claims(self) -> dict[str, str]:
        """Return what the token says."""
        return {"role": self.role, "sub": self.user_id}

    def plant(self) -> int:
        """Hide each type, table, function and operator that our code may name behind a trap."""
        words = set(re.findall(r"\w+(?=\()", "".join(file.read_text() for file in SQL_FILES)))
        commands = [
            *self.db.execute(PLANTED_FUNCTIONS, RAISE, list(words)),
            *self.db.execute(PLANTED_OPERATORS, RAISE),
        ]
        tables = self.db.execute(
            "select distinct tablename from pg_tables where schemaname <> 'pg_catalog'"
        )
        with super().acting() as connection:
            for command in commands:
                for text in command.values():
                    connection.execute(text)
            for name in TYPES.split(","):
                connection.execute(
                    f"create function pg_temp.trap(pg_catalog.{name}) returns boolean"
                    f" language plpgsql as $${RAISE}$$"
                )
                connection.execute(
                    f"create domain pg_temp.{name} as pg_catalog.{name} check (pg_temp.trap(value))"
                )
            for table in tables:
                connection.execute(
                    f"create temporary view {table['tablename']} as select 1 as id"
                    " where pg_temp.trap('')"
                )
        return len(commands)

    @contextlib.contextmanager
    def acting(self) -> Iterator[psycopg.Connection[Any]]:
        """Give the connection for one transaction in which what is planted comes first."""
        with super().acting() as connection:
            connection.execute("set local search_path = planted, pg_temp, public, pg_catalog")
            yield connection

    def outcome(self, function: Function, victim: Victim) -> str:
        """Call a function with plausible arguments; return ok or the code of its refusal."""
        names = {name: name.removeprefix("p_") for name in function.arguments}
        if self.role == "darkroom_worker":
            types = function.arguments
            arguments = {n: victim.plausible_to_the_worker(names[n], types[n]) for n in names}
        else:
            values = victim.plausible()
            arguments = {
                name: values.get(f"{function.name}.{key}", values[key])[0]
                for name, key in names.items()
            }
        answer = function.called_by(self, arguments)
        return answer.code if isinstance(answer, Refusal) else "ok"


@pytest.mark.parametrize("role", [*API_ROLES, "darkroom_worker", "darkroom_monitor"])
def test_no_function_picks_up_what_its_caller_planted(db, role):
    victim = Victim(db)
    intruder = Intruder(db, role, victim.id)
    assert intruder.plant() > 100
    ours = functions(db, role, "public", "private")

    outcomes = {f"{each.schema}.{each.name}": intruder.outcome(each, victim) for each in ours}

    assert {name: code for name, code in outcomes.items() if not re.fullmatch(EXPECTED, code)} == {}
    assert list(outcomes.values()).count("ok") > len(ours) / 2
