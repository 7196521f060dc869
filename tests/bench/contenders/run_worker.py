"""worker.py with pictures that need no provider: each is downloaded, checked and stored over HTTP.

A contender's program with the one command `work` (protocol.py). A job counts when its process ends,
after its completion. Options: slots; files (address of a server that gives out pictures, and takes
in what is stored); kind (of the picture); seconds_each (that a provider takes).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from typing import Any

import httpx
from protocol import Work, main

import worker

DEFAULTS = {"WORKER_GRACE_SECONDS": "5", "LOG_LEVEL": "WARNING"}


def run_of(options: dict[str, Any]) -> Work:
    """Return the run of a worker, which ends as on any SIGTERM."""
    return Work(options, end=lambda: os.kill(os.getpid(), signal.SIGTERM))


def serve(run: Work, provider: type[worker.Preview], **environment: str) -> None:
    """Begin the run, and be a worker until its end, with this provider of previews."""

    class Worker(worker.Worker):
        """Counts jobs."""

        async def process(self, *arguments: Any) -> None:
            await super().process(*arguments)
            if not run.wants_keys:
                run.handled()

    os.environ.update({**DEFAULTS, **os.environ, **environment})
    worker.Worker, worker.Preview = Worker, provider  # type: ignore[misc]
    run.begin()
    worker.main()


def work(url: str, options: dict[str, Any]) -> None:
    class Provider(worker.Preview):
        """Takes its time, then answers with an address, from which the worker downloads."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            http = httpx.AsyncClient(timeout=worker.HTTP_TIMEOUT)
            self.replicate = worker.Replicate(http, options["files"], "none")

        async def result(self, job: worker.Job, *_: Any) -> worker.Result:
            await asyncio.sleep(options["seconds_each"])
            return worker.Result([f"{options['files']}/{options['kind']}"], {"images": 1})

        def read(self, output: str) -> AsyncGenerator[bytes, None]:
            return self.replicate.read(output)

    serve(
        run_of(options),
        Provider,
        DATABASE_URL=url,
        SUPABASE_URL=options["files"],
        SUPABASE_SERVICE_KEY="none",
        WORKER_SLOTS=str(options["slots"]),
        WORKER_POLL_SECONDS="0.5",
    )


if __name__ == "__main__":
    main(work=work)
