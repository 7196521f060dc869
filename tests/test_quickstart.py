"""docs/quickstart.md: its steps, done in one terminal on a project without Darkroom, lead there.

What needs an account is left out; `project.env` is there instead, with the values of a project of
the local stack's parts, and `my-app` with the packages of the example app.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from database import PROJECT
from documents import APP, Block, read, shows
from PIL import Image

from stack import Stack, node, postgres_program

PAGE = PROJECT / "docs/quickstart.md"
TAKEN = ("Makefile", "worker.py", "outbox.py", "pictures.py", "scripts", "supabase", "examples")
# `make setup` has been done: its packages are shared with this checkout.
MAKE = (
    '#!/bin/sh\nexec /usr/bin/env -i PATH="$OLD" DATABASE_URL="$DATABASE_URL" make -o setup "$@"\n'
)
MARK = "--- the end of a block ---"
STEP = re.compile(r"(?m)^## (\d\. .+)$")


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Stack]:
    """What a Supabase project is: sign-up, files, RPC and functions, and nothing of Darkroom."""
    stack = Stack(tmp_path / "project", fsync=False)
    if not stack.postgrest:
        pytest.skip("no PostgREST for this machine")
    stack.folder.mkdir()
    stack.folder.chmod(0o711)
    tmp_path.chmod(0o711)
    stack.settings.secret("JWT_SECRET")
    try:
        stack.cluster.start()
        stack.start_http()
        yield stack
    finally:
        stack.clean()


@pytest.fixture
def folder(tmp_path: Path, project: Stack) -> Path:
    """The folder of a new user: a checkout that is set up, an app, and what step 2 writes."""
    folder = tmp_path / "new"
    checkout, app, programs = folder / "darkroom", folder / "my-app", folder / "bin"
    for each in (checkout, app, programs):
        each.mkdir(parents=True)
    ignored = shutil.ignore_patterns("node_modules", "__pycache__", ".expo")
    for name in TAKEN:
        source = PROJECT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, checkout / name, **({"ignore": ignored} if source.is_dir() else {}))
    for name in (".venv", "node_modules"):
        (checkout / name).symlink_to((PROJECT / name).resolve())
    (app / "node_modules").symlink_to((APP / "node_modules").resolve())
    (app / "tsconfig.json").write_text(
        '{"extends": "expo/tsconfig.base", "compilerOptions": {"strict": true,'
        ' "types": ["node", "expo/types"]}}'
    )
    (programs / "make").write_text(MAKE)
    (programs / "make").chmod(0o755)
    values = project.environment()
    names = ("DATABASE_URL", "API_URL", "ANON_KEY", "SERVICE_ROLE_KEY")
    (folder / "project.env").write_text("".join(f"{name}={values[name]}\n" for name in names))
    return folder


def script(blocks: list[Block]) -> str:
    """Return what is pasted into one terminal: a file is saved, a command run."""
    lines = ["trap 'kill $(jobs -p)' EXIT"]
    for block in blocks:
        if block.language == "sh":
            lines.append(block.text)
        else:
            name = block.text.split()[1]
            lines.append(f"cat > {name} <<'SAVED'\n{block.text}SAVED\n")
        lines.append(f"echo '{MARK}'")
    return "\n".join(lines)


def test_the_steps_lead_from_a_project_to_a_picture_and_credits(folder, project):
    blocks = [block for block in read(PAGE) if block.is_run]
    programs = [folder / "bin", postgres_program("psql").parent, node().parent]
    path = ":".join([*map(str, programs), os.environ["PATH"]])

    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script(blocks)],
        cwd=folder / "darkroom",
        env={"PATH": path, "OLD": os.environ["PATH"], "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )

    printed = done.stdout.split(f"{MARK}\n")
    for block, said in zip(blocks, printed, strict=False):
        assert not block.shown or shows(said, block.shown), f"{block.text}\n{said}{done.stderr}"
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(printed) == len(blocks) + 1
    with Image.open(folder / "my-app/first.png") as picture:
        assert picture.size == (1024, 1024)
    assert "job.completed" in (folder / "worker.log").read_text()


def commands(text: str) -> int:
    """Count the commands of a block: its lines, but for what a command is given to read."""
    lines = re.sub(r"(?ms)(<<'END')$.*?^END$", r"\1", text).splitlines()
    return len([line for line in lines if re.match(r"[^#\s]", line)])


def test_the_table_counts_the_commands_of_each_step():
    table = re.findall(r"(?m)^\| \[(\d\. .+?)\]\(.+?\) \| (\d+) \|", PAGE.read_text())
    _, *parts = STEP.split(PAGE.read_text())
    steps = dict(zip(parts[::2], parts[1::2], strict=True))
    counted = {
        title: sum(commands(text) for text in re.findall(r"(?ms)^```sh\n(.*?)^```$", step))
        for title, step in steps.items()
    }

    assert {title: int(count) for title, count in table} == counted


def test_what_the_local_stack_cannot_do_is_what_its_gateway_says():
    head, _, _ = (PROJECT / "scripts/gateway.ts").read_text().partition("*/")
    said = re.sub(r"(?m)^ \* ?", "", head.partition("says the same:")[2])
    [told] = re.findall(
        r"(?ms)^## What the local stack cannot do\n.*?^(- .*?)^## ", PAGE.read_text()
    )

    assert told.split() == said.split()
