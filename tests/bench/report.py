"""What a run leaves behind: results.json with every number, RESULTS.md, and charts."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from core import OURS, TIMES, Outcome, Part, human

HEAD = f"""# Benchmark results

Made by `make bench`, which also runs single parts: `make bench PART=enqueue ROUNDS=3`. Every number
is the median of its rounds; every ratio ({TIMES}) is the median over the rounds of contender ÷
reference **of the same round**, in which all take turns. Ratios carry over to other machines far
better than absolute numbers do. Durable commits throughout: `fsync` and `synchronous_commit` are
on. All raw numbers: [results.json](results.json).
"""
COLUMNS = ["situation", "contender", "round", "metric", "value"]  # of a cell in results.json
PROVENANCE = ("run", "machine", "versions", "settings")
WIDTH, LABEL, BAR, GAP = 900, 290, 15, 4  # pixels of the chart
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f }
.title { font-size: 16px; font-weight: 600 } .situation { font-weight: 600; fill: #57606a }
.bar { fill: #b6bec9 } .ours { fill: #d9480f } .label { text-anchor: end }
.ours-label { font-weight: 600 }
""".strip()


def write(
    folder: Path, outcome: Outcome, context: Mapping[str, Any], known: Mapping[str, Part]
) -> None:
    """Put a part's results in the place of its last ones, and write all files anew."""
    folder.mkdir(parents=True, exist_ok=True)
    file, part = folder / "results.json", outcome.part
    parts = json.loads(file.read_text()) if file.exists() else {}
    rounds = max((cell[2] for cell in outcome.cells), default=0)
    parts[part.name] = {
        **context,
        "run": {**context["run"], "rounds": rounds},
        "notes": list(part.notes),
        "failures": outcome.failures,
        "columns": COLUMNS,
        "cells": [[*cell[:4], round(cell[4], 4)] for cell in outcome.cells],
    }
    file.write_text(dump(parts))
    text = [HEAD]
    for name in filter(parts.__contains__, known):
        stored = parts[name]
        of_part = Outcome(known[name], list(map(tuple, stored["cells"])), stored["failures"])
        (folder / f"results-{name}.svg").write_text(chart(of_part))
        text.append(section(of_part, stored))
    (folder / "RESULTS.md").write_text("\n".join(text))


def dump(parts: Mapping[str, Any]) -> str:
    """Write JSON with one line for each cell."""
    text = json.dumps({name: {**part, "cells": name} for name, part in parts.items()}, indent=1)
    for name, part in parts.items():
        cells = ",\n   ".join(json.dumps(cell) for cell in part["cells"])
        text = text.replace(f'"cells": "{name}"', f'"cells": [\n   {cells}\n  ]')
    return text + "\n"


def section(outcome: Outcome, context: Mapping[str, Any]) -> str:
    part = outcome.part
    about = textwrap.wrap(part.about, 100, break_on_hyphens=False)
    lines = [f"## {part.title}", "", *about, "", *main_table(outcome), ""]
    lines += [f"![{part.title}: {part.metric}](results-{part.name}.svg)", ""]
    if outcome.other_metrics:
        lines += ["<details><summary>More numbers</summary>", "", *other_table(outcome), ""]
        lines += ["</details>", ""]
    lines += [f"- failed: {text}" for text in outcome.failures]
    lines += [f"- {text}" for text in context["notes"]]
    lines += [
        f"- {title}: {', '.join(f'{key} {value}' for key, value in context[title].items())}"
        for title in PROVENANCE
    ]
    return "\n".join([*lines, ""])


def main_table(outcome: Outcome) -> list[str]:
    part, situations = outcome.part, outcome.situations(outcome.part.metric)
    rows = [[f"{part.metric} ({TIMES} {part.reference})", *situations]]
    rows.append(["---", *["---:"] * len(situations)])
    for contender in outcome.contenders:
        row = [emphasize(contender)]
        for situation in situations:
            text, ratio = human(outcome.median(situation, contender)), ""
            if (times := outcome.ratio(situation, contender)) is not None:
                ratio = f" ({times:.2f}{TIMES})"
            if part.own_situation not in ("", situation):
                itself = outcome.ratio(situation, contender, to_itself=True)
                ratio += f", {itself:.2f} of its own" if itself is not None else ""
            row.append(text + ratio)
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


def other_table(outcome: Outcome) -> list[str]:
    metrics = outcome.other_metrics
    rows = [["", "", *metrics], ["---", "---", *["---:"] * len(metrics)]]
    for situation in outcome.situations():
        for contender in outcome.contenders:
            texts = [human(outcome.median(situation, contender, metric)) for metric in metrics]
            if any(texts):
                rows.append([situation, emphasize(contender), *texts])
    return [f"| {' | '.join(row)} |" for row in rows]


def emphasize(contender: str) -> str:
    return f"**{contender}**" if contender.startswith(OURS) else contender


def chart(outcome: Outcome) -> str:
    """Draw a part as sorted bars for each situation, the best on top, ours in colour."""
    part = outcome.part
    title = f"{part.title}: {part.metric}, {'less' if part.is_less_better else 'more'} is better"
    drawn, y = [f'<text class="title" x="10" y="26">{escape(title)}</text>'], 30
    for situation in outcome.situations(part.metric):
        medians = {each: outcome.median(situation, each) or 0 for each in outcome.contenders}
        there = [each for each in medians if outcome.values(situation, each)]
        longest = max([*medians.values(), 1e-9])
        drawn.append(f'<text class="situation" x="10" y="{y + 18}">{escape(situation)}</text>')
        y += 25
        for contender in sorted(there, key=medians.__getitem__, reverse=not part.is_less_better):
            ours = contender.startswith(OURS)
            width = max(1.0, (WIDTH - LABEL - 170) * medians[contender] / longest)
            ratio = outcome.ratio(situation, contender)
            text = human(medians[contender]) + ("" if ratio is None else f" · {ratio:.2f}{TIMES}")
            drawn += [
                f'<text class="label{" ours-label" if ours else ""}" x="{LABEL - 8}" y="{y + 12}">'
                f"{escape(contender)}</text>",
                f'<rect class="bar{" ours" if ours else ""}" x="{LABEL}" y="{y}"'
                f' width="{width:.1f}" height="{BAR}" rx="2"/>',
                f'<text x="{LABEL + width + 6:.1f}" y="{y + 12}">{text}</text>',
            ]
            y += BAR + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 10}" width="{WIDTH}"'
        f' role="img" aria-label="{escape(title)}">\n<style>{STYLE}</style>\n'
        f'<rect width="{WIDTH}" height="{y + 10}" fill="#ffffff"/>\n'
        + "\n".join(drawn)
        + "\n</svg>\n"
    )
