"""The worker in a container, as deploy/compose.yaml runs it: its image, on the stack's database.

Runs with STACK=docker, and where WORKER_IMAGE names an image of deploy/worker.Dockerfile.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import stack_choice
import yaml
from actors import User
from database import PROJECT, Database
from documents import read, run
from worker_process import Workers, eventually

from stack import Stack

IMAGE = os.environ.get("WORKER_IMAGE") or ("darkroom-worker" if stack_choice.is_wanted() else "")
SERVICE = yaml.safe_load((PROJECT / "deploy/compose.yaml").read_text())["services"]["worker"]
GRACE = int(SERVICE["stop_grace_period"].removesuffix("s"))

pytestmark = pytest.mark.skipif(not IMAGE, reason="neither STACK=docker nor WORKER_IMAGE")


class Container:
    """One worker, with the means and rights that the compose file gives it."""

    def __init__(self, environment: dict[str, str], folder: Path, **options: Any) -> None:
        self.log_file = folder / f"container-{uuid4()}.log"
        docker = importlib.import_module("docker").from_env()
        if "named" in options:
            self._container = docker.containers.get(options["named"])
            return
        values = {name: value for name, value in environment.items() if name != "PATH"}
        second = 1_000_000_000
        own = ("init", "read_only", "mem_limit", "pids_limit", "cap_drop", "security_opt")
        self._container = docker.containers.run(
            IMAGE,
            detach=True,
            environment=values,
            network_mode="host",
            tmpfs=dict(each.split(":") for each in SERVICE["tmpfs"]),
            healthcheck={"test": None, "interval": 3 * second, "timeout": 60 * second},
            **{name: SERVICE[name] for name in own},
            **options,
        )

    @property
    def log(self) -> str:
        gone = self.log_file.exists()
        return self.log_file.read_text() if gone else str(self._container.logs().decode())

    @property
    def state(self) -> dict[str, Any]:
        self._container.reload()
        return dict(self._container.attrs["State"])

    @property
    def means(self) -> dict[str, Any]:
        """What it has and may."""
        names = ("Init", "ReadonlyRootfs", "Tmpfs", "Memory", "PidsLimit", "CapDrop", "SecurityOpt")
        return {name: self._container.attrs["HostConfig"][name] for name in names}

    def run(self, command: str) -> tuple[int, str]:
        done = self._container.exec_run(["sh", "-c", command])
        return done.exit_code, done.output.decode()

    def started(self) -> Container:
        eventually(lambda: re.search(r"worker\.started", self.log), 30)
        return self

    def wait(self) -> int:
        return int(self._container.wait(timeout=60)["StatusCode"])

    def stop(self) -> int:
        self._container.stop(timeout=GRACE)
        return self.wait()

    def kill(self) -> None:
        self.log_file.write_text(self.log)
        self._container.remove(force=True, v=True)


@pytest.fixture
def workers(db: Database, stack: Stack, tmp_path: Path) -> Iterator[Workers]:
    db.lift_limits()
    with Workers(db, stack, tmp_path) as workers:
        yield workers


def contain(workers: Workers, **changes: Any) -> Container:
    own = {"command", "volumes", "named"} & changes.keys()
    options = {name: changes.pop(name) for name in own}
    environment = workers.environment | {name: str(value) for name, value in changes.items()}
    container = Container(environment, workers.folder, **options)
    workers.processes.append(container)
    return container


def test_it_works_as_nobody_on_a_disk_it_cannot_write_to_and_is_healthy(workers, alice: User):
    container = contain(workers).started()
    job = alice.enqueued(model="darkroom/preview")

    workers.until(job, "completed", within=30)
    eventually(lambda: container.state["Health"]["Status"] == "healthy", 60)
    assert container.run("id -u; id -g") == (0, "10001\n10001\n")
    assert (
        container.run("grep -E '^Cap(Eff|Prm|Bnd)' /proc/self/status | grep -vE '0{16}$'")[0] == 1
    )
    for folder in ("/", "/opt/darkroom/.venv", "/etc", "/var/tmp"):
        assert container.run(f"touch {folder}/mine")[0] != 0
    assert container.run("touch /tmp/mine") == (0, "")
    assert container.run("command -v pip gcc psql")[1].count("/opt/darkroom") == 0
    said = container.state["Health"]["Log"][-1]["Output"]
    assert "ok     storage    a file was written to bucket generations and deleted" in said


def test_stopped_during_a_job_it_hands_it_back_within_the_grace_and_nothing_is_lost(
    workers, alice: User
):
    container = contain(workers, PREVIEW_SECONDS=300, WORKER_GRACE_SECONDS=1).started()
    job = alice.enqueued(model="darkroom/preview")
    workers.until(job, "processing", within=30)
    paid, began = alice.credits(), time.monotonic()

    assert container.stop() == 0

    assert time.monotonic() - began < GRACE / 2
    assert (workers.status(job), workers.outcomes(job)) == ("queued", ["released"])
    contain(workers).started()
    workers.until(job, "completed", within=30)
    assert (workers.outcomes(job), alice.credits()) == (["released", "completed"], paid)


def test_secrets_may_be_files_and_what_is_wrong_makes_it_unhealthy(workers, tmp_path: Path):
    folder = tmp_path / "secrets"
    folder.mkdir()
    unset = dict.fromkeys(("DATABASE_URL", "SUPABASE_URL", "SUPABASE_SERVICE_KEY"), "")
    for name in unset:
        (folder / name).write_text(workers.environment[name])
    volumes = {str(folder): {"bind": "/run/secrets", "mode": "ro"}}
    with_files = unset | {"volumes": volumes, "CREDENTIALS_DIRECTORY": "/run/secrets"}

    assert contain(workers, command=["check"], **with_files).wait() == 0
    (folder / "SUPABASE_SERVICE_KEY").write_text("wrong key")
    container = contain(workers, **with_files).started()

    eventually(lambda: container.state["Health"]["Status"] == "unhealthy", 120)
    assert "wrong  storage" in container.state["Health"]["Log"][-1]["Output"]


def test_what_the_page_says_to_type_runs_one_with_the_same_means(workers, tmp_path: Path):
    block = next(
        each
        for each in read(PROJECT / "docs/deploy.md")
        if each.what == "tests/test_worker_container.py"
    )
    build, commands = block.text.split("\n", 1)
    assert build == "docker build -t darkroom-worker -f deploy/worker.Dockerfile ."  # by make test
    values = {name: value for name, value in workers.environment.items() if name != "PATH"}
    (tmp_path / "worker.env").write_text("".join(f"{k}={v}\n" for k, v in values.items()))
    name = f"darkroom-test-{uuid4()}"
    for said, here in (
        ("docker run", "docker run --network host"),
        ("--name darkroom-worker", f"--name {name}"),
        (" darkroom-worker", f" {IMAGE}"),
    ):
        commands = commands.replace(said, here)

    printed = run(["bash", "-euo", "pipefail"], commands, tmp_path)
    workers.processes.append(container := Container({}, tmp_path, named=name))

    assert "ok     storage" in printed
    assert container.started().means == contain(workers).means
    assert container.stop() == 0
