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


def test_no_released_migration_changes_and_new_ones_come_last():
    assert changed(PROJECT) == []
    names = [line.rpartition("/")[2] for line in RELEASED.read_text().splitlines()]
    assert names == [file.name for file in MIGRATIONS][: len(names)]


def test_migrations_are_only_added_and_come_last_whatever_the_clock_says(copy):
    future = copy / "supabase" / "migrations" / "29990101000000_of_a_clock_that_was_wrong.sql"
    future.touch()
    assert make(copy, "freeze").returncode == 0
    before = sorted(future.parent.iterdir())

    refused = [make(copy, "migration", *name) for name in ([], ["NAME=../x"], ["NAME=a b"])]
    done = [make(copy, "migration", "NAME=add_a_mood") for _ in range(2)]

    assert [each.returncode for each in refused + done] == [2, 2, 2, 0, 0]
    assert "NAME=what_changes" in refused[0].stdout
    added = sorted(future.parent.iterdir())[len(before) :]
    assert [str(file.relative_to(copy)) for file in added] == [each.stdout.strip() for each in done]
    assert [file.name[-15:] for file in added] == ["_add_a_mood.sql"] * 2
    assert changed(copy) == []
    before[0].write_text(before[0].read_text() + "-- a word more")
    assert changed(copy) == [f"migrations/{before[0].name}"]
    assert make(copy, "freeze").returncode == 2


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
