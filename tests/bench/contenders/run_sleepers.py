"""Two of Darkroom's workers that go back to sleep as soon as they can, each in its own thread.

As worker.py does: woken by NOTIFY, claim a job and complete it, claim again, sleep in the
database, look a second time. Unlike it they sleep again though jobs are left, so that under load
every enqueue has a worker to wake as often as can be. Reports how often they were woken.
"""

from __future__ import annotations

import random
import threading
from typing import Any

import psycopg
from protocol import Work, main
from psycopg import sql
from psycopg.rows import namedtuple_row
from run_bare import complete

WORKERS = 2
SECOND_LOOK_SECONDS = 0.2  # at most
BACKSTOP_SECONDS = 5.0


class Sleeper:
    """One worker with one slot."""

    def __init__(self, url: str) -> None:
        self.connection = psycopg.connect(url, autocommit=True, row_factory=namedtuple_row)
        query = "select * from private.register_worker('bench', 1, '1')"
        registered = self.connection.execute(query).fetchone()
        self.id = registered.worker_id
        self.listener = psycopg.connect(url, autocommit=True)
        self.listener.execute(sql.SQL("listen {}").format(sql.Identifier(registered.channel)))

    def run(self, run: Work) -> None:
        """Work for ever."""
        while True:
            self.claim()
            self.claim()
            self.beat()
            self.connection.execute("select private.sleep(%s)", [self.id])
            second_look = random.uniform(0.25, 1.0) * SECOND_LOOK_SECONDS
            if not self.is_woken(second_look, run) and not self.claim():
                self.is_woken(BACKSTOP_SECONDS, run)

    def is_woken(self, within: float, run: Work) -> bool:
        """Wait for NOTIFY."""
        for _ in self.listener.notifies(timeout=within, stop_after=1):
            run.handled()
            return True
        return False

    def beat(self) -> None:
        """Be known as alive."""
        query = "select private.heartbeat(%s, '{}', '{}', '{}')"
        self.connection.execute(query, [self.id])

    def claim(self) -> bool:
        """Claim a job and complete it, if there is one."""
        query = "select * from private.claim_jobs(%s, 1)"
        jobs = self.connection.execute(query, [self.id]).fetchall()
        complete(self.connection, jobs)
        return bool(jobs)


def work(url: str, options: dict[str, Any]) -> None:
    run = Work(options)
    sleepers = [Sleeper(url) for _ in range(WORKERS)]
    run.begin()
    threads = [threading.Thread(target=each.run, args=[run]) for each in sleepers]
    for thread in threads:
        thread.start()


if __name__ == "__main__":
    main(work=work)
