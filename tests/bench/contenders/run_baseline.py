"""The least a queue can be: insert a row; delete ten, skipping those locked by others."""

from __future__ import annotations

import time
from typing import Any

import psycopg
from protocol import Work, main, show_statement
from psycopg.types.json import Jsonb

TABLE = "create table jobs (id uuid primary key default gen_random_uuid(), payload jsonb not null)"
INSERT = "insert into jobs (payload) values ($1)"
INSERT_AND_NOTIFY = (
    "with job as (insert into jobs (payload) values ($1) returning id)"
    " select pg_notify('jobs', '') from job"
)
CLAIM = (
    "delete from jobs where id = any(array("
    "select id from jobs order by id limit %s for update skip locked)) returning payload"
)
BACKSTOP_SECONDS = 5.0


def install(url: str, options: dict[str, Any]) -> None:
    with psycopg.connect(url) as connection:
        connection.execute(TABLE)


def statement(url: str, options: dict[str, Any]) -> None:
    text = INSERT_AND_NOTIFY if options.get("notify") else INSERT
    show_statement(text, [Jsonb(options["payload"])])


def work(url: str, options: dict[str, Any]) -> None:
    run = Work(options)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("listen jobs")
        run.begin()
        while True:
            began = time.monotonic()
            rows = connection.execute(CLAIM, [options["batch"]]).fetchall()
            if rows:
                run.claims.append(time.monotonic() - began)
            for (payload,) in rows:
                run.handled(payload["key"])
            if not rows:
                for _ in connection.notifies(timeout=BACKSTOP_SECONDS, stop_after=1):
                    pass


if __name__ == "__main__":
    main(install=install, statement=statement, work=work)
