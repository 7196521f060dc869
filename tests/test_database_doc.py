"""docs/database.md: what it names is what is there, and its commands do what it says."""

from __future__ import annotations

import re

import pytest
from actors import User
from database import PROJECT, Database
from documents import Reader, read, shows
from worker_process import eventually

from stack import Stack

PAGE = PROJECT / "docs" / "database.md"
REALTIME = PROJECT / "sql" / "65_realtime.sql"
# In a checkout that is set up, and with nothing else to set up.
MAKE = 'make() { [ "$1" = migrate ] && env "${@:2}" .venv/bin/python scripts/migrate.py; }\n'


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    with Stack(tmp_path_factory.mktemp("stack"), fsync=False, with_worker=True).running() as stack:
        yield stack


def named(pattern: str) -> set[str]:
    return set(re.findall(pattern, PAGE.read_text()))


@pytest.mark.parametrize(
    ("pattern", "query"),
    [
        (
            r"`(darkroom_\w+)`",
            "select tgname from pg_trigger where tgrelid = 'auth.users'::regclass"
            " and not tgisinternal"
            " union select rolname from pg_roles where rolname like 'darkroom%'"
            " union select jobname from cron.job",
        ),
        (r'"(Users .+?|Everybody .+?)"',
         "select policyname from pg_policies where schemaname in ('storage', 'realtime')"),
        (r"`(\w+_timeout|default_\w+)`",
         "select split_part(c, '=', 1) from pg_db_role_setting as s, unnest(setconfig) as c"
         " where setrole::regrole::text like 'darkroom%'"),
        (r"\*\*Domains in `public`\*\*: ([^.]+)\.",
         "select string_agg(format('`%s`', typname), ', ' order by typname) from pg_type"
         " where typnamespace = 'public'::regnamespace and typtype = 'd'"),
        (r"the private buckets (.+?) \|",
         "select string_agg(format('`%s`', id), ' and ' order by id) from storage.buckets"),
    ],
)  # fmt: skip
def test_what_is_made_outside_of_private_is_named_and_nothing_else(project, pattern, query):
    db = Database(project.database_url, "postgres")
    there = {next(iter(row.values())) for row in db.execute(query)}
    db.close()
    if "pg_policies" in query:  # the stack has no Realtime
        there |= set(re.findall(r'create policy "(.+)"', REALTIME.read_text()))

    assert named(pattern) == there


def test_the_reading_order_is_of_all_files():
    order = re.findall(r"^\| \[\w+\]\(\.\./sql/(\w+\.sql)\)", PAGE.read_text(), re.MULTILINE)

    assert order == sorted(file.name for file in (PROJECT / "sql").glob("*.sql"))


def test_it_is_uninstalled_then_installed_and_upgraded_as_the_page_says(project, tmp_path):
    """In that order: what is there first has a picture in Storage."""
    reader = Reader(project, tmp_path)
    reader.functions = MAKE
    db = Database(project.database_url, "postgres")
    job = User(db, reader.user_id).enqueued()
    finished = "select status = 'completed' from public.generations where id = %s"
    eventually(lambda: db.value(finished, job))
    files = "select count(*) from storage.objects where bucket_id = 'generations'"
    assert db.value(files) > 0
    project.worker.stop()
    blocks = [block for block in read(PAGE) if block.is_run]
    removal = [block for block in blocks if "/empty" in block.text or "uninstall" in block.text]

    for block in removal + [block for block in blocks if block not in removal]:
        printed = getattr(reader, block.language)(block)
        assert shows(printed, block.shown or "…"), f"{block.text}\n{printed}"
        if block == removal[-1]:
            assert db.value("select to_regnamespace('private')") is None

    assert len(removal) == 2
    assert db.value(files) == 0
    assert db.value("select count(*) from public.models") > 0
    db.close()
