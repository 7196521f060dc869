"""Look at the queue from a terminal, and hand out keys to those who look at it in a browser.

make top          scripts/top.sql in psql, or with JSON=1 the report as one line
make monitor-key  a token of the role darkroom_monitor, signed with JWT_SECRET

The database is DATABASE_URL, or else the local stack's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

import psycopg
from psycopg import pq

from processes import StackError
from stack import Stack, sign_jwt
from worker import libpq_url

TOP = Path(__file__).with_name("top.sql")
REPORT = "select public.queue_report()::jsonb"  # json would have several lines
WIDTH_OF_A_FILE = 200  # columns, where no terminal says
DAY_SECONDS = 86_400


def libpq_environment(url: str) -> dict[str, str]:
    """Return a connection string as variables: everybody on the machine can read a command line."""
    try:
        options = pq.Conninfo.parse(libpq_url(url).encode())
    except psycopg.Error:
        raise StackError("DATABASE_URL is no connection string") from None
    return {
        option.envvar.decode(): option.val.decode()
        for option in options
        if option.envvar and option.val is not None
    }


def local_stack() -> Stack:
    """Return the stack of `make up`."""
    stack = Stack.local()
    if not stack.settings.file.exists():
        raise StackError("there is no stack yet: run make up, or set DATABASE_URL")
    return stack


def top(*, every: float, as_json: bool) -> None:
    """Become psql, which draws the report until Ctrl-C; once where nobody watches."""
    program = shutil.which("psql")
    if not program:
        raise StackError("psql is not installed (Debian: postgresql-client)")
    url = os.environ.get("DATABASE_URL") or local_stack().monitor_database_url
    environment = os.environ | {"PGAPPNAME": "darkroom-top"} | libpq_environment(url)
    command = [program, "-Xq", "-v", "ON_ERROR_STOP=1"]
    if as_json:
        command += ["-At", "-c", REPORT]
    else:
        is_watched = sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if is_watched else WIDTH_OF_A_FILE
        settings = {"every": every, "once": not is_watched, "width": width, "fancy": is_watched}
        command += [f"-v{name}={str(value).lower()}" for name, value in settings.items()]
        command += ["-f", str(TOP)]
    os.execve(program, command, environment)


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


if __name__ == "__main__":
    main()
