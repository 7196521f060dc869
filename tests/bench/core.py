"""What a part of the bench is, how its cells are run in turn, and what is computed from them.

A part compares contenders in situations. Each (situation, contender) is measured once in every
round, in the order A B C, A B C, …, so that all meet the same noise; a ratio is taken between two
cells of the same round, and the median of the rounds is what counts.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab import Lab

OURS = "Darkroom"  # how the names of our own contenders begin
TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Cell:
    """One number measured in one round."""

    part: str
    situation: str
    contender: str
    round: int
    metric: str  # with its unit
    value: float


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
        metric = metric or self.part.metric
        wanted = (situation, contender, metric)
        return {
            cell.round: cell.value
            for cell in self.cells
            if (cell.situation, cell.contender, cell.metric) == wanted
        }

    def median(self, situation: str, contender: str, metric: str = "") -> float | None:
        """Return the median of the rounds; None if nothing was measured."""
        values = self.values(situation, contender, metric)
        return statistics.median(values.values()) if values else None

    def ratio(self, situation: str, contender: str) -> float | None:
        """Return the median of the ratios to the reference in the same round."""
        return median_ratio(
            self.values(situation, contender), self.values(situation, self.part.reference)
        )

    def own_ratio(self, situation: str, contender: str) -> float | None:
        """Return the median of the ratios to the same contender in the part's own_situation."""
        return median_ratio(
            self.values(situation, contender), self.values(self.part.own_situation, contender)
        )

    @property
    def situations(self) -> list[str]:
        return unique(cell.situation for cell in self.cells)

    @property
    def compared_situations(self) -> list[str]:
        """Those in which there is more to see than other metrics."""
        return unique(cell.situation for cell in self.cells if cell.metric == self.part.metric)

    @property
    def contenders(self) -> list[str]:
        return unique(cell.contender for cell in self.cells)

    @property
    def other_metrics(self) -> list[str]:
        names = unique(cell.metric for cell in self.cells)
        return [name for name in names if name != self.part.metric]


def unique(names: Iterable[str]) -> list[str]:
    """Return each once, in the order of its first appearance."""
    return list(dict.fromkeys(names))


def median_ratio(values: Mapping[int, float], references: Mapping[int, float]) -> float | None:
    """Divide round by round; None if no round has both."""
    ratios = [values[n] / references[n] for n in values if references.get(n)]
    return statistics.median(ratios) if ratios else None


def percentiles(values: Iterable[float], *wanted: float) -> list[float]:
    """Return the values below which these percentages lie (nearest rank)."""
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, int(len(ordered) * each / 100))] for each in wanted]


def human(value: float) -> str:
    """Write a number with three digits that count."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def first_line(error: Exception) -> str:
    """Return what an error says, without the details that follow."""
    return str(error).partition("\n")[0]


class Progress:
    """One line on stderr for each cell, with a guess at the time left."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
        self.done = 0
        self.spent = 0.0

    def tell(self, round_number: int, task: Task, text: str, seconds: float) -> None:
        """Tell of a cell that took so long."""
        self.done += 1
        self.spent += seconds
        left = int((self.total - self.done) * self.spent / self.done)
        print(
            f"  round {round_number}  {task.situation:22.22}  {task.contender:36.36}  {text:34}"
            f"  {seconds:5.1f} s, left {left // 60}:{left % 60:02}",
            file=sys.stderr,
            flush=True,
        )


def run_part(
    part: Part, tasks: Sequence[Task], rounds: int, keep: Callable[[Outcome], None]
) -> Outcome:
    """Measure all tasks in every round, and keep what there is after each.

    One that fails is told of, and the others go on.
    """
    outcome, progress = Outcome(part), Progress(len(tasks) * rounds)
    for number in range(1, rounds + 1):
        for task in tasks:
            began = time.monotonic()
            try:
                measured = task.measure()
            except Exception as error:
                text = f"failed: {type(error).__name__}: {first_line(error)}"
                outcome.failures.append(f"{task.situation}, {task.contender}: {text}")
            else:
                outcome.cells += [
                    Cell(part.name, task.situation, task.contender, number, metric, value)
                    for metric, value in measured.items()
                ]
                text = describe(outcome, task, number)
            progress.tell(number, task, text, time.monotonic() - began)
        keep(outcome)
    return outcome


def describe(outcome: Outcome, task: Task, number: int) -> str:
    """Say what the compared metric is in a round, and its ratio to the reference of that round."""
    value = outcome.values(task.situation, task.contender).get(number)
    if value is None:
        return "-"
    text = f"{human(value)} {outcome.part.metric}"
    reference = outcome.values(task.situation, outcome.part.reference).get(number)
    return f"{text}  {value / reference:.2f}{TIMES}" if reference else text
