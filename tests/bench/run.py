"""Darkroom beside other PostgreSQL queues: one command, a throw-away cluster, numbers and a chart.

    python tests/bench/run.py [PART ...] [--rounds 3] [--only REGEX] [--hold 5] [--quick] [--out F]

Run it on a machine that does nothing else. Results of a part replace its last ones in RESULTS.md
and results.json, and its chart is drawn anew, here or in the folder named by --out. A quick run
(it only shows that everything works) and one of some cells write nothing unless told where.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

BENCH = Path(__file__).resolve().parent
PROJECT = BENCH.parents[1]
sys.path[:0] = [str(BENCH / "contenders"), str(PROJECT / "tests"), str(PROJECT / "scripts")]

import report  # noqa: E402
from core import Outcome, Part, Sizes, run_part  # noqa: E402
from lab import SERVER_SETTINGS, STOPS, Lab, machine  # noqa: E402
from parts import PARTS  # noqa: E402
from psycopg import sql  # noqa: E402

from stack import NODE_MODULES, node  # noqa: E402

PYTHON_PACKAGES = ("procrastinate", "pgqueuer", "asyncpg", "uvloop", "psycopg")
NODE_PACKAGES = {
    name: BENCH / "node_modules" / name for name in ("graphile-worker", "pg-boss", "pg")
} | {"Supabase Lite": NODE_MODULES / "@supabase/lite"}


def main() -> int:
    """Run the parts; answer 1 if anything failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="of 'situation, contender'")
    parser.add_argument("--hold", type=float, default=5, help="seconds a snapshot is held at first")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round")
    parser.add_argument("--out", type=Path, help="folder of the results")
    chosen = parser.parse_args()
    if unknown := set(chosen.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    sizes = Sizes(1, True, 1) if chosen.quick else Sizes(chosen.rounds, False, chosen.hold)
    folder = chosen.out or (None if chosen.quick or chosen.only else BENCH)
    has_failed = False
    with Lab.open() as lab:
        for name in chosen.parts or PARTS:
            outcome = measure(lab, PARTS[name], sizes, chosen.only, folder)
            table = report.main_table(outcome)
            print(f"\n{outcome.part.title}", *table, *outcome.failures, sep="\n")
            has_failed |= bool(outcome.failures)
    return int(has_failed)


def measure(lab: Lab, part: Part, sizes: Sizes, only: str, folder: Path | None) -> Outcome:
    context = describe(lab)
    tasks = [
        task
        for task in part.make_tasks(lab, sizes)
        if re.search(only, f"{task.situation}, {task.contender}")
    ]
    rounds = sizes.rounds * (1 if sizes.is_quick else part.turns)
    print(f"{part.title}: {len(tasks)} cells, {rounds} rounds", file=sys.stderr)

    def keep(outcome: Outcome) -> None:
        if folder:
            report.write(folder, outcome, context, PARTS)

    outcome = run_part(part, tasks, rounds, keep)
    lab.end_part()
    return outcome


def describe(lab: Lab) -> dict[str, Any]:
    """Say when, where and with what a part runs."""
    revision = lab.run(["git", "-C", str(PROJECT), "rev-parse", "--short", "HEAD"]).strip()
    installed = {name: metadata.version(name) for name in PYTHON_PACKAGES}
    for name, folder in NODE_PACKAGES.items():
        manifest = (folder / "package.json").read_text()
        installed[name] = re.search(r'"version": "([^"]+)"', manifest)[1]  # type: ignore[index]
    return {
        "run": {"date": time.strftime("%Y-%m-%d", time.gmtime()), "revision": revision},
        "machine": machine(),
        "versions": {
            "PostgreSQL": str(lab.admin(sql.SQL("show server_version"))).split()[0],
            "Python": sys.version.split()[0],
            "Node": lab.run([str(node()), "--version"]).strip().lstrip("v"),
            **installed,
        },
        "settings": {"fsync": "on", **SERVER_SETTINGS},
    }


def stop(*_: object) -> NoReturn:
    """End as with Ctrl-C, so that everything is cleaned up."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in STOPS:
        signal.signal(number, stop)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("bench: stopped")
