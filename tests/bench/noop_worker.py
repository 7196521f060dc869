"""worker.py itself with nothing to do for each job: no picture is made, none is stored.

A contender's program with the one command `work` (contenders/protocol.py). All calls of the
database are real. A job counts when its process ends, after its completion; with keys, when its
provider is called, under its job id. Options: listen (false: NOTIFY never reaches it), slots (64
unless given).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from protocol import main
from run_worker import run_of, serve

import worker

NOBODY = {"SUPABASE_URL": "http://127.0.0.1:9", "SUPABASE_SERVICE_KEY": "none"}


def work(url: str, options: dict[str, Any]) -> None:
    run = run_of(options)

    class Provider(worker.Preview):
        """Answers at once."""

        async def create(self, job: worker.Job, provider_input: dict[str, Any]) -> str:
            if run.wants_keys:
                run.handled(str(job.job_id))
            return f"noop-{job.token}"

        async def result(self, job: worker.Job, *_: Any) -> worker.Result:
            return worker.Result([b""], {"images": 1})

    class Storage(worker.Storage):
        """Keeps nothing."""

        async def store(
            self, job: worker.Job, position: int, body: AsyncGenerator[bytes, None]
        ) -> dict[str, Any]:
            return {
                "position": position,
                "storage_path": f"{job.user_id}/{job.job_id}/{position}.png",
                "content_type": "image/png",
                "width": 512,
                "height": 512,
                "bytes": 250_000,
            }

    class Database(worker.Database):
        """Notes how long a claim takes that finds something."""

        async def claim_jobs(self, worker_id: int, slots: int) -> list[worker.Job]:
            began = time.monotonic()
            jobs = await super().claim_jobs(worker_id, slots)
            if jobs:
                run.claims.append(time.monotonic() - began)
            return jobs

        async def listen(self, *arguments: Any) -> None:
            await (super().listen(*arguments) if options.get("listen", True) else asyncio.Future())

    worker.Storage, worker.Database = Storage, Database  # type: ignore[misc]
    serve(run, Provider, DATABASE_URL=url, WORKER_SLOTS=str(options.get("slots", 64)), **NOBODY)


if __name__ == "__main__":
    main(work=work)
