"""`make migrate`: shows what it will do, asks, does it, and agrees with the Supabase CLI."""

from __future__ import annotations

import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from database import PROJECT, Database

import migrate
from stack import supabase_cli

FILES = [file.stem for file in sorted((PROJECT / "supabase" / "migrations").glob("*.sql"))]
NOWHERE = "postgresql://u:secret@127.0.0.1:9/x"


def run(url: str, answer: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it as `make migrate` does."""
    done = subprocess.run(
        [sys.executable, PROJECT / "scripts/migrate.py"],
        env={"DATABASE_URL": url} | environment,
        input=answer,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert "secret" not in done.stdout + done.stderr
    return done


def history(db: Database) -> list[str]:
    query = "select version || '_' || name as file from supabase_migrations.schema_migrations"
    return sorted(row["file"] for row in db.execute(query))


def is_installed(db: Database) -> bool:
    return bool(db.value("select to_regnamespace('private') is not null"))


def made_outside(db: Database) -> set[str]:
    rows = db.execute(
        "select tgname::text as name from pg_trigger where tgrelid = 'auth.users'::regclass"
        " and not tgisinternal"
        " union all select format('storage.objects (%s)', count(*)) from pg_policies"
        " where schemaname = 'storage'"
        " union all select id from storage.buckets"
    )
    return {row["name"] for row in rows}


def test_it_shows_what_is_there_and_what_it_will_do_and_no_is_no(supabase_db):
    supabase_db.execute("create table public.orders as select 1 as id")
    supabase_db.execute("insert into auth.users (id) select gen_random_uuid() from pg_am limit 3")
    before = made_outside(supabase_db)

    done = [run(supabase_db.url, answer, WELCOME_CREDITS="3") for answer in ("y\n", "")]
    after_no = is_installed(supabase_db)
    shown = done[0].stdout
    done.append(run(supabase_db.url, f"{supabase_db.name}\n", WELCOME_CREDITS="3"))
    again = run(supabase_db.url, WELCOME_CREDITS="5").stdout

    version = supabase_db.value("show server_version").split()[0]
    at = urlsplit(supabase_db.url)
    assert f"server      PostgreSQL {version} at {at.hostname}:{at.port}\n" in shown
    assert f"database    {supabase_db.name}\nrole        postgres (superuser)\n" in shown
    assert "data        rows in auth.users, public.orders" in shown
    pending = [f"pending     {name}\n" for name in FILES]
    assert "".join([*pending, "pending     supabase/seed.sql"]) in shown
    assert "credits     3 for each new user, and for the 3 who are there: 9; WELCOME" in shown
    assert [each.returncode for each in done] == [2, 2, 0]  # data: only the database's name is yes
    assert "migrate: confirmation_needed: nothing was done" in done[1].stderr
    assert not after_no
    assert [name for name in made_outside(supabase_db) - before if name not in shown] == []
    assert "darkroom_worker" in shown
    assert supabase_db.value("select sum(credits) from public.entitlements") == 9
    assert supabase_db.value("select welcome_credits from private.settings") == 3
    assert all(f"applied     {name}\n" in again for name in FILES)
    assert again.splitlines()[-1] == "nothing to do"
    assert "outside" not in again and "credits" not in again


def test_what_it_installs_and_records_is_what_the_cli_would(supabase_db, db):
    done = run(supabase_db.url, YES="1")

    assert done.returncode == 0, done.stderr
    assert "notice      Darkroom: no pg_cron for this database" in done.stdout
    assert history(supabase_db) == FILES
    assert supabase_db.objects() == db.objects()
    models = "select count(*) from public.models"
    assert supabase_db.value(models) == db.value(models)
    assert "up to date" in supabase_cli(supabase_db.url, "db", "push", "--include-seed", "--yes")


def test_it_goes_on_where_the_cli_stopped(supabase_db, monkeypatch):
    supabase_cli(supabase_db.url, "db", "push", "--include-seed", "--yes")

    done = run(supabase_db.url)

    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "nothing to do")


def test_a_migration_that_fails_leaves_nothing(supabase_db, monkeypatch):
    whole = migrate.read_migrations()
    broken = migrate.Migration("20990101000000", "broken", "create table public.x (); select 1/0;")
    monkeypatch.setattr(migrate, "read_migrations", lambda: [*whole, broken])

    with pytest.raises(migrate.MigrateError, match=r"migration_failed: 2099.*: division by zero"):
        migrate.migrate(supabase_db.url, is_confirmed=True)

    assert history(supabase_db) == FILES
    assert supabase_db.value("select to_regclass('public.x')") is None


@pytest.mark.parametrize("by_cli", [True, False])
def test_a_file_that_changed_after_it_was_applied_is_refused_until_it_is_as_recorded(
    supabase_db, monkeypatch, by_cli
):
    if by_cli:
        supabase_cli(supabase_db.url, "db", "push", "--include-seed", "--yes")
    else:
        migrate.migrate(supabase_db.url, is_confirmed=True)
    *others, last = migrate.read_migrations()
    changed = migrate.Migration(last.version, last.name, last.text + "create table public.x ();")
    added = migrate.Migration("20990101000000", "added", "create table public.y ();")
    monkeypatch.setattr(migrate, "read_migrations", lambda: [*others, changed, added])

    with pytest.raises(migrate.MigrateError, match=rf"changed_migration: {last} .*make migration"):
        migrate.migrate(supabase_db.url, is_confirmed=True)

    assert supabase_db.value("select to_regclass('public.y')") is None
    record = "update supabase_migrations.schema_migrations set statements = %s where version = %s"
    supabase_db.execute(record, [changed.text], last.version)
    migrate.migrate(supabase_db.url, is_confirmed=True)
    assert supabase_db.value("select to_regclass('public.y')") is not None


@pytest.mark.parametrize(
    ("fault", "token"),
    [
        ("drop schema auth cascade", "missing_auth"),
        ("create schema private; create table private.settings ()", "not_recorded"),
        (f"{migrate.HISTORY} insert into supabase_migrations.schema_migrations values ('2')",
         "unknown_migration"),
        ("select", "bad_credits"),
    ],
)  # fmt: skip
def test_where_it_cannot_work_it_says_why_and_changes_nothing(supabase_db, fault, token):
    supabase_db.execute(fault)
    before = supabase_db.dump()

    for credits in ("-1", "many", "1e9") if token == "bad_credits" else ("3",):
        done = run(supabase_db.url, YES="1", WELCOME_CREDITS=credits)

        assert done.returncode == 1
        assert done.stderr.startswith(f"migrate: {token}: ")
        assert supabase_db.dump() == before


def test_it_gives_up_where_others_would_wait_behind_it(supabase_db):
    with supabase_db.connect().transaction() as signing_up:
        signing_up.connection.execute("insert into auth.users (id) values (gen_random_uuid())")
        done = run(supabase_db.url, YES="1")

    assert done.returncode == 1
    assert done.stderr.startswith("migrate: locked: ")
    assert not is_installed(supabase_db)


def test_a_new_migration_older_than_the_last_one_is_refused():
    class Target:
        def applied(self) -> dict[str, None]:
            return {"2": None}

    with pytest.raises(migrate.MigrateError, match="out_of_order: 1_x"):
        migrate.plan(Target(), [migrate.Migration(version, "x", "") for version in ("1", "2")])


def test_a_role_without_rights_is_told_which_and_nothing_is_left(supabase_db):
    name = f"migrator_of_{supabase_db.name}"
    supabase_db.execute(f"create role {name} login password 'secret' noinherit")
    at = urlsplit(supabase_db.url)
    url = at._replace(netloc=f"{name}:secret@{at.hostname}:{at.port}").geturl()

    before = run(url, YES="1")
    supabase_db.execute(f"grant create on database {supabase_db.name} to {name}")
    supabase_db.execute(f"grant create on schema public to {name}")
    supabase_db.execute(f"grant usage on schema auth to {name}")
    supabase_db.execute(f"alter role {name} createrole")
    later = run(url, YES="1")  # lacks what only the migration itself needs
    supabase_db.execute(f"drop owned by {name}")
    supabase_db.execute(f"drop role {name}")

    assert (before.returncode, later.returncode) == (1, 1)
    assert before.stderr == (
        "migrate: role_lacks_rights: CREATE on the database; CREATE on schema public; "
        "USAGE on schema auth; CREATEROLE\n"
    )
    assert later.stderr.startswith(f"migrate: role_lacks_rights: {FILES[0]}: ")
    assert not is_installed(supabase_db)


@pytest.mark.parametrize(
    "url", ["", NOWHERE, f"{NOWHERE}?pgbouncer=true&schema=public", "postgresql://u:%zz@h/x"]
)
def test_an_address_that_leads_nowhere(url):
    done = run(url)

    assert done.returncode == 1
    assert done.stderr.startswith("migrate: cannot_connect: DATABASE_URL: ")
    assert ("not an address" in done.stderr) == ("%zz" in url)


def test_the_privileges_that_the_documentation_names_are_enough_to_install_and_uninstall(
    server, supabase_db
):
    name, db = f"installer_of_{supabase_db.name}", supabase_db
    db.execute(
        f"create role {name} login createrole password 'secret';"
        f"grant create on database {db.name} to {name};"
        f"grant create on schema public to {name};"
        f"grant usage on schema auth, storage to {name};"
        f"grant select, trigger on auth.users to {name};"
        f"grant select on storage.objects to {name};"
        f"grant pg_monitor to {name}"
    )
    before = db.dump("--exclude-schema=supabase_migrations")
    text = (PROJECT / "sql" / "uninstall.sql").read_text()
    at = urlsplit(db.url)
    url = at._replace(netloc=f"{name}:secret@{at.hostname}:{at.port}").geturl()

    installed = run(url, YES="1")
    others = run(url, YES="1")

    assert installed.returncode == 0, installed.stderr
    assert "no right to make policies on storage.objects" in installed.stdout
    assert others.stdout.splitlines()[-1] == "nothing to do"
    keep = "set darkroom.uninstall_despite = 'files';\n"  # it may write no bucket
    done = Database(url, db.name).psql(script=keep + text)
    left = db.dump("--exclude-schema=supabase_migrations")
    db.execute(f"drop owned by {name}; drop role {name}")
    assert done.returncode == 0, done.stderr
    assert left == before
