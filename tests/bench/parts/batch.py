"""What a batch of 100 costs, in single enqueues."""

from __future__ import annotations

import functools
import time

import darkroom
import psycopg
from core import Part, Sizes, Task
from lab import Lab

BATCH = 100
GENERATIONS = 1000
COST = "ms per call"
SINGLE = "Darkroom, one enqueue_generation"
CALLS = {
    SINGLE: ("select public.enqueue_generation('darkroom/preview', %s, %s, null)", 1),
    f"Darkroom, one enqueue_batch of {BATCH}": (
        "select public.enqueue_batch('darkroom/preview', %s, %s, null)",
        BATCH,
    ),
}


def make_tasks(lab: Lab, sizes: Sizes) -> list[Task]:
    count = sizes.pick(GENERATIONS, GENERATIONS / 5)
    return [
        Task("1 client", name, functools.partial(call, lab, query, size, count))
        for name, (query, size) in CALLS.items()
    ]


def call(lab: Lab, query: str, size: int, count: int) -> dict[str, float]:
    """Enqueue that many generations of one user, `size` with each call."""
    prompts = [f"{darkroom.PROMPT}, {n}" for n in range(size)]
    what = prompts if size > 1 else prompts[0]
    options = darkroom.AS_USER["PGOPTIONS"]
    with (
        lab.copy(darkroom.base(lab)) as db,
        psycopg.connect(db.url, autocommit=True, options=options) as connection,
    ):
        connection.prepare_threshold = 0
        connection.execute("select set_config('request.jwt.claims', %s, false)", [CLAIMS])
        connection.execute(query, [what, PARAMS])  # once, to be prepared and planned
        began = time.monotonic()
        for _ in range(count // size):
            connection.execute(query, [what, PARAMS])
        return {COST: 1000 * (time.monotonic() - began) / (count // size)}


PARAMS = '{"width": 512}'
CLAIMS = darkroom.claims(darkroom.FIRST_USER)
PART = Part(
    name="batch",
    title="Batch",
    about=(
        f"{GENERATIONS:,} generations of one user over one connection, with a call for each or for"
        f" {BATCH} of them: the ratio says how many single calls a batch costs."
    ),
    metric=COST,
    reference=SINGLE,
    make_tasks=make_tasks,
    is_less_better=True,
)
