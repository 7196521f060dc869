"""Calculate what 1, 2, 4 and 8 cells carry on machines of their own, from what the bench measured.

    python tests/bench/cells_model.py [results.json]

Nothing is measured here. The CPU that a call takes of PostgREST, of the entry and of a cell is that
of the bench's part "cells"; a machine is busy to BUSY of its cores. The feed asks every cell, so
each page of it costs the entry and all cells the more, the more there are.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path

# What an app asks for each picture.
CALLS = {"enqueue_generation": 1, "get_job_status": 3, "list_generations": 1}
FEED = "list_public_images"
# In enqueues (docs/scale.md): a worker's calls for a picture; for each subscription, what home has
# to do to send its WAL.
WORK, SENDING = 0.3, 0.15
CORES, BUSY = 8, 0.5
POOL = 10  # connections of a PostgREST, so of an entry to each cell: PGRST_DB_POOL
DIRECT, ENTRY = "direct to home", "entry, user of home"


def main() -> None:
    """Print a table for an app that asks for the feed as often as for pictures, and for one that
    does not ask, or has a cache before it.
    """
    file = Path(*sys.argv[1:] or [Path(__file__).with_name("results.json")])
    measured = json.loads(file.read_text())["cells"]["cells"]

    def cpu(call: str, way: str, *parties: str) -> float:
        """Return the milliseconds that a call takes."""
        names = {(f"{call}, 8 connections", way, f"CPU ms, {party}") for party in parties}
        found = [each for each in measured if (each[0], each[1], each[3]) in names]
        rounds = {each[2] for each in found}
        return statistics.median(sum(e[4] for e in found if e[2] == n) for n in rounds)

    def in_all(way: str, *parties: str) -> float:
        return sum(times * cpu(call, way, *parties) for call, times in CALLS.items())

    enqueue = cpu("enqueue_generation", DIRECT, "cells")
    capacity = 1000 * CORES * BUSY
    for feeds in (1, 0):
        print(f"\nPages of the feed for each picture: {feeds}\n")
        print(
            "| cells | pictures/s | of one | machines with PostgREST and entry |"
            " ms of a cell, of entry and PostgREST, a picture | connections of a cell |\n"
            "| ---: | ---: | ---: | ---: | ---: | ---: |"
        )
        alone = 0.0
        for count in (0, 1, 2, 4, 8):
            way = ENTRY if count else DIRECT
            pages = feeds * max(count, 1)  # of its own users and of all others
            cell = in_all(way, "cells") + WORK * enqueue + pages * cpu(FEED, DIRECT, "cells")
            before = in_all(way, "PostgREST", "entry")
            before += feeds * cpu(FEED, way, "PostgREST", "entry")
            if count:  # it was measured with two
                before += feeds * (count - 2) * cpu("ping", ENTRY, "entry")
            entries = 0
            for _ in range(9):  # each entry is a subscriber, too
                sending = (count - 1 + entries) * SENDING * enqueue if count else 0
                rate = max(count - 1, 0) * capacity / cell + capacity / (cell + sending)
                entries = math.ceil(rate * before / capacity)
            alone = alone or rate
            print(
                f"| {count or 'none'} | {rate:,.0f} | {rate / alone:.1f} | {entries} |"
                f" {cell:.2f}, {before:.2f} | {POOL * entries} |"
            )


if __name__ == "__main__":
    main()
