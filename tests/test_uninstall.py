"""sql/uninstall.sql: nothing of Darkroom's is left, and nothing of the app's is touched.

How it is as Supabase's postgres, with pg_cron and Realtime: test_installation.
"""

from __future__ import annotations

import subprocess

import pytest
from actors import Worker
from database import PROJECT, SEED, SQL_FILES, Database

import migrate

UNINSTALL = PROJECT / "sql" / "uninstall.sql"
PARTS = [file for file in SQL_FILES if file.name >= "95"]
CORE = [file for file in SQL_FILES if file not in PARTS]
GALLERY = ("generation_tags", "image_likes", "prompt_templates")


def uninstall(db: Database, despite: str = "") -> subprocess.CompletedProcess[str]:
    return db.psql(
        script=f"set darkroom.uninstall_despite = '{despite}';\n" + UNINSTALL.read_text()
    )


def uninstalled(db: Database, despite: str = "") -> str:
    """Uninstall; return what was said."""
    done = uninstall(db, despite)
    assert done.returncode == 0, done.stderr
    return done.stderr


def rows(db: Database) -> list[str]:
    """Return the rows that are not in tables of Darkroom's."""
    tables = ("auth.users", "storage.buckets", "storage.objects")
    return [str(db.execute(f"select * from {table} order by 1")) for table in tables]


# An app's own that look like Darkroom's: functions it may add later only, as a grant goes by names.
OVERLOADS = """
create function public.ping(text) returns text return $1;
create function public.set_tags(int) returns int return $1;
"""
LOOKALIKES = """
create table public.generation_tags (id int primary key);
create table public.image_likes (id int);
create policy "Everybody reads shared images" on storage.objects using (true);
"""
APP = """
create table public.orders (id int primary key, user_id uuid references auth.users);
create policy mine on storage.objects for select using (bucket_id = 'avatars');
insert into storage.buckets (id, name) values ('avatars', 'avatars');
insert into auth.users (id) select gen_random_uuid() from pg_am limit 3;
"""


@pytest.mark.parametrize("parts", [PARTS, [], *([part] for part in PARTS)])
def test_it_leaves_what_was_there_whatever_parts_were_installed(supabase_db, parts):
    db = supabase_db
    db.execute(APP + OVERLOADS + ("" if parts else LOOKALIKES))
    before, rows_before = db.dump(), rows(db)
    db.execute("drop function public.ping(text), public.set_tags(int)")
    assert db.psql(*CORE, *parts, SEED).returncode == 0
    db.execute(OVERLOADS)

    said = uninstalled(db)

    assert (db.dump(), rows(db)) == (before, rows_before)
    assert "it is uninstalled" in said
    assert "there is nothing of it here" in uninstalled(db)
    db.execute("drop function public.ping(text), public.set_tags(int)")
    assert db.psql(*CORE, *parts, SEED).returncode == 0


def test_migrations_are_applied_again_after_it_and_the_apps_own_are_not(supabase_db):
    db = supabase_db
    db.execute(migrate.HISTORY)
    before = db.dump()
    migrate.migrate(db.url, is_confirmed=True)

    uninstalled(db)

    recorded = "select count(*) from supabase_migrations."
    assert db.dump() == before
    assert db.value(f"{recorded}schema_migrations") == db.value(f"{recorded}seed_files") == 0
    db.execute("insert into supabase_migrations.schema_migrations (version, name) values (1, 'x')")
    db.execute("insert into supabase_migrations.seed_files values ('supabase/seed.sql', 'x')")
    assert db.psql(*SQL_FILES, SEED).returncode == 0
    uninstalled(db)
    assert db.value(f"{recorded}schema_migrations") == db.value(f"{recorded}seed_files") == 1


def test_an_upgraded_first_edition_is_uninstalled_whole(first, supabase_db):
    migrate.migrate(first.url, is_confirmed=True)

    uninstalled(first)

    assert first.objects() == supabase_db.objects()


@pytest.mark.parametrize(
    ("given", "token"),
    [
        ("insert into private.workers (host, version, slots, keys) values ('a', '1', 1, '{}')",
         "a worker lives"),
        ("insert into storage.objects (bucket_id, name) values ('inputs', 'a/b.png')", "files"),
        ("create view public.mine as select id from public.generations", "view mine"),
        ("create table public.mine (id uuid references public.generations)", "constraint mine"),
        ("create table public.mine (id uuid default private.uuid_v7())", "default value"),
        ("create table public.mine (price public.credits)", "column price of table mine"),
        ("create function public.mine(public.models) returns int return 1", "function mine"),
        ("create view public.mine as select public.list_models()", "view mine"),
        ("create policy mine on storage.objects for select using (private.is_plain_path(name))",
         "policy mine"),
    ],
)  # fmt: skip
def test_it_refuses_where_something_would_be_lost_and_changes_nothing(db, given, token):
    db.execute(given)
    before = db.dump(), db.snapshot(), rows(db)

    refused = uninstall(db)

    assert refused.returncode == 3
    assert token in refused.stderr
    assert (db.dump(), db.snapshot(), rows(db)) == before


def test_it_does_what_it_refused_if_told_and_keeps_the_files(db, alice):
    alice.enqueue()
    Worker(db).claimed()
    db.execute("insert into storage.objects (bucket_id, name) values ('inputs', 'a/b.png')")
    before = rows(db)
    assert "jobs have not ended" in uninstall(db, "files").stderr
    assert "files in the buckets" in uninstall(db, "jobs").stderr

    uninstalled(db, "jobs, files")

    assert rows(db) == before
    assert db.value("select to_regnamespace('private')") is None


def test_it_does_not_hold_up_who_signs_up(db):
    with db.connect().transaction() as signing_up:
        signing_up.connection.execute("insert into auth.users (id) values (gen_random_uuid())")
        refused = uninstall(db)

    assert "lock timeout" in refused.stderr
    assert db.value("select to_regclass('private.ready_jobs')") is not None
