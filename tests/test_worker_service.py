"""worker.service: as closed as systemd can make it, and open where the worker needs it.

`make install-worker` is run into a folder, with stand-ins for what needs a network or systemd.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from database import PROJECT

import pictures

UNIT = PROJECT / "worker.service"
UNITS = "etc/systemd/system"


def analyzed(*arguments: str) -> subprocess.CompletedProcess[str]:
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run([analyze, *arguments], capture_output=True, text=True, check=False)


def test_the_worker_is_hardly_exposed():
    done = analyzed("security", "--offline=true", "--no-pager", str(UNIT))
    level = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    if not level:
        pytest.skip(f"this systemd-analyze does not judge files: {done.stderr.strip()}")

    assert float(level[1]) <= 1.2


def test_it_has_room_for_its_pictures_and_time_for_its_jobs_and_shows_no_secret():
    text = UNIT.read_text()
    unit = dict(re.findall(r"(?m)^(\w+)=(.*)$", text))

    most = pictures.SMALL_AT_ONCE * pictures.SMALL_BYTES + pictures.LARGE_BYTES
    assert (unit["MemoryMax"], most <= 750_000_000) == ("1G", True)
    assert (unit["Type"], unit["RestartPreventExitStatus"]) == ("notify", "2")
    assert int(unit["WatchdogSec"]) > int(unit["TimeoutStopSec"]) > 30 + 10
    assert unit["LoadCredential"] == "darkroom:/etc/darkroom/credentials"
    assert not re.search(r"KEY|TOKEN|PASSWORD|_URL", text)


# --- make install-worker ---


PYTHON = """#!/bin/sh
# Stands for python3, and for the python of the venv it makes: installs nothing.
echo "$@" >> "$CALLS"
case "$*" in *venv*)
  for folder; do :; done
  mkdir -p "$folder/bin" && cp "$0" "$folder/bin/python"
esac
"""


@pytest.fixture
def install(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Installs below `root`; what Python was asked for is in `calls`."""
    python = tmp_path / "bin" / "python3"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "DESTDIR": str(tmp_path / "root"),
    }

    def installed(**changes: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "-s", "install-worker"]
        values = environment | changes
        return subprocess.run(
            command, cwd=PROJECT, env=values, capture_output=True, text=True, check=False
        )

    return installed


def test_it_installs_all_there_is_and_later_only_what_differs(install, tmp_path):
    root = tmp_path / "root"
    done = install()

    assert done.returncode == 0, done.stderr
    for name in ("worker.py", "outbox.py", "pictures.py"):
        assert (root / "opt/darkroom" / name).read_text() == (PROJECT / name).read_text()
    units = {unit.name: unit.read_text() for unit in (root / UNITS).iterdir()}
    assert units == dict.fromkeys(
        ("darkroom-worker.service", "darkroom-worker@.service"), UNIT.read_text()
    )
    calls = (tmp_path / "calls").read_text()
    assert "--require-hashes --requirement requirements/worker.lock" in calls
    assert stat.S_IMODE((root / "etc/darkroom/credentials").stat().st_mode) == 0o700
    wanted = "install: write these files, mode 600: /etc/darkroom/credentials/DATABASE_URL"
    assert wanted in done.stdout

    (root / "etc/darkroom/credentials/DATABASE_URL").write_text("kept")
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    assert "install: everything is in place" in install().stdout
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*")} == before

    unit = root / UNITS / "darkroom-worker.service"
    unit.write_text("changed")
    again = install().stdout
    assert again.splitlines()[0] == f"install: /{UNITS}/darkroom-worker.service"
    assert unit.read_text() == UNIT.read_text()


@pytest.mark.parametrize("name", ["darkroom-worker.service", "darkroom-worker@.service"])
def test_systemd_understands_every_line(install, tmp_path, name):
    install()
    unit = tmp_path / name
    installed = (tmp_path / "root" / UNITS / name).read_text()
    unit.write_text(installed.replace("/opt/darkroom", f"{tmp_path}/root/opt/darkroom"))

    done = analyzed("verify", str(unit))

    assert (done.returncode, done.stderr) == (0, "")
