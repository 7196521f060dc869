"""README, docs and examples: every block is run, true to its file, or says why it is not."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from database import PROJECT
from documents import (
    BLOCK,
    PAGES,
    Reader,
    check_types,
    is_excerpt,
    prepare,
    read,
    run,
    shows,
    unread,
)

from stack import Stack

# Pages whose scenes are a test of their own.
RUN_BY = {
    "credits.md": "test_credits_doc.py",
    "database.md": "test_database_doc.py",
    "providers.md": "test_providers_doc.py",
    "RUNBOOK.md": "test_runbook.py",
    "scale.md": "test_scale_doc.py",
    "quickstart.md": "test_quickstart.py",
    "api.md": "test_api_doc.py",
    "models.md": "test_models_doc.py",
    "settings.md": "test_settings_doc.py",
    "webhooks.md": "test_webhooks_doc.py",
}
NAMES = [str(page.relative_to(PROJECT)) for page in PAGES]
STORIES = [name for name in NAMES if Path(name).name not in RUN_BY]
HEADING = re.compile(r"(?m)^#+ (.+)$")
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """A stack with a worker, for who reads the pages."""
    with Stack(tmp_path_factory.mktemp("stack"), fsync=False, with_worker=True).running() as stack:
        yield stack


@pytest.mark.parametrize("name", STORIES)
def test_what_a_page_says_can_be_done_and_shows_what_it_says(name, reading, tmp_path):
    blocks = [block for block in read(PROJECT / name) if block.is_run and block.language != "tsx"]
    if not blocks:
        return
    reader = Reader(reading, tmp_path)
    for block in blocks:
        printed = getattr(reader, block.language)(block)
        assert shows(printed, block.shown or "…"), f"{block.text}\n{printed}"


def test_the_demo_prints_what_the_readme_shows(reading, tmp_path):
    first = read(PROJECT / "README.md")[0]
    printed = run(
        [sys.executable, str(PROJECT / "examples/demo.py")],
        "",
        tmp_path,
        DARKROOM_STATE=str(reading.folder),
    )
    said = re.sub(r"\d\.\d\d s", "…", first.shown)
    assert shows(printed, said), printed


def test_typescript_is_right_by_its_types(tmp_path):
    prepare(tmp_path)
    for name in STORIES:
        for number, block in enumerate(read(PROJECT / name), 1):
            if block.is_run and block.language in ("ts", "tsx"):
                stem = re.sub(r"\W", "_", f"{name}_{number}")
                (tmp_path / f"{stem}.{block.language}").write_text(block.source)
    check_types(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_block_says_what_it_is(name):
    assert "```" not in unread(PROJECT / name)
    for block in read(PROJECT / name):
        if block.how == "from":
            assert is_excerpt(block.text, (PROJECT / block.what).read_text()), block.text
        if block.how == "run by":
            assert Path(name).name in (PROJECT / block.what).read_text(), block.what
        if block.is_run:
            assert block.language in ("sql", "sh", "ts", "tsx"), block.text


def test_an_excerpt_is_all_of_its_lines_in_order():
    source = "a\n  b\nc\nd\n"
    assert is_excerpt("b\nc\n", source)
    assert is_excerpt("a\n…\nd\n", source)
    assert not is_excerpt("a\nc\n", source)
    assert not is_excerpt("d\n…\na\n", source)


def test_the_pages_with_a_test_of_their_own_are_read_by_it():
    for page, test in RUN_BY.items():
        assert page in (PROJECT / "tests" / test).read_text()


def test_the_tables_of_the_architecture_are_all_there_are():
    sources = "".join(file.read_text() for file in PROJECT.glob("sql/[0-9]*.sql"))
    made = re.findall(r"(?m)^create table ((?:public|private)\.\w+)", sources)
    page = (PROJECT / "docs/architecture.md").read_text()
    told = page.partition("## The tables")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"`((?:public|private)\.\w+)`", told)) == sorted(made)


@pytest.mark.parametrize("name", NAMES)
def test_a_link_leads_somewhere(name):
    page = PROJECT / name
    for found in LINK.findall(unread(page)):
        address = found[0] or found[1]
        if re.match(r"[a-z]+:", address):
            continue
        file, _, anchor = address.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), address
        if anchor:
            titles = HEADING.findall(BLOCK.sub("", target.read_text()))
            assert anchor in [slug(title) for title in titles], address


def slug(title: str) -> str:
    """Return the anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
