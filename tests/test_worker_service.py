"""worker.service: as closed as systemd can make it, and open where the worker needs it.

`make install-worker` is run into a folder, with stand-ins for what needs a network or systemd.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from database import PROJECT

import pictures

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
    assert unit["OOMPolicy"] == ["continue"]  # a picture's process is not the worker
    most = pictures.SMALL_AT_ONCE * pictures.SMALL_BYTES + pictures.LARGE_BYTES
    assert (unit["MemoryMax"], most <= 750_000_000) == (["1G"], True)
    assert not {"PrivateNetwork", "IPAddressDeny", "NoExecPaths"} & unit.keys()
    assert "TMPDIR=/var/tmp" in unit["Environment"]  # its own, by PrivateTmp


def test_secrets_come_from_credentials_and_never_from_the_command_line():
    unit = settings()

    assert unit["LoadCredential"] == ["darkroom:/etc/darkroom/credentials"]
    assert unit["EnvironmentFile"] == [
        "-/etc/darkroom/worker.env",
        "-/etc/darkroom/worker-%i.env",
    ]
    assert unit["ExecStart"] == ["/opt/darkroom/.venv/bin/python /opt/darkroom/worker.py"]
    assert not re.search(r"KEY|TOKEN|PASSWORD|_URL", UNIT.read_text())


def test_systemd_waits_until_it_is_ready_and_ends_one_that_hangs():
    unit = settings()

    assert unit["Type"] == ["notify"]
    assert unit["Restart"] == ["always"]
    assert unit["RestartPreventExitStatus"] == ["2"]
    assert (unit["StartLimitIntervalSec"], unit["TimeoutStartSec"]) == (["0"], ["infinity"])
    assert "StartLimitBurst" not in unit
    assert int(unit["WatchdogSec"][0]) > int(unit["TimeoutStopSec"][0]) > 30 + 10


# --- make install-worker ---


PYTHON = """#!/bin/sh
# Stands for python3, and for the python of the venv it makes: installs nothing.
echo "$@" >> "$CALLS"
case "$*" in *venv*)
  for folder; do :; done
  mkdir -p "$folder/bin" && cp "$0" "$folder/bin/python"
esac
"""


class Machine:
    """A folder to install into."""

    def __init__(self, folder: Path) -> None:
        self.root, self.calls = folder / "root", folder / "calls"
        programs = folder / "bin"
        programs.mkdir()
        (programs / "python3").write_text(PYTHON)
        (programs / "python3").chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "DESTDIR": str(self.root),
        }

    def install(self, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "-s", "install-worker"]
        values = self.environment | environment
        return subprocess.run(
            command, cwd=PROJECT, env=values, capture_output=True, text=True, check=False
        )

    def mode(self, path: str) -> int:
        return stat.S_IMODE((self.root / path).stat().st_mode)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_it_installs_program_packages_units_and_a_closed_folder(machine):
    done = machine.install()

    assert done.returncode == 0, done.stderr
    home = machine.root / "opt/darkroom"
    units = machine.root / "etc/systemd/system"
    for name in ("worker.py", "outbox.py", "pictures.py"):
        assert (home / name).read_text() == (PROJECT / name).read_text()
    assert {unit.name: unit.read_text() for unit in units.iterdir()} == {
        "darkroom-worker.service": UNIT.read_text(),
        "darkroom-worker@.service": UNIT.read_text(),
    }
    assert "--require-hashes --requirement requirements/worker.lock" in machine.calls.read_text()
    assert machine.mode("etc/darkroom/credentials") == 0o700
    assert "install: write these files, mode 600: /etc/darkroom/credentials/DATABASE_URL" in (
        done.stdout
    )


def test_a_second_time_it_changes_nothing_and_later_only_what_differs(machine):
    machine.install()
    (machine.root / "etc/darkroom/credentials/DATABASE_URL").write_text("kept")
    before = {file: file.stat().st_mtime_ns for file in machine.root.rglob("*")}

    again = machine.install()
    unit = machine.root / "etc/systemd/system/darkroom-worker.service"
    after = {file: file.stat().st_mtime_ns for file in machine.root.rglob("*")}
    unit.write_text("changed")
    third = machine.install()

    assert "install: everything is in place" in again.stdout
    assert after == before
    assert third.stdout.splitlines()[0] == "install: /etc/systemd/system/darkroom-worker.service"
    assert unit.read_text() == UNIT.read_text()


@pytest.mark.skipif(Path("/run/systemd/system").exists(), reason="systemd runs this machine")
def test_without_systemd_it_says_so_and_changes_nothing(machine):
    done = machine.install(DESTDIR="")

    assert done.returncode != 0
    assert "install: systemd does not run this machine" in done.stderr
    assert not Path("/etc/darkroom").exists()


@pytest.mark.parametrize("name", ["darkroom-worker.service", "darkroom-worker@.service"])
def test_systemd_understands_every_line(machine, tmp_path, name):
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        pytest.skip("systemd-analyze is not installed")
    machine.install()
    unit = tmp_path / name
    installed = (machine.root / "etc/systemd/system" / name).read_text()
    unit.write_text(installed.replace("/opt/darkroom", f"{machine.root}/opt/darkroom"))

    done = subprocess.run([analyze, "verify", unit], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
