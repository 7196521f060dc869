"""docs/worker.md: its tables name all there is in the worker's code, and nothing else."""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict

import pytest
from database import PROJECT

import worker

PAGE = (PROJECT / "docs/worker.md").read_text()
CODE = {name: (PROJECT / f"{name}.py").read_text() for name in ("worker", "outbox", "pictures")}
REQUIRED = {
    "DATABASE_URL": "postgresql://darkroom_worker@127.0.0.1/x",
    "SUPABASE_URL": "http://127.0.0.1",
    "SUPABASE_SERVICE_KEY": "x",
}
PROVIDERS_KEYS = {"REPLICATE_API_TOKEN", "FAL_KEY"}


def section(title: str) -> str:
    found = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    assert found, title
    return found


def rows(text: str) -> list[list[str]]:
    """Return the cells of a table's rows, but for its head and what is no name or number."""
    cells = [line.split(" | ") for line in re.findall(r"(?m)^\| (.*) \|$", text)]
    return [row for row in cells if re.match(r"`|\d", row[0])]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


# --- the environment ---


def variables() -> set[str]:
    """Return what the code reads."""
    read = set(re.findall(r'"([A-Z]+_[A-Z_]+)"', inspect.getsource(worker.Settings)))
    return read | PROVIDERS_KEYS | {"TMPDIR"}


def test_the_table_the_docstring_and_the_example_name_what_the_code_reads():
    table = {name for row in rows(section("Environment")) for name in quoted(row[0])}
    example = re.findall(r"(?m)^(?:# )?([A-Z_]+)=", (PROJECT / ".env.example").read_text())
    docstring = (worker.__doc__ or "").partition("Environment")[2]

    assert table == variables()
    assert variables() <= set(example) | {"FAL_KEY"}
    assert {name for name in example if not worker.KEY_NAME.fullmatch(name)} <= variables()
    assert [name for name in variables() if not re.search(rf"\b{name}\b", docstring)] == []


def test_each_default_is_the_one_that_the_code_has():
    settings = worker.Settings(REQUIRED)
    for names, default, _ in rows(section("Environment")):
        name = quoted(names)[0]
        if default == "required":
            rest = {key: value for key, value in REQUIRED.items() if key != name}
            with pytest.raises(worker.ConfigError, match=f"^{name}: missing"):
                worker.Settings(rest)
        elif name not in {*PROVIDERS_KEYS, "TMPDIR"}:
            value = getattr(settings, name.lower().removeprefix("worker_"))
            told = quoted(default)[0] if "`" in default else ""
            assert told == (f"{value:g}" if isinstance(value, float) else str(value or told)), name


# --- the log ---


def events() -> dict[str, set[str]]:
    """Return the levels that each event is logged with."""
    found = defaultdict(set)
    for text in CODE.values():
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("log."):
                continue
            texts = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
            lines = [text for text in texts if re.match(r"[a-z]+\.[a-z_%]", str(text))]
            for line in lines:
                level = ast.unparse(node.func).removeprefix("log.")
                levels = {"info", "warning"} if level == "log" else {level}
                found[line.split()[0]] |= levels
    return found


def values(file: str, name: str) -> set[str]:
    """Return what a check of that name in a file of sql/ lets in."""
    text = (PROJECT / "sql" / file).read_text()
    allowed = re.search(rf"(?s){name}\b.*?\bin \(([^)]*)\)", text)
    assert allowed, name
    return set(re.findall(r"'(\w+)'", allowed[1]))


def test_every_event_of_the_code_is_in_the_table_with_its_level():
    logged = events()
    ends = values("12_queue_tables.sql", "attempt_outcome_is_known") | {"repeated"}
    states = values("96_webhooks.sql", "deliveries_state_is_known") | {"lost", "unknown"}
    jobs, deliveries = logged.pop("job.%s"), logged.pop("delivery.%s")
    for end in ends - {"completed"}:
        logged[f"job.{end}"] |= jobs
    for state in states:
        logged[f"delivery.{state}"] |= deliveries

    told: set[str] = set()
    for names, levels, _ in rows(section("Log")):
        row = quoted(names)
        assert told.isdisjoint(row)
        told |= {*row}
        assert set(re.findall(r"\w+", levels)) <= set().union(*(logged[each] for each in row)), row
    assert told == {*logged}


# --- outline and pseudo-code ---


def test_the_outline_names_the_sections_of_the_code_in_their_order():
    named = [quoted(row[0])[0] for row in rows(section("Outline"))]
    headings = [re.findall(r"(?m)^# --- (.+?) -*$", CODE[name]) for name in ("worker", "pictures")]

    assert named == [*headings[0], *headings[1]]
    for name in CODE:
        assert f"`{name}.py`" in section("Outline")


def test_the_pseudo_code_calls_what_the_worker_calls():
    pseudo = section("The loop").partition("```text")[2].partition("```")[0]
    # How it tries what it has, and a word in between, are no part of a job's way.
    beside = {"check_setup", "list_providers", "report_progress"}

    assert set(re.findall(r"(\w+)\([^)]*\)", pseudo)) - {"process"} == (
        {*worker.Database.FUNCTIONS} - beside
    )
    assert re.search(rf"every {worker.RECOVERY_SECONDS:g} s +recover_stale_jobs", pseudo)


def test_the_exit_codes_are_the_codes():
    codes = {value for name, value in vars(worker).items() if name.startswith("EXIT_")}

    assert {int(row[0]) for row in rows(section("Exit codes and signals"))} == codes
