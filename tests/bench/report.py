"""What a run leaves behind: results.json with every number, RESULTS.md, and charts."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from core import OURS, TIMES, Cell, Outcome, Part, human

HEAD = f"""# Benchmark results

Made by `make bench`, which also runs single parts: `make bench PART=enqueue ROUNDS=3`. Every number
is the median of its rounds; every ratio ({TIMES}) is the median over the rounds of contender ÷
reference **of the same round**, in which all take turns. Ratios carry over to other machines far
better than absolute numbers do. Durable commits throughout: `fsync` and `synchronous_commit` are
on. All raw numbers: [results.json](results.json).
"""
COLUMNS = ["situation", "contender", "round", "metric", "value"]  # of a cell in results.json
WIDTH, LABEL, BAR, GAP = 900, 290, 15, 4  # pixels of the chart
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-size: 16px; font-weight: 600 } .situation { font-weight: 600; fill: #57606a }
.bar { fill: #b6bec9 } .ours { fill: #d9480f } .label { text-anchor: end }
.ours-label { font-weight: 600 }
""".strip()


class Results:
    """The results of all parts that were ever run into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "results.json"
        self.parts: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def add(self, outcome: Outcome, context: Mapping[str, Any]) -> None:
        """Put a part's results in the place of its last ones."""
        rounds = max((cell.round for cell in outcome.cells), default=0)
        self.parts[outcome.part.name] = {
            **context,
            "run": {**context["run"], "rounds": rounds},
            "notes": list(outcome.part.notes),
            "failures": outcome.failures,
            "columns": COLUMNS,
            "cells": [
                [c.situation, c.contender, c.round, c.metric, round(c.value, 4)]
                for c in outcome.cells
            ],
        }

    def write(self, known: Mapping[str, Part]) -> None:
        """Write all files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text(dump(self.parts))
        text = [HEAD]
        for name in filter(self.parts.__contains__, known):
            outcome = outcome_of(known[name], self.parts[name])
            picture = f"results-{name}.svg"
            (self.folder / picture).write_text(chart(outcome))
            text.append(section(outcome, self.parts[name], picture))
        (self.folder / "RESULTS.md").write_text("\n".join(text))


def dump(parts: Mapping[str, Any]) -> str:
    """Write JSON with one line for each cell."""
    text = json.dumps({name: {**part, "cells": name} for name, part in parts.items()}, indent=1)
    for name, part in parts.items():
        cells = ",\n   ".join(json.dumps(cell) for cell in part["cells"])
        text = text.replace(f'"cells": "{name}"', f'"cells": [\n   {cells}\n  ]')
    return text + "\n"


def outcome_of(part: Part, stored: Mapping[str, Any]) -> Outcome:
    """Read back what was stored."""
    cells = [
        Cell(part.name, situation, contender, number, metric, value)
        for situation, contender, number, metric, value in stored["cells"]
    ]
    return Outcome(part, cells, list(stored["failures"]))


def section(outcome: Outcome, context: Mapping[str, Any], picture: str) -> str:
    """Write the section of a part."""
    part = outcome.part
    about = textwrap.wrap(part.about, 100, break_on_hyphens=False)
    lines = [f"## {part.title}", "", *about, "", *main_table(outcome), ""]
    lines += [f"![{part.title}: {part.metric}]({picture})", ""]
    if outcome.other_metrics:
        lines += ["<details><summary>More numbers</summary>", "", *other_table(outcome), ""]
        lines += ["</details>", ""]
    lines += [f"- failed: {text}" for text in outcome.failures]
    lines += [f"- {text}" for text in context["notes"]]
    return "\n".join([*lines, *provenance(context), ""])


def main_table(outcome: Outcome) -> list[str]:
    """Write the compared metric with its ratios."""
    part, situations = outcome.part, outcome.compared_situations
    head = [f"{part.metric} ({TIMES} {part.reference})", *situations]
    rows = [head, ["---", *["---:"] * len(situations)]]
    for contender in outcome.contenders:
        row = [emphasize(contender)]
        for situation in situations:
            value, ratio = outcome.median(situation, contender), outcome.ratio(situation, contender)
            text = "" if value is None else human(value)
            text += "" if ratio is None else f" ({ratio:.2f}{TIMES})"
            itself = outcome.own_ratio(situation, contender)
            if itself is not None and situation != part.own_situation:
                text += f", {itself:.2f} of its own"
            row.append(text)
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


def other_table(outcome: Outcome) -> list[str]:
    """Write what was measured beside it."""
    rows = [
        ["", "", *outcome.other_metrics],
        ["---", "---", *["---:"] * len(outcome.other_metrics)],
    ]
    for situation in outcome.situations:
        for contender in outcome.contenders:
            medians = [
                outcome.median(situation, contender, metric) for metric in outcome.other_metrics
            ]
            if any(value is not None for value in medians):
                texts = ["" if value is None else human(value) for value in medians]
                rows.append([situation, emphasize(contender), *texts])
    return [f"| {' | '.join(row)} |" for row in rows]


def emphasize(contender: str) -> str:
    return f"**{contender}**" if contender.startswith(OURS) else contender


def provenance(context: Mapping[str, Any]) -> list[str]:
    """Say where, when and with what."""
    return [
        f"- {title}: {', '.join(f'{key} {value}' for key, value in context[title].items())}"
        for title in ("run", "machine", "versions", "settings")
    ]


def chart(outcome: Outcome) -> str:
    """Draw a part as sorted bars for each situation, ours in colour."""
    part = outcome.part
    title = f"{part.title}: {part.metric}, {'less' if part.is_less_better else 'more'} is better"
    drawn, y = [f'<text class="title" x="10" y="26">{escape(title)}</text>'], 30
    for situation in outcome.compared_situations:
        bars, y = chart_group(outcome, situation, y)
        drawn += bars
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 10}" width="{WIDTH}"'
        f' role="img" aria-label="{escape(title)}">\n<style>{STYLE}</style>\n'
        f'<rect width="{WIDTH}" height="{y + 10}" fill="#ffffff"/>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )


def chart_group(outcome: Outcome, situation: str, y: int) -> tuple[list[str], int]:
    """Draw the bars of one situation, the best on top; answer where the next begins."""
    medians = {
        contender: value
        for contender in outcome.contenders
        if (value := outcome.median(situation, contender)) is not None
    }
    sign = 1 if outcome.part.is_less_better else -1
    longest = max([*medians.values(), 1e-9])
    y += 18
    drawn = [f'<text class="situation" x="10" y="{y}">{escape(situation)}</text>']
    y += 7
    for contender, value in sorted(medians.items(), key=lambda item: sign * item[1]):
        ratio, is_ours = outcome.ratio(situation, contender), contender.startswith(OURS)
        width = max(1.0, (WIDTH - LABEL - 170) * value / longest)
        text = human(value) + (f" · {ratio:.2f}{TIMES}" if ratio is not None else "")
        drawn += [
            f'<text class="label{" ours-label" if is_ours else ""}" x="{LABEL - 8}" y="{y + 12}">'
            f"{escape(contender)}</text>",
            f'<rect class="bar{" ours" if is_ours else ""}" x="{LABEL}" y="{y}"'
            f' width="{width:.1f}" height="{BAR}" rx="2"/>',
            f'<text x="{LABEL + width + 6:.1f}" y="{y + 12}">{text}</text>',
        ]
        y += BAR + GAP
    return drawn, y
