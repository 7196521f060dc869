"""Look at the queue from a terminal, and hand out keys to those who look at it in a browser.

make top          public.queue_report() as text, again and again, or with JSON=1 once as one line
make monitor-key  a token of the role darkroom_monitor, signed with JWT_SECRET

The database is DATABASE_URL, or else the local stack's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import psycopg
from psycopg import conninfo

from processes import StackError
from stack import Stack, sign_jwt
from worker import libpq_url

REPORT = "select public.queue_report()::jsonb::text"  # json would have several lines
WIDTH_OF_A_FILE = 200  # columns, where no terminal says
DAY_SECONDS = 86_400
COLOURS = {
    "ok": "\x1b[1;32m",
    "warning": "\x1b[33m",
    "critical": "\x1b[1;31m",
    "dim": "\x1b[2m",
    "title": "\x1b[1m",
}
MODEL = "{:34.34} {:>7} {:>7} {:>6} {:>7} {:>8} {:>7} {:>7} {:>7} {:>6}"
WORKER = "{:<6} {:28.28} {:8.8} {:8} {:10} {:>9} {:>9}"
RECENT = "{:8} {:34.34} {:10} {:>7} {:>8} {:>7}  {}"

Line = tuple[str, str]  # style, text


def clock(seconds: float) -> str:
    """Return a time that passed as hours, minutes and seconds."""
    return f"{seconds // 3600:02.0f}:{seconds // 60 % 60:02.0f}:{seconds % 60:02.0f}"


def unit(number: float | None, name: str, digits: int = 0) -> str:
    """Return a number with its unit, or a dash for none."""
    return "-" if number is None else f"{number:.{digits}f} {name}"


def state(report: dict[str, Any]) -> Iterator[Line]:
    """Tell what is wrong, and what the queue does as a whole."""
    health, now = report["health"], datetime.fromisoformat(report["at"])
    title = f"Darkroom  {health['status'].upper()}   {now:%Y-%m-%d %H:%M:%S}Z"
    yield health["status"], f"{title}   report took {report['took_ms']} ms"
    for alert in health["alerts"]:
        yield alert["severity"], f"! {alert['alert']:17} {alert['detail']}"
        yield "dim", f"  {'':17} {alert['hint']}"
    depth, running, workers = health["depth"], health["running"], health["workers"]
    mean, last = health["rates"]["per_minute_of_15"], health["rates"]["last_minute"]
    oldest, errors = depth["oldest_ready_seconds"], health["rates"]["error_rate"]
    yield "", ""
    yield (
        "",
        f"queue     {depth['ready']} ready, {depth['delayed']} delayed, {depth['paused']} paused"
        + ("" if oldest is None else f", the oldest waits {oldest:.0f} s")
        + f" · {running['jobs']} running, {running['stale']} of them past lease or deadline",
    )
    kinds = ("enqueued", "completed", "failed", "retried")
    a_minute = ", ".join(f"{mean[kind]:.2f} {kind}" for kind in kinds)
    share = "-" if errors is None else f"{100 * errors:.1f}"
    yield "", f"a minute  {a_minute} · of 15 minutes, {share} % errors"
    yield "", "the last  " + ", ".join(f"{last[kind]} {kind}" for kind in kinds)
    yield (
        "",
        f"workers   {workers['alive']} alive, {workers['slots_used']} of {workers['slots']} slots "
        f"used, {workers['asleep']} asleep, {workers['alive'] - workers['listening']} find jobs "
        "by polling only",
    )
    ran = [
        f"{name} {clock((now - datetime.fromisoformat(each['last_run_at'])).total_seconds())} ago"
        for name, each in sorted(health["routines"].items())
    ]
    yield "", "cron      " + (" · ".join(ran) or "nothing is scheduled")
    outbox, books = health["outbox"], health["books"]
    problems = books["recent_problems"] + (books["problems"] or 0)
    waiting = f"{outbox.get('pending', 0)} pending, {outbox.get('dead', 0)} dead"
    yield "", f"outbox    {waiting} · books {problems} problems"
    for each in health["budgets"][:3]:
        taken = f"{each['spent_usd']:.2f} spent and {each['reserved_usd']:.2f} reserved"
        limit = f"of {each['limit_usd']:.2f} USD this {each['period']}"
        yield "warning" if each["used"] >= 1 else "", f"budget    {each['scope']}: {taken} {limit}"
    for held in report["vacuum_holders"]:
        seconds, count = held["seconds"] or 0, held["transactions"] or 0
        if seconds >= 60 or (held["kind"] != "session" and count > 1000):  # a moment is no harm
            name = " ".join(str(held[key]) for key in ("kind", "pid", "name") if held[key])
            since = f"{held['state']} for {clock(seconds)}, {count} transactions"
            yield "warning", f"vacuum    held back by {name}, {since}"


def tables(report: dict[str, Any]) -> Iterator[Line]:
    """Tell of each model, each worker, and what was tried last."""
    heads = ("READY", "DELAYED", "PAUSED", "RUNNING", "OLDEST", "P50", "P95", "DONE/H", "ERRORS")
    yield "title", MODEL.format("MODEL", *heads)
    for row in report["models"][:10]:
        errors = row["failed"] + row["retried"]
        ended = errors + row["completed"]
        yield (
            "warning" if row["paused"] else "",
            MODEL.format(
                *(row[key] for key in ("model_id", "ready", "delayed", "paused", "running")),
                unit(row["oldest_ready_seconds"], "s"),
                *(unit(row[key], "s", 1) for key in ("p50_seconds", "p95_seconds")),
                row["completed"],
                unit(100 * errors / ended if ended else None, "%", 1),
            ),
        )
    yield "title", WORKER.format("WORKER", "HOST", "VERSION", "STATE", "WAKES BY", "SLOTS", "SEEN")
    for row in report["workers"][:10]:
        style = "" if row["is_listening"] else "warning"
        yield (
            "critical" if row["state"] == "silent" else style,
            WORKER.format(
                *(row[key] for key in ("worker_id", "host", "version", "state")),
                "notify" if row["is_listening"] else "polling",
                f"{row['slots_used']}/{row['slots']}",
                f"{row['seen_seconds']:.0f} s ago",
            ),
        )
    yield "title", "ERRORS OF THE LAST HOUR"
    for row in report["errors"][:8]:
        count = f"{row['errors']:>5} times {row['error_code']:20} {row['model_id']:34.34}"
        yield "", f"{count} {row['failed']:>5} failed, last at {row['last_at'][11:19]}"
    yield "title", RECENT.format("ENDED", "MODEL", "OUTCOME", "ATTEMPT", "WAITED", "RAN", "")
    for row in report["recent"][:8]:
        times = (unit(row[key], "s", 1) for key in ("waited_seconds", "ran_seconds"))
        ended_at, code = row["ended_at"][11:19], row["error_code"] or ""
        named = (row[key] for key in ("model_id", "outcome", "attempt"))
        yield "warning" if code else "", RECENT.format(ended_at, *named, *times, code)


def screen(report: dict[str, Any], width: int, *, is_watched: bool) -> str:
    """Return the report as text, cut to the width, and without what would move the cursor.

    A session's name may hold anything.
    """
    lines = ["\x1b[H\x1b[2J"] if is_watched else []
    for style, text in (*state(report), *tables(report)):
        plain = "".join(each if each.isprintable() else "·" for each in text)[:width]
        if style in COLOURS and is_watched:
            plain = f"{COLOURS[style]}{plain}\x1b[0m"
        lines.append(("\n" if style == "title" else "") + plain + "\n")
    return "".join(lines)


def local_stack() -> Stack:
    """Return the stack of `make up`."""
    stack = Stack.local()
    if not stack.settings.file.exists():
        raise StackError("there is no stack yet: run make up, or set DATABASE_URL")
    return stack


def top(*, every: float, as_json: bool) -> None:
    """Draw the report until Ctrl-C; once where nobody watches."""
    url = os.environ.get("DATABASE_URL") or local_stack().monitor_database_url
    is_watched = sys.stdout.isatty() and not as_json
    try:
        conninfo.conninfo_to_dict(url := libpq_url(url))
    except psycopg.ProgrammingError:  # its message quotes the string
        raise StackError("DATABASE_URL is no connection string") from None
    try:
        with psycopg.connect(url, autocommit=True, application_name="darkroom-top") as connection:
            connection.execute("set timezone = 'UTC'")
            while True:
                (text,) = connection.execute(REPORT).fetchone() or ("",)
                if as_json:
                    print(text)
                    return
                width = shutil.get_terminal_size().columns if is_watched else WIDTH_OF_A_FILE
                print(screen(json.loads(text), width, is_watched=is_watched), end="", flush=True)
                if not is_watched:
                    return
                time.sleep(every)
    except psycopg.Error as error:
        raise StackError(str(error)) from None


def key(days: float) -> str:
    """Return a token that reads the reports for so many days and does nothing else."""
    secret = os.environ.get("JWT_SECRET") or local_stack().jwt_secret
    expires_at = int(time.time() + days * DAY_SECONDS)
    return sign_jwt(secret, {"iss": "darkroom", "role": "darkroom_monitor", "exp": expires_at})


def positive(text: str) -> float:
    """Read a number above zero."""
    if not (number := float(text)) > 0:
        raise ValueError
    return number


def main() -> None:
    """Run one command from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    of_top = commands.add_parser("top", help="show the queue")
    of_top.add_argument("--every", type=positive, default=5, help="seconds between two looks")
    of_top.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    of_key = commands.add_parser("key", help="print a key for the operator page")
    of_key.add_argument("--days", type=positive, default=30, help="until it expires")
    arguments = parser.parse_args()
    try:
        if arguments.command == "top":
            top(every=arguments.every, as_json=arguments.json)
        else:
            print(key(arguments.days))
    except StackError as error:
        sys.exit(f"{arguments.command}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
