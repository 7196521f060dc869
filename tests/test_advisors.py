"""Supabase's own linters: plpgsql_check over every function, and the advisors of the dashboard."""

from __future__ import annotations

import subprocess

import pytest

from stack import NODE_MODULES, PROJECT, node

CLI = [str(node()), str(NODE_MODULES / "supabase/dist/supabase.js")]


@pytest.mark.parametrize(
    "check",
    [
        "lint --schema=public,private --fail-on=warning",
        "advisors --type=all --level=warn --fail-on=warn",
    ],
)
def test_supabase_finds_nothing_to_warn_of(stack, check):
    command = [*CLI, "db", *check.split(), f"--remote={stack.database_url}"]

    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout + done.stderr
