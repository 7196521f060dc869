"""supabase/migrations and sql/: the same database, on whatever is there."""

import subprocess

from database import PROJECT, SQL_FILES

MIGRATIONS = sorted((PROJECT / "supabase" / "migrations").glob("*.sql"))


def test_the_migration_is_what_make_migration_builds(tmp_path):
    subprocess.run(
        ["make", "-s", "migration", f"MIGRATIONS={tmp_path}"], cwd=PROJECT, check=True, timeout=30
    )

    built = {file.name: file.read_text() for file in tmp_path.glob("*.sql")}
    assert {file.name: file.read_text() for file in MIGRATIONS} == built


def test_migrations_and_sql_build_equal_databases(server, supabase_template):
    dumps = []
    for files in (SQL_FILES, MIGRATIONS):
        database = server.create(supabase_template)
        done = database.psql(*files)
        assert done.returncode == 0, done.stderr
        dumps.append(database.dump())
        server.drop(database)

    assert "GRANT ALL ON FUNCTION private.claim_jobs" in dumps[0]
    assert "COMMENT ON TABLE public.generations" in dumps[0]
    assert dumps[0] == dumps[1]


def test_it_installs_where_there_is_nothing_but_auth_and_says_what_it_skips(
    server, supabase_db, db
):
    count = "select count(*) from pg_tables where schemaname in ('public', 'private')"
    bare = server.create()
    bare.psql(script=supabase_db.dump("--schema=auth"))

    notices = bare.install()
    skipped = [line.split("Darkroom: ")[1] for line in notices.splitlines() if "Darkroom" in line]
    tables = bare.value(count)
    server.drop(bare)

    assert skipped == [
        "no storage.objects here; buckets and their policies are skipped",
        "no schema realtime here; broadcasts are skipped, clients poll",
        "no storage.buckets here; create the private buckets yourself",
        "no pg_cron for this database; workers do its work on their own",
    ]
    assert tables == db.value(count)


def test_a_failed_installation_leaves_nothing(supabase_db):
    done = supabase_db.psql(*SQL_FILES, script="select 1 / 0;")

    assert done.returncode == 3
    assert supabase_db.value("select to_regnamespace('private')") is None
    assert supabase_db.value("select to_regclass('public.generations')") is None
