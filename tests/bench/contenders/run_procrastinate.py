"""procrastinate, with its async connector."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
from procrastinate import App, PsycopgConnector
from procrastinate.schema import SchemaManager
from protocol import Work, main, show_statement

TASK = "bench"


class Recorder(psycopg.AsyncCursor[Any]):
    """Prints the enqueue it is asked to execute."""

    async def execute(self, query: Any, params: Any = None, **more: Any) -> Recorder:
        if params and "jobs" in params:
            show_statement(query.replace("%(jobs)s", "$1"), [params["jobs"]], self.connection)
        return await super().execute(query, params, **more)


def install(url: str, options: dict[str, Any]) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(SchemaManager.get_schema())


def statement(url: str, options: dict[str, Any]) -> None:
    async def defer() -> None:
        connector = PsycopgConnector(conninfo=url, kwargs={"cursor_factory": Recorder}, min_size=1)
        async with App(connector=connector).open_async() as app:
            await app.configure_task(TASK).defer_async(**options["payload"])

    asyncio.run(defer())


def work(url: str, options: dict[str, Any]) -> None:
    run, concurrency = Work(options), options["concurrency"]
    app = App(connector=PsycopgConnector(conninfo=url, max_size=concurrency + 2))

    @app.task(name=TASK)
    async def handle(key: str, **payload: Any) -> None:
        run.handled(key)

    async def serve() -> None:
        async with app.open_async():
            run.begin()
            await app.run_worker_async(concurrency=concurrency, install_signal_handlers=False)

    asyncio.run(serve())


if __name__ == "__main__":
    main(install=install, statement=statement, work=work)
