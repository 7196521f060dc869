"""sql/00_setup.sql: schemas, roles, and nothing of other people's."""

import json

import pytest
from database import GRANTS, PROJECT, SEED, SQL_FILES
from realtime_stand_in import add_realtime, as_postgres

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


@pytest.mark.parametrize("where", ["in schema public", ""])
def test_whatever_is_granted_by_default_nobody_has_a_right_on_what_is_ours(supabase_db, db, where):
    everybody = ", ".join(["public", *API_ROLES])
    for kind in ("tables", "sequences", "functions", "types"):
        supabase_db.execute(f"alter default privileges {where} grant all on {kind} to {everybody}")

    supabase_db.install(SEED)

    assert supabase_db.execute(GRANTS) == db.execute(GRANTS)


DEFAULTS = "select defaclrole, defaclnamespace, defaclobjtype, defaclacl::text from pg_default_acl"
WHO_MAY = """
select c.relname, r.rolname, a.privilege_type
from pg_class as c
cross join aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) as a
inner join pg_roles as r on r.oid = a.grantee
where c.relname = 'of_the_app' order by 2, 3
"""


def test_what_the_app_makes_later_is_granted_as_if_darkroom_were_not_there(supabase_db):
    supabase_db.execute(
        f"alter default privileges in schema public grant all on tables to {', '.join(API_ROLES)}"
    )
    make = "create table public.of_the_app (id integer)"
    supabase_db.execute(make)
    without = supabase_db.execute(WHO_MAY), supabase_db.execute(DEFAULTS)
    supabase_db.execute("drop table public.of_the_app")

    supabase_db.install(SEED)
    supabase_db.execute(make)

    assert (supabase_db.execute(WHO_MAY), supabase_db.execute(DEFAULTS)) == without
    assert len(without[0]) > 20


@pytest.mark.parametrize("table", ["auth.users", "storage.objects"])
def test_it_does_not_wait_for_long_where_others_would_wait_behind_it(supabase_db, table):
    with supabase_db.connect().transaction() as reading:
        reading.connection.execute(f"lock {table} in row exclusive mode")
        done = supabase_db.psql(*SQL_FILES)

    assert "lock timeout" in done.stderr
    assert supabase_db.value("select to_regnamespace('private')") is None


def test_where_it_may_make_no_policies_it_shows_them_and_goes_on(supabase_db):
    add_realtime(
        supabase_db,
        "grant supabase_realtime_admin to supabase_postgres;"
        "alter table storage.objects owner to postgres;"
        "grant all on storage.objects to supabase_postgres;"
        "revoke all on storage.buckets from supabase_postgres;",
    )
    faults = "select detail from private.check_setup('{}') where part = 'policies'"

    notices = as_postgres(supabase_db).install(SEED)

    assert "Darkroom: no right to make buckets; create the private buckets yourself" in notices
    supabase_db.execute("grant select on storage.buckets to supabase_postgres")
    shown = notices.split("no right to make policies on storage.objects; ")[1:]
    assert supabase_db.value(faults).count("is missing") == 2 + 6
    for part in (each.split("NOTICE")[0] for each in shown):
        supabase_db.execute(part[part.index("create policy") :].rsplit(";", 1)[0])
    supabase_db.execute("insert into storage.buckets (id, name) values ('inputs', 'inputs')")
    assert supabase_db.value(faults).startswith("bucket generations is missing: see")
