"""`make migrate`: shows what it will do, asks, does it, and agrees with the Supabase CLI."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

import psycopg
import pytest
from database import PROJECT, Database, Server

import migrate
from stack import supabase_cli

CORE, *PARTS = sorted((PROJECT / "supabase" / "migrations").glob("*.sql"))
ALL = [tuple(file.stem.split("_", 1)) for file in (CORE, *PARTS)]


def run(url: str, answer: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it as `make migrate` does."""
    done = subprocess.run(
        [sys.executable, PROJECT / "scripts/migrate.py"],
        env={"DATABASE_URL": url} | environment,
        input=answer,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    password = urlsplit(url).password
    assert not password or password not in done.stdout + done.stderr
    return done


def history(db: Database) -> list[tuple[str, str]]:
    if db.value("select to_regclass('supabase_migrations.schema_migrations')") is None:
        return []
    query = "select version, name from supabase_migrations.schema_migrations order by 1"
    return [(row["version"], row["name"]) for row in db.execute(query)]


def is_installed(db: Database) -> bool:
    return db.value("select to_regnamespace('private') is not null")


@pytest.fixture
def role(server: Server, supabase_db: Database) -> Iterator[str]:
    """The address of the test's database for a role that may nothing yet."""
    name = f"migrator_of_{supabase_db.name}"
    supabase_db.execute(f"create role {name} login password 'secret' noinherit")
    parts = urlsplit(supabase_db.url)
    yield parts._replace(netloc=f"{name}:secret@{parts.hostname}:{parts.port}").geturl()
    supabase_db.execute(f"drop owned by {name}")
    supabase_db.execute(f"drop role {name}")


def test_it_shows_what_is_there_and_asks_and_no_is_no(supabase_db):
    done = run(supabase_db.url, "n\n")

    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line[0] != "A")
    version = supabase_db.value("show server_version").split()[0]
    parts = urlsplit(supabase_db.url)
    assert lines["server"] == f"PostgreSQL {version} at {parts.hostname}:{parts.port}"
    assert (lines["database"], lines["role"]) == (supabase_db.name, "postgres (superuser)")
    assert "plpgsql 1.0" in lines["extensions"]
    assert lines["data"] == "none"
    pending = [f"pending     {file.stem}\n" for file in (CORE, *PARTS)]
    assert "".join([*pending, "pending     supabase/seed.sql"]) in done.stdout
    assert done.returncode == 2
    assert "migrate: confirmation_needed: nothing was done" in done.stderr
    assert not is_installed(supabase_db)
    assert history(supabase_db) == []


def test_confirmed_it_installs_and_records_and_has_nothing_to_do_afterwards(supabase_db, db):
    done = run(supabase_db.url, "y\n")
    again = run(supabase_db.url)

    assert done.returncode == 0, done.stderr
    assert "notice      Darkroom: no pg_cron for this database" in done.stdout
    assert history(supabase_db) == ALL
    ours = ("--schema=public", "--schema=private")
    assert supabase_db.dump(*ours) == db.dump(*ours)
    models = "select count(*) from public.models"
    assert supabase_db.value(models) == db.value(models)
    assert again.stdout.splitlines()[-1] == "nothing to do"
    assert all(f"applied     {file.stem}\n" in again.stdout for file in (CORE, *PARTS))


def test_where_there_is_data_only_the_databases_name_or_yes_confirms(supabase_db):
    supabase_db.execute("create table public.orders as select 1 as id")

    refused = [run(supabase_db.url, answer) for answer in ("y\n", "yes\n", "")]
    installed_before = is_installed(supabase_db)
    done = run(supabase_db.url, YES="1")

    assert [each.returncode for each in refused] == [2, 2, 2]
    assert "data        rows in public.orders" in refused[0].stdout
    assert not installed_before
    assert done.returncode == 0
    assert is_installed(supabase_db)


def test_the_name_of_the_database_confirms(supabase_db):
    supabase_db.execute("create table public.orders as select 1 as id")

    assert run(supabase_db.url, f"{supabase_db.name}\n").returncode == 0


def test_it_tells_what_it_does_outside_its_own_schemas_and_what_it_gives_away(supabase_db):
    supabase_db.execute(
        "insert into auth.users (id) select gen_random_uuid() from generate_series(1, 7)"
    )

    shown = run(supabase_db.url, "n\n", WELCOME_CREDITS="3").stdout
    done = run(supabase_db.url, YES="1", WELCOME_CREDITS="3")
    again = run(supabase_db.url, WELCOME_CREDITS="5")

    outside = [line for line in shown.splitlines() if line.startswith("outside ")]
    named = ("darkroom_worker", "darkroom_lock_jobs", "storage.objects (6)")
    assert all(any(name in line for line in outside) for name in named)
    assert "credits     3 for each new user, and for the 7 who are there: 21; WELCOME" in shown
    assert done.returncode == 0, done.stderr
    credits = "select sum(credits) from public.entitlements"
    assert supabase_db.value(credits) == 21
    assert supabase_db.value("select welcome_credits from private.settings") == 3
    assert "outside" not in again.stdout and "credits" not in again.stdout


def test_all_that_it_makes_outside_is_told(supabase_db):
    """Whatever is there afterwards and was not before, in schemas of others and in the cluster."""
    made = (
        "select tgname::text as name from pg_trigger where tgrelid = 'auth.users'::regclass"
        " and not tgisinternal"
        " union all select count(*)::text from pg_policies where schemaname = 'storage'"
        " union all select id from storage.buckets"
    )
    before = {row["name"] for row in supabase_db.execute(made)}

    shown = run(supabase_db.url, YES="1").stdout

    names = {row["name"] for row in supabase_db.execute(made)} - before
    assert len(names) == 3 + 1 + 2
    assert [name for name in names if name not in shown] == []


@pytest.mark.parametrize("credits", ["-1", "many", "1e9"])
def test_credits_that_are_no_number_are_refused(supabase_db, credits):
    done = run(supabase_db.url, YES="1", WELCOME_CREDITS=credits)

    assert (done.returncode, done.stderr.split(":")[1]) == (1, " bad_credits")
    assert not is_installed(supabase_db)


def test_it_gives_up_where_others_would_wait_behind_it(supabase_db):
    with supabase_db.connect().transaction() as signing_up:
        signing_up.connection.execute("insert into auth.users (id) values (gen_random_uuid())")
        done = run(supabase_db.url, YES="1")

    assert done.returncode == 1
    assert done.stderr.startswith("migrate: locked: ")
    assert not is_installed(supabase_db)


def test_the_cli_goes_on_where_it_stopped(supabase_db):
    run(supabase_db.url, YES="1")

    listed = supabase_cli(supabase_db.url, "migration", "list")
    pushed = supabase_cli(supabase_db.url, "db", "push", "--include-seed", "--yes")

    assert all(listed.count(version) >= 2 for version, _ in ALL), listed  # local and remote
    assert "up to date" in pushed


def test_it_goes_on_where_the_cli_stopped(supabase_db):
    supabase_cli(supabase_db.url, "db", "push", "--include-seed", "--yes")

    done = run(supabase_db.url)

    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "nothing to do")
    assert "changed since" not in done.stdout


def test_a_migration_that_fails_leaves_nothing(supabase_db, monkeypatch):
    whole = migrate.read_migrations()
    broken = migrate.Migration("20990101000000", "broken", "create table public.x (); select 1/0;")
    monkeypatch.setattr(migrate, "read_migrations", lambda: [*whole, broken])

    with pytest.raises(migrate.MigrateError, match=r"migration_failed: 2099.*: division by zero"):
        migrate.migrate(supabase_db.url, is_confirmed=True)

    assert history(supabase_db) == ALL
    assert supabase_db.value("select to_regclass('public.x')") is None


def test_a_file_that_has_changed_since_is_told(supabase_db, capsys, monkeypatch):
    migrate.migrate(supabase_db.url, is_confirmed=True)
    one, *parts = migrate.read_migrations()
    changed = migrate.Migration(one.version, one.name, one.text + "select 1;")
    monkeypatch.setattr(migrate, "read_migrations", lambda: [changed, *parts])
    capsys.readouterr()

    migrate.migrate(supabase_db.url, is_confirmed=True)

    assert f"applied     {one} (its file has changed since)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fault", "token"),
    [
        ("drop schema auth cascade", "missing_auth"),
        ("create schema private; create table private.settings ()", "not_recorded"),
        (f"{migrate.HISTORY} insert into supabase_migrations.schema_migrations values ('2')",
         "unknown_migration"),
    ],
)  # fmt: skip
def test_where_it_cannot_work_it_says_why_and_changes_nothing(supabase_db, fault, token):
    supabase_db.execute(fault)
    before = supabase_db.dump()

    done = run(supabase_db.url, YES="1")

    assert done.returncode == 1
    assert done.stderr.startswith(f"migrate: {token}: ")
    assert supabase_db.dump() == before


def test_a_new_migration_older_than_the_last_one_is_refused():
    old, new = (migrate.Migration(version, "x", "") for version in ("1", "2"))

    class Target:
        def applied(self) -> dict[str, None]:
            return {"2": None}

    with pytest.raises(migrate.MigrateError, match="out_of_order: 1_x"):
        migrate.plan(Target(), [old, new])


def test_a_role_without_rights_is_told_which(role, supabase_db):
    done = run(role, YES="1")

    assert done.returncode == 1
    assert done.stderr == (
        "migrate: role_lacks_rights: CREATE on the database; CREATE on schema public; "
        "USAGE on schema auth; CREATEROLE\n"
    )


def test_a_right_that_only_the_migration_needs_is_told_and_nothing_is_left(role, supabase_db):
    name = urlsplit(role).username
    supabase_db.execute(f"grant create on database {supabase_db.name} to {name}")
    supabase_db.execute(f"grant create on schema public to {name}")
    supabase_db.execute(f"grant usage on schema auth to {name}")
    supabase_db.execute(f"alter role {name} createrole")

    done = run(role, YES="1")

    assert done.returncode == 1
    assert done.stderr.startswith(f"migrate: role_lacks_rights: {CORE.stem}: ")
    assert not is_installed(supabase_db)


def test_a_server_without_pg_cron_that_is_to_have_it(supabase_db, monkeypatch):
    monkeypatch.setattr(migrate.Target, "wants_cron", lambda _: True)
    with psycopg.connect(supabase_db.url) as connection:
        target = migrate.Target(connection)
        connection.execute("create temp table pg_available_extensions (name text)")

        with pytest.raises(migrate.MigrateError, match=r"^missing_pg_cron: "):
            connection.execute("set search_path = pg_temp, pg_catalog")
            target.refuse_unfit()


NOWHERE = "postgresql://u:secret@127.0.0.1:9/x"


@pytest.mark.parametrize(
    "url", ["", NOWHERE, f"{NOWHERE}?pgbouncer=true&schema=public", "postgresql://u:%zz@h/x"]
)
def test_an_address_that_leads_nowhere(url):
    done = run(url)

    assert done.returncode == 1
    assert done.stderr.startswith("migrate: cannot_connect: DATABASE_URL: ")
    assert "secret" not in done.stderr
    assert ("not an address" in done.stderr) == ("%zz" in url)
