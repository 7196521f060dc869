"""The migration on every version of PostgreSQL, by Supabase's postgres, where another app lives.

The distribution's server has pg_cron; those of `tests/postgres` come from npm and have not. Each
has a cluster of its own: pg_cron works in one database of it only, and roles are shared by all.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

import psycopg
import pytest
from actors import Service, User, Worker
from database import GRANTS, PROJECT, SEED, Database, Server, assert_books_balance
from psycopg import sql
from realtime_stand_in import add_realtime

from stack import Cluster, Settings, Stack

MACHINE = {"x86_64": "x64", "aarch64": "arm64"}.get(platform.machine())
SERVERS = PROJECT / "tests" / "postgres" / "node_modules"
TESTS = PROJECT / "tests"
MIGRATIONS = sorted((PROJECT / "supabase" / "migrations").glob("*.sql"))
UNINSTALL = PROJECT / "sql" / "uninstall.sql"
PASSWORD = "of a test"
NO_CRON = "no pg_cron for this database; workers do its work on their own"

# Every row of the other app, and whatever says what things are and who may do what.
PRESENT = """
select 'row of ' || t.name || ': ' || t.row from (
  select 'auth.users' as name, u::text as row from auth.users as u
  union all select 'storage.buckets', b::text from storage.buckets as b
  union all select 'storage.objects', o::text from storage.objects as o
  union all select 'public.profiles', p::text from public.profiles as p
  union all select 'public.posts', p::text from public.posts as p
) as t
union all
select concat_ws(' ', c.relkind, c.oid::regclass, c.relowner::regrole, c.relacl, c.relrowsecurity)
from pg_class as c where c.relnamespace::regnamespace::text in ('auth', 'storage', 'app', 'public')
union all
select concat_ws(' ', a.attrelid::regclass, a.attname, a.atttypid::regtype, a.attacl)
from pg_attribute as a inner join pg_class as c on c.oid = a.attrelid and c.relkind in ('r', 'v')
where c.relnamespace::regnamespace::text in ('auth', 'storage', 'app', 'public')
union all
select 'policy ' || p::text from pg_policies as p
union all
select concat_ws(' ', pg_get_triggerdef(t.oid), t.tgenabled) from pg_trigger as t
where not t.tgisinternal
union all
select concat_ws(' ', 'constraint', c.conrelid::regclass, pg_get_constraintdef(c.oid))
from pg_constraint as c
union all
select concat_ws(' ', 'function', p.oid::regprocedure, p.proowner::regrole, p.proacl, md5(p.prosrc))
from pg_proc as p where p.pronamespace::regnamespace::text in ('auth', 'storage', 'app', 'public')
union all
select 'default ' || d::text from pg_default_acl as d
union all
select concat_ws(' ', 'schema', nspname, nspowner::regrole, nspacl) from pg_namespace
union all
select 'published ' || p::text from pg_publication_tables as p
union all
select concat_ws(' ', 'role', r.rolname, r.rolsuper, r.rolinherit, r.rolcreaterole, r.rolcanlogin,
  r.rolbypassrls, r.rolconfig, (
    select array_agg(m.roleid::regrole order by m.roleid) from pg_auth_members as m
    -- Ours: what a monitor may look at, and PostgREST's role may become.
    where m.member = r.oid and m.roleid::regrole::text not in ('pg_monitor', 'darkroom_monitor')
  ))
from pg_roles as r
where r.rolname not in ('supabase_postgres', 'darkroom_worker', 'darkroom_monitor')
"""


@dataclass(frozen=True)
class Project:
    """A project of Supabase's with another app and, since a moment ago, Darkroom."""

    db: Database
    owner: Database  # seen by the role that installed it
    notices: list[str]
    before: set[str]
    after: set[str]
    has_cron: bool


def installed_servers() -> list[str]:
    """The versions of tests/postgres, as far as they are for this machine."""
    return sorted(path.name.split("-")[1] for path in SERVERS.glob(f"postgres-*-{MACHINE}"))


@pytest.fixture(scope="module", params=["distribution", *installed_servers()])
def cluster(request: pytest.FixtureRequest, stopped_stack: Stack) -> Iterator[Cluster]:
    """A cluster of this version, else of the distribution's."""
    folder = stopped_stack.folder / f"postgres-{request.param}"
    folder.mkdir(mode=0o711)
    settings, options = Settings(folder / "env"), {}
    if request.param != "distribution":
        programs = SERVERS / f"postgres-{request.param}-{MACHINE}" / "native"
        # Where they are installed, the user that the server runs as may not be able to read.
        shutil.copytree(programs, folder / "programs", symlinks=True)
        options = {
            "tuning": {"shared_preload_libraries": "", "cron.database_name": ""},
            "programs": folder / "programs" / "bin",
        }
    cluster = Cluster(folder, settings, fsync=False, **options)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        cluster.delete()
        shutil.rmtree(cluster.folder)


@pytest.fixture(scope="module")
def supabase_schemas(server: Server, supabase_template: str) -> str:
    """A script that makes auth and storage as Supabase Lite does."""
    database = server.create(supabase_template)
    script = database.dump("--schema=auth", "--schema=storage")
    server.drop(database)
    return script


@pytest.fixture(scope="module")
def project(cluster: Cluster, supabase_schemas: str) -> Iterator[Project]:
    """Install Darkroom as Supabase's postgres would, where another app is."""
    db = Database(cluster.url(), "postgres")
    done = db.psql(script=supabase_schemas + (TESTS / "supabase.sql").read_text())
    assert done.returncode == 0, done.stderr
    add_realtime(db, "grant supabase_realtime_admin to supabase_postgres")
    db.execute(sql.SQL("alter role supabase_postgres password {}").format(PASSWORD))
    address = f"supabase_postgres:{quote(PASSWORD)}@{cluster.address()}"
    owner = Database(urlsplit(db.url)._replace(netloc=address).geturl(), "postgres")
    done = owner.psql(TESTS / "other_app.sql")
    assert done.returncode == 0, done.stderr
    before = present(db)
    done = owner.psql(*MIGRATIONS, SEED)
    assert done.returncode == 0, done.stderr
    said = [line.split("Darkroom: ")[1] for line in done.stderr.splitlines() if "Darkroom" in line]
    yield Project(db, owner, said, before, present(db), cluster.programs is None)
    owner.close()
    db.close()


def present(db: Database) -> set[str]:
    """All there is, as far as it is not Darkroom's alone."""
    return {str(row["?column?"]) for row in db.execute(PRESENT)}


def test_it_installs_as_supabases_postgres_and_what_was_there_is_as_it_was(project):
    assert set(project.notices) == (set() if project.has_cron else {NO_CRON})
    role = "select rolsuper from pg_roles where rolname = current_user"
    assert project.owner.value(role) is False
    assert len(project.before) > 200
    assert project.before - project.after == set()
    missing = (
        "select u.id from auth.users as u left join public.entitlements as e on e.user_id = u.id"
        " where e.credits is distinct from 10"
    )
    assert project.db.value("select count(*) from auth.users") >= 3
    assert project.db.execute(missing) == []
    assert_books_balance(project.db)


def test_nobody_may_do_more_there_than_where_nothing_else_is(project, db):
    def granted(database: Database) -> set[tuple[str, str, str]]:
        owner = database.value("select tableowner from pg_tables where tablename = 'ready_jobs'")
        return {tuple(row.values()) for row in database.execute(GRANTS) if row["role"] != owner}

    ours = {grant[0] for grant in granted(db)}
    assert {grant for grant in granted(project.db) if grant[0] in ours} == granted(db)


def test_jobs_and_routines_and_the_workers_login_work_there(project):
    db, worker = project.db, Worker(project.db)
    users = [User(db), User(db)]
    assert db.value("select count(*) from public.profiles") == 5  # the other app's trigger

    done, failed = (user.enqueued() for user in users)
    worker.complete_job(worker.claimed())
    worker.fail_job(worker.claimed(), "moderated")

    assert users[0].get_job_status(done)["status"] == "completed"
    assert users[1].get_job_status(failed)["refunded_credits"] == 1
    assert Service(db).queue_health()["depth"]["ready"] == 0
    routines = ["recover_stale_jobs", "expire_credits", "apply_retention", "trim_history"]
    routines.append("check_books")
    if project.has_cron:
        jobs = db.execute("select username, jobname from cron.job")
        ours = [f"darkroom_{name}" for name in routines]
        assert {job["jobname"] for job in jobs} == {"app", *ours}
        assert {job["username"] for job in jobs} == {"supabase_postgres"}
    for name in routines:
        project.owner.execute(f"select private.{name}(), private.note_run('{name}')")
    project.owner.execute(sql.SQL("alter role darkroom_worker password {}").format(PASSWORD))
    url = urlsplit(db.url)
    address = f"darkroom_worker:{quote(PASSWORD)}@{url.hostname}:{url.port}"
    with psycopg.connect(url._replace(netloc=address).geturl()) as connection:
        connection.execute("select * from private.register_worker('test', 1, '1')")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("select * from private.running_jobs")
    assert_books_balance(db)
    for user in users:
        db.execute("delete from auth.users where id = %s", user.id)


def test_a_second_time_is_refused_and_changes_nothing(project):
    before = present(project.db), project.db.snapshot()

    done = project.owner.psql(*MIGRATIONS, SEED)

    assert done.returncode == 3
    assert "Darkroom is installed here already" in done.stderr
    assert (present(project.db), project.db.snapshot()) == before


def test_uninstalled_it_leaves_the_project_as_it_was_and_ready_to_install_it_again(project):
    db = project.db
    db.execute("delete from private.workers")  # of tests before

    said = [project.owner.psql(UNINSTALL).stderr for _ in range(2)]

    assert present(db) == project.before
    ours = "select count(*) from pg_roles where rolname like 'darkroom%'"
    assert db.value(ours) == 0
    if project.has_cron:
        assert [job["jobname"] for job in db.execute("select jobname from cron.job")] == ["app"]
    assert "it is uninstalled" in said[0] and "there is nothing of it here" in said[1]
    again = project.owner.psql(*MIGRATIONS, SEED)
    assert again.returncode == 0, again.stderr
    assert project.before < present(db)
    assert len(present(db)) == len(project.after)  # the buckets are of another time
