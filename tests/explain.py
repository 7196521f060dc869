"""What a call really did in the database: the plan of every statement in it, at any depth.

auto_explain tells them, with the rows that each node met and the pages it touched.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import psycopg

SETTINGS = """
log_min_duration=0 log_analyze=on log_timing=off log_buffers=on log_nested_statements=on
log_format=json
"""


@contextlib.contextmanager
def explained(connection: psycopg.Connection[Any]) -> Iterator[list[dict[str, Any]]]:
    """Collect the plans of all that runs on a connection."""
    plans: list[dict[str, Any]] = []

    def note(diagnosis: psycopg.errors.Diagnostic) -> None:
        _, is_plan, text = (diagnosis.message_primary or "").partition("plan:\n")
        if is_plan:
            told = json.loads(text)
            plans.append(told["Plan"] | {"JIT": told.get("JIT")})

    (role,) = connection.execute("select current_user").fetchone() or ()
    connection.execute("reset role")
    connection.execute("load 'auto_explain'")
    for setting in SETTINGS.split():
        connection.execute(f"set auto_explain.{setting}")
    connection.execute("set client_min_messages = log")
    connection.execute(f"set role {role}")
    connection.add_notice_handler(note)
    yield plans
    connection.remove_notice_handler(note)
    connection.execute("set client_min_messages = notice")


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each node of a plan, the top one first."""
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def rows_met(node: dict[str, Any]) -> int:
    """How many rows a node has looked at, taken or not."""
    removed = sum(node.get(f"Rows Removed by {by}", 0) for by in ("Filter", "Index Recheck"))
    return int((node.get("Actual Rows", 0) + removed) * node.get("Actual Loops", 1))


def pages(plans: list[dict[str, Any]]) -> int:
    """How many pages these plans have touched."""
    return sum(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] for plan in plans)
