"""A database with Supabase Realtime's part in it, where there is no Supabase."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from actors import Caller
from database import SEED, Database

STAND_IN = Path(__file__).with_name("realtime.sql")


def as_postgres(db: Database) -> Database:
    """Return the database as seen by the role that installs Darkroom on Supabase."""
    return Database(f"{db.url}?options=-crole%3Dsupabase_postgres", db.name)


def add_realtime(db: Database, script: str = "") -> None:
    """Add the stand-in, then what a test changes of it."""
    done = db.psql(STAND_IN, script=script)
    assert done.returncode == 0, done.stderr


def install(db: Database) -> str:
    """Install Darkroom as Supabase's postgres, who may make policies there; return the notices."""
    db.execute("grant supabase_realtime_admin to supabase_postgres")
    try:
        return as_postgres(db).install(SEED)
    finally:
        db.execute("revoke supabase_realtime_admin from supabase_postgres")


def sent(db: Database) -> list[dict[str, Any]]:
    """Return what was broadcast, in the order of the transactions."""
    return db.execute(
        "select topic, event, payload, private, id::text from realtime.messages"
        " order by inserted_at"
    )


def hints(db: Database) -> list[tuple[str, str, str]]:
    """Return topic, job id and status of each broadcast."""
    payloads = [(row["topic"], row["payload"]) for row in sent(db)]
    return [(topic, payload["job_id"], payload["status"]) for topic, payload in payloads]


def readable(caller: Caller, topic: str) -> set[str]:
    """Ask as Realtime does when a client joins a topic: which extensions may it read?"""
    with caller.connection.transaction(force_rollback=True):
        caller.connection.execute(
            "insert into realtime.messages (topic, extension)"
            " values (%(topic)s, 'broadcast'), (%(topic)s, 'presence')",
            {"topic": topic},
        )
        with caller.acting() as connection:
            connection.execute("select set_config('realtime.topic', %s, true)", [topic])
            rows = connection.execute("select extension from realtime.messages").fetchall()
    return {extension for (extension,) in rows}
