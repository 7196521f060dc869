"""Darkroom's functions in a bare loop: claim a batch, complete it. Options: batch, in jobs.

With sleepers, so many workers of one slot, each in its own thread, that go back to sleep as soon as
they can. As worker.py does: woken by NOTIFY, claim a job and complete it, claim again, sleep in the
database, look a second time. Unlike it they sleep again though jobs are left, so that under load
every enqueue has a worker to wake as often as can be. They report how often they were woken.
"""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import psycopg
from protocol import Work, main
from psycopg import sql
from psycopg.rows import namedtuple_row
from psycopg.types.json import Jsonb

COMPLETE = "select * from private.complete_jobs(%s::uuid[], %s::bigint[], %s::jsonb[], %s::jsonb[])"
IDLE_SECONDS = 0.05
SECOND_LOOK_SECONDS, BACKSTOP_SECONDS = 0.2, 5.0  # at most


def complete(connection: psycopg.Connection[Any], jobs: list[Any]) -> None:
    ids, tokens = [job.job_id for job in jobs], [job.token for job in jobs]
    images = [Jsonb([image_of(job)]) for job in jobs]
    connection.execute(COMPLETE, [ids, tokens, images, [Jsonb({"images": 1})] * len(jobs)])


def image_of(job: Any) -> dict[str, Any]:
    path = f"{job.user_id}/{job.job_id}/0.png"
    kind = {"content_type": "image/png", "width": 512, "height": 512, "bytes": 250_000}
    return {"position": 0, "storage_path": path, **kind}


class Bare:
    def __init__(self, url: str, slots: int) -> None:
        self.connection = psycopg.connect(url, autocommit=True, row_factory=namedtuple_row)
        query = "select * from private.register_worker('bench', %s, '1')"
        registered: Any = self.connection.execute(query, [slots]).fetchone()
        self.id, self.slots, self.channel = registered.worker_id, slots, registered.channel

    def claim(self) -> list[Any]:
        query = "select * from private.claim_jobs(%s, %s, '{}')"
        return self.connection.execute(query, [self.id, self.slots]).fetchall()

    def work(self, run: Work) -> None:
        while True:
            began = time.monotonic()
            jobs = self.claim()
            if not jobs:
                time.sleep(IDLE_SECONDS)
                continue
            run.claims.append(time.monotonic() - began)
            complete(self.connection, jobs)
            for _ in jobs:
                run.handled()

    def sleep(self, run: Work, listener: psycopg.Connection[Any]) -> None:
        """Sleep, be woken, and sleep again, for ever."""

        def is_woken(within: float) -> bool:
            for _ in listener.notifies(timeout=within, stop_after=1):
                run.handled()
                return True
            return False

        listener.execute(sql.SQL("listen {}").format(sql.Identifier(self.channel)))
        while True:
            for _ in range(2):
                complete(self.connection, self.claim())
            self.connection.execute("select private.heartbeat(%s, '{}', '{}', '{}')", [self.id])
            self.connection.execute("select private.sleep(%s)", [self.id])
            if not is_woken(random.uniform(0.25, 1.0) * SECOND_LOOK_SECONDS):
                jobs = self.claim()
                complete(self.connection, jobs)
                if not jobs:
                    is_woken(BACKSTOP_SECONDS)


def work(url: str, options: dict[str, Any]) -> None:
    run = Work(options)
    bare = [Bare(url, options["batch"]) for _ in range(options.get("sleepers", 1))]
    run.begin()
    if "sleepers" not in options:
        bare[0].work(run)
    for each in bare:
        listener = psycopg.connect(url, autocommit=True)
        threading.Thread(target=each.sleep, args=[run, listener]).start()


if __name__ == "__main__":
    main(work=work)
