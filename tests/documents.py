"""The documentation as tests see it: pages, their fenced blocks, and somebody who runs them.

A block is run as its language says, unless the line above it says otherwise:

    <!-- from: worker.py -->                verbatim lines of that file; `…` alone skips some
    <!-- run by: tests/test_migrate.py -->  that file runs it
    <!-- not run: needs an account -->      nothing here can run it

A bare fence right below a block is what the block prints; `…` in it stands for anything.
`text` is for pictures and pseudo-code.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import uuid
from dataclasses import dataclass
from pathlib import Path

import httpx
from database import PROJECT

from stack import Stack, node, postgres_program

PAGES = sorted(
    [PROJECT / "README.md", *PROJECT.glob("docs/*.md"), PROJECT / "examples/expo/README.md"]
)
BLOCK = re.compile(
    r"(?ms)^(?:<!-- (?P<how>from|run by|not run): (?P<what>.+?) -->\n)?"
    r"```(?P<language>\w+)\n(?P<text>.*?)^```$(?:\n^```\n(?P<shown>.*?)^```$)?"
)
APP = PROJECT / "examples/expo"
TYPESCRIPT = APP / "node_modules/typescript/bin/tsc"
# What a TypeScript block finds: a client that is signed in. A page shows once how to make it.
SIGNED_IN = """\
import { createClient } from '@supabase/supabase-js';
import type { Database } from './src/darkroom/database.types';
const supabase = createClient<Database>(process.env['API_URL']!, process.env['ANON_KEY']!, {
  accessToken: () => Promise.resolve(process.env['TOKEN']!),
});
const user = { id: process.env['USER_ID']! };
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: `how` is empty where the block is run as its language says."""

    how: str
    what: str
    language: str
    text: str
    shown: str

    @property
    def is_run(self) -> bool:
        return not self.how and self.language != "text"

    @property
    def source(self) -> str:
        """The TypeScript as a module of its own."""
        given = "" if "createClient" in self.text or self.language == "tsx" else SIGNED_IN
        used = "supabase, user" if given else ""
        return f"{given}{self.text}\nexport {{}};\nvoid [{used}];\n"


def read(page: Path) -> list[Block]:
    return blocks_of(page.read_text())


def blocks_of(text: str) -> list[Block]:
    return [Block(*(part or "" for part in found)) for found in BLOCK.findall(text)]


def unread(page: Path) -> str:
    """Return what of a page is in no block: prose."""
    return BLOCK.sub("", page.read_text())


def shows(printed: str, said: str) -> bool:
    """Compare what a block prints with what the page says, in which … stands for anything."""
    pattern = ".*".join(re.escape("".join(part.split())) for part in said.split("…"))
    return bool(re.fullmatch(pattern, "".join(printed.split())))


def is_excerpt(text: str, source: str) -> bool:
    """Say whether all lines of a text are lines of a source, in order and without a gap but at …"""
    lines, at = [line.strip() for line in source.splitlines()], 0
    for part in re.split(r"(?m)^\s*…\n", text):
        wanted = [line.strip() for line in part.splitlines()]
        places = range(at, len(lines) - len(wanted) + 1)
        found = next((n for n in places if lines[n : n + len(wanted)] == wanted), None)
        if found is None:
            return False
        at = found + len(wanted)
    return True


def run(command: list[str], script: str, folder: Path = PROJECT, **environment: str) -> str:
    """Run a script to its end and return what it printed; where it fails, the test does."""
    programs = f"{postgres_program('psql').parent}:{PROJECT / '.venv/bin'}"
    done = subprocess.run(
        ["timeout", "120", *command],  # which ends what the script has started, too
        input=script,
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"} | environment,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


class Reader:
    """Somebody who does what a page says, in order, on a stack, as one user who is signed up."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack, self.folder, self.functions = stack, folder, ""
        account = {"email": f"{uuid.uuid4()}@example.com", "password": "correct-horse-1"}
        headers = {"apikey": stack.anon_key}
        signed = httpx.post(f"{stack.api_url}/auth/v1/signup", json=account, headers=headers)
        session = signed.raise_for_status().json()
        self.user_id = session["user"]["id"]
        self.environment = stack.environment() | {
            "DARKROOM_STATE": str(stack.folder),
            "TOKEN": session["access_token"],
            "USER_ID": self.user_id,
        }
        prepare(folder)

    def sql(self, block: Block) -> str:
        variables = ["--set=ON_ERROR_STOP=1", f"--set=user_id={self.user_id}"]
        command = [str(postgres_program("psql")), self.stack.database_url, "-XAtq", *variables]
        return run(command, block.text)

    def sh(self, block: Block) -> str:
        if "() {" in block.text:
            self.functions += block.text
            return ""
        return run(["bash", "-euo", "pipefail"], self.functions + block.text, **self.environment)

    def ts(self, block: Block) -> str:
        module = self.folder / "block.ts"
        module.write_text(block.source)
        command = [str(node()), "--experimental-strip-types", "--no-warnings", str(module)]
        return run(command, "", self.folder, **self.environment)


def prepare(folder: Path) -> None:
    """Make a folder in which a TypeScript block finds what it imports: packages and `./src`."""
    for name in ("node_modules", "src"):
        (folder / name).symlink_to((APP / name).resolve())
    (folder / "package.json").write_text('{"type": "module"}')


def check_types(folder: Path) -> None:
    """Hold the TypeScript of a folder that was prepared to its types."""
    options = {"noEmit": True, "preserveSymlinks": True, "types": ["node", "expo/types"]}
    settings = {"extends": str(APP / "tsconfig.json"), "include": ["*.ts", "*.tsx"]}
    (folder / "tsconfig.json").write_text(json.dumps(settings | {"compilerOptions": options}))
    run([str(node()), str(TYPESCRIPT), "--pretty", "false"], "", folder)
