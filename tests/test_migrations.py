"""supabase/migrations and sql/: the same database, on whatever is there."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from database import PROJECT

RELEASED = PROJECT / "supabase" / "released.sha256"
MIGRATIONS = sorted((PROJECT / "supabase" / "migrations").glob("*.sql"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the Makefile and the migrations."""
    shutil.copy(PROJECT / "Makefile", tmp_path)
    shutil.copytree(PROJECT / "supabase", tmp_path / "supabase")
    shutil.copytree(PROJECT / "sql", tmp_path / "sql")
    return tmp_path


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-s", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def changed(folder: Path) -> list[str]:
    """Return the released migrations that are not what was released."""
    lines = (folder / "supabase" / RELEASED.name).read_text().splitlines()
    return [
        name
        for digest, name in (line.split() for line in lines)
        if not (file := folder / "supabase" / name).exists()
        or hashlib.sha256(file.read_bytes()).hexdigest() != digest
    ]


def test_until_they_are_released_migrations_are_what_make_migration_builds(copy):
    if RELEASED.exists():
        pytest.skip("they are released")

    assert make(copy, "migration").returncode == 0

    for file in MIGRATIONS:
        assert (copy / "supabase" / "migrations" / file.name).read_text() == file.read_text()


def test_no_released_migration_changes_and_new_ones_come_last():
    if not RELEASED.exists():
        pytest.skip("none is released")

    assert changed(PROJECT) == []
    names = [line.rpartition("/")[2] for line in RELEASED.read_text().splitlines()]
    assert names == [file.name for file in MIGRATIONS][: len(names)]


def test_once_released_migrations_are_only_added(copy):
    assert make(copy, "freeze").returncode == 0
    before = sorted((copy / "supabase" / "migrations").glob("*.sql"))

    rebuilt = make(copy, "migration")
    refused = make(copy, "migration", "NAME=../x")
    done = make(copy, "migration", "NAME=add_a_mood")

    assert (rebuilt.returncode, refused.returncode, done.returncode) == (2, 2, 0)
    assert "make migration NAME=what_changes" in rebuilt.stdout
    (added,) = sorted((copy / "supabase" / "migrations").glob("*.sql"))[len(before) :]
    assert str(added.relative_to(copy)) == done.stdout.strip()
    assert added.name.endswith("_add_a_mood.sql")
    assert changed(copy) == []
    before[0].write_text(before[0].read_text() + "-- a word more")
    assert changed(copy) == [f"migrations/{before[0].name}"]


def test_migrations_and_sql_build_equal_databases(supabase_db, db):
    done = supabase_db.psql(*MIGRATIONS)

    assert done.returncode == 0, done.stderr
    built = supabase_db.objects()
    lines = "\n".join(line for each in built.values() for line in each)
    assert "GRANT ALL ON FUNCTION private.claim_jobs" in lines
    assert "COMMENT ON TABLE public.generations" in lines
    assert built == db.objects()


def test_it_installs_where_there_is_nothing_but_auth_and_says_what_it_skips(
    server, supabase_db, db
):
    count = "select count(*) from pg_tables where schemaname in ('public', 'private')"
    bare = server.create()
    bare.psql(script=supabase_db.dump("--schema=auth"))

    notices = bare.install()
    tables = bare.value(count)
    server.drop(bare)

    assert [line.split("Darkroom: ")[1] for line in notices.splitlines() if "Darkroom" in line] == [
        "no storage.objects here; buckets and their policies are skipped",
        "no schema realtime here; broadcasts are skipped, clients poll",
        "no storage.buckets here; create the private buckets yourself",
        "no pg_cron for this database; workers do its work on their own",
    ]
    assert tables == db.value(count)
