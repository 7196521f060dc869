"""docs/settings.md: it names every column that an operator may set, with the default it has."""

from __future__ import annotations

import re
from typing import Any

import pytest
from database import PROJECT, Database
from documents import read

PAGE = PROJECT / "docs" / "settings.md"
TEXT = PAGE.read_text()
SECTIONS = dict(re.findall(r"(?ms)^## [^\n]*: `(private\.\w+)`\n(.*?)(?=^## |\Z)", TEXT))
# Sections that tell of rows, too, and the column that names them.
ROWS = {"private.alert_rules": "alert", "private.push_texts": "event_type"}
COLUMNS = """
    select a.attname as name, format_type(a.atttypid, a.atttypmod) as type, a.attnotnull as needed,
      pg_get_expr(d.adbin, d.adrelid) as value
    from pg_attribute as a
    left join pg_attrdef as d on (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
    where a.attrelid = %s::regclass and a.attnum > 0 and not a.attisdropped
"""
GIVEN, NULL = ("per row", "required"), "`null`"


def tables(section: str) -> list[list[dict[str, str]]]:
    """Return the tables of a section: rows by the words of the head."""
    found = []
    for text in re.findall(r"(?m)(?:^\|.*\n)+", section):
        head, _, *rows = [
            [cell.strip() for cell in row[1:-1].split("|")] for row in text.splitlines()
        ]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def defaults(table: str) -> dict[str, str]:
    """Return what the page has for each column of a table."""
    return {
        name: row["default"]
        for rows in tables(SECTIONS[table])
        for row in rows
        if "default" in row
        for name in re.findall(r"`(\w+)`", row["column"])
    }


def columns(db: Database, table: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in db.execute(COLUMNS, table)}


@pytest.mark.parametrize("table", SECTIONS)
def test_no_column_is_missing_and_none_is_invented(db, table):
    known = columns(db, table).keys()
    named = {*re.findall(r"`(\w+)`", SECTIONS[table]), *tables(SECTIONS[table])[0][0]}
    assert known - named == set()
    assert defaults(table).keys() - known == set()


@pytest.mark.parametrize("table", [table for table in SECTIONS if defaults(table)])
def test_a_default_is_that_of_the_table(db, table):
    known = columns(db, table)
    for name, said in defaults(table).items():
        kind, value = known[name]["type"], known[name]["value"]
        given = None if said == NULL else said.strip("`")
        if said in GIVEN:
            assert value is None, name
        else:
            assert value or not known[name]["needed"], name
            value = value or "null"
            assert db.value(f"select %s::{kind} is not distinct from ({value})", given), name


def test_the_plans_are_those_that_are_installed(db):
    known = columns(db, "private.plans")
    (rows,) = tables(SECTIONS["private.plans"])
    assert {row["column"].strip("`") for row in rows} > {"max_active", "busy_after"}
    for row in rows:
        name = row["column"].strip("`")
        for plan in ("guest", "free", "paid"):
            given = None if row[plan] == NULL else row[plan].strip("`")
            query = f"select {name} is not distinct from %s::{known[name]['type']}"
            assert db.value(f"{query} from private.plans where name = %s", given, plan), name


@pytest.mark.parametrize("table", ROWS)
def test_the_rows_are_those_that_are_installed(db, table):
    rows = next(rows for rows in tables(SECTIONS[table]) if ROWS[table] in rows[0])
    shown = [{name: cell.strip("`") for name, cell in row.items()} for row in rows]
    listed = ", ".join(f"{name}::text" for name in rows[0])
    installed = db.execute(f"select {listed} from {table}")
    assert sorted(shown, key=str) == sorted(map(dict, installed), key=str)


def test_what_the_page_says_can_be_done(db):
    for block in read(PAGE):
        done = db.psql(script=block.text)
        assert done.returncode == 0, done.stderr
