"""A database with a long history and a long queue, built in one go and not call by call."""

from __future__ import annotations

from database import PROJECT, Database

SCRIPT = PROJECT / "tests" / "scale.sql"
RUNNING = 100


def fill(db: Database, generations: int, ready: int) -> None:
    """Add this many generations, of which so many wait, 250 for each user."""
    sizes = {
        "users": users_of(generations),
        "finished": generations - ready - RUNNING,
        "running": RUNNING,
        "ready": ready,
    }
    settings = [f"\\set {name} {size}" for name, size in sizes.items()]
    done = db.psql(script="\n".join([*settings, SCRIPT.read_text()]))
    assert done.returncode == 0, done.stderr
    with db.connect() as connection:
        connection.execute("set statement_timeout = 0")
        connection.execute("vacuum analyze")


def users_of(generations: int) -> int:
    """How many users they have: no divisor of 10, so that each has some of every kind."""
    return generations // 250 + 1


def user_id(number: int) -> str:
    """The id of one of the users, from 1."""
    return f"00000000-0000-4000-8000-{number:012}"
