"""Chaos: real workers, a real database, and a director that breaks everything around them.

    python tests/chaos/run.py [--jobs 5000] [--faults 500] [--seed 1] [--rounds 1] [--only REGEX]
                              [--workers 4] [--out FOLDER]

60 % of the jobs and faults go to "all at once", the rest to the scenarios of one kind each, and a
tenth as many again to the cells. The results go to RESULTS.md, here or in the folder named by
--out; a run of some scenarios writes nothing unless told where. Exit code 1: a rule was broken; the
seed of that scenario, given with --seed and --only, makes the same faults again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import signal
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

CHAOS = Path(__file__).resolve().parent
PROJECT = CHAOS.parents[1]
sys.path[:0] = [str(PROJECT / "tests"), str(PROJECT / "scripts"), str(PROJECT)]

from chaos.cells import CELLS_KILLED, CellWorld  # noqa: E402
from chaos.clients import Clients  # noqa: E402
from chaos.director import EVERYTHING, SCENARIOS, Director, Outcome  # noqa: E402
from chaos.faults import restarted  # noqa: E402
from chaos.world import World  # noqa: E402
from fake_replicate import Behaviour  # noqa: E402
from worker_process import WorkerProcess, eventually  # noqa: E402

from stack import interrupt  # noqa: E402

HEAD = """# Chaos results

Made by `make chaos`: real workers, the local stack, the fake provider, and faults drawn from a
seed. Recovery is the time from the end of a fault to the next completed job; other jobs go on and,
in "All of these at once", other faults strike meanwhile. Lost, doubled and wrongly charged count
what breaks the rules of `invariants.py` once all has healed. So does "files, purchases": an image
without its file, a file without its image, something bought twice. Each scenario was run by the
command under the tables; `ONLY` and `SEED` make its faults again.

"""
# Each column of the first table counts what breaks these rules.
BROKEN = {
    "lost": ("lost", "drain", "faults", "logs", "hurt by another"),
    "doubled": ("doubled", "lives elsewhere"),
    "wrongly charged": ("wrongly charged", "wrongly booked", "wrongly paid"),
    "files, purchases": ("image without file", "file without image", "wrongly bought"),
}
ENDS = ("completed", "failed", "canceled")


def say(text: str) -> None:
    """Show progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


# --- two promises, measured with lease, heartbeat and pauses as they are installed ---


def dead_worker() -> list[float]:
    """Kill a worker with jobs at the provider: how long until each is in other hands?"""
    slots, seconds = 6, list[float]()
    with World() as world:
        open_models(world)
        for number in range(3):
            with world.working(1) as fleet, fleet.held(0) as victim:
                world.provider.default = Behaviour(seconds=20)
                Clients(world, number, slots).start()
                bought = f"{RUNNING} where provider_job_id > ''"
                eventually(lambda bought=bought: world.db.value(bought) == slots, within=60)
                killed_at = time.time()
                victim.kill()
                fleet.launch(WORKER_SLOTS=slots)
                claims: dict[str, float] = {}
                while len(claims) < slots:
                    for row in world.db.execute(CLAIMED_SINCE, killed_at, killed_at):
                        claims.setdefault(row["job_id"], row["at"] - killed_at)
                    assert time.time() - killed_at < 150, "never restarted"
                    time.sleep(0.1)
                seconds += claims.values()
                say(f"dead worker: jobs claimed after {sorted(round(s, 1) for s in seconds)} s")
                eventually(lambda: world.db.value(RUNNING) == 0, within=60)
                for process in filter(WorkerProcess.is_running, fleet.processes):
                    process.stop(within=60)
    return seconds


def postgres_restart() -> list[float]:
    """Restart PostgreSQL under load: how long until as much is completed per second as before?"""
    seconds, window = list[float](), 4.0
    with World() as world, world.working(4):
        open_models(world)
        clients = Clients(world, 0, 1_000_000)
        backlog = "select count(*) from private.ready_jobs"
        clients.may_send = lambda number: world.db.value(backlog) < 80
        clients.start()
        eventually(lambda: world.db.value(COMPLETED, 0, time.time()) > 20, within=60)
        for number in range(4):
            began = time.time()
            time.sleep(15)
            before = world.db.value(COMPLETED, began, time.time()) / 15
            with restarted(world, signal.SIGINT if number % 2 else signal.SIGQUIT):
                pass
            back_at = time.time()
            time.sleep(20)
            starts = [
                start / 4
                for start in range(64)
                if world.db.value(COMPLETED, back_at + start / 4, back_at + start / 4 + window)
                >= 0.8 * before * window
            ]
            seconds.append(min(starts, default=math.inf))
            say(f"restart: {before:.1f} jobs/s before, back after {seconds[-1]:.1f} s")
        clients.stop()
    return seconds


RUNNING = "select count(*) from private.running_jobs"
# With those that have ended already: what the provider has finished long ago takes no time.
CLAIMED_SINCE = """
select extract(epoch from claimed_at)::float8 as at, job_id::text
from private.running_jobs where claimed_at > to_timestamp(%s)
union all
select extract(epoch from started_at)::float8, generation_id::text
from private.attempts where started_at > to_timestamp(%s)
"""
COMPLETED = """
select count(*)::integer from public.generations where status = 'completed'
  and finished_at >= to_timestamp(%s) and finished_at < to_timestamp(%s)
"""


def open_models(world: World) -> None:
    """Let the models be used and lift the limits; all else is as installed."""
    world.db.execute("update public.models set is_active = true")
    world.db.lift_limits()


PROMISES = {  # what is measured, and the most seconds that it may take
    dead_worker: ("Dead worker's job in another's hands", 75),
    postgres_restart: ("Throughput back after a restart of PostgreSQL", 10),
}


# --- what a run leaves behind ---


def table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """The lines of a table in Markdown."""
    names = list(head)
    for row in (names, ["---", *["---:"] * (len(names) - 1)], *rows):
        yield f"| {' | '.join(map(str, row))} |"


def summary(title: str, outcomes: list[Outcome]) -> list[object]:
    """A row of the first table."""
    broken = [
        sum(len(each.violations.get(rule, [])) for each in outcomes for rule in rules)
        for rules in BROKEN.values()
    ]
    faults, jobs = sum(each.faults for each in outcomes), sum(each.jobs for each in outcomes)
    times = [seconds for each in outcomes for _, seconds in each.recoveries] or [math.nan]
    p50, most = f"{statistics.median(times):.1f} s", f"{max(times):.1f} s"
    return [title, len(outcomes), faults, f"{jobs:,}", *broken, p50, most]


def report(outcomes: list[Outcome], measured: dict[str, list[float]], command: str) -> str:
    """The text of RESULTS.md."""
    groups = {
        title: [each for each in outcomes if each.scenario == title]
        for title in dict.fromkeys(each.scenario for each in outcomes)
    }
    rows = [summary(title, group) for title, group in groups.items()]
    columns = ["scenario", "runs", "faults", "jobs", *BROKEN, "recovery p50", "max"]
    lines = [*table(columns, [*rows, summary("**Sum**", outcomes)]), ""]
    lines += ["With the intervals as installed:", ""]
    for title, promised in PROMISES.values():
        if times := measured.get(title):
            p50, most = statistics.median(times), max(times)
            many = f"p50 {p50:.1f} s, max {most:.1f} s of {len(times)}"
            lines.append(f"- {title}: {many} (promised: under {promised} s).")
    for each in outcomes:
        if each.done:
            counted = ", ".join(f"{what} {count}" for what, count in sorted(each.done.items()))
            lines.append(f"- {each.scenario}: {counted}.")
    lines += ["", "## How the jobs ended", ""]
    counts = [
        [title, *(sum(each.statuses.get(end, 0) for each in group) for end in ENDS)]
        for title, group in groups.items()
    ]
    lines += [*table(["scenario", *ENDS], counts), "", "## Recovery by kind of fault", ""]
    times_of: dict[str, list[float]] = {}
    for kind, seconds in sorted(found for each in outcomes for found in each.recoveries):
        times_of.setdefault(kind, []).append(seconds)
    by_kind = [
        [kind, len(times), f"{statistics.median(times):.1f} s", f"{max(times):.1f} s"]
        for kind, times in times_of.items()
    ]
    lines += [*table(["fault", "how often", "p50", "max"], by_kind), "", "## Commands", ""]
    return HEAD + "\n".join([*lines, f"- `{command}`"]) + "\n"


def told(outcome: Outcome) -> bool:
    """Show what came of a run; say whether no rule was broken."""
    ends = f"{outcome.statuses}, {outcome.seconds:.0f} s, {outcome.restarts} restarts"
    say(f"{outcome.scenario}, seed {outcome.seed}: {outcome.faults} faults, {ends}")
    for what, count in outcome.done.items():
        say(f"  {what}: {count} times")
    broken = {rule: found for rule, found in outcome.violations.items() if found}
    for rule, found in broken.items():
        for each in found[:20]:
            say(f"  BROKEN {rule}: {each}")
    return not broken


def main() -> int:
    """Run the scenarios; answer 1 if a rule or a promise was broken."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, default in (("jobs", 5000), ("faults", 500), ("seed", 1), ("rounds", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--only", default="", help="of the scenarios' titles")
    parser.add_argument("--out", type=Path, help="folder of the results")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, interrupt)
    command = f"make chaos JOBS={given.jobs} FAULTS={given.faults} SEED={given.seed}"
    command += f" ROUNDS={given.rounds}" + (f' ONLY="{given.only}"' if given.only else "")
    is_wanted = re.compile(given.only, re.IGNORECASE).search
    outcomes: list[Outcome] = []
    measured: dict[str, list[float]] = {}
    is_good = True
    for measure, (title, promised) in PROMISES.items():
        if is_wanted(measure.__name__.replace("_", " ")):
            measured[title] = measure()
            is_good = is_good and max(measured[title]) < promised
    plans = [(World, scenario, 0.4 / len(SCENARIOS), 1) for scenario in SCENARIOS]
    plans += [(World, EVERYTHING, 0.6, 4), (CellWorld, CELLS_KILLED, 0.1, 1)]
    wanted = [(*each, number) for number, each in enumerate(plans) if is_wanted(each[1].title)]
    for kind, group in itertools.groupby(wanted, key=lambda each: each[0]):
        with kind() as world:
            world.shorten()
            for _, scenario, part, pieces, number in group:
                for piece in range(given.rounds * pieces):
                    seed = given.seed * 10_000 + number * 100 + piece
                    jobs, faults = (
                        math.ceil(total * part / pieces / given.rounds)
                        for total in (given.jobs, given.faults)
                    )
                    outcome = Director(world, scenario, seed, say).run(jobs, faults, given.workers)
                    outcomes.append(outcome)
                    is_good = told(outcome) and is_good
    text = report(outcomes, measured, command)
    print(text)
    if folder := given.out or (None if given.only else CHAOS):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "RESULTS.md").write_text(text)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
