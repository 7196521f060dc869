"""Asks what is known against the packages of every lock file, and says what got no answer.

pip-audit asks PyPI, then OSV; `npm audit` asks npm's registry. Mirrors and closed networks often
have none of them. So nothing counts as safe that nobody has spoken for.

Exit codes: 0 nothing is known of any, 1 something is known, 3 some had no answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stack import PROJECT

PYTHON_LOCKS = [Path("requirements") / f"{name}.lock" for name in ("worker", "test", "bench")]
NODE_LOCKS = [
    Path(folder) / "package-lock.json"
    for folder in (".", "tests/bench", "tests/postgres", "examples/expo")
]
SERVICES = ("pypi", "osv")
SECONDS = 300


@dataclass
class Report:
    """What was said of a lock file's packages."""

    answered: int = 0
    known: list[str] = field(default_factory=list)
    unanswered: list[str] = field(default_factory=list)  # names of packages, or why for all

    def __str__(self) -> str:
        lines = [f"{self.answered} answered for, {len(self.known)} with known vulnerabilities"]
        lines += [f"  {each}" for each in self.known]
        if self.unanswered:
            shown = ", ".join(self.unanswered[:3]) + (" ..." if len(self.unanswered) > 3 else "")
            lines.append(f"  NO ANSWER ({len(self.unanswered)}): {shown}")
        return "\n".join(lines)


def ask(command: Sequence[str | Path], folder: Path) -> tuple[Any, str]:
    """Run a program that prints JSON; return what it printed, or None, and its last words."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return None, f"nothing within {SECONDS} s"
    words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    try:
        return json.loads(done.stdout), words
    except json.JSONDecodeError:
        return None, words


def read_pip_audit(said: Any, words: str) -> Report:
    """Make a report of what `pip-audit --format json` said."""
    report = Report()
    if said is None:
        report.unanswered.append(words)
        return report
    for package in said["dependencies"]:
        if "skip_reason" in package:
            report.unanswered.append(package["name"])
            continue
        report.answered += 1
        if ids := ", ".join(each["id"] for each in package["vulns"]):
            report.known.append(f"{package['name']} {package['version']}: {ids}")
    return report


def read_npm_audit(said: Any, words: str) -> Report:
    """Make a report of what `npm audit --json` said."""
    if said is None or "vulnerabilities" not in said:
        return Report(unanswered=[(said or {}).get("message") or words])
    known = [f"{name}: {each['severity']}" for name, each in said["vulnerabilities"].items()]
    return Report(said["metadata"]["dependencies"]["total"], known)


def audit_python(lock: Path, pip_audit: Path) -> Report:
    """Ask one service after the other until one speaks for all packages."""
    reports = []
    for service in SERVICES:
        options = f"--disable-pip --require-hashes --progress-spinner off -f json -s {service}"
        said = ask([pip_audit, *options.split(), "--requirement", lock], PROJECT)
        reports.append(read_pip_audit(*said))
        if not reports[-1].unanswered:
            break
    return max(reports, key=lambda report: (report.answered, len(report.known)))


def audit_node(lock: Path) -> Report:
    command = ["npm", "audit", "--json", "--package-lock-only"]
    return read_npm_audit(*ask(command, PROJECT / lock.parent))


def main(pip_audit: str) -> int:
    """Audit every lock file and print the reports."""
    reports = []
    for lock in PYTHON_LOCKS:
        reports.append(audit_python(lock, PROJECT / pip_audit))
        print(f"{lock}: {reports[-1]}", flush=True)
    for lock in NODE_LOCKS:
        reports.append(audit_node(lock))
        print(f"{lock}: {reports[-1]}", flush=True)
    if any(report.known for report in reports):
        return 1
    return 3 if any(report.unanswered for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
