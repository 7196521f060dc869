"""scripts/audit.py: what nobody has spoken for does not count as safe."""

import json
from pathlib import Path

import pytest

import audit

SAFE = {"name": "httpx", "version": "0.28.1", "vulns": []}
KNOWN = {"name": "pillow", "version": "9.0.0", "vulns": [{"id": "PYSEC-2022-10"}]}
SKIPPED = {"name": "yarl", "skip_reason": "Dependency not found on PyPI"}
TOTAL = {"dependencies": {"total": 7}}


@pytest.mark.parametrize(
    ("said", "report"),
    [
        ({"vulnerabilities": {}, "metadata": TOTAL}, audit.Report(7)),
        (
            {"vulnerabilities": {"semver": {"severity": "high"}}, "metadata": TOTAL},
            audit.Report(7, ["semver: high"]),
        ),
        ({"message": "405 Method Not Allowed"}, audit.Report(0, [], ["405 Method Not Allowed"])),
        (None, audit.Report(0, [], ["last words"])),
    ],
)
def test_what_npm_says(said, report):
    assert audit.read_npm_audit(said, "last words") == report


@pytest.mark.parametrize(
    ("packages", "code"), [([SAFE], 0), ([SAFE, SKIPPED], 3), ([SKIPPED, KNOWN], 1)]
)
def test_the_exit_code_tells_known_from_unanswered(monkeypatch, capsys, packages, code):
    monkeypatch.setattr(audit, "audit_node", lambda _: audit.Report(1))
    monkeypatch.setattr(audit, "ask", lambda *_: ({"dependencies": packages}, ""))

    assert audit.main("pip-audit") == code

    said = capsys.readouterr().out
    assert ("NO ANSWER (1): yarl" in said) == (SKIPPED in packages)
    assert ("pillow 9.0.0: PYSEC-2022-10" in said) == (KNOWN in packages)


def test_a_service_that_speaks_for_all_is_asked_after_one_that_does_not(monkeypatch):
    answers = iter([({"dependencies": [SKIPPED]}, ""), ({"dependencies": [SAFE]}, "")])
    monkeypatch.setattr(audit, "ask", lambda *_: next(answers))

    assert audit.audit_python(Path("a.lock"), Path("pip-audit")) == audit.Report(1)


def test_a_program_that_prints_no_json_had_no_answer(tmp_path):
    assert audit.ask(["sh", "-c", "echo broken; echo why >&2"], tmp_path) == (None, "why")
    assert audit.ask(["echo", json.dumps([1])], tmp_path)[0] == [1]
