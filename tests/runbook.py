"""docs/RUNBOOK.md and scale.md as tests see them: sections by title, and their commands run.

    Section("Restore").sh(ADMIN_URL=…)       # every shell block, in order, in one shell
    Section("`stuck`").sql(db.url, pid=7)    # every SQL block, in order, in one psql

A command that fails fails the test.
"""

from __future__ import annotations

import re
from pathlib import Path

from database import PROJECT
from documents import run

from stack import postgres_program

RUNBOOK = PROJECT / "docs" / "RUNBOOK.md"
SCALE = PROJECT / "docs" / "scale.md"
HEADING = re.compile(r"(?m)^#{2,3} (.+)$")
BLOCK = re.compile(r"(?ms)^```(\w+)\n(.*?)^```$")


def titles() -> list[str]:
    """Return the titles of all sections, in order."""
    return HEADING.findall(BLOCK.sub("", RUNBOOK.read_text()))


class Section:
    """What stands under one title, down to the next."""

    def __init__(self, title: str, page: Path = RUNBOOK) -> None:
        self.title = title
        _, _, rest = page.read_text().partition(f"# {title}\n")
        assert rest, f"no section {title}"
        blocks = BLOCK.findall(rest)
        inside = BLOCK.sub("", rest)  # a comment in a shell block is no heading
        end = HEADING.search(inside)
        self.text = inside[: end.start()] if end else inside
        count = len(BLOCK.findall(rest[: rest.find(end[0])])) if end else len(blocks)
        self.blocks = blocks[:count]

    def of(self, language: str) -> list[str]:
        """Return its blocks in a language."""
        return [text for name, text in self.blocks if name == language]

    def sql(self, url: str, **variables: object) -> str:
        """Run its SQL in one psql session; return what that printed."""
        options = ["ON_ERROR_STOP=1", *(f"{name}={value}" for name, value in variables.items())]
        command = [str(postgres_program("psql")), url, "-X", *(f"--set={each}" for each in options)]
        return run(command, "\n".join(self.of("sql")))

    def sh(self, folder: Path, **environment: str) -> str:
        """Run its shell blocks in one shell, in a checkout; what they write goes to a folder."""
        script = "\n".join(self.of("sh"))
        return run(["bash", "-euo", "pipefail"], script, BACKUP=str(folder), **environment)
