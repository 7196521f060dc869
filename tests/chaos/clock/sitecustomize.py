"""Loaded by Python itself at the start of a worker whose wall clock the chaos moves.

The clock is off by as many seconds as the file named by CHAOS_CLOCK says at the moment. The
monotonic clock stays what it is, as when a real clock is set.
"""

import datetime
import os
import time
from pathlib import Path

FILE = Path(os.environ["CHAOS_CLOCK"])
true_time = time.time


class MovedDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "MovedDatetime":
        return cls.fromtimestamp(time.time(), tz)


time.time = lambda: true_time() + float(FILE.read_text() or 0)
time.time_ns = lambda: int(time.time() * 1e9)
datetime.datetime = MovedDatetime  # type: ignore[misc]
