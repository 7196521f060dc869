"""Bugs planted in a copy of the project are noticed: the test that planted.py names fails there.

`make test` plants the cornerstones. `PLANTED=all` plants all (a quarter of an hour),
`PLANTED=lease` those with that in their name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from database import PROJECT
from planted import CORNERSTONES, PLANTED, Bug

WANTED = os.environ.get("PLANTED", "")
INSTALLED = (".venv", "node_modules")
NOT_COPIED = shutil.ignore_patterns(
    *INSTALLED, ".git", ".local", ".env", "demo", "dist", "__pycache__", ".*_cache", ".hypothesis"
)


def chosen() -> list[Bug]:
    if not WANTED:
        by_name = {bug.name: bug for bug in PLANTED}
        return [by_name[name] for name in CORNERSTONES.values()]
    bugs = [bug for bug in PLANTED if WANTED == "all" or WANTED in bug.name]
    if not bugs:
        raise pytest.UsageError(f"PLANTED: no bug has {WANTED!r} in its name")
    return bugs


@pytest.fixture
def copy() -> Iterator[Path]:
    """A copy of the project, with what is installed in the original."""
    with tempfile.TemporaryDirectory(prefix="darkroom-planted-") as folder:
        copy = Path(folder, "project")
        Path(folder).chmod(0o711)
        shutil.copytree(PROJECT, copy, ignore=NOT_COPIED)
        for name in INSTALLED:
            (copy / name).symlink_to((PROJECT / name).resolve())
        yield copy


def run_pytest(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run tests of a project, without a trace in it."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("bug", chosen(), ids=lambda bug: bug.name)
def test_the_bug_is_noticed(copy, bug):
    file = copy / bug.file
    file.write_text(file.read_text().replace(bug.old, bug.new))
    migrations = sorted((copy / "supabase" / "migrations").glob("*.sql"))
    for each in migrations[1:]:
        each.unlink()
    files = sorted((copy / "sql").glob("[0-9]*.sql"))
    migrations[0].write_text("".join(each.read_text() for each in files))

    done = run_pytest(copy, bug.test)

    assert done.returncode == 1, done.stdout + done.stderr  # 0: missed; another: it did not run
    failed = bug.test.partition("[")[0]
    assert f"\nFAILED {failed}" in done.stdout, done.stdout  # and not in error before it began


def test_each_bug_changes_what_stands_in_one_place():
    places = {bug.name: (PROJECT / bug.file).read_text().count(bug.old) for bug in PLANTED}

    assert len(places) == len(PLANTED)
    assert {name: count for name, count in places.items() if count != 1} == {}
    assert [bug.name for bug in PLANTED if bug.old == bug.new] == []


def test_each_bug_names_a_test_there_is():
    done = run_pytest(PROJECT, "--collect-only", *{bug.test for bug in PLANTED})

    assert done.returncode == 0, done.stdout + done.stderr
