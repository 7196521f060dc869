"""What a chaos run leaves behind: results.json and RESULTS.md."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chaos.director import Outcome
from chaos.measured import Measured

HEAD = """# Chaos results

Made by `make chaos`: real workers, the local stack, the fake provider, and faults drawn from a
seed. Recovery is the time from the end of a fault to the next completed job; other jobs go on and,
in "All of these at once", other faults strike meanwhile. Lost, doubled and wrongly charged count
what breaks the rules of `invariants.py` once all has healed. So does "files, purchases": an image
without its file, a file without its image, something bought twice. Each scenario was run by the
command under the tables; `ONLY` and `SEED` make its faults again.

"""
COLUMNS = (
    "scenario",
    "runs",
    "faults",
    "jobs",
    "lost",
    "doubled",
    "wrongly charged",
    "files, purchases",
    "recovery p50",
    "max",
)
FILES_AND_PURCHASES = ("image without file", "file without image", "wrongly bought")
OTHERS = ("drain", "faults", "logs")


class Results:
    """The results in a folder: what is run anew replaces the scenario's last ones."""

    def __init__(self, folder: Path | None, command: str) -> None:
        self.folder, self.command = folder, command
        file = folder / "results.json" if folder else None
        known = json.loads(file.read_text()) if file and file.exists() else {}
        self.runs: list[dict[str, Any]] = known.get("runs", [])
        self.measured: list[dict[str, Any]] = known.get("measured", [])

    def write(self, outcomes: Sequence[Outcome], measured: Sequence[Measured]) -> None:
        """Write what is known so far; nothing without a folder."""
        if not self.folder:
            return
        again = {each.scenario for each in outcomes}
        kept = [run for run in self.runs if run["scenario"] not in again]
        self.runs = kept + [asdict(each) | {"command": self.command} for each in outcomes]
        titles = {each.title for each in measured}
        self.measured = [each for each in self.measured if each["title"] not in titles]
        self.measured += [asdict(each) for each in measured]
        self.folder.mkdir(parents=True, exist_ok=True)
        data = {"measured": self.measured, "runs": self.runs}
        (self.folder / "results.json").write_text(json.dumps(data) + "\n")
        (self.folder / "RESULTS.md").write_text(self._text())

    def _text(self) -> str:
        commands = dict.fromkeys(run["command"] for run in self.runs)
        outcomes = [
            Outcome(**{key: value for key, value in run.items() if key != "command"})
            for run in self.runs
        ]
        lines = table(outcomes)
        lines += ["", "With the intervals as installed:", ""]
        lines += [Measured(**each).line() for each in self.measured]
        lines += ["", "## How the jobs ended", ""]
        lines += ends(outcomes)
        lines += ["", "## Recovery by kind of fault", ""]
        lines += by_kind(outcomes)
        lines += ["", "## Commands", ""]
        lines += [f"- `{command}`" for command in commands]
        return HEAD + "\n".join(lines) + "\n"


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the table of the README, with a sum."""
    lines = [row(COLUMNS), row(["---", *["---:"] * (len(COLUMNS) - 1)])]
    for title in dict.fromkeys(each.scenario for each in outcomes):
        lines.append(summary(title, [each for each in outcomes if each.scenario == title]))
    return [*lines, summary("**Sum**", outcomes)]


def summary(title: str, outcomes: Sequence[Outcome]) -> str:
    """Return a line of the table."""

    def broken(*rules: str) -> int:
        return sum(len(each.violations.get(rule, ())) for each in outcomes for rule in rules)

    times = [seconds for each in outcomes for _, seconds in each.recoveries] or [float("nan")]
    numbers = [
        len(outcomes),
        sum(each.faults for each in outcomes),
        sum(each.jobs for each in outcomes),
        broken("lost", *OTHERS),
        broken("doubled"),
        broken("wrongly charged"),
        broken(*FILES_AND_PURCHASES),
    ]
    return row(
        [
            title,
            *(f"{number:,}" for number in numbers),
            f"{statistics.median(times):.1f} s",
            f"{max(times):.1f} s",
        ]
    )


def ends(outcomes: Sequence[Outcome]) -> list[str]:
    """Return how many jobs of each scenario ended how; canceled ones by their users."""
    names = ("completed", "failed", "canceled")
    lines = [row(["scenario", *names]), row(["---", *["---:"] * 3])]
    for title in dict.fromkeys(each.scenario for each in outcomes):
        of_title = [each.statuses for each in outcomes if each.scenario == title]
        counts = [sum(statuses.get(name, 0) for statuses in of_title) for name in names]
        lines.append(row([title, *map(str, counts)]))
    return lines


def by_kind(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a table of recovery times by kind of fault, over all scenarios."""
    times: dict[str, list[float]] = {}
    for each in outcomes:
        for kind, seconds in each.recoveries:
            times.setdefault(kind, []).append(seconds)
    lines = [row(["fault", "how often", "p50", "max"]), row(["---", "---:", "---:", "---:"])]
    for kind, seconds_of_kind in sorted(times.items()):
        p50, most = statistics.median(seconds_of_kind), max(seconds_of_kind)
        lines.append(row([kind, str(len(seconds_of_kind)), f"{p50:.1f} s", f"{most:.1f} s"]))
    return lines


def row(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"
