"""pgqueuer, with its asyncpg driver on uvloop."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import asyncpg
import uvloop
from pgqueuer import AsyncpgDriver, Job, PgQueuer, Queries
from protocol import Work, main, show_statement

ENTRYPOINT = "bench"
DEQUEUE_TIMEOUT = timedelta(seconds=30)


class Recorder(AsyncpgDriver):
    """Prints the enqueue it is asked to execute."""

    async def fetch(self, query: str, *args: object) -> list[dict[str, object]]:
        show_statement(query, args)
        return await super().fetch(query, *args)


def install(url: str, options: dict[str, Any]) -> None:
    async def make() -> None:
        await Queries(AsyncpgDriver(await asyncpg.connect(url))).install()

    uvloop.run(make())


def statement(url: str, options: dict[str, Any]) -> None:
    async def enqueue() -> None:
        payload = json.dumps(options["payload"]).encode()
        await Queries(Recorder(await asyncpg.connect(url))).enqueue(ENTRYPOINT, payload)

    uvloop.run(enqueue())


def work(url: str, options: dict[str, Any]) -> None:
    async def serve() -> None:
        run = Work(options)
        queuer = PgQueuer(AsyncpgDriver(await asyncpg.connect(url)))

        @queuer.entrypoint(ENTRYPOINT)
        async def handle(job: Job) -> None:
            run.handled(json.loads(job.payload or b"")["key"] if run.wants_keys else "")

        run.begin()
        await queuer.qm.run(dequeue_timeout=DEQUEUE_TIMEOUT, batch_size=options["batch"])

    uvloop.run(serve())


if __name__ == "__main__":
    main(install=install, statement=statement, work=work)
