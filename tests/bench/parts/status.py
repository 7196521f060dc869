"""What a user pays for looking at a job when there are millions of others."""

from __future__ import annotations

import functools

import darkroom
from core import Part, Sizes, Task
from lab import Lab

CLIENTS = 32
SECONDS, QUICK_SECONDS = 10, 1
FEW, MANY, QUICK_MANY = 10_000, 5_000_000, 50_000
COST = f"ms per call, {CLIENTS} clients"
RATE, LOOKUP = "calls/s", "of it to draw a job, ms"
SITUATIONS = {"finished": "finished", f"queued behind {darkroom.BEFORE}": "queued"}
NAME = "Darkroom, {:,} generations"
DRAWN = """\\set n random(1, {count})
select set_config('request.jwt.claims', claims, false), {what}
from bench.{sample} where n = :n
"""


def make_tasks(lab: Lab, sizes: Sizes) -> list[Task]:
    seconds = sizes.pick(SECONDS, QUICK_SECONDS)
    return [
        Task(situation, NAME.format(count), functools.partial(measure, lab, count, sample, seconds))
        for situation, sample in SITUATIONS.items()
        for count in (FEW, sizes.pick(MANY, QUICK_MANY))
    ]


def measure(lab: Lab, generations: int, sample: str, seconds: int) -> dict[str, float]:
    """Look at one job after the other, each time as its user."""
    db = darkroom.aged(lab, generations)
    darkroom.run_script(db, darkroom.LAST_QUEUED)
    count = db.value(f"select count(*) from bench.{sample}")

    def rate(what: str, seconds: int) -> float:
        script = DRAWN.format(count=count, what=what, sample=sample)
        options = (f"-c{CLIENTS}", "-j2", f"-T{seconds}")
        return lab.pgbench(db.url, script, *options, **darkroom.AS_USER)

    calls, lookups = rate("public.get_job_status(job_id)", seconds), rate("job_id", 1)
    return {COST: 1000 * CLIENTS / calls, RATE: calls, LOOKUP: 1000 * CLIENTS / lookups}


PART = Part(
    name="status",
    title="Status",
    about=(
        f"get_job_status by pgbench with {CLIENTS} clients over 2 threads and prepared statements,"
        f" as the user whose job it is. Each call draws one of 10,000 finished jobs of all ages, or"
        f" of the last {darkroom.QUEUE - darkroom.BEFORE} queued ones, which have at least"
        f" {darkroom.BEFORE} before them. To draw it takes a part of the time, which is told."
        " Target: at most 1.3 times the time of the small database."
    ),
    metric=COST,
    reference=NAME.format(FEW),
    make_tasks=make_tasks,
    is_less_better=True,
)
