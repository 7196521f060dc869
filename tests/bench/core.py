"""What a part of the bench is, how its cells are run in turn, and what is computed from them.

A part compares contenders in situations. Each (situation, contender) is measured once in every
round, in the order A B C, A B C, …, so that all meet the same noise; a ratio is taken between two
cells of the same round, and the median of the rounds is what counts.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab import Lab

OURS = "Darkroom"  # how the names of our own contenders begin
TIMES = "\N{MULTIPLICATION SIGN}"

Cell = tuple[str, str, int, str, float]  # situation, contender, round, metric (its unit), value


@dataclass(frozen=True)
class Task:
    """What is measured once in every round."""

    situation: str
    contender: str
    measure: Callable[[], Mapping[str, float]]  # by metric


@dataclass(frozen=True)
class Sizes:
    """How much of everything, where a part does not say so itself."""

    rounds: int = 3
    is_quick: bool = False
    hold_seconds: float = 5.0  # a snapshot is held before a drain that it is to slow down

    def pick(self, full: float, quick: float) -> int:
        """Choose between the real size and the one of a smoke run."""
        return int(quick if self.is_quick else full)


@dataclass(frozen=True)
class Part:
    """One question, and how it is measured."""

    name: str
    title: str
    about: str  # for readers of the results: what is measured, and how
    metric: str  # the one that is compared
    reference: str  # the contender that the others are divided by
    make_tasks: Callable[[Lab, Sizes], Sequence[Task]]
    is_less_better: bool = False
    own_situation: str = ""  # each contender is divided by itself in this one, too
    turns: int = 1  # in each round: short cells that take turns more often
    notes: Sequence[str] = ()  # what readers should know of this run


@dataclass
class Outcome:
    """What a part gave."""

    part: Part
    cells: list[Cell] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def values(self, situation: str, contender: str, metric: str = "") -> dict[int, float]:
        """Return a metric, the compared one unless named, by round."""
        wanted = (situation, contender, metric or self.part.metric)
        return {each[2]: each[4] for each in self.cells if (each[0], each[1], each[3]) == wanted}

    def median(self, situation: str, contender: str, metric: str = "") -> float | None:
        values = self.values(situation, contender, metric).values()
        return statistics.median(values) if values else None

    def ratio(self, situation: str, contender: str, *, to_itself: bool = False) -> float | None:
        """Return the median of the ratios, round by round, to the reference of the situation, or to
        the same contender in the part's own_situation; None if no round has both.
        """
        values = self.values(situation, contender)
        others = (
            self.values(self.part.own_situation, contender)
            if to_itself
            else self.values(situation, self.part.reference)
        )
        ratios = [values[n] / others[n] for n in values if others.get(n)]
        return statistics.median(ratios) if ratios else None

    def situations(self, metric: str = "") -> list[str]:
        """Return those in which something, or this, was measured, in the order of the cells."""
        return unique(each[0] for each in self.cells if metric in ("", each[3]))

    @property
    def contenders(self) -> list[str]:
        return unique(each[1] for each in self.cells)

    @property
    def other_metrics(self) -> list[str]:
        return unique(each[3] for each in self.cells if each[3] != self.part.metric)


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def percentiles(values: Iterable[float], *wanted: float) -> list[float]:
    """Return the values below which these percentages lie (nearest rank)."""
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, int(len(ordered) * each / 100))] for each in wanted]


def human(value: float | None) -> str:
    """Write a number with three digits that count."""
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def run_part(
    part: Part, tasks: Sequence[Task], rounds: int, keep: Callable[[Outcome], None]
) -> Outcome:
    """Measure all tasks in every round, tell of each, and keep what there is after each round.

    One that fails is told of, and the others go on.
    """
    outcome, start, done = Outcome(part), time.monotonic(), 0
    for number in range(1, rounds + 1):
        for task in tasks:
            began, names = time.monotonic(), (task.situation, task.contender)
            try:
                measured = task.measure()
            except Exception as error:
                said = str(error).partition("\n")[0]
                text = f"failed: {type(error).__name__}: {said}"
                outcome.failures.append(f"{', '.join(names)}: {text}")
            else:
                outcome.cells += [(*names, number, *each) for each in measured.items()]
                text = f"{human(measured.get(part.metric))} {part.metric}"
            now, done = time.monotonic(), done + 1
            left = int((len(tasks) * rounds - done) * (now - start) / done)
            print(
                f"  round {number}  {task.situation:22.22}  {task.contender:36.36}  {text:34}"
                f"  {now - began:5.1f} s, left {left // 60}:{left % 60:02}",
                file=sys.stderr,
                flush=True,
            )
        keep(outcome)
    return outcome
