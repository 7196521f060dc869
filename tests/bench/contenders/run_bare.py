"""Darkroom's functions in a bare loop: claim a batch, complete it. Options: batch, in jobs."""

from __future__ import annotations

import time
from typing import Any

import psycopg
from protocol import Work, main
from psycopg.rows import namedtuple_row
from psycopg.types.json import Jsonb

COMPLETE = "select * from private.complete_jobs(%s::uuid[], %s::bigint[], %s::jsonb[], %s::jsonb[])"
IDLE_SECONDS = 0.05


def complete(connection: psycopg.Connection[Any], jobs: list[Any]) -> None:
    """Complete a batch of jobs in one call."""
    ids, tokens = [job.job_id for job in jobs], [job.token for job in jobs]
    images = [Jsonb([image_of(job)]) for job in jobs]
    connection.execute(COMPLETE, [ids, tokens, images, [Jsonb({"images": 1})] * len(jobs)])


def image_of(job: Any) -> dict[str, Any]:
    """Return an image as a worker reports it."""
    return {
        "position": 0,
        "storage_path": f"{job.user_id}/{job.job_id}/0.png",
        "content_type": "image/png",
        "width": 512,
        "height": 512,
        "bytes": 250_000,
    }


def work(url: str, options: dict[str, Any]) -> None:
    run = Work(options)
    with psycopg.connect(url, autocommit=True, row_factory=namedtuple_row) as connection:
        query = "select * from private.register_worker('bench', %s, '1')"
        worker_id = connection.execute(query, [options["batch"]]).fetchone().worker_id
        run.begin()
        while True:
            began = time.monotonic()
            query = "select * from private.claim_jobs(%s, %s)"
            jobs = connection.execute(query, [worker_id, options["batch"]]).fetchall()
            if not jobs:
                time.sleep(IDLE_SECONDS)
                continue
            run.claims.append(time.monotonic() - began)
            complete(connection, jobs)
            for _ in jobs:
                run.handled()


if __name__ == "__main__":
    main(work=work)
