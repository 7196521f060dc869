"""docs/scale.md: from one database to cells, by its commands, and its users notice nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from actors import Worker
from database import Database, assert_books_balance
from documents import Block, Reader, read, run, shows
from http_client import Client, Endpoints, SignedUp, answer
from http_fixtures import endpoints_of
from runbook import SCALE, Section

from stack import Cluster, PostgREST, Settings, Stack, postgrest
from worker import POOL_SIZE, RECOVERY_SECONDS

LOGICAL = {"wal_level": "logical"}
EMPTY = ("two", "three", "entry", "entry_2")


def bare(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{parts.username}@{parts.hostname}:{parts.port}").geturl()


class Home(Stack):
    """The project that grows, with empty databases on machines of their own."""

    def make_cluster(self, *, fsync: bool) -> Cluster:
        return Cluster(self.folder, self.settings, fsync=fsync, tuning=LOGICAL)

    def rent_machines(self) -> None:
        self.machines = {"home": self.cluster}
        lines = []
        for name in EMPTY:
            folder = self.folder / name
            folder.mkdir()
            folder.chmod(0o711)
            self.machines[name] = Cluster(
                folder, Settings(folder / "env"), fsync=False, tuning=LOGICAL
            )
            self.machines[name].start()
        for cluster in self.machines.values():
            at = urlsplit(cluster.url())
            lines.append(f"{at.hostname}:{at.port}:*:{at.username}:{at.password}\n")
        self.passwords = self.folder / "pgpass"
        self.passwords.touch(0o600)
        self.passwords.write_text("".join(lines))

    def clean(self) -> None:
        for name, cluster in getattr(self, "machines", {}).items():
            if name != "home":
                cluster.stop()
                cluster.delete()
        super().clean()


def kept(cluster: Cluster) -> Path:
    """Return a copy of a cluster's files, as a base backup has them: without replication slots."""
    cluster.stop()
    copy = cluster.data.with_name("backup")
    shutil.copytree(cluster.data, copy, symlinks=True)
    shutil.rmtree(copy / "pg_replslot")
    (copy / "pg_replslot").mkdir()
    subprocess.run(["chown", "-R", f"--reference={cluster.data}", copy], check=True)
    cluster.start()
    return copy


def restore(cluster: Cluster, copy: Path) -> None:
    cluster.stop()
    shutil.rmtree(cluster.data)
    copy.rename(cluster.data)
    cluster.start()


class Before(PostgREST):
    """PostgREST before an entry, as the page says."""

    def __init__(self, folder: Path, settings: Settings, entry: Cluster, page: Block) -> None:
        super().__init__(folder, settings)
        self.entry, self.page = entry, page

    def prepare(self, database_url: str) -> dict[str, str]:
        usual = super().prepare(self.entry.url())
        own = {
            "AUTHENTICATOR_PASSWORD": self.settings.secret("AUTHENTICATOR_PASSWORD"),
            "ENTRY": self.entry.address(),
        }
        told = run(["bash"], f"{self.page.text}\nenv | grep ^PGRST", **own)
        return usual | dict(line.split("=", 1) for line in told.split())


class Operator(Reader):
    """Who does what the page says, and counts what was done."""

    def __init__(self, stack: Home, folder: Path) -> None:
        super().__init__(stack, folder)
        self.home, self.done = stack, list[str]()
        self.environment |= {f"{n.upper()}_URL": bare(c.url()) for n, c in stack.machines.items()}
        self.environment["PGPASSFILE"] = str(stack.passwords)

    def does(self, title: str, then: Callable[[], object] = lambda: None) -> None:
        texts = [text for _, text in Section(title, SCALE).blocks]
        for block in read(SCALE):
            if block.text in texts and block.text not in self.done:
                printed = self.do(block)
                assert shows(printed, block.shown or "…"), f"{block.text}\n{printed}"
                self.done.append(block.text)
                then()

    def psql(self, query: str) -> str:
        return self.sql(Block("", "", "sql", query, ""))

    def do(self, block: Block) -> str:
        if block.is_run:
            return str(getattr(self, block.language)(block))
        if "PGRST_DB_URI" in block.text and "ENTRY" in block.text:
            self.home.stop_http()
            entry = self.home.machines["entry"]
            self.home.postgrest = Before(self.home.folder, self.home.settings, entry, block)
            self.home.http[1] = self.home.postgrest
            self.home.start_http()
        elif "make migrate" in block.text:
            command = f"YES=1 {sys.executable} scripts/migrate.py"
            text = re.sub(r"make migrate (.*)", rf"\1 {command}", block.text)
            return self.sh(Block("", "", "sh", text, ""))
        return ""


@pytest.fixture(scope="module")
def home() -> Iterator[Home]:
    folder = Path(tempfile.mkdtemp(prefix="darkroom-scale-", dir="/dev/shm"))
    stack = Home(folder, fsync=False)
    try:
        stack.up()
        stack.rent_machines()
        yield stack
    finally:
        stack.clean()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def endpoints(home) -> Iterator[Endpoints]:
    with httpx.Client(timeout=30) as http:
        yield endpoints_of(home, http)


class App:
    """Its users, each of whom has a job that waits."""

    def __init__(self, home: Home, endpoints: Endpoints, folder: Path) -> None:
        self.home, self.endpoints = home, endpoints
        self.operator = Operator(home, folder)
        self.service = Client(endpoints, home.service_role_key)
        self.jobs: dict[SignedUp, str] = {}

    def sign_up(self) -> SignedUp:
        user = SignedUp(self.endpoints)
        self.jobs[user] = user.enqueued()
        return user

    def cell_of(self, user: SignedUp) -> str:
        query = "select from public.entitlements where user_id = %s"
        found = []
        for name in ("home", "two"):
            with psycopg.connect(self.home.machines[name].url()) as connection:
                found += [name for _ in connection.execute(query, [user.id])]
        (cell,) = found
        return cell

    def is_well(self) -> None:
        for user, job_id in self.jobs.items():
            assert answer(user.get_job_status(job_id))["status"] == "queued"
            assert user.credits() == 9
        for name in ("home", "two"):
            database = Database(self.home.machines[name].url(), name)
            if database.value("select to_regclass('private.broken_books') is not null"):
                assert_books_balance(database)
            database.close()

    def grows(self) -> None:
        old = [self.sign_up() for _ in range(3)]
        for title in ("Which step is next", "More workers", "Make them"):
            self.operator.does(title)
            self.is_well()
        new = [self.sign_up() for _ in range(12)]
        assert {self.cell_of(user) for user in old} == {"home"}
        assert {self.cell_of(user) for user in new} == {"home", "two"}
        self.operator.does("Move users")
        assert {self.cell_of(user) for user in self.jobs} == {"two"}
        self.is_well()
        self.operator.does("One more, one less", then=self.is_used_by_many)
        assert {self.cell_of(user) for user in self.jobs} == {"home", "two"}
        self.operator.does("Upgrade", then=self.is_well)

    def is_used_by_many(self) -> None:
        """Some of whom live in the third cell, while there is one; either entry tells them."""
        new = [self.sign_up() for _ in range(12)]
        self.is_well()
        for user in new:
            with psycopg.connect(self.home.machines["entry_2"].url()) as connection:
                who = json.dumps({"sub": user.id, "role": "authenticated"})
                connection.execute("select set_config('request.jwt.claims', %s, false)", [who])
                connection.execute("set role authenticated")
                ((entitlement,),) = connection.execute("select public.get_entitlement()")
            assert entitlement["credits"] == 9

    def has_a_cell_restored(self) -> None:
        two, left = self.home.machines["two"], next(iter(self.jobs))
        backup = kept(two)
        self.operator.psql("update cells.cells set weight = 0 where name = 'home'")
        came = SignedUp(self.endpoints)
        self.operator.psql("update public.models set price_credits = 2")
        self.operator.psql(f"call cells.move_user('{left.id}', 'home')")
        restore(two, backup)
        restored = Section("A cell was restored")
        for language, text in restored.blocks:
            getattr(self.operator, language)(Block("", "", language, text, ""))
        self.is_well()
        assert (self.cell_of(came), self.cell_of(left)) == ("two", "home")
        assert came.credits() == 0
        given = {"user_id": came.id, "amount": 10, "kind": "grant", "external_id": "lost"}
        answer(self.service.rpc("grant_credits", **given))
        assert answer(came.enqueue())["credits_left"] == 8

    def has_a_cell_away(self) -> None:
        two, away = self.home.machines["two"], Section("A cell is away")
        self.operator.psql("update cells.cells set weight = 1 where name = 'home'")
        two.stop()
        assert answer(self.service.rpc("queue_health"))["cells_away"] == ["two"]
        assert "darkroom_catalogue_two" in away.sql(self.home.database_url, cell="two")
        assert SignedUp(self.endpoints).credits() == 10
        two.start()
        self.is_well()


@pytest.mark.skipif(not postgrest(), reason="there is no PostgREST for this machine")
def test_an_app_grows_by_the_pages_commands_and_its_users_notice_nothing(home, endpoints, tmp_path):
    app = App(home, endpoints, tmp_path)
    app.grows()
    app.has_a_cell_restored()
    app.has_a_cell_away()
    ours = [block.text for block in read(SCALE) if block.is_run or "scale_doc" in block.what]
    assert app.operator.done == ours


def test_the_numbers_of_workers_are_those_of_the_code(db):
    section = Section("More workers", SCALE)
    Worker(db)

    assert f"at most {POOL_SIZE + 1} connections: {POOL_SIZE} for its calls" in section.text
    assert f"which\nevery worker does within {RECOVERY_SECONDS:.0f} s" in section.text
    lease = db.value("select extract(epoch from lease)::int from private.settings")
    assert f"their lease ({lease} s)" in section.text
    assert "slots" in section.sql(db.url)
