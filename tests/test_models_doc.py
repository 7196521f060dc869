"""docs/models.md: what it says can be done is done, in order, and shows what it says."""

from __future__ import annotations

from pathlib import Path

from database import PROJECT, Database
from documents import Block, Reader, check_types, read, shows
from worker_process import eventually

from stack import Stack


class Operator(Reader):
    """Somebody who does what the page says, where all is installed that `make` would install."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        super().__init__(stack, folder)
        self.functions = 'make() { command make -o setup "$@"; }\n'
        self.db = Database(stack.database_url, "postgres")
        self.modules = 0

    def ts(self, block: Block) -> str:
        """Run it, and wait until what it asked for is made."""
        self.modules += 1
        (self.folder / f"block_{self.modules}.ts").write_text(block.source)
        printed = super().ts(block)
        eventually(lambda: self.db.value("select count(*) = 0 from private.live_jobs"), 60)
        query = "select count(*) = 0 from public.generations where status <> 'completed'"
        assert self.db.value(query)
        return printed


def test_what_the_page_says_can_be_done_and_shows_what_it_says(tmp_path):
    (tmp_path / "reader").mkdir()
    with Stack(tmp_path / "stack", fsync=False, with_worker=True).running() as stack:
        operator = Operator(stack, tmp_path / "reader")
        for block in read(PROJECT / "docs" / "models.md"):
            if block.is_run:
                printed = getattr(operator, block.language)(block)
                assert shows(printed, block.shown), f"{block.text}\n{printed}"
        operator.db.close()
    assert operator.modules > 3
    check_types(operator.folder)
