"""sql/00_setup.sql: schemas, roles, default privileges."""

import json

import pytest
from database import GRANTS, PROJECT, SEED

SETUP = PROJECT / "sql" / "00_setup.sql"
API_ROLES = ("anon", "authenticated", "service_role")


def test_it_refuses_to_install_without_supabase_auth(server):
    empty = server.create()

    done = empty.psql(script=SETUP.read_text())
    server.drop(empty)

    assert done.returncode == 3
    assert "Darkroom needs Supabase Auth: auth.users and auth.uid() are missing" in done.stderr


def test_it_takes_nobodys_schema(supabase_db):
    supabase_db.execute("create schema private")

    done = supabase_db.psql(script=SETUP.read_text())

    assert done.returncode == 3
    assert "Darkroom needs the schema private for itself, and there is one" in done.stderr


@pytest.mark.parametrize("bucket", ["generations", "inputs"])
def test_it_takes_no_bucket_with_files_it_would_sweep(supabase_db, bucket):
    supabase_db.execute("insert into storage.buckets (id, name) values (%s, %s)", bucket, bucket)
    supabase_db.execute("insert into storage.objects (bucket_id, name) values (%s, 'a')", bucket)

    done = supabase_db.psql(script=SETUP.read_text())

    assert done.returncode == 3
    assert "Darkroom needs the buckets generations and inputs for itself" in done.stderr


@pytest.mark.parametrize("name", ["darkroom_worker", "darkroom_monitor"])
def test_our_roles_log_in_and_inherit_nothing(db, name):
    role = db.row(
        "select rolcanlogin, rolinherit, rolsuper, rolcreaterole, rolcreatedb, rolbypassrls"
        " from pg_roles where rolname = %s",
        name,
    )

    assert role.pop("rolcanlogin")
    assert not any(role.values())


def test_a_call_of_the_worker_that_hangs_is_ended(db):
    settings = db.value(
        "select setconfig from pg_db_role_setting where setrole = 'darkroom_worker'::regrole"
    )

    assert sorted(settings) == [
        "idle_in_transaction_session_timeout=15s",
        "statement_timeout=30s",
    ]


def test_who_looks_on_reads_only_and_is_ended_in_time(db):
    settings = db.value(
        "select setconfig from pg_db_role_setting where setrole = 'darkroom_monitor'::regrole"
    )

    assert sorted(settings) == [
        "default_transaction_read_only=on",
        "idle_in_transaction_session_timeout=15s",
        "statement_timeout=10s",
    ]


def test_the_roles_it_makes_have_their_requests_ended_and_others_stay_as_they_are(supabase_db):
    shown = (
        "do $$ begin raise exception 'set: %', (select jsonb_object_agg(rolname, rolconfig)"
        " from pg_roles where rolname in ('anon', 'authenticated')); end $$;"
    )
    others = "alter role authenticated rename to nobody; alter role anon set statement_timeout = 7;"

    done = supabase_db.psql(script=f"{others}{SETUP.read_text()}{shown}")  # rolled back

    expected = {"anon": ["statement_timeout=7"], "authenticated": ["statement_timeout=8s"]}
    assert f"set: {json.dumps(expected)}" in done.stderr


def test_schema_private_is_closed_to_everybody_else(db):
    db.execute("create role darkroom_stranger")
    try:
        usage = db.value("select has_schema_privilege('darkroom_stranger', 'private', 'usage')")
    finally:
        db.execute("drop role darkroom_stranger")

    assert usage is False


def test_nobody_but_the_owner_creates_in_private(db):
    assert not db.execute(
        "select r.rolname from pg_roles as r"
        " where has_schema_privilege(r.oid, 'private', 'create') and not r.rolsuper"
        " and r.rolname !~ '^pg_'"
    )


def test_the_default_grants_of_older_supabase_projects_leave_no_trace(supabase_db, db):
    for kind in ("tables", "sequences", "functions"):
        supabase_db.execute(
            f"alter default privileges in schema public grant all on {kind}"
            f" to {', '.join(API_ROLES)}"
        )

    supabase_db.install(SEED)

    assert supabase_db.execute(GRANTS) == db.execute(GRANTS)
