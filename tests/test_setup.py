"""sql/00_setup.sql: schemas, roles, and nothing of other people's."""

import json

import pytest
from database import PROJECT, SEED
from realtime_stand_in import add_realtime, as_postgres

SETUP = PROJECT / "sql" / "00_setup.sql"
API_ROLES = "anon, authenticated, service_role"


@pytest.mark.parametrize(
    ("given", "refusal"),
    [
        ("drop schema auth cascade", "Supabase Auth: auth.users and auth.uid() are missing"),
        ("create schema private", "the schema private for itself, and there is one"),
        *(
            (
                f"insert into storage.buckets (id, name) values ('{bucket}', '{bucket}');"
                f"insert into storage.objects (bucket_id, name) values ('{bucket}', 'a')",
                "the buckets generations and inputs for itself",
            )
            for bucket in ("generations", "inputs")
        ),
    ],
)
def test_it_takes_nothing_of_others_and_does_not_begin_without_auth(supabase_db, given, refusal):
    supabase_db.execute(given)

    done = supabase_db.psql(script=SETUP.read_text())

    assert done.returncode == 3
    assert f"Darkroom needs {refusal}" in done.stderr


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("darkroom_worker", {"statement_timeout=30s"}),
        ("darkroom_monitor", {"statement_timeout=10s", "default_transaction_read_only=on"}),
    ],
)
def test_our_roles_log_in_inherit_nothing_and_are_ended_in_time(db, name, settings):
    role = db.row(
        "select rolcanlogin, rolinherit, rolsuper, rolcreaterole, rolcreatedb, rolbypassrls,"
        " rolconfig from pg_roles where rolname = %s",
        name,
    )

    assert set(role.pop("rolconfig")) == settings | {"idle_in_transaction_session_timeout=15s"}
    assert role.pop("rolcanlogin")
    assert not any(role.values())


def test_the_roles_it_makes_have_their_requests_ended_and_others_stay_as_they_are(supabase_db):
    shown = (
        "do $$ begin raise exception 'set: %', (select jsonb_object_agg(rolname, rolconfig)"
        " from pg_roles where rolname in ('anon', 'authenticated')); end $$;"
    )
    others = "alter role authenticated rename to nobody; alter role anon set statement_timeout = 7;"

    done = supabase_db.psql(script=f"{others}{SETUP.read_text()}{shown}")  # rolled back

    expected = {"anon": ["statement_timeout=7"], "authenticated": ["statement_timeout=8s"]}
    assert f"set: {json.dumps(expected)}" in done.stderr


def test_schema_private_is_closed_to_strangers_and_nobody_creates_in_it(db):
    stranger = db.connect()
    with stranger.transaction(force_rollback=True):
        stranger.execute("create role darkroom_stranger")
        may = "select has_schema_privilege('darkroom_stranger', 'private', 'usage')"
        assert stranger.execute(may).fetchone() == (False,)

    assert not db.execute(
        "select r.rolname from pg_roles as r"
        " where has_schema_privilege(r.oid, 'private', 'create') and not r.rolsuper"
        " and r.rolname !~ '^pg_'"
    )


def test_of_a_deleted_generation_realtime_is_told_the_id_and_nothing_else(db):
    query = "select relreplident from pg_class where oid = 'public.generations'::regclass"
    assert db.value(query) == "d"


DEFAULTS = "select defaclrole, defaclnamespace, defaclobjtype, defaclacl::text from pg_default_acl"
WHO_MAY = """
select r.rolname, a.privilege_type
from pg_class as c
cross join aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) as a
inner join pg_roles as r on r.oid = a.grantee
where c.relname = 'of_the_app' order by 1, 2
"""


def test_what_the_app_makes_later_is_granted_as_if_darkroom_were_not_there(supabase_db):
    grant = f"alter default privileges in schema public grant all on tables to {API_ROLES}"
    supabase_db.execute(grant)
    make = "create table public.of_the_app (id integer)"
    supabase_db.execute(make)
    without = supabase_db.execute(WHO_MAY), supabase_db.execute(DEFAULTS)
    supabase_db.execute("drop table public.of_the_app")

    supabase_db.install(SEED)
    supabase_db.execute(make)

    assert (supabase_db.execute(WHO_MAY), supabase_db.execute(DEFAULTS)) == without
    assert len(without[0]) > 20


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
    assert supabase_db.value(faults).count("is missing") == 2 + 6
    for part in notices.split("no right to make policies on storage.objects; ")[1:]:
        shown = part.partition("NOTICE")[0]
        supabase_db.execute(shown[shown.index("create policy") :].rsplit(";", 1)[0])
    supabase_db.execute("insert into storage.buckets (id, name) values ('inputs', 'inputs')")
    assert supabase_db.value(faults).startswith("bucket generations is missing: see")
