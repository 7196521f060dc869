"""How many jobs a second can be enqueued, one transaction each."""

from __future__ import annotations

import functools

import darkroom
import peers
from core import Part, Sizes, Task
from lab import Contender, Lab

CLIENTS = (1, 8, 32)
SECONDS, QUICK_SECONDS = 5, 1
RATE, WAKE_UPS = "enqueues/s", "wake-ups/s"
SLEEPERS = Contender("sleeping workers", "run_bare.py", {"batch": 1, "sleepers": 2})
PEERS = (
    *(peers.BASELINE, peers.BASELINE_NOTIFY, peers.PROCRASTINATE, peers.PGQUEUER),
    *(peers.GRAPHILE, peers.PGBOSS, peers.PGBOSS_NOTIFY),
)


def make_tasks(lab: Lab, sizes: Sizes) -> list[Task]:
    seconds = sizes.pick(SECONDS, QUICK_SECONDS)
    contenders = {peer.name: functools.partial(enqueue_peer, lab, peer) for peer in PEERS} | {
        "Darkroom, no worker": functools.partial(enqueue_ours, lab),
        "Darkroom, sleeping workers": functools.partial(enqueue_with_sleepers, lab),
    }
    return [
        Task(
            f"{clients} client{'s' if clients > 1 else ''}",
            name,
            functools.partial(enqueue, seconds, (f"-c{clients}", "-j2", f"-T{seconds}")),
        )
        for clients in CLIENTS
        for name, enqueue in contenders.items()
    ]


def enqueue_peer(lab: Lab, peer: Contender, _: int, options: tuple[str, ...]) -> dict[str, float]:
    with lab.copy(peers.tables(lab, peer)) as db:
        return {RATE: peers.enqueue(lab, peer, db, *options)}


def enqueue_ours(lab: Lab, _: int, options: tuple[str, ...]) -> dict[str, float]:
    """Call enqueue_generation as PostgREST does."""
    with lab.copy(darkroom.base(lab)) as db:
        return {RATE: lab.pgbench(db.url, darkroom.ENQUEUE, *options, **darkroom.AS_USER)}


def enqueue_with_sleepers(lab: Lab, seconds: int, options: tuple[str, ...]) -> dict[str, float]:
    """Call it while workers go to sleep again and again; say how often they were woken."""
    with lab.copy(darkroom.base(lab)) as db:
        url = darkroom.worker_url(db)
        with lab.work(SLEEPERS, url, jobs=None, seconds=seconds + 60, keys=False) as workers:
            workers.say()
            rate = lab.pgbench(db.url, darkroom.ENQUEUE, *options, **darkroom.AS_USER)
            workers.say()
            woken = len(workers.report(within=10)["moments"])
    return {RATE: rate, WAKE_UPS: woken / seconds}


PART = Part(
    name="enqueue",
    title="Enqueue",
    about=(
        "One job for each transaction, by pgbench with prepared statements over 2 threads, in a"
        " fresh database after a checkpoint. The peers' statement is what their library sends."
        " Darkroom's is the public function, called as a user: it checks the request, the plan's"
        " limits and the balance, and writes charge, ledger entry, generation and ready job."
    ),
    metric=RATE,
    reference=peers.BASELINE.name,
    make_tasks=make_tasks,
)
