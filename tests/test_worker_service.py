"""worker.service: as closed as systemd can make it, and open where the worker needs it."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from database import PROJECT

UNIT = PROJECT / "worker.service"


def exposure() -> float:
    """Return how exposed systemd finds the unit, from 0 to 10."""
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        pytest.skip("systemd-analyze is not installed")
    command = [analyze, "security", "--offline=true", "--no-pager", str(UNIT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    level = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    if not level:
        pytest.skip(f"this systemd-analyze does not judge files: {done.stderr.strip()}")
    return float(level[1])


def settings() -> dict[str, list[str]]:
    """Return what each setting of the unit says, in order."""
    lines = re.findall(r"(?m)^(\w+)=(.*)$", UNIT.read_text())
    return {name: [value for key, value in lines if key == name] for name, _ in lines}


def test_the_worker_is_hardly_exposed():
    assert exposure() <= 1.2


def test_the_worker_can_do_its_work():
    unit = settings()

    assert unit["RestrictAddressFamilies"] == ["AF_INET AF_INET6 AF_UNIX"]
    assert unit["SystemCallFilter"] == ["@system-service", "~@privileged @resources"]
    assert not {"PrivateNetwork", "IPAddressDeny", "NoExecPaths"} & unit.keys()
    assert "TMPDIR=/var/tmp" in unit["Environment"]  # its own, by PrivateTmp


def test_secrets_come_from_a_file_and_never_from_the_command_line():
    unit = settings()

    assert unit["EnvironmentFile"] == ["/etc/darkroom/worker.env"]
    assert unit["ExecStart"] == ["/opt/darkroom/.venv/bin/python /opt/darkroom/worker.py"]
    assert not re.search(r"KEY|TOKEN|PASSWORD|_URL", UNIT.read_text())
