"""What a batch of 100 costs, in single enqueues."""

from __future__ import annotations

import functools
import time

import darkroom
from core import Part, Sizes, Task
from lab import Lab

BATCH = 100
GENERATIONS = 1000
COST = "ms per call"
SINGLE = "Darkroom, one enqueue_generation"
CALLS = {
    SINGLE: ("enqueue_generation", 1),
    f"Darkroom, one enqueue_batch of {BATCH}": ("enqueue_batch", BATCH),
}


def make_tasks(lab: Lab, sizes: Sizes) -> list[Task]:
    count = sizes.pick(GENERATIONS, GENERATIONS / 5)
    return [
        Task("1 client", name, functools.partial(call, lab, function, size, count))
        for name, (function, size) in CALLS.items()
    ]


def call(lab: Lab, function: str, size: int, count: int) -> dict[str, float]:
    """Enqueue that many generations, `size` with each call, each call as another user."""
    prompts = [f"{darkroom.PROMPT}, {n}" for n in range(size)]
    what = prompts if size > 1 else prompts[0]
    query = (
        "select set_config('request.jwt.claims', %s, false),"
        f" public.{function}('darkroom/preview', %s, '{{\"width\": 512}}', null)"
    )
    with lab.copy(darkroom.base(lab)) as db, darkroom.as_user(db) as user:
        began = 0.0
        for number in range(1 + count // size):  # once more, to be prepared and planned
            user.execute(query.encode(), [darkroom.claims(number), what])
            began = began or time.monotonic()
        return {COST: 1000 * (time.monotonic() - began) / (count // size)}


PART = Part(
    name="batch",
    title="Batch",
    about=(
        f"{GENERATIONS:,} generations over one connection, with a call for each or for {BATCH} of"
        " them, each call as another user: the ratio says how many single calls a batch costs."
    ),
    metric=COST,
    reference=SINGLE,
    make_tasks=make_tasks,
    is_less_better=True,
)
