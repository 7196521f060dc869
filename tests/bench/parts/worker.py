"""What the worker itself takes: processor time for each job, and memory."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from pathlib import Path

import darkroom
import memory
from core import Part, Sizes, Task
from lab import Contender, Lab
from PIL import Image

PEAK, IDLE, CPU, RATE = "peak MB", "idle MB", "CPU ms/job", "jobs/s"
NOOP_SLOTS, NOOP_JOBS, QUICK_NOOP_JOBS = (4, 64, 256), 5_000, 1_000
SLOTS = (1, 64, 256)
EACH, QUICK_EACH = 8, 2  # pictures for each slot
PICTURE_SECONDS = 1.0  # that a provider takes
IDLE_SECONDS = 3.0  # before the first job: the worker has gone to sleep
LARGE, QUICK_LARGE = 64, 8
MOST_SECONDS = 300.0  # for the jobs of a cell
KINDS = {"PNG": ("png",), "of four formats": tuple(memory.KINDS)}
NAME = "Darkroom's worker.py, {}"


def make_tasks(lab: Lab, sizes: Sizes) -> list[Task]:
    jobs, each = sizes.pick(NOOP_JOBS, QUICK_NOOP_JOBS), sizes.pick(EACH, QUICK_EACH)
    large = sizes.pick(LARGE, QUICK_LARGE)
    drains = [("no pictures", slots, jobs) for slots in NOOP_SLOTS] + [
        ("small pictures", slots, each * slots) for slots in SLOTS
    ]
    return [
        Task(
            situation,
            NAME.format(f"{slots} slot{'s' if slots > 1 else ''}"),
            functools.partial(handle, lab, slots, count, situation == "small pictures"),
        )
        for situation, slots, count in drains
    ] + [
        Task(
            "20 MB pictures",
            NAME.format(f"{large} at once, {name}"),
            functools.partial(store_large, large, kinds),
        )
        for name, kinds in KINDS.items()
    ]


def handle(lab: Lab, slots: int, jobs: int, has_pictures: bool) -> dict[str, float]:
    """Have an idle worker handle jobs that are all queued at the same moment.

    With pictures it downloads and stores a small one for each, as many at once as there are slots.
    """
    with contextlib.ExitStack() as end:
        options: dict[str, object] = {"slots": slots}
        if has_pictures:
            folder = end.enter_context(tempfile.TemporaryDirectory())
            Image.effect_noise((512, 512), 80).convert("RGB").save(Path(folder, "png"), "PNG")
            files = end.enter_context(memory.serving(Path(folder)))
            options |= {"files": files, "kind": "png", "seconds_each": PICTURE_SECONDS}
        db = end.enter_context(lab.copy(darkroom.base(lab)))
        contender, url = Contender("worker.py", "run_worker.py", options), darkroom.worker_url(db)
        with lab.work(contender, url, jobs=jobs, seconds=MOST_SECONDS, keys=False) as program:
            program.say()
            time.sleep(IDLE_SECONDS)
            idle, cpu_before = program.megabytes(), program.cpu_seconds()
            darkroom.fill(db, jobs)
            report = program.report(within=MOST_SECONDS + 30)
        if darkroom.finished(db) < jobs:
            raise RuntimeError(f"{darkroom.finished(db)} of {jobs} jobs are completed")
    return {
        PEAK: report["peak_megabytes"],
        IDLE: idle,
        CPU: 1000 * (report["cpu_seconds"] - cpu_before) / jobs,
        RATE: (jobs - 1) / (report["moments"][-1] - report["moments"][0]),
    }


def store_large(count: int, kinds: tuple[str, ...]) -> dict[str, float]:
    """Download and store pictures of some 20 MB, all at once."""
    megabytes, seconds = memory.measure(count, kinds)
    return {PEAK: megabytes, RATE: count / seconds}


PART = Part(
    name="worker",
    title="Worker",
    about=(
        f"One worker process. No pictures: provider and storage do nothing, {NOOP_JOBS:,} jobs."
        f" Small pictures: the provider takes {PICTURE_SECONDS:g} s; a PNG of 512 x 512 pixels and"
        " 250 kB is downloaded, checked, decoded, made a preview of, and stored, over HTTP; as many"
        f" at once as there are slots, {EACH} for each slot. Pictures of 20 MB: {LARGE} at once go"
        " the same way, without a database. Memory is resident, the peak"
        f" that of the kernel; idle, after {IDLE_SECONDS:g} s without a job. Processor time is the"
        " process's own and the kernel's for it, from when the jobs are queued. Targets: 60 MB"
        " idle, 120 MB with 256 small pictures, 250 MB with large ones."
    ),
    metric=PEAK,
    reference=NAME.format("64 slots"),
    make_tasks=make_tasks,
    is_less_better=True,
)
