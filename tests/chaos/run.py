"""Chaos: real workers, a real database, and a director that breaks everything around them.

    python tests/chaos/run.py [--jobs 5000] [--faults 500] [--seed 1] [--rounds 1] [--only REGEX]
                              [--workers 4] [--out FOLDER]

60 % of the jobs and faults go to "all at once", the rest to the scenarios of one kind each. Results
of a scenario replace its last ones in RESULTS.md and results.json, here or in the folder named by
--out; a run of some scenarios writes nothing unless told where. Exit code 1: a rule was broken; the
seed of that scenario, given with --seed and --only, makes the same faults again.
"""

from __future__ import annotations

import argparse
import math
import re
import signal
import sys
import time
from pathlib import Path

CHAOS = Path(__file__).resolve().parent
PROJECT = CHAOS.parents[1]
sys.path[:0] = [str(PROJECT / "tests"), str(PROJECT / "scripts"), str(PROJECT)]

from chaos.director import EVERYTHING, SCENARIOS, Director, Outcome, Scenario  # noqa: E402
from chaos.measured import MEASUREMENTS, Measured  # noqa: E402
from chaos.report import Results, table  # noqa: E402
from chaos.world import World  # noqa: E402

from stack import interrupt  # noqa: E402


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1, help="runs of each scenario")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--only", default="", help="of the scenarios' titles")
    parser.add_argument("--out", type=Path, help="folder of the results")
    return parser.parse_args()


def command(arguments: argparse.Namespace) -> str:
    """Return the command that makes this run again."""
    only = f' ONLY="{arguments.only}"' if arguments.only else ""
    return (
        f"make chaos JOBS={arguments.jobs} FAULTS={arguments.faults} SEED={arguments.seed}"
        f" ROUNDS={arguments.rounds}{only}"
    )


def say(text: str) -> None:
    """Show progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def runs(scenario: Scenario, rounds: int) -> int:
    """Return how often a scenario is run: "all at once" in pieces."""
    return rounds * (4 if scenario is EVERYTHING else 1)


def share(total: int, scenario: Scenario, rounds: int) -> int:
    """Return one run's part of all jobs or faults."""
    part = 0.6 if scenario is EVERYTHING else 0.4 / len(SCENARIOS)
    return math.ceil(total * part / runs(scenario, rounds))


def main() -> int:
    """Run the scenarios; answer 1 if a rule was broken."""
    arguments = parse()
    signal.signal(signal.SIGTERM, interrupt)
    outcomes: list[Outcome] = []
    measured: list[Measured] = []
    results = Results(arguments.out or (None if arguments.only else CHAOS), command(arguments))
    for measure in MEASUREMENTS:
        if re.search(arguments.only, measure.__name__.replace("_", " "), re.IGNORECASE):
            measured.append(measure(say))
            results.write(outcomes, measured)
    with World() as world:
        world.shorten()
        for number, scenario in enumerate([*SCENARIOS, EVERYTHING]):
            if not re.search(arguments.only, scenario.title, re.IGNORECASE):
                continue
            for a_run in range(runs(scenario, arguments.rounds)):
                seed = arguments.seed * 10_000 + number * 100 + a_run
                outcome = Director(world, scenario, seed, say).run(
                    share(arguments.jobs, scenario, arguments.rounds),
                    share(arguments.faults, scenario, arguments.rounds),
                    arguments.workers,
                )
                outcomes.append(outcome)
                tell(outcome)
                results.write(outcomes, measured)
    print(*table(outcomes), sep="\n")
    return int(not all(each.is_good for each in [*outcomes, *measured]))


def tell(outcome: Outcome) -> None:
    """Say what came of a run."""
    say(
        f"{outcome.scenario}, seed {outcome.seed}: {outcome.faults} faults, {outcome.statuses},"
        f" {outcome.seconds:.0f} s, drained in {outcome.drain_seconds:.0f} s,"
        f" {outcome.restarts} workers ended by themselves"
    )
    for rule, found in outcome.violations.items():
        for each in found[:20]:
            say(f"  BROKEN {rule}: {each}")


if __name__ == "__main__":
    sys.exit(main())
