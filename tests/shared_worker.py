"""One worker for all cases of a file, with a database and a fake of Replicate of its own.

    world, db, workers = shared_worker(WORKER_POLL_SECONDS=60)

Who kills `workers.process` or stops it need not start another one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from actors import User
from database import Database, Server
from fake_replicate import FakeReplicate
from worker_process import WorkerProcess, Workers, eventually

from stack import Stack


class Shared(Workers):
    process: WorkerProcess
    fake: FakeReplicate

    def running(self, user: User, **behaviour: Any) -> str:
        """Have a job of the user's under way at the provider, which behaves like this."""
        self.fake.next(**behaviour)
        job = user.enqueued(model="black-forest-labs/flux-schnell")
        eventually(lambda: self.checkpointed(job))
        return job


def shared_worker(settings: str = "retry_base = '0'", **environment: Any) -> tuple[Any, ...]:
    """Return the fixtures `world`, `db` and `workers` of a file."""

    @pytest.fixture(scope="module")
    def world(
        server: Server, template: str, stack: Stack, tmp_path_factory: pytest.TempPathFactory
    ) -> Iterator[Shared]:
        db = server.create(template)
        db.lift_limits()
        db.execute("update public.models set is_active = true")
        db.execute(f"update private.settings set {settings}")
        with FakeReplicate() as fake, Shared(db, stack, tmp_path_factory.mktemp("w")) as workers:
            workers.fake = fake
            db.runs_at("replicate", fake.url)
            workers.extra_secrets = {fake.token, f"{fake.origin}/files"}
            workers.environment |= {name: str(value) for name, value in environment.items()}
            workers.environment["REPLICATE_API_TOKEN"] = fake.token
            yield workers
        server.drop(db)

    @pytest.fixture(scope="module")
    def db(world: Shared) -> Database:
        return world.db

    @pytest.fixture
    def workers(world: Shared) -> Shared:
        if not any(process.is_running() for process in world.processes):
            world.process = world.start()
        return world

    return world, db, workers
