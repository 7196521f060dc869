"""worker.py itself, with pictures of a provider that answers at once, or with none at all.

A contender's program with the one command `work` (protocol.py). All calls of the database are real.
A job counts when its process ends, after its completion; with keys, when its provider is called,
under its job id. Options: slots (64 unless given); listen (false: NOTIFY never reaches it); files
(address of a server that gives out pictures, and takes in what is stored: each is downloaded,
checked and stored), with kind (of the picture) and seconds_each (that a provider takes). Without
files no picture is made and none is stored.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import httpx
from protocol import Work, main

import worker


def work(url: str, options: dict[str, Any]) -> None:
    run = Work(options, end=lambda: os.kill(os.getpid(), signal.SIGTERM))
    files = options.get("files")

    class Provider(worker.Provider):
        """Answers at once with nothing, or in its time with an address to download from."""

        def __init__(self, http: httpx.AsyncClient, row: Mapping[str, Any], key: Any) -> None:
            super().__init__(http, {**row, "base_url": files or row["base_url"]}, key)
            self.job_id = str(row["job_id"])

        async def send(self, request: dict[str, Any], **_: Any) -> dict[str, Any]:
            if run.wants_keys:
                run.handled(self.job_id)
            if files:
                await asyncio.sleep(options["seconds_each"])
            outputs = [f"{files}/{options['kind']}" if files else "none"]
            return {"status": 200, "headers": {}, "body": {"outputs": outputs}}

    class Storage(worker.Storage):
        async def store(self, job: worker.Job, position: int, read: Any) -> dict[str, Any]:
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

    class Worker(worker.Worker):
        async def process(self, *arguments: Any) -> None:
            await super().process(*arguments)
            if not run.wants_keys:
                run.handled()

    os.environ |= {"DATABASE_URL": url, "SUPABASE_URL": files or "http://127.0.0.1:9"} | {
        "SUPABASE_SERVICE_KEY": "none",
        "WORKER_SLOTS": str(options.get("slots", 64)),
        "WORKER_GRACE_SECONDS": "5",
        "LOG_LEVEL": "WARNING",
    }
    if files:
        os.environ["WORKER_POLL_SECONDS"] = "0.5"
    else:
        worker.Storage = Storage  # type: ignore[misc]
    worker.Worker, worker.Provider, worker.Database = Worker, Provider, Database  # type: ignore[misc]
    run.begin()
    worker.main()


if __name__ == "__main__":
    main(work=work)
